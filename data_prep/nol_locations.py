"""Reads all seasons of a location of SSL4EO-S12 + NoL."""

import datetime
import re
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds

from cromss_jax import sensors
from data_prep import bands, errors, records, sources
from data_prep.nol_table import TABLE, Location


def timestamp(granule: str) -> str:
    """The first date in a granule's name, as ISO 8601 (UTC).

    Raises:
      ValueError: if there is none.
    """
    match = re.search(r"\d{8}T\d{6}", granule)
    if match is None:
        raise ValueError(f"no date (YYYYMMDDThhmmss) in the name {granule}")
    return datetime.datetime.strptime(match[0], "%Y%m%dT%H%M%S").isoformat()


def read_location(
    location: Location,
    *,
    source: sources.Source,
    max_seasons: int,
    s2_offset: int,
    tile_size: int | None = None,
    has_truth: bool | None = None,
) -> list[records.Example]:
    """Reads, checks and scales all seasons of one location.

    Args:
      location: the location.
      source: where its files are.
      max_seasons: S, the number of seasons to which `labels` are padded.
      s2_offset: subtracted from raw S2 pixels (floor 0) before scaling: 1000 for products of
        processing baseline 04.00 and later, which add it.
      tile_size: T, pixels along a side at 10 m; None takes the label's.
      has_truth: whether there must be a `truth.tif` beside each label (True) or must not be
        (False); None takes it from the first season.

    Returns:
      The record of each season by date: s1 (T,T,2), s2_10m (T,T,4), s2_20m (T/2,T/2,6), s2_60m
      (T/6,T/6,3), labels (S,T,T) of all seasons, 255 in seasons that the location does not have,
      and, if the tree has it, truth (T,T), all uint8; `season` an index into labels;
      georeference, granules and timestamps as in `features`.

    Raises:
      errors.BadFileError: if a file is missing, damaged, of the wrong size or dtype, or contains
        invalid values.
    """
    seasons = _pair_granules(location, source)
    s2_granules = [s2_granule for _, s2_granule in seasons]
    labels, truths = _read_label_maps(location, s2_granules, source, tile_size, has_truth)
    tile_size = labels[0].shape[0]
    # One array for all seasons: a worker sends it once.
    padding = ((0, max_seasons - len(labels)), (0, 0), (0, 0))
    all_labels = np.pad(np.stack(labels), padding, constant_values=sensors.IGNORE_LABEL)
    examples = []
    for season, granules in enumerate(seasons):
        example = _read_images(location, granules, source, tile_size, s2_offset)
        example |= {"labels": all_labels, "season": season}
        if truths:
            example["truth"] = truths[season]
        examples.append(example)
    return examples


def _read_label_maps(
    location: Location,
    s2_granules: Sequence[str],
    source: sources.Source,
    tile_size: int | None,
    has_truth: bool | None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Reads the label and truth maps of all seasons, each (T,T) uint8; see `read_location`."""
    labels = []
    truths = []
    for granule in s2_granules:
        folder = f"dw_noisy_labels/{location.location_id}/{granule}"
        labels.append(_read_labels(source, f"{folder}/label.tif", tile_size))
        tile_size = labels[0].shape[0]
        if has_truth is None:
            has_truth = source.has_file(f"{folder}/truth.tif")
        if has_truth:
            truths.append(_read_labels(source, f"{folder}/truth.tif", tile_size))
        elif source.has_file(f"{folder}/truth.tif"):
            raise errors.BadFileError(
                f"{folder}/truth.tif",
                "unexpected: either all labels have a truth beside them, or none",
            )
    return labels, truths


def _read_images(
    location: Location,
    granules: tuple[str, str],
    source: sources.Source,
    tile_size: int,
    s2_offset: int,
) -> records.Example:
    """Reads, checks and scales the S1 and S2 granule of a season; see `read_location`."""
    s1_granule, s2_granule = granules
    s1_folder = f"s1/{location.location_id}/{s1_granule}"
    s2_folder = f"s2c/{location.location_id}/{s2_granule}"
    s1 = {band: bands.read_band(source, f"{s1_folder}/{band}.tif") for band in sensors.S1_BANDS}
    s2 = {band: bands.read_band(source, f"{s2_folder}/{band}.tif") for band in sensors.S2_BANDS}
    example = {
        "s1": np.stack(
            [
                bands.scale_s1(f"{s1_folder}/{name}.tif", name, band.pixels, (tile_size,) * 2)
                for name, band in s1.items()
            ],
            axis=-1,
        ),
        "location_id": location.location_id,
        "crs": s2["B2"].crs,
        "transform": np.array(s2["B2"].transform[:6], np.float64),
        "s1_crs": s1["VV"].crs,
        "s1_transform": np.array(s1["VV"].transform[:6], np.float64),
        "s1_granule": s1_granule,
        "s2_granule": s2_granule,
        "s1_timestamp": timestamp(s1_granule),
        "s2_timestamp": timestamp(s2_granule),
    }
    for metres, names in sensors.S2_BANDS_BY_RESOLUTION.items():
        size = (tile_size * 10 // metres,) * 2
        example[f"s2_{metres}m"] = np.stack(
            [
                bands.scale_s2(f"{s2_folder}/{name}.tif", name, s2[name].pixels, size, s2_offset)
                for name in names
            ],
            axis=-1,
        )
    return example


def _pair_granules(location: Location, source: sources.Source) -> list[tuple[str, str]]:
    """(S1 granule, S2 granule) of each season: both sorted by date, paired by rank."""
    s1_folder = f"s1/{location.location_id}"
    s1_granules = source.folders(s1_folder)
    if not location.granules:
        raise errors.BadFileError(TABLE, "no season listed for this location")
    if len(set(location.granules)) < len(location.granules):
        raise errors.BadFileError(TABLE, "a season of this location is listed twice")
    if len(s1_granules) != len(location.granules):
        raise errors.BadFileError(
            s1_folder,
            f"{len(s1_granules)} S1 granules for the {len(location.granules)} seasons in {TABLE}",
        )
    pairs = []
    for folder, granules in ((s1_folder, s1_granules), (TABLE, location.granules)):
        try:
            pairs.append(sorted(granules, key=lambda granule: (timestamp(granule), granule)))
        except ValueError as error:
            raise errors.BadFileError(folder, str(error)) from error
    return list(zip(*pairs, strict=True))


def _read_labels(source: sources.Source, path: str, tile_size: int | None) -> np.ndarray:
    """Reads a label or truth map: (T,T) uint8, 0..8 and 255; T its own if `tile_size` is None."""
    pixels = bands.read_band(source, path).pixels
    side = tile_size or pixels.shape[0]
    bands.check_size(path, pixels, (side, side))
    if pixels.shape[0] % 6:
        raise errors.BadFileError(
            path,
            f"{pixels.shape[0]} pixels a side, but bands at 10, 20 and 60 m need a multiple of 6",
        )
    known = (pixels >= 0) & (pixels < sensors.NUM_CLASSES) | (pixels == sensors.IGNORE_LABEL)
    if not known.all():
        values = np.unique(pixels[~known])
        shown = ", ".join(map(str, values[:10])) + (", ..." if values.size > 10 else "")
        raise errors.BadFileError(path, f"labels {shown} are neither 0..8 nor 255")
    return pixels.astype(np.uint8)


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
