"""Looks at a few tiles of each acquisition before any is written: units, offset, order, shift.

One tile of water or cloud could be mistaken about them. What cannot be right is refused.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cromss_jax.legend import IGNORE_LABEL
from data_prep import errors
from data_prep.datasets import scene_images
from data_prep.datasets.scene_images import Units
from data_prep.datasets.scene_table import Acquisition, Group
from data_prep.options import Options
from data_prep.reading import (
    bands,
    grids,
    labels,
    offsets,
    pairing,
    rasters,
    registration,
    warping,
)
from data_prep.reading.warping import Grid
from data_prep.report import Finding

# Tiles of each acquisition, spread over it.
NUM_TILES = 16
# Pixels of a tile along a side for a first survey.
_SAMPLE = 16


@dataclasses.dataclass(frozen=True)
class Scan:
    """What was found out about an acquisition.

    Attributes:
      acquisition: without its metadata, which is not needed any more.
      units: of its pixels.
      facts: for the report, by column.
      findings: for the report.
    """

    acquisition: Acquisition
    units: Units
    facts: dict[str, Any]
    findings: tuple[Finding, ...]


def scan(
    acquisition: Acquisition, tiles: Sequence[Grid], options: Options
) -> Scan | errors.BadFileError:
    """Looks at an acquisition.

    Args:
      acquisition: what to look at.
      tiles: of its scene's grid; the first `NUM_TILES` with content are read.
      options: see `Options`.

    Returns:
      What was found, or why the acquisition cannot be used.
    """
    try:
        return _scan(acquisition, tiles, options)
    except errors.BadFileError as bad:
        return bad


def _scan(acquisition: Acquisition, tiles: Sequence[Grid], options: Options) -> Scan:
    # In another order than along rows, so that the first ones are spread.
    order = np.random.default_rng(0).permutation(len(tiles))
    sample = [tiles[i] for i in order.tolist()]
    facts: dict[str, Any] = {"acquisition": acquisition.name}
    found: tuple[Finding, ...] = ()
    units = Units()
    if acquisition.s2:
        unit, offset, facts_s2, found = _scan_s2(acquisition, sample, options)
        units = dataclasses.replace(units, s2=unit, s2_offset=offset)
        facts |= facts_s2
    if acquisition.s1:
        unit, facts_s1 = _scan_s1(acquisition, sample, options)
        units = dataclasses.replace(units, s1=unit)
        facts |= facts_s1
    for kind in ("labels", "truth", "mask"):
        layers = getattr(acquisition, kind)
        if layers and not any(
            warping.source_window(layer, tile) for layer in layers for tile in tiles
        ):
            raise errors.BadFileError(
                layers[0].path, f"does not cover any tile of {acquisition.name}: {kind} must"
            )
    if acquisition.s1 and acquisition.s2:
        shift, found_shift = _shift(acquisition, sample, units)
        facts |= shift
        found += found_shift
    return Scan(dataclasses.replace(acquisition, metadata=()), units, facts, found)


def _samples(group: Group, sample: Sequence[Grid]) -> list:
    """The images of a group where the sampled tiles are, without empty ones."""
    images = []
    for tile in sample:
        window = warping.source_window(group[0], tile)
        if window is None:
            continue
        image = rasters.read(group, window)
        if image.valid.any() and (image.pixels[image.valid] != 0).any():
            images.append(image)
        if len(images) == NUM_TILES:
            break
    return images


def _scan_s2(
    acquisition: Acquisition, sample: Sequence[Grid], options: Options
) -> tuple[str, int, dict[str, Any], tuple[Finding, ...]]:
    """Unit and offset of Sentinel-2, facts and findings."""
    path = acquisition.s2[0][0].path
    evidence: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    unit = None
    for group in acquisition.s2:
        images = _samples(group, sample)
        if not images:
            raise errors.BadFileError(group[0].path, "has no valid pixel")
        if np.issubdtype(images[0].pixels.dtype, np.floating):
            valid = np.concatenate([i.pixels[i.valid & (i.pixels > 0)] for i in images])
            # Snow and cloud have a reflectance of 1, the darkest water 20 of 10000.
            own = scene_images.REFLECTANCE if np.median(valid) < 3 else scene_images.SCALED
            if unit not in (None, own):
                raise errors.BadFileError(
                    group[0].path,
                    f"holds Sentinel-2 as {own}, other bands of the scene are {unit}: bring all "
                    "into one unit",
                )
            unit = own
        values = [scene_images.native_s2(group, image, unit) for image in images]
        for i, layer in enumerate(group):
            pixels = np.concatenate([v.pixels[i].ravel() for v in values])
            valid = np.concatenate([v.valid[i].ravel() for v in values])
            if valid.any() and not pixels[valid].any():
                raise errors.BadFileError(
                    layer.path,
                    f"{layer.name} is 0 in all tiles sampled: the band was never filled; replace "
                    "it; a data set may do without it by --s2_bands",
                )
            evidence[layer.name] = pixels, valid
    unit = unit or scene_images.SCALED
    _check_range(path, evidence)
    _check_order(path, evidence)
    if options.s2_offset is None:
        offset = offsets.find(path, evidence, acquisition.metadata)
    else:
        offset = offsets.Offset(options.s2_offset, "--s2_offset")
    facts = {
        "Sentinel-2": f"{acquisition.s2_level or 'level not said'}, {unit}",
        "offset": f"{offset.value} ({offset.evidence})",
    }
    return unit, offset.value, facts, offsets.findings(path, offset)


def _check_range(path: str, evidence: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Refuses pictures: values of all bands that end at the largest of 8 bits.

    Raises:
      errors.BadFileError: naming the range.
    """
    largest = max(float(pixels[valid].max()) for pixels, valid in evidence.values() if valid.any())
    if 250 <= largest <= 255:
        raise errors.BadFileError(
            path,
            f"has values of 0 to {largest:.0f} in all bands, as a picture of 8 bits has: give the "
            "product itself, reflectance * 10000",
        )


