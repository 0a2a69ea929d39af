"""Sizes and shapes of a data set, without reading its records: for planning a run.

If the configuration's data set does not exist, the published one is described.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cromss_jax import files, presets, sensors
from cromss_jax.data import input_pipeline, validation_split
from cromss_jax.legend import Legend


@dataclasses.dataclass(frozen=True)
class Description:
    """Sizes of a data set.

    Attributes:
      source: folder of the data set, or name of the published one.
      num_locations: number of locations, those for validation included.
      tile_size: pixels at 10 m.
      seasons: largest number of seasons of a location.
      features: names of a record's features.
      legend: the classes.
      bands: of the imagery, in the order of the records' arrays.
      blocks: see `input_pipeline.TileDataset`.
      season_counts: likewise; None of the published data set.
    """

    source: str
    num_locations: int
    tile_size: int
    seasons: int
    features: tuple[str, ...]
    legend: Legend
    bands: tuple[sensors.Band, ...]
    blocks: np.ndarray | None = None
    season_counts: np.ndarray | None = None

    def padded_to(self, size: int) -> "Description":
        """The same as `TileDataset.padded_to`."""
        padded = input_pipeline.padded_size(self.tile_size, size, self.bands)
        return dataclasses.replace(self, tile_size=padded)


# SSL4EO-S12 with noisy labels, as data_prep builds it from the distributed files.
_PUBLISHED = Description(
    source="SSL4EO-S12 + NoL as published",
    num_locations=103_793,
    tile_size=264,
    seasons=4,
    features=("s1", *(f"s2_{m}m" for m in sensors.S2_BANDS_BY_RESOLUTION), "labels", "season"),
    legend=presets.DYNAMIC_WORLD,
    bands=sensors.preset_bands(is_native=True),
)


def describe(config: ml_collections.ConfigDict, **overrides: int | None) -> Description:
    """Describes the configuration's data set, or the published one if it does not exist.

    Args:
      config: the configuration.
      **overrides: values for fields of `Description`; None leaves a field as found.

    Raises:
      DataError: if the data set cannot be read, or if its tiles do not have a whole number of
        pixels in every band.
      files.PathError: if the program cannot read from the storage of the data set.
    """
    found = _PUBLISHED
    folder = files.absolute(config.data.dir) / config.data.name
    if folder.exists():
        dataset = input_pipeline.open_dataset(
            config.data.dir, config.data.name, max_bad_records=config.data.max_bad_records
        )
        found = Description(
            source=str(folder),
            num_locations=dataset.num_locations,
            tile_size=dataset.tile_size,
            seasons=len(dataset.read(0)[0]["labels"]),
            features=dataset.features,
            legend=dataset.legend,
            bands=dataset.bands,
            blocks=dataset.blocks,
            season_counts=dataset.season_counts,
        )
    given = {name: value for name, value in overrides.items() if value is not None}
    found = dataclasses.replace(found, **given)
    metres = max(band.metres for band in found.bands)
    coarsest = metres // 10
    if found.tile_size % coarsest:
        raise input_pipeline.DataError(
            f"the tile size is {found.tile_size} pixels; bands at {metres} m need a multiple of "
            f"{coarsest}, such as {max(found.tile_size // coarsest, 1) * coarsest}"
        )
    return found


def record_shapes(
    described: Description, modalities: Sequence[str], batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch that `input_pipeline.read_batch` reads from the data set."""
    size = described.tile_size
    shapes = {"labels": (described.seasons, size, size), "truth": (size, size)}
    metres = {band.array: band.metres for band in described.bands}
    for array, names in sensors.arrays_of(described.bands).items():
        side = size * 10 // metres[array]
        shapes[array] = (side, side, len(names))
    names = [name for m in modalities for name in input_pipeline.IMAGE_FEATURES[m]] + [
        "labels",
        "truth",
    ]
    records = {
        name: jax.ShapeDtypeStruct((batch_size, *shapes[name]), jnp.uint8)
        for name in names
        if name in described.features
    }
    records["season"] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    records["is_real"] = jax.ShapeDtypeStruct((batch_size,), jnp.bool_)
    return records


def split_sizes(config: ml_collections.ConfigDict, described: Description) -> tuple[int, int]:
    """Numbers of locations for training and of records, all their seasons, for validation."""
    blocks, counts = described.blocks, described.season_counts
    if counts is None or len(counts) != described.num_locations:
        # Of no data set, or another number of locations was given.
        blocks, counts = None, np.full(described.num_locations, described.seasons)
    locations, held_back = validation_split.split_locations(
        described.num_locations, config.data.validation_fraction, config.seed, blocks
    )
    return len(locations), int(np.minimum(counts[held_back], described.seasons).sum())
