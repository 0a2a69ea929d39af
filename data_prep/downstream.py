"""The downstream data sets: tiles with one date of imagery and one label map each.

Imagery is at 10 m, in files of 2 and 13 bands. `LAYOUT` of each builder says where the files are.
The scaling is that of pretraining (`bands`).
"""

import dataclasses
import functools
import itertools
import os

import tensorflow_datasets as tfds

from cromss_jax import sensors
from data_prep import builder, errors, geotiff, report, sources, tile_files, tiles
from data_prep.labels import LabelMap


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
            f"{' or '.join(names)}. To try without data, make a sample: "
            f"python -m data_prep.sample --format={sample_format} --output_dir=DIR",
        )
    return source, splits


def _measure(tile: tile_files.Tile, source: sources.Source) -> tile_files.Tile:
    """Adds the size of its labels to a tile. Files that cannot be opened are reported later."""
    if tile.fault:
        return tile
    try:
        size = geotiff.read_size(source.read(tile.paths["labels"]))
    except (sources.UnreadableError, geotiff.GeotiffError):
        return tile
    return dataclasses.replace(tile, size=size)


class TileBuilder(builder.LocationBuilder, skip_registration=True):
    """A downstream data set: a record for each tile, or for each of its patches.

    Attributes:
      LAYOUT: where the files are.
      LABEL_MAP: from values of label files to classes.
      LEGEND: the classes.
      SAMPLE_FORMAT: the name of the layout in the sample command.
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
        """Finds the tree, pairs its files, and measures its largest tile.

        Args:
          source_dir: the tree, or what `sources.Source` finds one in.
          data_dir: the folder of TFDS data sets.
          num_workers: processes that read.
          max_bad_locations: number of tiles that may be skipped.
          s2_offset: see `bands.scale_s2`.
          patch_size: side of the patches that tiles are cut into; 0 does not cut them.

        Raises:
          sources.SourceError: if there is no such tree.
          errors.BuildError: if too many tiles are skipped, or patches are larger than any tile.
        """
        data_dir = sources.absolute(data_dir)
        source, names = find_source(source_dir, self.LAYOUT, self.SAMPLE_FORMAT)
        splits = {}
        for split in names:
            found = tile_files.find_tiles(source, self.LAYOUT, split)
            splits[split] = [_measure(tile, source) for tile in found]
        read = functools.partial(
            tiles.read_records, source=source, label_map=self.LABEL_MAP, s2_offset=s2_offset
        )
        report_path = data_dir / f"{self.name}.bad_locations.csv"
        # The first that can be read is the largest. A damaged file does not decide the size.
        example = builder.first_readable(
            functools.partial(read, tile_size=0, patch_size=0),
            sorted(itertools.chain(*splits.values()), key=lambda tile: -max(tile.size)),
            report.BadLocations(report_path, max_bad_locations),
        )
        tile_size = max(example["height"], example["width"])
        if patch_size > tile_size:
            raise errors.BuildError(
                f"--patch_size={patch_size} is larger than the largest tile, {tile_size} pixels: "
                "choose a smaller one, or leave --patch_size out"
            )
        side = patch_size or tile_size
        self._patch_size = patch_size
        super().__init__(
            data_dir=data_dir,
            splits=splits,
            read=functools.partial(read, tile_size=tile_size, patch_size=patch_size),
            features=tiles.features(side),
            metadata={
                "tile_size": side,
                "has_truth": False,
                "s2_offset": s2_offset,
                "patch_size": patch_size,
                "num_empty_patches": {split: 0 for split in splits},
                # Pairs: an object's order is not kept.
                "legend": [list(pair) for pair in self.LEGEND.items()],
            },
            location_bytes=tiles.num_patches((tile_size, tile_size), patch_size)
            * side**2
            * (len(sensors.S1_BANDS) + len(sensors.S2_BANDS) + 1),
            num_workers=num_workers,
            bad_locations=report.BadLocations(report_path, max_bad_locations),
        )

    def _count(self, split: str, location: tile_files.Tile, num_records: int) -> None:
        super()._count(split, location, num_records)
        empty = tiles.num_patches(location.size, self._patch_size) - num_records
        self._metadata["num_empty_patches"][split] += empty


class Ssl4eoS12Dw(TileBuilder):
    """SSL4EO-S12@DW: Dynamic World labels made by people, 9 classes."""

    VERSION = tfds.core.Version("1.0.0")
    LAYOUT = tile_files.SSL4EO_S12_DW
    # 0 is unmarked, 10 is cloud.
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
