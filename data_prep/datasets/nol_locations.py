"""Reads all seasons of a location of SSL4EO-S12 + NoL."""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds

from cromss_jax import sensors
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

    Returns:
      The record of each season by date: s1 (T,T,2), s2_10m (T,T,4), s2_20m (T/2,T/2,6), s2_60m
      (T/6,T/6,3), labels (S,T,T) of all seasons, 255 in seasons that the location does not have
      and where one of the sensors has no valid pixel, and, if the tree has it, truth (T,T), all
      uint8; `season` an index into labels; georeference, granules and timestamps as in `features`.
      Seasons with too many invalid pixels are left out.

    Raises:
      errors.BadFileError: if a file is missing, damaged, of the wrong size or dtype, contains
        invalid values, or is not where the others are.
    """
    pairs, findings = pair_granules(location, source, options.max_days)
    kept: list[_Season] = []
    for granules in pairs:
        season, found = _read_season(location, granules, source, tile_size, has_truth, options)
        tile_size, has_truth = len(season.labels), season.truth is not None
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
    options: Options,
) -> tuple[_Season, tuple[Finding, ...]]:
    """Reads images and labels of one season."""
    s1_granule, s2_granule = granules
    s1 = read_granule(source, f"s1/{location.location_id}/{s1_granule}", sensors.S1_BANDS)
    s2 = read_granule(source, f"s2c/{location.location_id}/{s2_granule}", sensors.S2_BANDS)
    side = tile_size or s2.images["B2"].size[0]
    if side % 6:
        raise errors.BadFileError(
            s2.path("B2"),
            f"{side} pixels a side, but bands at 10, 20 and 60 m need a multiple of 6",
        )
    example, valid, found = _scale_images(s1, s2, side, options, s2_granule)
    label_folder = f"dw_noisy_labels/{location.location_id}/{s2_granule}"
    season_labels, truth, label_found = _read_label_maps(
        source, label_folder, has_truth, s2.images["B2"], s2.path("B2")
    )
    example |= {
        "location_id": location.location_id,
        "s1_granule": s1_granule,
        "s2_granule": s2_granule,
        "s1_timestamp": acquisition_time(s1_granule).isoformat(),
        "s2_timestamp": acquisition_time(s2_granule).isoformat(),
    }
    season = _Season(example, nodata.ignore(season_labels, valid), truth, valid)
    return season, (*s1.findings, *s2.findings, *found, *label_found)


def _scale_images(
    s1: Granule, s2: Granule, side: int, options: Options, s2_granule: str
) -> tuple[records.Example, np.ndarray, tuple[Finding, ...]]:
    """Checks and scales the images of a season.

    Returns:
      A record with the images and their georeference, where both sensors have valid pixels (T,T),
      and findings.
    """
    reference = s2.images["B2"]
    found: list[Finding] = []
    s1_values, s2_values = {}, {}
    for folder, values, read, sizes in (
        (s1, s1_values, bands.s1_values, dict.fromkeys(sensors.S1_BANDS, 10)),
        (s2, s2_values, bands.s2_values, _RESOLUTIONS),
    ):
        for name, image in folder.images.items():
            path = folder.path(name)
            bands.check_size(path, image, (side * 10 // sizes[name],) * 2)
            values[name] = read(path, image)
            found += values[name].findings
            found += grids.compare(reference, path, image, s2.path("B2"))
    s2_pixels = {name: value.pixels[0] for name, value in s2_values.items()}
    s2_valid = nodata.mark_zeros(
        {name: value.zero[0] for name, value in s2_values.items()},
        {name: value.valid[0] for name, value in s2_values.items()},
    )
    offset = options.s2_offset
    if offset is None:
        evidence = {name: (s2_pixels[name], s2_valid[name]) for name in s2_pixels}
        texts = (*s2.metadata, f"_{s2_granule}_")
        offset, offset_found = offsets.detect(s2.folder, evidence, texts)
        found += offset_found
    example = {
        "s1": np.stack(
            [bands.scale(name, v.pixels[0], v.valid[0]) for name, v in s1_values.items()], axis=-1
        ),
        "crs": reference.crs,
        "transform": np.array(reference.transform[:6], np.float64),
        "s1_crs": s1.images["VV"].crs,
        "s1_transform": np.array(s1.images["VV"].transform[:6], np.float64),
    }
    for metres, names in sensors.S2_BANDS_BY_RESOLUTION.items():
        scaled = [bands.scale_s2(n, s2_pixels[n], s2_valid[n], offset) for n in names]
        example[f"s2_{metres}m"] = np.stack(scaled, axis=-1)
    s1_seen = np.logical_and.reduce([value.valid[0] for value in s1_values.values()])
    s2_seen = np.logical_and.reduce([nodata.at_10_metres(v, side) for v in s2_valid.values()])
    found += nodata.findings(s1.folder, "S1 invalid", s1_seen)
    found += nodata.findings(s2.folder, "S2 invalid", s2_seen)
    return example, s1_seen & s2_seen, tuple(found)


_RESOLUTIONS = {
    name: metres for metres, names in sensors.S2_BANDS_BY_RESOLUTION.items() for name in names
}


def _read_label_maps(
    source: component_tree.ComponentTree,
    folder: str,
    has_truth: bool | None,
    reference: geotiff.Image,
    reference_path: str,
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
        found += grids.compare(reference, path, image, reference_path)
        pixels, label_found = labels.read_labels(path, image, labels.DYNAMIC_WORLD, reference.size)
        maps.append(pixels)
        found += label_found
    return maps[0], maps[1] if len(maps) > 1 else None, found


def features(tile_size: int, max_seasons: int, has_truth: bool) -> tfds.features.FeaturesDict:
    """The features of a record; see `read_location`."""
    array = records.array_feature
    names = {
        "s1": array(tile_size, tile_size, len(sensors.S1_BANDS)),
        "labels": array(max_seasons, tile_size, tile_size),
        "season": np.int32,
        "transform": array(6, dtype=np.float64),
        "s1_transform": array(6, dtype=np.float64),
    }
    for metres, s2_bands in sensors.S2_BANDS_BY_RESOLUTION.items():
        size = tile_size * 10 // metres
        names[f"s2_{metres}m"] = array(size, size, len(s2_bands))
    if has_truth:
        names["truth"] = array(tile_size, tile_size)
    for name in ("location_id", "crs", "s1_crs", "s1_granule", "s2_granule", "s1_timestamp",
                 "s2_timestamp"):  # fmt: skip
        names[name] = tfds.features.Text()
    return tfds.features.FeaturesDict(names)
