"""A map on one scene: its blocks are what locations are of a data set.

The scene is predicted in windows, as for a map (`mapping.scene_map`), and the probabilities of each
sensor are kept on disk in eight bits. After that blocks are judged one by one, each with the labels
around it: borders of windows and of blocks are not seen. Memory does not depend on the scene.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from cromss_jax import sensors
from cromss_jax.auditing import evidence, maps
from cromss_jax.errors import UserError
from cromss_jax.legend import Legend
from cromss_jax.mapping import scene_map
from cromss_jax.mapping.cogs import Grid
from cromss_jax.mapping.work import Work
from cromss_jax.method import smoothing

# Longest side of a block in pixels. Small scenes are cut, too: how much blocks differ says how sure
# estimates are.
MOST_SIDE, LEAST_SIDE, NUM_BLOCKS = 256, 32, 64
# Levels of probabilities are equally far apart in their logarithm, from the least one that evidence
# knows to 1, so that 8 bits keep each ratio of two within 4 %.
_TOP = 254
_STEP = -math.log(evidence.LEAST) / _TOP
NODATA = sensors.IGNORE_LABEL

# From row, column, height and width to labels, uint8 [h, w].
ReadLabels = Callable[[int, int, int, int], np.ndarray]
# Row and column of the first pixel, height and width.
Block = tuple[int, int, int, int]


class LabelError(UserError):
    """Labels that cannot be audited. The message is for the user."""


def to_levels(
    probs: Mapping[str, np.ndarray], valid: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Probabilities in eight bits; a `scene_map.MakeLayers`.

    Args:
      probs: [H, W, C] float32 by modality.
      valid: [H, W] bool by modality.

    Returns:
      uint8 [C, H, W] by modality, `NODATA` where it has no data.
    """
    found = {}
    for modality, values in probs.items():
        logs = np.log(np.maximum(values, np.float32(evidence.LEAST)))
        levels = np.rint(logs / np.float32(_STEP) + _TOP).astype(np.uint8)
        known = valid[modality][..., None]
        found[modality] = np.moveaxis(np.where(known, levels, np.uint8(NODATA)), -1, 0)
    return found


def from_levels(levels: np.ndarray) -> np.ndarray:
    """Probabilities [H, W, C] float32, summing to one, from levels [C, H, W]."""
    logs = (np.moveaxis(levels, 0, -1).astype(np.float32) - _TOP) * np.float32(_STEP)
    values = np.exp(logs)
    return values / values.sum(axis=-1, keepdims=True)


