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
      limits: [C] of confident predictions, see `noise.thresholds`.
      noise: the joint distribution of labels and classes.
      shifts: [C] see `noise.fit_shifts`.
    """

    limits: np.ndarray
    noise: noise.Noise
    shifts: np.ndarray

    def judge(self, product: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The probability that labels are wrong, float32, and the most probable class, uint8."""
        found = evidence.posterior(product, labels, self.noise.likelihood)
        wrong = 1 - evidence.label_probability(found, labels)
        shifted = noise.apply_shifts(wrong, labels, self.shifts)
        return shifted, found.argmax(axis=-1).astype(np.uint8)


def witnesses(probs: Mapping[str, np.ndarray], prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the images say, and the product of all witnesses; see `evidence`.

    Args:
      probs: [S, T, T, C] by modality.
      prior: [S, T, T, C] from the labels.

    Returns:
      Both [S, T, T, C]: a distribution of images and seasons alone, and the log-product.
    """
    images = evidence.entangled(probs)
    seen = {"images": images, "seasons": evidence.other_seasons(images)}
    alone = np.exp(evidence.combine(seen, evidence.WEIGHTS))
    alone = alone / alone.sum(axis=-1, keepdims=True)
    return alone, evidence.combine({**seen, "neighbours": prior}, evidence.WEIGHTS)


def calibrate(judge: Judge, locations: np.ndarray, settings: Settings) -> Calibration:
    """Estimates the noise and calibrates to it, on pixels of some locations, without truth.

    Args:
      judge: predicts a location.
      locations: [n] indices of those to look at.
      settings: see `Settings`.
    """
    rng = np.random.default_rng(settings.seed)
    drawn: dict[str, list[np.ndarray]] = {"alone": [], "product": [], "labels": []}
    for index in _progress(locations, "estimating the noise"):
        probs, found = judge(index)
        alone, product = witnesses(probs, found["prior"])
        known = np.flatnonzero(found["labels"].ravel() != sensors.IGNORE_LABEL)
        chosen = rng.permutation(known)[: settings.pixels]
        drawn["alone"].append(alone.reshape(-1, alone.shape[-1])[chosen])
        drawn["product"].append(product.reshape(-1, product.shape[-1])[chosen])
        drawn["labels"].append(found["labels"].ravel()[chosen])
    alone, product, labels = (np.concatenate(drawn[n]) for n in ("alone", "product", "labels"))
    limits = noise.thresholds(alone, labels)
    label_counts = np.bincount(labels, minlength=alone.shape[1])
    estimated = noise.estimate(noise.confident_counts(alone, labels, limits), label_counts)
    found = evidence.posterior(product, labels, estimated.likelihood)
    wrong = 1 - evidence.label_probability(found, labels)
    shifts = noise.fit_shifts(wrong, labels, estimated.error_rates)
    return Calibration(limits, estimated, shifts)


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
    counts = np.zeros((dataset.num_locations, num_classes, num_classes), np.int64)
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
        counts[index] = noise.confident_counts(alone[known], flat, calibration.limits)
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
    estimated = noise.estimate(counts.sum(axis=0), label_counts.sum(axis=0))
    content = report.content(
        dataset.legend.names,
        estimated,
        noise.intervals(counts, label_counts, settings.seed),
        expected / np.maximum(label_counts.sum(axis=0), 1),
        label_counts.sum(axis=0),
        moved,
        sorted(worst, reverse=True)[: settings.num_worst],
        ranked if dataset.has_truth else None,
        facts,
    )
    folder.mkdir(parents=True, exist_ok=True)
    files.write_whole(
        epath.Path(folder / "report.json"), (json.dumps(content, indent=1) + "\n").encode()
    )
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
