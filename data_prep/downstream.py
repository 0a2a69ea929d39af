"""The downstream data sets: tiles with one date of imagery and one label map each.

Imagery is at 10 m in files of 2 and 13 bands; `LAYOUT` of each builder tells where they lie.
Scaling is that of pretraining (`bands`).
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds

from cromss_jax import sensors
from data_prep import bands, geotiff, records, sources, tile_files


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """What the values of a label file stand for.

    Attributes:
      classes: the class of each value that has one.
      ignored: values without a class; None stands for all others.
    """

    classes: Mapping[int, int]
    ignored: tuple[int, ...] | None

    def apply(self, path: str, pixels: np.ndarray) -> np.ndarray:
        """Values (H, W) of any dtype to classes, uint8, 255 where ignored.

        Raises:
          records.BadFileError: if there are values that stand for nothing.
        """
        labels = np.full(pixels.shape, sensors.IGNORE_LABEL, np.uint8)
        known = np.full(pixels.shape, self.ignored is None)
        for value in self.ignored or ():
            known |= pixels == value
        for value, label in self.classes.items():
            here = pixels == value
            labels[here] = label
            known |= here
        if not known.all():
            values = np.unique(pixels[~known])
            shown = ", ".join(map(str, values[:10])) + (", ..." if values.size > 10 else "")
            needed = sorted({*self.classes, *(self.ignored or ())})
            raise records.BadFileError(path, f"labels {shown} are not {needed[0]}..{needed[-1]}")
        return labels


def find_source(
    source_dir: str | os.PathLike, layout: tile_files.Layout, sample_format: str
) -> tuple[sources.Source, list[str]]:
    """Finds the tree.

    Returns:
      The tree, and those of our splits that it has.

    Raises:
      sources.SourceError: if a folder is missing or empty.
    """
    splits = [split for split in layout.splits if split not in layout.optional_splits]
    folders = [folder for split in splits for folder in layout.folders(split).values()]
    missing = folders
    if sources.absolute(source_dir).exists():
        source = sources.Source(source_dir, layout.components)
        for split in sorted(layout.optional_splits):
            optional = layout.folders(split).values()
            if any(source.files(folder) for folder in optional):
                splits.append(split)
                folders = [*folders, *optional]
        missing = [folder for folder in folders if not source.files(folder)]
    if missing:
        names = [layout.splits[split] for split in layout.splits]
        raise sources.not_found(
            missing,
            source_dir,
            f"A tree of {', '.join(layout.paths.values())} is needed, split being "
            f"{' or '.join(names)}. Without data at hand, make a sample: "
            f"python -m data_prep.sample --format={sample_format} --output_dir=DIR",
        )
    return source, splits


def _measure(tile: tile_files.Tile, source: sources.Source) -> tile_files.Tile:
    """Adds the size of its labels to a tile; reading it will tell what is wrong with others."""
    if tile.fault:
        return tile
    try:
        size = geotiff.read_size(source.read(tile.paths["labels"]))
    except (sources.UnreadableError, geotiff.GeotiffError):
        return tile
    return dataclasses.replace(tile, size=size)


def read_tile(
    tile: tile_files.Tile, *, source: sources.Source, label_map: LabelMap, s2_offset: int
) -> records.Example:
    """Reads, checks and scales one tile of H x W pixels.

    Args:
      tile: which.
      source: where its files are.
      label_map: of its labels.
      s2_offset: see `bands.scale_s2`.

    Returns:
      s1 (H,W,2), s2 (H,W,13) in the order of `sensors.S2_BANDS`, labels (1,H,W), all uint8;
      `season` 0; `location_id`; `height` and `width`; `crs` and `transform` (6,) of the S2 file.

    Raises:
      records.BadFileError: if the files do not belong together, or one of them is missing,
        damaged, of another size than the labels, of another dtype or number of bands than needed,
        or holds values it must not.
    """
    if tile.fault:
        raise records.BadFileError(*tile.fault)
    label_file = bands.read_bands(source, tile.paths["labels"])
    # A file of more than one band has its labels in the second.
    band = 0 if len(label_file.pixels) == 1 else 1
    labels = label_map.apply(tile.paths["labels"], label_file.pixels[band])
    s1 = _read_image(source, tile.paths["s1"], len(sensors.S1_BANDS))
    s2 = _read_image(source, tile.paths["s2"], len(sensors.S2_BANDS))
    return {
        "s1": np.stack(
            [
                bands.scale_s1(tile.paths["s1"], name, pixels, labels.shape)
                for name, pixels in zip(sensors.S1_BANDS, s1.pixels, strict=True)
            ],
            axis=-1,
        ),
        "s2": np.stack(
            [
                bands.scale_s2(tile.paths["s2"], name, pixels, labels.shape, s2_offset)
                for name, pixels in zip(sensors.S2_BANDS, s2.pixels, strict=True)
            ],
            axis=-1,
        ),
        "labels": labels[None],
        "season": 0,
        "height": labels.shape[0],
        "width": labels.shape[1],
        "location_id": tile.location_id,
        "crs": s2.crs,
        "transform": np.array(s2.transform[:6], np.float64),
    }


def _read_image(source: sources.Source, path: str, num_bands: int) -> geotiff.Bands:
    image = bands.read_bands(source, path)
    if len(image.pixels) != num_bands:
        raise records.BadFileError(path, f"has {len(image.pixels)} bands, {num_bands} are needed")
    return image


def _window(example: records.Example, row: int, column: int, side: int) -> records.Example:
    """The `side` x `side` pixels of a tile from a row and column on, filled up where it ends.

    Images repeat their edge, labels are ignored there; `height` and `width` tell what is real.
    """
    height = min(side, example["height"] - row)
    width = min(side, example["width"] - column)
    rows, columns = slice(row, row + height), slice(column, column + width)
    padding = ((0, side - height), (0, side - width))
    window = dict(example, height=height, width=width)
    for name in ("s1", "s2"):
        window[name] = np.pad(example[name][rows, columns], (*padding, (0, 0)), mode="edge")
    window["labels"] = np.pad(
        example["labels"][:, rows, columns],
        ((0, 0), *padding),
        constant_values=sensors.IGNORE_LABEL,
    )
    a, b, c, d, e, f = example["transform"]
    corner = (a * column + b * row + c, d * column + e * row + f)
    window["transform"] = np.array([a, b, corner[0], d, e, corner[1]], np.float64)
    return window


def num_patches(size: tuple[int, int], patch_size: int) -> int:
    """How many patches without overlap cover a tile; 1 of a `patch_size` of 0, the whole tile."""
    if not patch_size:
        return 1
    height, width = size
    return -(-height // patch_size) * -(-width // patch_size)


def read_records(
    tile: tile_files.Tile,
    *,
    source: sources.Source,
    label_map: LabelMap,
    s2_offset: int,
    tile_size: int,
    patch_size: int,
) -> list[records.Example]:
    """Reads one tile as a record of its own, or as one of each of its patches.

    Args:
      tile: which.
      source: where its files are.
      label_map: of its labels.
      s2_offset: see `bands.scale_s2`.
      tile_size: T, to which tiles are filled up at the bottom and the right; 0 takes the tile's.
      patch_size: side of the patches, likewise filled up; 0 leaves tiles whole.

    Returns:
      Records as in `read_tile` and `features`. A patch has its row and column in the tile
      appended to its `location_id`; those without any labels are left out.

    Raises:
      records.BadFileError: see `read_tile`.
    """
    example = read_tile(tile, source=source, label_map=label_map, s2_offset=s2_offset)
    if not patch_size:
        side = tile_size or max(example["height"], example["width"])
        return [_window(example, 0, 0, side)]
    patches = []
    for row in range(0, example["height"], patch_size):
        for column in range(0, example["width"], patch_size):
            patch = _window(example, row, column, patch_size)
            if (patch["labels"] != sensors.IGNORE_LABEL).any():
                patch["location_id"] += f"_{row}_{column}"
                patches.append(patch)
    return patches


def features(side: int) -> tfds.features.FeaturesDict:
    """What a record of `side` x `side` pixels holds; see `read_tile`."""
    array = records.array_feature
    return tfds.features.FeaturesDict(
        {
            "s1": array(side, side, len(sensors.S1_BANDS)),
            "s2": array(side, side, len(sensors.S2_BANDS)),
            "labels": array(1, side, side),
            "season": np.int32,
            "height": np.int32,
            "width": np.int32,
            "location_id": tfds.features.Text(),
            "crs": tfds.features.Text(),
            "transform": array(6, dtype=np.float64),
        }
    )


class TileBuilder(records.LocationBuilder, skip_registration=True):
    """A downstream data set: a record for each tile, or for each of its patches.

    Attributes:
      LAYOUT: where the files are.
      LABEL_MAP: from the values of label files to classes.
      LEGEND: the classes.
      SAMPLE_FORMAT: what the sample command calls the layout.
    """

    LAYOUT: tile_files.Layout
    LABEL_MAP: LabelMap
    LEGEND: sensors.Legend
    SAMPLE_FORMAT: str

    def __init__(
        self,
        *,
        source_dir: str | os.PathLike,
        data_dir: str | os.PathLike,
        num_workers: int = 1,
        max_bad_locations: int = 0,
        s2_offset: int = 0,
        patch_size: int = 0,
    ):
        """Finds the tree, pairs its files, and learns the size of its largest tile.

        Args:
          source_dir: the tree, or what `sources.Source` finds one in.
          data_dir: where TFDS datasets live.
          num_workers: processes that read.
          max_bad_locations: how many tiles may be set aside.
          s2_offset: see `bands.scale_s2`.
          patch_size: side of the patches to cut tiles into; 0 leaves them whole.

        Raises:
          sources.SourceError: if there is no such tree.
          records.BuildError: if too many tiles are bad, or patches are larger than any tile.
        """
        data_dir = sources.absolute(data_dir)
        source, names = find_source(source_dir, self.LAYOUT, self.SAMPLE_FORMAT)
        splits = {}
        for split in names:
            tiles = tile_files.find_tiles(source, self.LAYOUT, split)
            splits[split] = [_measure(tile, source) for tile in tiles]
        read = functools.partial(
            read_records, source=source, label_map=self.LABEL_MAP, s2_offset=s2_offset
        )
        report = data_dir / f"{self.name}.bad_locations.csv"
        # The first that can be read is the largest: a broken file does not set the size.
        example = records.first_readable(
            functools.partial(read, tile_size=0, patch_size=0),
            sorted(itertools.chain(*splits.values()), key=lambda tile: -max(tile.size)),
            records.BadLocations(report, max_bad_locations),
        )
        tile_size = max(example["height"], example["width"])
        if patch_size > tile_size:
            raise records.BuildError(
                f"--patch_size={patch_size} is larger than the largest tile, {tile_size} pixels: "
                "choose a smaller one, or leave it out to keep tiles whole"
            )
        side = patch_size or tile_size
        self._patch_size = patch_size
        super().__init__(
            data_dir=data_dir,
            splits=splits,
            read=functools.partial(read, tile_size=tile_size, patch_size=patch_size),
            features=features(side),
            metadata={
                "tile_size": side,
                "has_truth": False,
                "s2_offset": s2_offset,
                "patch_size": patch_size,
                "num_empty_patches": {split: 0 for split in splits},
                # Pairs: an object's order is not kept.
                "legend": [list(pair) for pair in self.LEGEND.items()],
            },
            location_bytes=num_patches((tile_size, tile_size), patch_size)
            * side**2
            * (len(sensors.S1_BANDS) + len(sensors.S2_BANDS) + 1),
            num_workers=num_workers,
            bad_locations=records.BadLocations(report, max_bad_locations),
        )

    def _count(self, split: str, location: tile_files.Tile, num_records: int) -> None:
        super()._count(split, location, num_records)
        empty = num_patches(location.size, self._patch_size) - num_records
        self._metadata["num_empty_patches"][split] += empty


class Ssl4eoS12Dw(TileBuilder):
    """SSL4EO-S12@DW: Dynamic World labels made by people, 9 classes."""

    VERSION = tfds.core.Version("1.0.0")
    LAYOUT = tile_files.SSL4EO_S12_DW
    # 0 is unmarked, 10 cloud.
    LABEL_MAP = LabelMap({value: value - 1 for value in range(1, 10)}, ignored=(0, 10))
    LEGEND = sensors.DYNAMIC_WORLD
    SAMPLE_FORMAT = "dw"


class Ssl4eoS12Osm(TileBuilder):
    """SSL4EO-S12@OSM: labels from OpenStreetMap, 13 classes."""

    VERSION = tfds.core.Version("1.0.0")
    LAYOUT = tile_files.SSL4EO_S12_OSM
    # 0 is unmarked.
    LABEL_MAP = LabelMap({value: value - 1 for value in range(1, 14)}, ignored=(0,))
    LEGEND = sensors.OSM
    SAMPLE_FORMAT = "osm"


class Dfc2020(TileBuilder):
    """DFC2020 (IEEE GRSS data fusion contest): 8 of the classes of Dynamic World in its order."""

    VERSION = tfds.core.Version("1.0.0")
    LAYOUT = tile_files.DFC2020
    LABEL_MAP = LabelMap({1: 1, 2: 5, 4: 2, 5: 3, 6: 4, 7: 6, 9: 7, 10: 0}, ignored=None)
    LEGEND = sensors.DFC2020
    SAMPLE_FORMAT = "dfc2020"
