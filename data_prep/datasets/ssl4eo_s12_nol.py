"""SSL4EO-S12 with noisy labels (SSL4EO-S12 v1 + NoL): from its tree to records.

```
s1/0000200/<S1 granule>/{VV,VH}.tif          float dB, or uint8
s2c/0000200/<S2 granule>/{B1,...,B12}.tif    uint16, or uint8
dw_noisy_labels/0000200/<S2 granule>/label.tif   (and truth.tif, if the tree has any)
dw_complete_ids.csv                          ids,sub1,...,subN: the S2 granules of each location
```

Files that are uint8 are already scaled; others go through `sensors.scale_to_uint8`.
"""

import functools
import os
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from cromss_jax import files, presets, sensors
from data_prep import errors, report
from data_prep.datasets import nol_locations
from data_prep.datasets.nol_table import TABLE, Location, read_table
from data_prep.finding import component_tree, sources
from data_prep.options import DEFAULT, Options
from data_prep.report import Finding
from data_prep.writing import builder, cleaning

# The names that each component has in the published archives.
COMPONENTS = {
    "s1": ("s1", "s1_grd"),
    "s2c": ("s2c", "s2_l1c"),
    "dw_noisy_labels": ("dw_noisy_labels",),
    TABLE: (TABLE,),
}


def find_source(
    source_dir: str | os.PathLike,
    index_path: epath.Path | None = None,
    modalities: Sequence[str] = sensors.MODALITIES,
) -> tuple[component_tree.ComponentTree, list[Location], tuple[Finding, ...]]:
    """Finds the tree, and indexes its archives.

    Args:
      source_dir: see `component_tree.ComponentTree`.
      index_path: the file that keeps the index of archives; None for a temporary one.
      modalities: the imagery that is needed.

    Returns:
      The tree, the locations of its table, and what of it was not read.

    Raises:
      sources.SourceError: if a component is missing.
      errors.BuildError: if the table is wrong.
    """
    folders = {"s1": "s1", "s2": "s2c"}
    left = {folders[m] for m in sensors.MODALITIES if m not in modalities}
    components = {name: names for name, names in COMPONENTS.items() if name not in left}
    missing = list(components)
    unread = ()
    if files.absolute(source_dir).exists():
        source = component_tree.ComponentTree(source_dir, components)
        # The table says which locations to index. It is a file, or in the zip of the labels.
        if TABLE not in source.found:
            source.index(only_zip=True)
        locations = _read_table(source) if TABLE in source.found else None
        ids = None if locations is None else [location.location_id for location in locations]
        source.index(index_path, ids)
        missing = [component for component in components if component not in source.found]
        unread = source.unread
    if missing:
        raise sources.not_found(
            missing,
            source_dir,
            "An SSL4EO-S12 + NoL tree is needed: s1/ID/GRANULE/{VV,VH}.tif, "
            "s2c/ID/GRANULE/{B1,...,B12}.tif, dw_noisy_labels/ID/GRANULE/label.tif and "
            f"{TABLE}. To try without data, make a sample: "
            "python -m data_prep.sample --output_dir=DIR",
            unread,
        )
    if locations is None:
        locations = _read_table(source)
    return source, locations, _unread(source, locations)


def _read_table(source: component_tree.ComponentTree) -> list[Location]:
    """The table of a tree; raises errors.BuildError if it cannot be read."""
    try:
        data = source.read(TABLE)
    except sources.UnreadableError as error:
        raise errors.BuildError(f"{TABLE} cannot be read: {error}") from error
    return read_table(data)


def _unread(source: component_tree.ComponentTree, locations: list[Location]) -> tuple[Finding, ...]:
    """Files and folders of the tree that are no part of the data set, or not in its table."""
    ids = {location.location_id for location in locations}
    found = [
        Finding("not read", path, sources.why_unread(path, "no part of the data set"))
        for path in source.unread
    ]
    for component in COMPONENTS:
        others = sorted(set(source.folders(component)) - ids)
        if others:
            detail = f"{len(others)} folders are not in {TABLE}: {sources.listed(others)}"
            found.append(Finding("not read", component, detail))
        for name in source.files(component):
            found.append(Finding("not read", f"{component}/{name}", "no location"))
    for name, count, names in source.left_out():
        if count:
            detail = f"{count} files are no part of the data set: {sources.listed(names)}"
            found.append(Finding("not read", name, detail))
    return tuple(found)


class Ssl4eoS12Nol(builder.LocationBuilder):
    """SSL4EO-S12 with noisy Dynamic World labels, a record for each season of each location."""

    VERSION = tfds.core.Version("1.1.0")

    def __init__(
        self,
        *,
        source_dir: str | os.PathLike,
        data_dir: str | os.PathLike,
        num_workers: int = 1,
        max_bad_locations: int = 0,
        options: Options = DEFAULT,
    ):
        """Finds the tree. Its first readable location gives the tile size and whether truth exists.

        Args:
          source_dir: see `component_tree.ComponentTree`.
          data_dir: the folder of TFDS data sets.
          num_workers: processes that read.
          max_bad_locations: number of locations that may be skipped.
          options: see `Options`.

        Raises:
          sources.SourceError: if there is no such tree.
          errors.BuildError: if its table is wrong, or too many locations are bad.
        """
        data_dir = files.absolute(data_dir)
        index_path = data_dir / f"{self.name}.archives.sqlite"
        source, locations, unread = find_source(source_dir, index_path, options.modalities)
        max_seasons = max(1, *(len(location.granules) for location in locations))
        read = functools.partial(
            nol_locations.read_location, source=source, max_seasons=max_seasons, options=options
        )
        example = builder.first_readable(
            read, locations, report.Report(data_dir, self.name, max_bad_locations)
        )
        findings = report.Report(data_dir, self.name, max_bad_locations)
        findings.add(unread)
        tile_size = example["labels"].shape[-1]
        has_truth, is_native = "truth" in example, "s2" not in example
        described = options.described_bands(is_native)
        super().__init__(
            data_dir=data_dir,
            splits={"train": locations},
            read=cleaning.cleaned(
                functools.partial(
                    read, tile_size=tile_size, has_truth=has_truth, is_native=is_native
                ),
                options.cleaning,
            ),
            features=nol_locations.features(tile_size, max_seasons, has_truth, described),
            metadata={
                "tile_size": tile_size,
                "max_seasons": max_seasons,
                "has_truth": has_truth,
                **options.metadata(
                    options.legend or presets.DYNAMIC_WORLD,
                    described,
                    f"{self.name} in {source_dir}",
                ),
            },
            location_bytes=max_seasons
            * sum(value.nbytes for value in example.values() if isinstance(value, np.ndarray)),
            num_workers=num_workers,
            findings=findings,
            block_size=options.block_size,
        )
