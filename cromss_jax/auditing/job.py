"""An audit from beginning to end: the noise is estimated, then every location is judged."""

import dataclasses
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Mapping

import numpy as np
import tqdm
from etils import epath

from cromss_jax import files, sensors
from cromss_jax.auditing import evidence, noise, report, scores
from cromss_jax.data import input_pipeline
from cromss_jax.mapping import cogs
from cromss_jax.mapping.styles import PERCENT, Entry

_log = logging.getLogger(__name__)

# By location: probabilities [S, T, T, C] by modality; labels, prior and perhaps truth.
Judge = Callable[[int], tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an audit is made.

    Attributes:
      num_estimated: locations from which the noise is estimated, spread by a draw.
      pixels: drawn from each of these.
      maps: whether maps of each location are written.
      num_worst: locations named in the report.
      seed: of the draws.
    """

    num_estimated: int = 512
    pixels: int = 4000
    maps: bool = True
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
        """The probability that labels are wrong, float32, and the most probable class, uint8."""
        wrong = 1 - evidence.label_probability(product, labels)
        shifted = noise.apply_shifts(wrong, labels, self.shifts)
        return shifted, product.argmax(axis=-1).astype(np.uint8)


def witnesses(probs: Mapping[str, np.ndarray], prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the images say, and the product of all witnesses; see `evidence`.

    Args:
      probs: [S, T, T, C] by modality.
      prior: [S, T, T, C] from the labels.

    Returns:
      Two distributions [S, T, T, C]: by images and seasons alone, and by all.
    """
    images = evidence.entangled(probs)
    seen = {"images": images, "seasons": evidence.other_seasons(images)}
    return evidence.combine(seen), evidence.combine({**seen, "neighbours": prior})


def calibrate(judge: Judge, locations: np.ndarray, settings: Settings) -> Calibration:
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
        for pixels, values in zip(drawn[1:], witnesses(probs, found["prior"]), strict=True):
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


def audit(
    dataset: input_pipeline.TileDataset,
    judge: Judge,
    folder: pathlib.Path,
    settings: Settings,
    facts: Mapping[str, str],
) -> dict:
    """Judges every label of a data set, and writes report and maps.

    Args:
      dataset: to judge.
      judge: predicts a location, by networks that may or may not have seen it.
      folder: to write to.
      settings: see `Settings`.
      facts: what the report says about how it was made.

    Returns:
      The content of `report.json`.
    """
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(dataset.num_locations)
    calibration = calibrate(judge, np.sort(order[: settings.num_estimated]), settings)
    num_classes = len(dataset.legend)
    counts = np.zeros((dataset.num_locations, 2, num_classes, num_classes), np.int64)
    label_counts = np.zeros((dataset.num_locations, num_classes), np.int64)
    expected = np.zeros(num_classes)
    moved = np.zeros((num_classes, num_classes), np.int64)
    worst: list[tuple[float, str]] = []
    ranked = np.zeros((2, scores.NUM_BINS), np.int64)
    for index in _progress(np.arange(dataset.num_locations), "judging"):
        probs, found = judge(index)
        alone, product = witnesses(probs, found["prior"])
        labels = found["labels"]
        wrong, suggested = calibration.judge(product, labels)
        known = labels != sensors.IGNORE_LABEL
        own, flat = wrong[known], labels[known]
        counts[index] = _confident_counts(alone[known], product[known], flat, calibration.limits)
        label_counts[index] = np.bincount(flat, minlength=num_classes)
        expected += np.bincount(flat, own, minlength=num_classes)
        pairs = flat.astype(np.int64) * num_classes + suggested[known]
        moved += np.bincount(pairs, minlength=num_classes**2).reshape(moved.shape)
        records = [dataset.source[int(dataset.starts[index]) + s] for s in range(len(labels))]
        name = records[0]["location_id"].decode()
        if len(own):
            worst.append((float(own.mean()), name))
        if "truth" in found:
            truth = found["truth"][known]
            judged = truth < num_classes
            ranked += scores.count(own[judged], (flat != truth)[judged])
        if settings.maps:
            for season, record in enumerate(records):
                _write_maps(folder, name, season, record, wrong[season], suggested[season], dataset)
    total = label_counts.sum(axis=0)
    content = report.content(
        dataset.legend.names,
        noise.estimate(counts.sum(axis=0), total),
        [noise.estimate(own, total).error_rate for own in counts.sum(axis=0)],
        noise.intervals(counts, label_counts, settings.seed),
        expected / np.maximum(total, 1),
        total,
        moved,
        sorted(worst, reverse=True)[: settings.num_worst],
        ranked if dataset.has_truth else None,
        facts,
    )
    folder.mkdir(parents=True, exist_ok=True)
    files.write_whole(
        epath.Path(folder / "report.json"), (json.dumps(content, indent=1) + "\n").encode()
    )
    if "against_truth" in content:
        from cromss_jax.results import pictures  # late: a second that nobody else waits

        picture = pictures.draw_reliability(content["against_truth"]["reliability"])
        pictures.save_picture(epath.Path(folder / report.RELIABILITY), picture)
    files.write_whole(epath.Path(folder / "report.md"), report.markdown(content).encode())
    return content


def _write_maps(
    folder: pathlib.Path,
    name: str,
    season: int,
    record: Mapping,
    wrong: np.ndarray,
    suggested: np.ndarray,
    dataset: input_pipeline.TileDataset,
) -> None:
    """Writes the two maps of a season of a location."""
    known = record["labels"][season] != sensors.IGNORE_LABEL
    target = folder / "maps" / name / f"season_{season}"
    target.mkdir(parents=True, exist_ok=True)
    height, width = wrong.shape
    grid = cogs.Grid(height, width, record["crs"].decode(), [float(x) for x in record["transform"]])
    legend = tuple(Entry(i, colour, n) for i, (n, colour) in enumerate(dataset.legend.pairs()))
    percent = np.rint(100 * wrong).astype(np.uint8)
    for layer, pixels in (
        (cogs.Layer("wrong_probability", ("label is wrong",), PERCENT, False, "%"), percent),
        (cogs.Layer("suggested", ("class it should be",), legend, True), suggested),
    ):
        raw = target / f"{layer.name}.raw"
        raw.write_bytes(np.where(known, pixels, np.uint8(sensors.IGNORE_LABEL)).tobytes())
        work = target / "work"
        work.mkdir(exist_ok=True)
        raw = raw.replace(work / raw.name)
        cogs.write(raw, layer, grid, target)
        for path in work.iterdir():
            path.unlink()
        work.rmdir()


def _progress(indices: np.ndarray, what: str) -> tqdm.tqdm:
    often = 1 if sys.stderr.isatty() else 30
    return tqdm.tqdm(
        indices.tolist(), desc=what, unit=" locations", mininterval=often, maxinterval=often
    )