def _check_order(path: str, evidence: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Refuses L1C bands in a wrong order, as far as band 10 shows it.

    Raises:
      errors.BadFileError: naming the darkest band.
    """
    if "B10" not in evidence or len(evidence) < 13:
        return
    medians = {
        name: float(np.median(pixels[valid]))
        for name, (pixels, valid) in evidence.items()
        if valid.any()
    }
    darkest = min(medians, key=medians.get)
    if darkest != "B10":
        raise errors.BadFileError(
            path,
            f"{darkest} (median {medians[darkest]:.0f}) is darker than B10 "
            f"({medians['B10']:.0f}), which sees no ground and is always darkest: the bands are in "
            "another order; describe them in the file",
        )


def _scan_s1(
    acquisition: Acquisition, sample: Sequence[Grid], options: Options
) -> tuple[str, dict[str, Any]]:
    """The unit of Sentinel-1, and facts."""
    path = acquisition.s1[0][0].path
    raw: dict[str, np.ndarray] = {}
    for group in acquisition.s1:
        images = _samples(group, sample)
        if not images:
            raise errors.BadFileError(
                group[0].path, f"has no valid pixel on the grid of {acquisition.name}"
            )
        for i, layer in enumerate(group):
            pixels = [scene_images.raw_s1(image)[i][image.valid[i]] for image in images]
            values = np.concatenate(pixels)
            raw[layer.name] = values[(values != 0) & (values > 100 * bands.MIN_DECIBELS + 1)]
    if not all(values.size for values in raw.values()):
        raise errors.BadFileError(path, "one of its bands is nodata in all tiles sampled")
    medians = {name: float(np.median(values)) for name, values in raw.items()}
    unit = _s1_unit(path, raw, medians)
    if medians["VH"] > medians["VV"]:
        raise errors.BadFileError(
            path,
            f"VH (median {medians['VH']:.4g}) is brighter than VV ({medians['VV']:.4g}), which "
            "never is so: the bands are swapped; describe them in the file, or name the files "
            "after their bands",
        )
    facts = {"Sentinel-1": f"{unit}, VV {medians['VV']:.3g}, VH {medians['VH']:.3g}"}
    facts["days apart"] = "not said"
    if acquisition.s1_date is not None:
        days = pairing.days_between(acquisition.s1_date, acquisition.date)
        facts["days apart"] = f"{days:.0f}"
        if days > options.max_days:
            raise errors.BadFileError(
                path,
                f"is of {acquisition.s1_date:%Y-%m-%d}, {days:.0f} days from the date of its row, "
                f"{acquisition.date:%Y-%m-%d}: --max_days={options.max_days:g} are allowed",
            )
    return unit, facts


def _s1_unit(path: str, raw: dict[str, np.ndarray], medians: dict[str, float]) -> str:
    """The unit by the medians of the bands.

    Raises:
      errors.BadFileError: if it is none that is known.
    """
    values = np.concatenate(list(raw.values()))
    if max(medians.values()) < bands.MIN_MEDIAN_DECIBELS * 4:
        return scene_images.CENTIBELS
    low, high = bands.MIN_MEDIAN_DECIBELS, bands.MAX_MEDIAN_DECIBELS
    if all(low <= median <= high for median in medians.values()):
        return scene_images.DECIBELS
    # Noise removal makes a few values negative; the median of land and water is below 1.
    if all(0 < median < 2 for median in medians.values()) and (values < 0).mean() < 0.2:
        return scene_images.POWER
    shown = ", ".join(f"{name} {median:.4g}" for name, median in medians.items())
    raise errors.BadFileError(
        path,
        f"has the medians {shown}, which are neither dB ({low:g} to {high:g}), nor dB * 100, nor "
        "linear power (0 to 2): convert it to dB",
    )


def _shift(
    acquisition: Acquisition, sample: Sequence[Grid], units: Units
) -> tuple[dict[str, Any], tuple[Finding, ...]]:
    """How far Sentinel-1 and 2 are apart by what they show.

    Raises:
      errors.BadFileError: if they nowhere overlap, or are clearly further apart than is accepted.
    """
    path = acquisition.s1[0][0].path
    correlation = registration.Correlation()
    overlaps, num_read = False, 0
    for tile in sample:
        if not all(
            warping.source_window(groups[0][0], tile) for groups in (acquisition.s1, acquisition.s2)
        ):
            continue
        num_read += 1
        s1 = scene_images.read_s1(acquisition, tile, units)
        s2 = scene_images.read_s2(acquisition, tile, units)
        valid = s1.valid.all(axis=0) & s2.valid.all(axis=0)
        overlaps |= bool(valid.any())
        # The last band sees through haze, and land and water differ most in it.
        correlation.add(np.log1p(np.maximum(s2.pixels[-1], 0)), s1.pixels.sum(axis=0), valid)
        # Of scenes with little in common, few tiles count.
        if correlation.num_tiles == NUM_TILES or (overlaps and num_read >= 4 * NUM_TILES):
            break
    if not overlaps:
        raise errors.BadFileError(
            path,
            f"has no valid pixel where Sentinel-2 of {acquisition.name} has one: is it of the same "
            "place?",
        )
    shift = correlation.shift()
    if shift is None or not shift.is_clear:
        return {"shift S1 to S2": "not clear"}, ()
    text = f"{shift.rows:+d} rows, {shift.columns:+d} columns ({shift.clearness:.0f} sigma)"
    if shift.distance > grids.MAX_SHIFT:
        raise errors.BadFileError(
            path,
            f"lies {shift.distance:.0f} pixels off Sentinel-2 of {acquisition.name} by what both "
            f"show ({text}), at most {grids.MAX_SHIFT:g} are accepted: correct its terrain and its "
            "georeference",
        )
    found = ()
    if shift.distance > 2:
        found = (Finding("S1 shifted", path, text),)
    return {"shift S1 to S2": text}, found


def survey(tile: Grid, acquisition: Acquisition, options: Options) -> float:
    """Roughly the share of a tile's pixels that will be valid and labelled.

    Few pixels are read, of the coarsest band and the labels, so that tiles without content are not
    counted where tiles are split. Which tiles are written is decided on all of their pixels.
    """
    groups = acquisition.s2 or acquisition.s1
    group = groups[-1][-1:]
    window = warping.source_window(group[0], tile, margin=0)
    if window is None:
        return 0.0
    image = rasters.read(group, window, (_SAMPLE, _SAMPLE))
    valid = image.valid & (image.pixels != 0)
    labelled = np.zeros((_SAMPLE, _SAMPLE), bool)
    for layer in acquisition.labels:
        window = warping.source_window(layer, tile, margin=0)
        if window is not None:
            found = rasters.read([layer], window, (_SAMPLE, _SAMPLE))
            values = found.pixels[0][found.valid[0]]
            classes = np.full(labelled.shape, IGNORE_LABEL, np.uint8)
            classes[found.valid[0]] = labels.classes(layer.path, values, options.legend)
            labelled |= classes != IGNORE_LABEL
    return min(float(valid.mean()), float(labelled.mean()))
