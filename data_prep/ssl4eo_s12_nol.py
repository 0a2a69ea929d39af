"""SSL4EO-S12 with noisy labels (SSL4EO-S12 v1 + NoL): from its tree to records.

```
s1/0000200/<S1 granule>/{VV,VH}.tif          float dB, or uint8
s2c/0000200/<S2 granule>/{B1,...,B12}.tif    uint16, or uint8
dw_noisy_labels/0000200/<S2 granule>/label.tif   (and truth.tif, if the tree has any)
dw_complete_ids.csv                          ids,sub1,...,subN: the S2 granules of each location
```

Files that are uint8 are already scaled; others go through `sensors.scale_to_uint8`.
"""

import csv
import dataclasses
import datetime
import functools
import os
import re

import numpy as np
import tensorflow_datasets as tfds

from cromss_jax import sensors
from data_prep import bands, records, sources

TABLE = "dw_complete_ids.csv"
COMPONENTS = ("s1", "s2c", "dw_noisy_labels", TABLE)
LOCATION_ID_DIGITS = 7


@dataclasses.dataclass(frozen=True)
class Location:
    """A row of the table.

    Attributes:
      location_id: folder name, 7 digits.
      granules: its S2 granules, as listed.
    """

    location_id: str
    granules: tuple[str, ...]


def find_source(source_dir: str | os.PathLike) -> sources.Source:
    """Finds the tree.

    Raises:
      sources.SourceError: if a component is missing.
    """
    missing = list(COMPONENTS)
    if sources.absolute(source_dir).exists():
        source = sources.Source(source_dir, COMPONENTS)
        missing = [component for component in COMPONENTS if component not in source.found]
    if missing:
        raise sources.not_found(
            missing,
            source_dir,
            "An SSL4EO-S12 + NoL tree is needed: s1/ID/GRANULE/{VV,VH}.tif, "
            "s2c/ID/GRANULE/{B1,...,B12}.tif, dw_noisy_labels/ID/GRANULE/label.tif and "
            f"{TABLE}. Without data at hand, make a sample: "
            "python -m data_prep.sample --output_dir=DIR",
        )
    return source


