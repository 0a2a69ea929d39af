"""Data sets of tiles with one date of imagery and one label map each: downstream, and SEN12MS.

Imagery is at 10 m, in files of 2 and 13 bands. `LAYOUT` of each builder says where the files are.
The scaling is that of pretraining (`bands`).
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence

import tensorflow_datasets as tfds
from etils import epath

from cromss_jax import files, presets
from cromss_jax.legend import Legend
from data_prep import errors, report
from data_prep.datasets import tile_files, tile_layouts, tiles
from data_prep.finding import file_tree, sources
from data_prep.options import DEFAULT, Options
from data_prep.reading import geotiff
from data_prep.report import Finding
from data_prep.writing import builder, cleaning


def find_files(
    source_dir: str | os.PathLike,
    layout: tile_layouts.Layout,
    sample_format: str,
    index_path: epath.Path | None = None,
    test_cities: Sequence[str] = (),
) -> tuple[file_tree.FileTree, dict[str, list[tile_layouts.TileFile]], list[str]]:
    """Finds the files of a data set.

    Args:
      source_dir: see `file_tree.FileTree`.
      layout: of the data set.
      sample_format: its name in the sample command; empty if it is not there.
      index_path: the file that keeps the index of archives; None for a temporary one.
      test_cities: see `Options`.

    Returns:
      The tree, the files of each of our splits, and the paths of files that are no part of a tile.

    Raises:
      sources.SourceError: if files of a kind are missing.
      errors.BuildError: if the data set has no split and no cities are given.
    """
    missing = tile_files.missing_folders({}, layout)
    unread: list[str] = []
    if files.absolute(source_dir).exists():
        tree = file_tree.FileTree(source_dir)
        found, unread = tile_files.sort_files(tree.paths(), layout)
        # Extracted files may be complete without archives, and zip files without others, which
        # take long to index.
        for only_zip in (True, False):
            if tile_files.missing_folders(found, layout):
                tree.index(index_path, only_zip)
                found, unread = tile_files.sort_files(tree.paths(), layout)
        found = _split_cities(_name_splits(found), layout, test_cities)
        missing = tile_files.missing_folders(found, layout)
    if missing:
        raise sources.not_found(missing, source_dir, _needed(layout, sample_format), unread)
    splits = {split: found[split] for split in layout.splits if split in found}
    unread += [file.path for split in found.keys() - splits.keys() for file in found[split]]
    return tree, splits, sorted(unread)


def _needed(layout: tile_layouts.Layout, sample_format: str) -> str:
    """What a tree must hold, and how to make one, for people."""
    text = f"A tree of {', '.join(layout.paths.values())} is needed"
    if any("{split}" in path for path in layout.paths.values()):
        text += f", split being {' or '.join(layout.splits.values())}"
    text += f". {layout.forms}"
    if sample_format:
        text += (
            " To try without data, make a sample: python -m data_prep.sample "
            f"--format={sample_format} --output_dir=DIR"
        )
    return text


def _name_splits(
    files: dict[str, list[tile_layouts.TileFile]],
) -> dict[str, list[tile_layouts.TileFile]]:
    """Takes the large training set for the training set, where there is no other."""
    if "train" not in files and "train_large" in files:
        files = dict(files)
        files["train"] = files.pop("train_large")
    return files


def _split_cities(
    files: dict[str, list[tile_layouts.TileFile]],
    layout: tile_layouts.Layout,
    test_cities: Sequence[str],
) -> dict[str, list[tile_layouts.TileFile]]:
    """Makes the splits of a data set that has cities instead.

    Raises:
      errors.BuildError: if it is not said which cities are the test split.
    """
    cities = sorted(files.keys() - layout.splits.keys())
    if not cities or any(split in files for split in layout.splits):
        return files
    unknown = sorted(set(test_cities) - set(cities))
    if unknown or not test_cities or len(set(test_cities)) == len(cities):
        given = f"--test_cities={','.join(test_cities)}" if test_cities else "no --test_cities"
        raise errors.BuildError(
            f"the public bundle has no training and test split, and {given} was given: choose "
            f"some, not all, of --test_cities={','.join(cities)}; the others are trained on"
        )
    splits: dict[str, list[tile_layouts.TileFile]] = {"train": [], "test": []}
    for city in cities:
        splits["test" if city in test_cities else "train"] += files[city]
    return splits


def _measure(tile: tile_files.Tile, source: file_tree.FileTree) -> tile_files.Tile:
    """Adds the size of its image to a tile. Files that cannot be opened are reported later."""
    if tile.fault:
        return tile
    try:
        size = geotiff.read_size(source.read(tile.paths.get("s2") or tile.paths["s1"]))
    except (sources.UnreadableError, geotiff.GeotiffError):
        return tile
    return dataclasses.replace(tile, size=size)


class TileBuilder(builder.LocationBuilder, skip_registration=True):
    """A downstream data set: a record for each tile, or for each of its patches.

    Attributes:
      LAYOUT: where the files are.
      LEGEND: the classes, and the values of the label files.
      SAMPLE_FORMAT: the name of the layout in the sample command; empty if it is not there.
    """

    LAYOUT: tile_layouts.Layout
    LEGEND: Legend
    SAMPLE_FORMAT: str

    def __init__(
        self,
        *,
        source_dir: str | os.PathLike,
        data_dir: str | os.PathLike,
        num_workers: int = 1,
        max_bad_locations: int = 0,
        options: Options = DEFAULT,
        patch_size: int = 0,
    ):
        """Finds the tree, pairs its files, and measures its largest tile.

        Args:
          source_dir: see `file_tree.FileTree`.
          data_dir: the folder of TFDS data sets.
          num_workers: processes that read.
          max_bad_locations: number of tiles that may be skipped.
          options: see `Options`.
          patch_size: side of the patches that tiles are cut into; 0 does not cut them.

        Raises:
          sources.SourceError: if there is no such tree.
          errors.BuildError: if too many tiles are skipped, or patches are larger than any tile.
        """
        data_dir = files.absolute(data_dir)
        layout, legends = self._labels(options)
        source, splits, found = self._find_tiles(source_dir, data_dir, options, layout)
        described = options.described_bands(is_native=False)
        read = functools.partial(
            tiles.read_records,
            source=source,
            legends=legends,
            label_band=layout.label_band,
            options=options,
        )
        # The first that can be read is the largest. A damaged file does not decide the size.
        example = builder.first_readable(
            functools.partial(read, tile_size=0, patch_size=0),
            sorted(itertools.chain(*splits.values()), key=lambda tile: -max(tile.size)),
            report.Report(data_dir, self.name, max_bad_locations),
        )
        findings = report.Report(data_dir, self.name, max_bad_locations)
        findings.add(found)
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
            read=cleaning.cleaned(
                functools.partial(read, tile_size=tile_size, patch_size=patch_size),
                options.cleaning,
            ),
            features=tiles.features(side, described, "truth" in legends),
            metadata={
                "tile_size": side,
                "has_truth": "truth" in legends,
                **options.metadata(legends["labels"], described, f"{self.name} in {source_dir}"),
                "patch_size": patch_size,
                "num_empty_patches": {split: 0 for split in splits},
                **({"labels": options.labels} if "truth" in legends else {}),
            },
            location_bytes=tiles.num_patches((tile_size, tile_size), patch_size)
            * side**2
            * (len(described) + len(legends)),
            num_workers=num_workers,
            findings=findings,
            block_size=options.block_size,
        )

    def _labels(self, options: Options) -> tuple[tile_layouts.Layout, dict[str, Legend]]:
        """Where the files are, and the legends of the labels and of the truth if there is one."""
        kinds = (*options.modalities, "labels")
        return self.LAYOUT.of_kinds(kinds), {"labels": options.legend or self.LEGEND}

    def _find_tiles(
        self,
        source_dir: str | os.PathLike,
        data_dir: epath.Path,
        options: Options,
        layout: tile_layouts.Layout,
    ) -> tuple[file_tree.FileTree, dict[str, list[tile_files.Tile]], list[Finding]]:
        """Finds the tiles of each split, and what is not read."""
        index_path = data_dir / f"{self.name}.archives.sqlite"
        source, files, unread = find_files(
            source_dir, layout, self.SAMPLE_FORMAT, index_path, options.test_cities
        )
        splits = {}
        findings = [
            Finding("not read", path, sources.why_unread(path, "no part of a tile"))
            for path in unread
        ]
        for split, split_files in files.items():
            found, unpaired = tile_files.find_tiles(
                split_files, unread, layout, split, options.max_days
            )
            splits[split] = [_measure(tile, source) for tile in found]
            findings += unpaired
        return source, splits, findings

    def _count(self, split: str, location: tile_files.Tile, num_records: int) -> None:
        # Tiles without records are counted, too.
        self._metadata["season_counts"][split].append(num_records)
        empty = tiles.num_patches(location.size, self._patch_size) - num_records
        self._metadata["num_empty_patches"][split] += empty


class Ssl4eoS12Dw(TileBuilder):
    """SSL4EO-S12@DW: Dynamic World labels made by people, 9 classes."""

    VERSION = tfds.core.Version("1.0.0")
    LAYOUT = tile_layouts.SSL4EO_S12_DW
    # 0 is unmarked, 10 is cloud.
    LEGEND = presets.DYNAMIC_WORLD.with_values({v: v - 1 for v in range(1, 10)}, ignored=(0, 10))
    SAMPLE_FORMAT = "dw"


class Ssl4eoS12Osm(TileBuilder):
    """SSL4EO-S12@OSM: labels from OpenStreetMap, 13 classes."""

    VERSION = tfds.core.Version("1.0.0")
    LAYOUT = tile_layouts.SSL4EO_S12_OSM
    LEGEND = presets.OSM
    SAMPLE_FORMAT = "osm"


class Dfc2020(TileBuilder):
    """DFC2020 (IEEE GRSS data fusion contest): 8 of the classes of Dynamic World in its order."""

    VERSION = tfds.core.Version("1.0.0")
    LAYOUT = tile_layouts.DFC2020
    LEGEND = presets.DFC2020
    SAMPLE_FORMAT = "dfc2020"

    def _labels(self, options: Options) -> tuple[tile_layouts.Layout, dict[str, Legend]]:
        """With --labels=lc, MODIS land cover are the labels and the contest's labels the truth."""
        if options.labels != "lc":
            return super()._labels(options)
        if options.legend:
            raise errors.BuildError(
                "--legend and --labels=lc were given, but MODIS land cover has a legend of its own "
                "(IGBP): remove --legend"
            )
        kinds = (*options.modalities, "labels", "truth")
        legends = {"labels": presets.DFC2020_OF_IGBP, "truth": presets.DFC2020}
        return tile_layouts.DFC2020_LC.of_kinds(kinds), legends


class Sen12Ms(TileBuilder):
    """SEN12MS: MODIS land cover as noisy labels, in the 8 classes of DFC2020; one split, train."""

    name = "sen12ms"
    VERSION = tfds.core.Version("1.0.0")
    LAYOUT = tile_layouts.SEN12MS
    LEGEND = presets.DFC2020_OF_IGBP
    SAMPLE_FORMAT = ""