def _cut(length: int, most: int) -> Iterator[tuple[int, int]]:
    """First pixel and length of parts of nearly the same length."""
    count = -(-length // most)
    edges = [length * i // count for i in range(count + 1)]
    return ((start, end - start) for start, end in itertools.pairwise(edges))


class LabelledScene:
    """A scene with a map; a `subjects.Subject` after `keep_valid`."""

    has_truth = False

    def __init__(
        self,
        scene: scene_map.Scene,
        bands: Mapping[str, Sequence[str]],
        legend: Legend,
        grid: Grid,
        date: str,
        unfinished: Work,
        folder: pathlib.Path,
    ):
        """Nothing is read yet.

        Args:
          scene: that is looked at.
          bands: of its images by modality.
          legend: of the labels.
          grid: where the scene lies.
          date: of the scene, as in `maps.Tile`.
          unfinished: holds the probabilities of `to_levels`, and gets labels and maps.
          folder: of the audit.
        """
        self.legend = legend
        self._scene, self._bands, self._grid, self._date = scene, bands, grid, date
        self._work, self._folder = unfinished, folder
        wanted = math.isqrt(scene.height * scene.width // NUM_BLOCKS)
        self.side = min(max(wanted, LEAST_SIDE), MOST_SIDE)
        self._blocks = [
            (row, column, height, width)
            for row, height in _cut(scene.height, self.side)
            for column, width in _cut(scene.width, self.side)
        ]
        self._prior = jax.jit(
            lambda labels: smoothing.smoothing_prior(labels[:, None], labels, len(legend), "ts")
        )

    @property
    def num_locations(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    def _on_disk(self, name: str, block: Block) -> np.ndarray:
        """A block of a layer, uint8 [bands, h, w], to be used once: what stays mapped is memory."""
        path, (row, column, height, width) = self._work.path(name), block
        size = self._scene.height, self._scene.width
        pixels = np.memmap(path, np.uint8, "r+").reshape(-1, *size)
        return pixels[:, row : row + height, column : column + width]

    def _read(self, name: str, block: Block) -> np.ndarray:
        """A block of a layer, uint8 [bands, h, w]."""
        return np.array(self._on_disk(name, block))

    def _read_first(self, name: str, block: Block) -> np.ndarray:
        """The first band of a block, uint8 [h, w]."""
        return np.array(self._on_disk(name, block)[0])

    def _write(self, name: str, block: Block, pixels: np.ndarray | int) -> None:
        """Writes a block of a layer of one band."""
        self._on_disk(name, block)[0] = pixels

    def read_labels(self, read: ReadLabels, source: str) -> None:
        """Reads all labels, before anything is predicted.

        Args:
          read: reads those of a window.
          source: where they are, for messages.

        Raises:
          LabelError: if there are none.
        """
        for name in maps.LAYERS:
            with self._work.path(name).open("wb") as file:
                # At once: what is mapped into memory cannot say that a disk is full.
                os.posix_fallocate(file.fileno(), 0, self._scene.height * self._scene.width)
        found = False
        for block in self._blocks:
            labels = read(*block)
            found |= bool((labels != NODATA).any())
            for name in maps.LAYERS:
                self._write(name, block, labels if name == maps.GIVEN else NODATA)
        if not found:
            raise LabelError(
                f"{source} has no class anywhere on the scene: is --legend its own, and does it "
                "cover the scene?"
            )

    def keep_valid(self, source: str) -> None:
        """Takes the labels away where a sensor has no data, and blocks without labels.

        Raises:
          LabelError: if none is left.
        """
        kept = []
        for block in self._blocks:
            levels = [self._read_first(m, block) for m in self._scene.modalities]
            valid = np.logical_and.reduce([own != NODATA for own in levels])
            labels = np.where(valid, self._read_first(maps.GIVEN, block), np.uint8(NODATA))
            self._write(maps.GIVEN, block, labels)
            if (labels != NODATA).any():
                kept.append(block)
        if not kept:
            raise LabelError(
                f"{source} has no class where the scene has data: do they lie in the same area?"
            )
        self._blocks = kept

    def location(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """See `subjects.Judge`; there is one season."""
        block = self._blocks[index]
        probs = {m: from_levels(self._read(m, block))[None] for m in self._scene.modalities}
        labels = self._read(maps.GIVEN, block)
        return probs, {"labels": labels, "prior": self._prior_of(block)[None]}

    def _prior_of(self, block: Block) -> np.ndarray:
        """What the labels around say, [h, w, C]: the block's part of the prior of the scene."""
        row, column, height, width = block
        reach = smoothing.RADIUS
        above, left = min(reach, row), min(reach, column)
        below = min(reach, self._scene.height - row - height)
        right = min(reach, self._scene.width - column - width)
        around = row - above, column - left, above + height + below, left + width + right
        labels = self._read_first(maps.GIVEN, around)
        # At the edges of the scene as the prior does at those of a tile.
        missing = ((reach - above, reach - below), (reach - left, reach - right))
        padded = np.pad(labels, missing, mode="symmetric")
        prior = np.asarray(self._prior(padded[None]))[0]
        return prior[reach : reach + height, reach : reach + width]

    def tiles(self, index: int) -> list[maps.Tile]:
        """The block."""
        row, column, height, width = self._blocks[index]
        grid = self._grid.window(row, column, height, width)
        name = f"{row}_{column}"
        return [maps.Tile(self._folder, name, 0, self._date, grid, (row, column))]

    def write(self, tile: maps.Tile, layers: Mapping[str, np.ndarray]) -> None:
        """Puts a block's maps into those of the scene."""
        block = (*tile.corner, tile.grid.height, tile.grid.width)
        for name, pixels in layers.items():
            self._write(name, block, pixels)

    def finish(self) -> None:
        """Writes the maps of the scene."""
        maps.finish(self._work.folder, self._grid, self._folder, self.legend)

    def image(self, number: int) -> dict[str, np.ndarray]:
        """See `subjects.Subject`."""
        pixels = self._scene.read(*self._blocks[number])
        return {
            name: grey[..., i]
            for modality, grey in pixels.grey.items()
            for i, name in enumerate(self._bands[modality])
        }
