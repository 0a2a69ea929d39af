"""What is audited, location by location: a built data set, or a map on one scene (`scene`)."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from cromss_jax import sensors
from cromss_jax.auditing import maps
from cromss_jax.data import input_pipeline
from cromss_jax.legend import Legend

# By location: probabilities [S, T, T, C] by modality; labels, prior and perhaps truth.
Judge = Callable[[int], tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]


class Subject(Protocol):
    """What `job.audit` reads and writes.

    Attributes:
      legend: of the labels.
      num_locations: how many there are.
      has_truth: whether true classes are known.
    """

    legend: Legend
    num_locations: int
    has_truth: bool

    def location(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What is known of a location, see `Judge`."""

    def tiles(self, index: int) -> list[maps.Tile]:
        """The dates of a location."""

    def write(self, tile: maps.Tile, layers: Mapping[str, np.ndarray]) -> None:
        """Takes the maps of a tile, see `maps.layers_of`."""

    def finish(self) -> None:
        """Lets the maps of all tiles be on disk."""

    def image(self, number: int) -> dict[str, np.ndarray]:
        """What is shown of a tile, by its number among those of all locations.

        Returns:
          [H, W] uint8 by the name of the band, as far as they have the tile's size, and `truth`
          where it is known.
        """


class DataSet:
    """A built data set. Each date of each location gets maps of its own."""

    def __init__(self, dataset: input_pipeline.TileDataset, judge: Judge, folder: pathlib.Path):
        """A data set and who judges it.

        Args:
          dataset: to audit.
          judge: predicts a location, by networks that may or may not have seen it.
          folder: of the audit.
        """
        self.legend = dataset.legend
        self.num_locations = dataset.num_locations
        self.has_truth = dataset.has_truth
        self.location = judge
        self._dataset, self._folder = dataset, folder

    def tiles(self, index: int) -> list[maps.Tile]:
        """The dates of a location."""
        first = int(self._dataset.starts[index])
        return [
            maps.tile_of(self._folder, self._dataset.source[first + season], season)
            for season in range(self._dataset.season_counts[index])
        ]

    def write(self, tile: maps.Tile, layers: Mapping[str, np.ndarray]) -> None:
        """Writes the maps of a tile."""
        maps.write(tile, layers, self.legend)

    def finish(self) -> None:
        """All maps are on disk."""

    def image(self, number: int) -> dict[str, np.ndarray]:
        """See `Subject`; tiles are in the order of the records."""
        arrays = self._dataset.source[number]
        shown = {
            name: arrays[array][..., i]
            for array, names in sensors.arrays_of(self._dataset.bands).items()
            for i, name in enumerate(names)
        }
        return shown | ({"truth": arrays["truth"]} if "truth" in arrays else {})
