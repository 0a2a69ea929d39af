"""Reads all seasons of a location of SSL4EO-S12 + NoL."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds

from cromss_jax import presets, sensors
from cromss_jax.legend import Legend
from data_prep import errors
from data_prep.datasets.nol_granules import Granule, acquisition_time, pair_granules, read_granule
from data_prep.datasets.nol_table import Location
from data_prep.finding import component_tree
from data_prep.options import Options
from data_prep.reading import bands, geotiff, grids, labels, nodata, offsets
from data_prep.report import Finding
from data_prep.writing import records


@dataclasses.dataclass(frozen=True)
class _Season:
    """The images and labels of one season.

    Attributes:
      example: a record without `labels` and `season`.
      labels: (T,T) uint8.
      truth: (T,T) uint8, or None.
      valid: (T,T) bool, where both sensors have valid pixels.
    """

    example: records.Example
    labels: np.ndarray
    truth: np.ndarray | None
    valid: np.ndarray


def read_location(
    location: Location,
    *,
    source: component_tree.ComponentTree,
    max_seasons: int,
    options: Options,
    tile_size: int | None = None,
    has_truth: bool | None = None,
    is_native: bool | None = None,
) -> records.Reading:
    """Reads, checks and scales all seasons of one location.

    Args:
      location: the location.
      source: where its files are.
      max_seasons: S, the number of seasons to which `labels` are padded.
      options: see `Options`.
      tile_size: T, pixels along a side at 10 m; None takes that of the first B2.
      has_truth: whether there must be a `truth.tif` beside each label (True) or must not be
        (False); None takes it from the first season.
      is_native: whether S2 files have the native size of their bands (True), or all that of 10 m
        (False); None takes it from the first season.

    Returns:
      The record of each season by date: s1 (T,T,2), s2_10m (T,T,4), s2_20m (T/2,T/2,6), s2_60m
      (T/6,T/6,3), or s2 (T,T,13) if files have all bands at 10 m, of the bands of `options`;
      labels (S,T,T) of all seasons, 255 in seasons that the location does not have and where one of
      the sensors has no valid pixel, and, if the tree has it, truth (T,T), all uint8; `season` an
      index into labels; georeference, granules and timestamps as in `features`.
      Seasons with too many invalid pixels are left out.

    Raises:
      errors.BadFileError: if a file is missing, damaged, of the wrong size or dtype, contains
        invalid values, or is not where the others are.
    """
    pairs, findings = pair_granules(location, source, options)
    kept: list[_Season] = []
    for granules in pairs:
        season, found = _read_season(
            location, granules, source, tile_size, has_truth, is_native, options
        )
        tile_size, has_truth = len(season.labels), season.truth is not None
        is_native = "s2" not in season.example
        findings += found
        share = 1 - float(season.valid.mean())
        if share > options.max_invalid:
            folder = f"s2c/{location.location_id}/{granules[1]}"
            detail = f"{share:.1%} of the pixels are invalid"
            findings += (Finding("season skipped", folder, detail, share),)
        else:
            kept.append(season)
    if not kept:
        return records.Reading([], findings)
    # One array for all seasons: a worker sends it once.
    padding = ((0, max_seasons - len(kept)), (0, 0), (0, 0))
    all_labels = np.pad(
        np.stack([season.labels for season in kept]),
        padding,
        constant_values=sensors.IGNORE_LABEL,
    )
    examples = []
    for index, season in enumerate(kept):
        example = season.example | {"labels": all_labels, "season": index}
        if has_truth:
            example["truth"] = season.truth
        examples.append(example)
    return records.Reading(examples, findings)


def _read_season(
    location: Location,
    granules: tuple[str, str],
    source: component_tree.ComponentTree,
    tile_size: int | None,
    has_truth: bool | None,
    is_native: bool | None,
    options: Options,
) -> tuple[_Season, tuple[Finding, ...]]:
    """Reads images and labels of one season."""
    s1_granule, s2_granule = granules
    folders = {"s1": f"s1/{location.location_id}/{s1_granule}"}
    folders["s2"] = f"s2c/{location.location_id}/{s2_granule}"
    images = {m: read_granule(source, folders[m], names) for m, names in options.bands.items()}
    grid = _find_grid(images, is_native)
    side = grid.side
    if tile_size not in (None, side):
        bands.check_size(grid.path, grid.image, (tile_size * 10 // grid.metres_of_image,) * 2)
    if not side:
        raise errors.BadFileError(
            grid.path,
            f"{grid.full} pixels a side, but bands at {10 * grid.coarsest} m need at least "
            f"{grid.coarsest}",
        )
    example, valid, found = _scale_images(images, grid, side, options, s2_granule)
    label_folder = f"dw_noisy_labels/{location.location_id}/{s2_granule}"
    season_labels, truth, label_found = _read_label_maps(
        source, label_folder, has_truth, grid, options.legend or presets.DYNAMIC_WORLD
    )
    example |= {"location_id": location.location_id}
    for modality, granule in (("s1", s1_granule), ("s2", s2_granule)):
        if granule:
            example[f"{modality}_granule"] = granule
            example[f"{modality}_timestamp"] = acquisition_time(granule).isoformat()
    season_labels = season_labels[:side, :side]
    truth = None if truth is None else truth[:side, :side]
    season = _Season(example, nodata.ignore(season_labels, valid), truth, valid)
    for granule in images.values():
        found += granule.findings
    return season, (*found, *label_found)


_RESOLUTIONS = {
    name: metres for metres, names in sensors.S2_BANDS_BY_RESOLUTION.items() for name in names
} | dict.fromkeys(sensors.S1_BANDS, 10)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The grid of a season's images.

    Attributes:
      image: the one that the others are compared with, of the finest band.
      path: its path.
      metres_of_image: size of its pixels.
      metres: size of each band's pixels in the files.
      full: pixels of 10 m along a side of the files.
    """

    image: geotiff.Image
    path: str
    metres_of_image: int
    metres: Mapping[str, int]
    full: int

    @property
    def coarsest(self) -> int:
        """Pixels of 10 m in a pixel of the coarsest band, along a side."""
        return max(self.metres.values()) // 10

    @property
    def side(self) -> int:
        """The largest number of pixels of 10 m that is a whole number in all bands."""
        step = math.lcm(*(metres // 10 for metres in self.metres.values()))
        return self.full // step * step


def _find_grid(images: Mapping[str, Granule], is_native: bool | None) -> _Grid:
    """The grid of a season, and whether its S2 bands have their native size; see `_Grid`."""
    bands_found = {name: granule for granule in images.values() for name in granule.images}
    finest = min(bands_found, key=lambda name: (_RESOLUTIONS[name], name != "B2"))
    image = bands_found[finest].images[finest]
    metres = {name: _RESOLUTIONS[name] for name in bands_found}
    coarse = [name for name, size in metres.items() if size > metres[finest]]
    if is_native is None:
        sizes = {bands_found[name].images[name].size for name in coarse}
        is_native = sizes != {image.size}
    if not is_native:
        metres = dict.fromkeys(metres, 10)
    full = image.size[0] * metres[finest] // 10
    return _Grid(image, bands_found[finest].path(finest), metres[finest], metres, full)


def _cut(path: str, image: geotiff.Image, grid: _Grid, metres: int, side: int) -> geotiff.Image:
    """The pixels of an image that cover the tile, from its upper left corner.

    Raises:
      errors.BadFileError: if it does not cover as much as the grid, to a pixel of its own.
    """
    exact = grid.full * 10 / metres
    near = {math.floor(exact), math.ceil(exact)}
    if not (set(image.size) <= near and len(set(image.size)) == 1):
        bands.check_size(path, image, (grid.full * 10 // metres,) * 2)
    needed = side * 10 // metres
    return image if image.size == (needed, needed) else image.window(needed, needed)


def _scale_images(
    images: Mapping[str, Granule], grid: _Grid, side: int, options: Options, s2_granule: str
) -> tuple[records.Example, np.ndarray, tuple[Finding, ...]]:
    """Checks and scales the images of a season.

    Returns:
      A record with the images and their georeference, where all sensors have valid pixels (T,T),
      and findings.
    """
    found: list[Finding] = []
    read = {"s1": bands.s1_values, "s2": bands.s2_values}
    values: dict[str, dict[str, bands.Values]] = {}
    reference = grid.image.window(*(side * 10 // grid.metres_of_image,) * 2)
    for modality, granule in images.items():
        values[modality] = {}
        for name, image in granule.images.items():
            path = granule.path(name)
            cut = _cut(path, image, grid, grid.metres[name], side)
            values[modality][name] = read[modality](path, cut)
            found += values[modality][name].findings
            found += grids.compare(reference, path, cut, grid.path)
    if side < grid.full:
        found.append(Finding("tile cropped", grid.path, f"{grid.full} to {side} pixels"))
    example: records.Example = {}
    seen = []
    if "s1" in values:
        scaled, valid = _scale_s1(values["s1"])
        example |= {
            "s1": scaled,
            "s1_crs": images["s1"].images["VV"].crs,
            "s1_transform": np.array(images["s1"].images["VV"].transform[:6], np.float64),
        }
        found += nodata.findings(images["s1"].folder, "S1 invalid", valid)
        seen.append(valid)
    if "s2" in values:
        scaled_arrays, valid, s2_found = _scale_s2(
            values["s2"], images["s2"], grid, side, options, s2_granule
        )
        example |= scaled_arrays
        found += s2_found
        seen.append(valid)
    example["crs"] = grid.image.crs
    example["transform"] = _at_10_metres(grid)
    return example, np.logical_and.reduce(seen), tuple(found)


def _at_10_metres(grid: _Grid) -> np.ndarray:
    """The transform (6,) of pixels of 10 m."""
    a, b, c, d, e, f = grid.image.transform[:6]
    factor = grid.metres_of_image // 10
    return np.array([a / factor, b / factor, c, d / factor, e / factor, f], np.float64)


def _scale_s1(values: Mapping[str, bands.Values]) -> tuple[np.ndarray, np.ndarray]:
    """The S1 image (T,T,2) uint8, and where it is valid (T,T)."""
    scaled = [bands.scale(name, v.pixels[0], v.valid[0]) for name, v in values.items()]
    return np.stack(scaled, axis=-1), np.logical_and.reduce([v.valid[0] for v in values.values()])


def _scale_s2(
    values: Mapping[str, bands.Values],
    granule: Granule,
    grid: _Grid,
    side: int,
    options: Options,
    s2_granule: str,
) -> tuple[records.Example, np.ndarray, tuple[Finding, ...]]:
    """The S2 images by array, where all bands are valid (T,T), and findings."""
    pixels = {name: value.pixels[0] for name, value in values.items()}
    valid = nodata.mark_zeros(
        {name: value.zero[0] for name, value in values.items()},
        {name: value.valid[0] for name, value in values.items()},
    )
    found: tuple[Finding, ...] = ()
    offset = options.s2_offset
    if offset is None:
        evidence = {name: (pixels[name], valid[name]) for name in pixels}
        texts = (*granule.metadata, f"_{s2_granule}_")
        offset, found = offsets.detect(granule.folder, evidence, texts)
    statistics = sensors.S2_STATISTICS[options.s2_level]
    is_native = any(metres > 10 for metres in grid.metres.values())
    described = [b for b in options.described_bands(is_native) if b.modality == "s2"]
    example = {
        array: np.stack(
            [bands.scale_s2(n, pixels[n], valid[n], offset, statistics) for n in names], axis=-1
        )
        for array, names in sensors.arrays_of(described).items()
    }
    seen = np.logical_and.reduce([nodata.at_10_metres(v, side) for v in valid.values()])
    return example, seen, (*found, *nodata.findings(granule.folder, "S2 invalid", seen))


def _read_label_maps(
    source: component_tree.ComponentTree,
    folder: str,
    has_truth: bool | None,
    grid: _Grid,
    legend: Legend,
) -> tuple[np.ndarray, np.ndarray | None, tuple[Finding, ...]]:
    """Reads the labels of a season and, if there is one, the truth: (T,T) uint8, and findings."""
    names = {name.lower(): name for name in source.files(folder)}
    label_name = names.pop("label.tif", "label.tif")
    truth_name = names.pop("truth.tif", None)
    if truth_name and has_truth is False:
        raise errors.BadFileError(
            f"{folder}/{truth_name}",
            "unexpected: either all labels have a truth beside them, or none",
        )
    found: tuple[Finding, ...] = tuple(
        Finding("not read", f"{folder}/{name}", "no label map") for name in names.values()
    )
    maps = []
    for name in [label_name, *([truth_name or "truth.tif"] if truth_name or has_truth else [])]:
        path = f"{folder}/{name}"
        image = bands.read_band(source, path)
        found += grids.compare(grid.image, path, image, grid.path)
        pixels, label_found = labels.read_labels(path, image, legend, (grid.full, grid.full))
        maps.append(pixels)
        found += label_found
    return maps[0], maps[1] if len(maps) > 1 else None, found


def features(
    tile_size: int, max_seasons: int, has_truth: bool, described: Sequence[sensors.Band]
) -> tfds.features.FeaturesDict:
    """The features of a record with these bands; see `read_location`."""
    array = records.array_feature
    modalities = {band.modality for band in described}
    names = {
        "labels": array(max_seasons, tile_size, tile_size),
        "season": np.int32,
        "transform": array(6, dtype=np.float64),
    }
    texts = ["location_id", "crs", "s2_granule", "s2_timestamp"]
    if "s1" in modalities:
        names["s1_transform"] = array(6, dtype=np.float64)
        texts += ["s1_crs", "s1_granule", "s1_timestamp"]
    metres = {band.array: band.metres for band in described}
    for name, band_names in sensors.arrays_of(described).items():
        side = tile_size * 10 // metres[name]
        names[name] = array(side, side, len(band_names))
    if has_truth:
        names["truth"] = array(tile_size, tile_size)
    return tfds.features.FeaturesDict(names | {name: tfds.features.Text() for name in texts})