def read_table(data: bytes) -> list[Location]:
    """Reads `dw_complete_ids.csv`.

    Args:
      data: the file: a column `ids`, then one S2 granule a column; empty cells are seasons that
        the location lacks.

    Raises:
      records.BuildError: if it is not such a table, is empty, or lists a location twice.
    """
    rows = list(csv.reader(data.decode("utf-8-sig", errors="replace").splitlines()))
    if not rows or rows[0][0].strip() != "ids" or len(rows[0]) < 2:
        found = ",".join(rows[0]) if rows else "an empty file"
        raise records.BuildError(f"{TABLE} begins with {found!r}, needs columns ids,sub1,sub2,...")
    locations: dict[str, Location] = {}
    for row in rows[1:]:
        cells = [cell.strip() for cell in row if cell.strip()]
        if not cells:
            continue
        if not cells[0].isdecimal():
            raise records.BuildError(f"{TABLE} has the id {cells[0]!r}, needs whole numbers")
        location_id = cells[0].zfill(LOCATION_ID_DIGITS)
        if location_id in locations:
            raise records.BuildError(f"{TABLE} lists location {location_id} twice")
        locations[location_id] = Location(location_id, tuple(cells[1:]))
    if not locations:
        raise records.BuildError(f"{TABLE} lists no locations")
    return list(locations.values())


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
      location: which.
      source: where its files are.
      max_seasons: S, the seasons to which `labels` are filled up.
      s2_offset: subtracted from raw S2 pixels (floor 0) before scaling: 1000 for products of
        processing baseline 04.00 and later, which add it.
      tile_size: T, pixels along a side at 10 m; None takes the label's.
      has_truth: whether a `truth.tif` must lie beside each label (True) or must not (False); None
        asks the first season.

    Returns:
      The record of each season by date: s1 (T,T,2), s2_10m (T,T,4), s2_20m (T/2,T/2,6), s2_60m
      (T/6,T/6,3), labels (S,T,T) of all seasons, 255 in those that the location lacks, and, where
      the tree has it, truth (T,T), all uint8; `season` an index into labels; georeference,
      granules and timestamps as in `features`.

    Raises:
      records.BadFileError: if a file is missing, damaged, of another size or dtype than its band
        demands, or holds values it must not.
    """
    seasons = _pair_granules(location, source)
    labels = []
    truths = []
    for _, granule in seasons:
        folder = f"dw_noisy_labels/{location.location_id}/{granule}"
        labels.append(_read_labels(source, f"{folder}/label.tif", tile_size))
        tile_size = labels[0].shape[0]
        if has_truth is None:
            has_truth = source.has_file(f"{folder}/truth.tif")
        if has_truth:
            truths.append(_read_labels(source, f"{folder}/truth.tif", tile_size))
        elif source.has_file(f"{folder}/truth.tif"):
            raise records.BadFileError(
                f"{folder}/truth.tif", "unexpected: other labels have none, and all must or none"
            )
    # One array for all seasons: it crosses from the worker once.
    padding = ((0, max_seasons - len(labels)), (0, 0), (0, 0))
    all_labels = np.pad(np.stack(labels), padding, constant_values=sensors.IGNORE_LABEL)

    examples = []
    for season, (s1_granule, s2_granule) in enumerate(seasons):
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
            "labels": all_labels,
            "season": season,
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
                    bands.scale_s2(
                        f"{s2_folder}/{name}.tif", name, s2[name].pixels, size, s2_offset
                    )
                    for name in names
                ],
                axis=-1,
            )
        if has_truth:
            example["truth"] = truths[season]
        examples.append(example)
    return examples


def _pair_granules(location: Location, source: sources.Source) -> list[tuple[str, str]]:
    """(S1 granule, S2 granule) of each season: both sorted by date, paired by rank."""
    s1_folder = f"s1/{location.location_id}"
    s1_granules = source.folders(s1_folder)
    if not location.granules:
        raise records.BadFileError(TABLE, "no season listed for this location")
    if len(set(location.granules)) < len(location.granules):
        raise records.BadFileError(TABLE, "a season of this location is listed twice")
    if len(s1_granules) != len(location.granules):
        raise records.BadFileError(
            s1_folder,
            f"{len(s1_granules)} S1 granules for the {len(location.granules)} seasons in {TABLE}",
        )
    pairs = []
    for folder, granules in ((s1_folder, s1_granules), (TABLE, location.granules)):
        try:
            pairs.append(sorted(granules, key=lambda granule: (timestamp(granule), granule)))
        except ValueError as error:
            raise records.BadFileError(folder, str(error)) from error
    return list(zip(*pairs, strict=True))


def _read_labels(source: sources.Source, path: str, tile_size: int | None) -> np.ndarray:
    """Reads a label or truth map: (T,T) uint8, 0..8 and 255; T its own if `tile_size` is None."""
    pixels = bands.read_band(source, path).pixels
    side = tile_size or pixels.shape[0]
    bands.check_size(path, pixels, (side, side))
    if pixels.shape[0] % 6:
        raise records.BadFileError(
            path, f"{pixels.shape[0]} pixels a side; bands at 10, 20 and 60 m need a multiple of 6"
        )
    known = (pixels >= 0) & (pixels < sensors.NUM_CLASSES) | (pixels == sensors.IGNORE_LABEL)
    if not known.all():
        values = np.unique(pixels[~known])
        shown = ", ".join(map(str, values[:10])) + (", ..." if values.size > 10 else "")
        raise records.BadFileError(path, f"labels {shown} are neither 0..8 nor 255")
    return pixels.astype(np.uint8)


def features(tile_size: int, max_seasons: int, has_truth: bool) -> tfds.features.FeaturesDict:
    """What a record holds; see `read_location`."""
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


class Ssl4eoS12Nol(records.LocationBuilder):
    """SSL4EO-S12 with noisy Dynamic World labels, a record for each season of each location."""

    VERSION = tfds.core.Version("1.1.0")

    def __init__(
        self,
        *,
        source_dir: str | os.PathLike,
        data_dir: str | os.PathLike,
        num_workers: int = 1,
        max_bad_locations: int = 0,
        s2_offset: int = 0,
    ):
        """Finds the tree, and learns tile size and truth from its first readable location.

        Args:
          source_dir: the tree, or what `sources.Source` finds one in.
          data_dir: where TFDS datasets live.
          num_workers: processes that read.
          max_bad_locations: how many locations may be set aside.
          s2_offset: see `read_location`.

        Raises:
          sources.SourceError: if there is no such tree.
          records.BuildError: if its table is wrong, or too many locations are bad.
        """
        data_dir = sources.absolute(data_dir)
        source = find_source(source_dir)
        locations = read_table(source.read(TABLE))
        max_seasons = max(1, *(len(location.granules) for location in locations))
        read = functools.partial(
            read_location, source=source, max_seasons=max_seasons, s2_offset=s2_offset
        )
        report = data_dir / f"{self.name}.bad_locations.csv"
        example = records.first_readable(
            read, locations, records.BadLocations(report, max_bad_locations)
        )
        tile_size = example["s1"].shape[0]
        has_truth = "truth" in example
        super().__init__(
            data_dir=data_dir,
            splits={"train": locations},
            read=functools.partial(read, tile_size=tile_size, has_truth=has_truth),
            features=features(tile_size, max_seasons, has_truth),
            metadata={
                "tile_size": tile_size,
                "max_seasons": max_seasons,
                "has_truth": has_truth,
                "s2_offset": s2_offset,
                # Pairs: an object's order is not kept.
                "legend": [list(pair) for pair in sensors.DYNAMIC_WORLD.items()],
            },
            location_bytes=max_seasons
            * sum(value.nbytes for value in example.values() if isinstance(value, np.ndarray)),
            num_workers=num_workers,
            bad_locations=records.BadLocations(report, max_bad_locations),
        )
