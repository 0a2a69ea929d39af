"""An audit from beginning to end: the noise is estimated, then every location is judged."""

import dataclasses
import json
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import tqdm
from etils import epath

from cromss_jax import files, sensors
from cromss_jax.auditing import (
    evidence,
    maps,
    noise,
    parcels,
    report,
    scores,
    subjects,
    suspects,
    vectors,
    worst,
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an audit is made.

    Attributes:
      num_estimated: locations from which the noise is estimated, spread by a draw.
      pixels: drawn from each of these.
      maps: whether maps of each location are written, and suspects from them.
      above: probability from which labels are suspects.
      min_area: hectares; smaller suspects are left out.
      num_worst: locations named in the report.
      seed: of the draws.
    """

    num_estimated: int = 512
    pixels: int = 4000
    maps: bool = True
    above: float = 0.5
    min_area: float = 0.1
    num_worst: int = 20
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What turns evidence into the probability that a label is wrong.

    Attributes:
      limits: [2, C] of confident predictions by the images alone and by all witnesses, see
        `noise.thresholds`.
      shifts: [C] see `noise.fit_shifts`.
    """

    limits: np.ndarray
    shifts: np.ndarray

    def judge(self, product: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The probability that labels are wrong, float32, and the most probable class, uint8.

        The class is the most probable one by all witnesses, the label itself only where it is
        rather right than wrong.
        """
        wrong = 1 - evidence.label_probability(product, labels)
        shifted = noise.apply_shifts(wrong, labels, self.shifts)
        own = np.arange(product.shape[-1]) == labels[..., None]
        others = np.where(own & (shifted > 0.5)[..., None], 0, product)
        return shifted, others.argmax(axis=-1).astype(np.uint8)


def witnesses(
    probs: Mapping[str, np.ndarray], prior: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the images say, and the product of all witnesses; see `evidence`.

    Args:
      probs: [S, T, T, C] by modality.
      prior: [S, T, T, C] from the labels.
      labels: [S, T, T] uint8.

    Returns:
      Two distributions [S, T, T, C]: by images and seasons alone, and by all.
    """
    images = evidence.entangled(probs)
    seen = {"images": images, "seasons": evidence.other_seasons(images)}
    said = {"neighbours": prior, "dates": evidence.other_dates(labels, prior.shape[-1])}
    return evidence.combine(seen), evidence.combine({**seen, **said})


def calibrate(judge: subjects.Judge, locations: np.ndarray, settings: Settings) -> Calibration:
    """Estimates the noise and calibrates to it, on pixels of some locations, without truth.

    Args:
      judge: predicts a location.
      locations: [n] indices of those to look at.
      settings: see `Settings`.
    """
    rng = np.random.default_rng(settings.seed)
    drawn: tuple[list, list, list] = [], [], []
    for index in _progress(locations, "estimating the noise"):
        probs, found = judge(index)
        known = np.flatnonzero(found["labels"].ravel() != sensors.IGNORE_LABEL)
        chosen = rng.permutation(known)[: settings.pixels]
        drawn[0].append(found["labels"].ravel()[chosen])
        both = witnesses(probs, found["prior"], found["labels"])
        for pixels, values in zip(drawn[1:], both, strict=True):
            pixels.append(values.reshape(-1, values.shape[-1])[chosen])
    labels, alone, product = map(np.concatenate, drawn)
    limits = np.stack([noise.thresholds(values, labels) for values in (alone, product)])
    counts = _confident_counts(alone, product, labels, limits)
    estimated = noise.estimate(counts, np.bincount(labels, minlength=alone.shape[1]))
    wrong = 1 - evidence.label_probability(product, labels)
    return Calibration(limits, noise.fit_shifts(wrong, labels, estimated.error_rates))


def _confident_counts(
    alone: np.ndarray, product: np.ndarray, labels: np.ndarray, limits: np.ndarray
) -> np.ndarray:
    """Counts of `noise.confident_counts` by the images alone and by all witnesses, [2, C, C]."""
    each = zip((alone, product), limits, strict=True)
    return np.stack([noise.confident_counts(values, labels, own) for values, own in each])


class Tally:
    """What is summed up over the locations."""

    def __init__(self, num_locations: int, num_classes: int):
        """Nothing is judged yet."""
        self.counts = np.zeros((num_locations, 2, num_classes, num_classes), np.int64)
        self.labels = np.zeros((num_locations, num_classes), np.int64)
        self.expected = np.zeros(num_classes)
        self.moved = np.zeros((num_classes, num_classes), np.int64)
        self.worst: list[tuple[float, float, str]] = []
        self.ranked = np.zeros((2, scores.NUM_BINS), np.int64)

    def add(
        self,
        index: int,
        name: str,
        confident: np.ndarray,
        labels: np.ndarray,
        wrong: np.ndarray,
        suggested: np.ndarray,
        truth: np.ndarray | None,
    ) -> None:
        """Adds the labelled pixels of a location, [n] each.

        Args:
          index: of the location.
          name: of it.
          confident: [2, C, C] its counts of confident learning.
          labels: classes.
          wrong: probability that they are wrong.
          suggested: what they should be.
          truth: true classes, where they are known.
        """
        num_classes = len(self.expected)
        self.counts[index] = confident
        self.labels[index] = np.bincount(labels, minlength=num_classes)
        self.expected += np.bincount(labels, wrong, minlength=num_classes)
        pairs = labels.astype(np.int64) * num_classes + suggested
        self.moved += np.bincount(pairs, minlength=num_classes**2).reshape(self.moved.shape)
        if len(labels):
            # By how many are wrong: of few labels, all may be.
            self.worst.append((float(wrong.sum()), float(wrong.mean()), name))
        if truth is not None:
            judged = truth < num_classes
            self.ranked += scores.count(wrong[judged], (labels != truth)[judged])

    def content(
        self, names: Sequence[str], settings: Settings, has_truth: bool, facts: Mapping[str, str]
    ) -> dict:
        """The content of the report; see `report.content`."""
        total, counts = self.labels.sum(axis=0), self.counts.sum(axis=0)
        return report.content(
            names,
            noise.estimate(counts, total),
            [noise.estimate(own, total).error_rate for own in counts],
            noise.intervals(self.counts, self.labels, settings.seed),
            self.expected / np.maximum(total, 1),
            total,
            self.moved,
            sorted(self.worst, reverse=True)[: settings.num_worst],
            self.ranked if has_truth else None,
            facts,
        )


def audit(
    subject: subjects.Subject,
    folder: pathlib.Path,
    settings: Settings,
    facts: Mapping[str, str],
    polygons: vectors.Polygons | None = None,
) -> dict:
    """Judges every label of a subject, and writes report, maps, suspects and parcels.

    Args:
      subject: to judge.
      folder: to write to.
      settings: see `Settings`.
      facts: what the report says about how it was made.
      polygons: the parcels, if there are any; they need the maps.

    Returns:
      The content of `report.json`.
    """
    for name in ("report.json", "report.md"):  # of an earlier audit, whose maps are replaced
        (folder / name).unlink(missing_ok=True)
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(subject.num_locations)
    chosen = np.sort(order[: settings.num_estimated])
    calibration = calibrate(subject.location, chosen, settings)
    tally = Tally(subject.num_locations, len(subject.legend))
    tiles: list[maps.Tile] = []
    modalities: set[str] = set()
    for index in _progress(np.arange(subject.num_locations), "judging"):
        probs, found = subject.location(index)
        modalities |= set(probs)
        labels = found["labels"]
        alone, product = witnesses(probs, found["prior"], labels)
        wrong, suggested = calibration.judge(product, labels)
        known = labels != sensors.IGNORE_LABEL
        own = subject.tiles(index)
        tally.add(
            index,
            own[0].location,
            _confident_counts(alone[known], product[known], labels[known], calibration.limits),
            labels[known],
            wrong[known],
            suggested[known],
            found["truth"][known] if "truth" in found else None,
        )
        if settings.maps:
            reason = evidence.reasons(probs, labels, suggested)
            for season, tile in enumerate(own):
                layers = labels[season], wrong[season], suggested[season], reason[season]
                subject.write(tile, maps.layers_of(*layers))
            tiles += own
    names = subject.legend.names
    content = tally.content(names, settings, subject.has_truth, facts)
    if settings.maps:
        subject.finish()
        content["suspects"] = suspects.write(
            folder, tiles, names, settings.above, settings.min_area, len(modalities) == 2
        )
        shown = [row["name"] for row in content["worst_locations"]][: worst.COUNT]
        ranked = worst.rank(tiles, shown)
        if ranked:
            images = [subject.image(tiles.index(tile)) for tile in ranked]
            worst.draw(folder, ranked, images, subject.legend)
            content["pictures"] = worst.FILE
    if polygons is not None:
        counted = parcels.count(polygons, tiles, len(names))
        content["parcels"] = parcels.write(folder, polygons, counted, names)
    _write_report(folder, content)
    return content


def _write_report(folder: pathlib.Path, content: Mapping) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_whole(
        epath.Path(folder / "report.json"), (json.dumps(content, indent=1) + "\n").encode()
    )
    if "against_truth" in content:
        from cromss_jax.results import pictures  # late: a second that nobody else waits

        picture = pictures.draw_reliability(content["against_truth"]["reliability"])
        pictures.save_picture(epath.Path(folder / report.RELIABILITY), picture)
    files.write_whole(epath.Path(folder / "report.md"), report.markdown(content).encode())


def _progress(indices: np.ndarray, what: str) -> tqdm.tqdm:
    often = 1 if sys.stderr.isatty() else 30
    return tqdm.tqdm(
        indices.tolist(), desc=what, unit=" locations", mininterval=often, maxinterval=often
    )
