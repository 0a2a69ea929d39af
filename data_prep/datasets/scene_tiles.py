"""Reads the tiles of scenes: a location is a tile, its seasons are the scene's dates."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds

from cromss_jax import sensors
from cromss_jax.legend import IGNORE_LABEL
from data_prep import errors
from data_prep.datasets import scene_images, scene_labels, scene_scan
from data_prep.datasets.scene_scan import Scan
from data_prep.options import Options
from data_prep.reading import bands, nodata
from data_prep.reading.warping import Grid
from data_prep.report import Finding
from data_prep.writing import records


@dataclasses.dataclass(frozen=True)
class SceneTile:
    """A tile of a scene.

    Attributes:
      location_id: scene, row and column of its upper left pixel in the scene's grid.
      grid: its own.
      seasons: the acquisitions of the scene by date.
      block: number of the block of the earth's surface in which its centre lies.
    """

    location_id: str
    grid: Grid
    seasons: tuple[Scan, ...]
    block: int


@dataclasses.dataclass(frozen=True)
class _Season:
    """One date of a tile.

    Attributes:
      example: its imagery.
      labels: (T,T) uint8.
      truth: (T,T) uint8, or None.
    """

    example: records.Example
    labels: np.ndarray
    truth: np.ndarray | None


def has_content(tile: SceneTile, min_labelled: float, options: Options) -> bool:
    """Whether a tile probably has pixels enough on one of its dates; see `scene_scan.survey`.

    Where this cannot be found out, `read_tile` says why.
    """
    # Half of what is needed, as a sample may show less than there is.
    needed = min(min_labelled, 1 - options.max_invalid) / 2
    try:
        shares = [scene_scan.survey(tile.grid, s.acquisition, options) for s in tile.seasons]
    except errors.BadFileError:
        return True
    return max(shares) > needed


def read_tile(
    tile: SceneTile,
    *,
    band_list: Sequence[sensors.Band],
    max_seasons: int,
    min_labelled: float,
    options: Options,
) -> records.Reading:
    """Reads all dates of a tile of T x T pixels.

    Args:
      tile: the tile.
      band_list: of the records, with their scaling.
      max_seasons: S, the number of seasons to which `labels` are padded.
      min_labelled: smallest share of the pixels that must have a label.
      options: see `Options`.

    Returns:
      The record of each date: s1 (T,T,2) and s2 (T,T,K), as far as the scenes have them; labels
      (S,T,T) of all dates, 255 in seasons that the tile does not have, where one of the sensors has
      no valid pixel, and where the mask says so; truth (T,T), if the table has it; all uint8; and
      what `features` names. Dates with too few valid pixels or labels are left out.

    Raises:
      errors.BadFileError: if a file cannot be used.
    """
    kept: list[_Season] = []
    findings: tuple[Finding, ...] = ()
    for scan in tile.seasons:
        season, found = _read_season(tile, scan, band_list, min_labelled, options)
        findings += found
        if season is not None:
            kept.append(season)
    if not kept:
        return records.Reading([], findings)
    padding = ((0, max_seasons - len(kept)), (0, 0), (0, 0))
    labels = np.pad(
        np.stack([season.labels for season in kept]), padding, constant_values=IGNORE_LABEL
    )
    examples = []
    for index, season in enumerate(kept):
        example = season.example | {"labels": labels, "season": index}
        if season.truth is not None:
            example["truth"] = season.truth
        examples.append(example)
    return records.Reading(examples, findings)


def _read_season(
    tile: SceneTile,
    scan: Scan,
    band_list: Sequence[sensors.Band],
    min_labelled: float,
    options: Options,
) -> tuple[_Season | None, tuple[Finding, ...]]:
    """Reads one date of a tile; None in place of it if it is left out. Besides, findings."""
    acquisition, name = scan.acquisition, f"{tile.location_id} {scan.acquisition.date:%Y-%m-%d}"
    example: records.Example = {}
    found: tuple[Finding, ...] = ()
    valid = np.ones((tile.grid.height, tile.grid.width), bool)
    # Sentinel-2 first: of a tile that it does not cover, nothing else is read.
    for array, files, read in (
        ("s2", acquisition.s2, scene_images.read_s2),
        ("s1", acquisition.s1, scene_images.read_s1),
    ):
        if not files:
            continue
        image = read(acquisition, tile.grid, scan.units)
        seen = image.valid.all(axis=0)
        found += nodata.findings(name, f"{array.upper()} invalid", seen)
        valid &= seen
        share = 1 - float(valid.mean())
        if share > options.max_invalid:
            detail = f"{share:.1%} of the pixels are invalid"
            return None, (Finding("season skipped", name, detail, share),)
        example[array] = _scaled(image, array, band_list, scan.units.s2_offset)
    labels, covered = scene_labels.read(acquisition.labels, tile.grid, options.legend)
    found += nodata.findings(name, "labels invalid", covered)
    has_class = ~covered | (labels != IGNORE_LABEL)
    found += nodata.findings(name, "labels without class", has_class)
    if acquisition.mask:
        masked = scene_images.read_mask(acquisition.mask, tile.grid)
        found += nodata.findings(name, "masked", ~masked)
        valid &= ~masked
    labels = nodata.ignore(labels, valid)
    labelled = float((labels != IGNORE_LABEL).mean())
    if labelled < min_labelled or not labelled:
        detail = f"{labelled:.1%} of the pixels have a label"
        return None, (Finding("season unlabelled", name, detail, 1 - labelled),)
    truth = None
    if acquisition.truth:
        truth, _ = scene_labels.read(acquisition.truth, tile.grid, options.legend)
    example |= {
        "location_id": tile.location_id,
        "crs": tile.grid.crs,
        "transform": np.array(tile.grid.transform, np.float64),
        "timestamp": acquisition.date.isoformat(),
    }
    return _Season(example, labels, truth), found


def _scaled(
    image: scene_images.Bands, array: str, band_list: Sequence[sensors.Band], offset: int
) -> np.ndarray:
    """The bands of one array of a record, (T,T,K) uint8; invalid pixels are neutral."""
    own = [band for band in band_list if band.array == array]
    ordered = image.in_order([band.name for band in own])
    # One offset for all bands of a product.
    shift = offset if array == "s2" else 0
    statistics = {band.name: (band.mean, band.std) for band in own}
    scaled = [
        sensors.scale_to_uint8(
            np.maximum(pixels - shift, 0) if shift else pixels, band.name, statistics
        )
        for band, pixels in zip(own, ordered.pixels, strict=True)
    ]
    return np.where(ordered.valid, np.stack(scaled), np.uint8(bands.NEUTRAL)).transpose(1, 2, 0)


def features(
    tile_size: int, max_seasons: int, band_list: Sequence[sensors.Band], has_truth: bool
) -> tfds.features.FeaturesDict:
    """The features of a record; see `read_tile`."""
    array = records.array_feature
    names = {
        name: array(tile_size, tile_size, len(own))
        for name, own in sensors.arrays_of(band_list).items()
    }
    names["labels"] = array(max_seasons, tile_size, tile_size)
    if has_truth:
        names["truth"] = array(tile_size, tile_size)
    names |= {"season": np.int32, "transform": array(6, dtype=np.float64)}
    names |= {name: tfds.features.Text() for name in ("location_id", "crs", "timestamp")}
    return tfds.features.FeaturesDict(names)
