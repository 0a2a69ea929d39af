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

import numpy as np
import tensorflow_datasets as tfds

from cromss_jax import sensors
from data_prep import builder, nol_locations, report, sources
from data_prep.nol_table import TABLE, read_table

COMPONENTS = ("s1", "s2c", "dw_noisy_labels", TABLE)


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
            f"{TABLE}. To try without data, make a sample: "
            "python -m data_prep.sample --output_dir=DIR",
        )
    return source


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
        s2_offset: int = 0,
    ):
        """Finds the tree. Its first readable location gives the tile size and whether truth exists.

        Args:
          source_dir: the tree, or what `sources.Source` finds one in.
          data_dir: the folder of TFDS data sets.
          num_workers: processes that read.
          max_bad_locations: number of locations that may be skipped.
          s2_offset: see `nol_locations.read_location`.

        Raises:
          sources.SourceError: if there is no such tree.
          errors.BuildError: if its table is wrong, or too many locations are bad.
        """
        data_dir = sources.absolute(data_dir)
        source = find_source(source_dir)
        locations = read_table(source.read(TABLE))
        max_seasons = max(1, *(len(location.granules) for location in locations))
        read = functools.partial(
            nol_locations.read_location, source=source, max_seasons=max_seasons, s2_offset=s2_offset
        )
        report_path = data_dir / f"{self.name}.bad_locations.csv"
        example = builder.first_readable(
            read, locations, report.BadLocations(report_path, max_bad_locations)
        )
        tile_size = example["s1"].shape[0]
        has_truth = "truth" in example
        super().__init__(
            data_dir=data_dir,
            splits={"train": locations},
            read=functools.partial(read, tile_size=tile_size, has_truth=has_truth),
            features=nol_locations.features(tile_size, max_seasons, has_truth),
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
            bad_locations=report.BadLocations(report_path, max_bad_locations),
        )
