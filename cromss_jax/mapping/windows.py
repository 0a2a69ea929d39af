"""Cuts a scene into overlapping windows, and weights their predictions so that no seam is seen.

Along each axis a window has a weight of 1 where it is alone. Where it overlaps its neighbour, its
weight falls to 0 towards its own edge as a raised cosine, and the neighbour's rises likewise: the
two sum to 1. The weights of a pixel are products of those along the two axes. So
- pixels near the edge of a window, where the network lacks the pixels around, count least;
- weights and their slopes are continuous, and nothing changes abruptly from window to window;
- where all windows agree, blending changes nothing.
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Axis:
    """The windows along one axis of a scene.

    Attributes:
      length: of the scene in pixels.
      size: of a window in pixels, no longer than the scene.
      starts: first pixel of each window, ascending.
    """

    length: int
    size: int
    starts: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """The pixel after the last one that a window alone decides with those before it."""
        return (*self.starts[1:], self.length)

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """Weights [windows, size] float32; over all windows they sum to 1 at every pixel."""
        raw = np.ones((len(self.starts), self.size))
        centres = np.arange(self.size) + 0.5
        for i, start in enumerate(self.starts):
            if i > 0:
                raw[i] *= _rise(centres, self.starts[i - 1] + self.size - start)
            if i + 1 < len(self.starts):
                raw[i] *= _rise(self.size - centres, start + self.size - self.starts[i + 1])
        # Three windows may overlap where the scene is little longer than two.
        total = np.zeros(self.length)
        for start, weights in zip(self.starts, raw, strict=True):
            total[start : start + self.size] += weights
        for start, weights in zip(self.starts, raw, strict=True):
            weights /= total[start : start + self.size]
        return raw.astype(np.float32)


def cut(length: int, size: int, overlap: int) -> Axis:
    """Spreads as few windows as possible evenly over an axis.

    Args:
      length: of the axis in pixels.
      size: of a window in pixels; a shorter axis gets one window of its own length.
      overlap: how many pixels neighbours share at least, at most half a window.

    Raises:
      ValueError: for a size or an overlap that is not possible.
    """
    if size < 1 or not 0 <= overlap <= size // 2:
        raise ValueError(
            f"windows of {size} pixels with an overlap of {overlap}: the overlap must be from 0 to "
            "half a window"
        )
    if length <= size:
        return Axis(length, length, (0,))
    count = 1 + -(-(length - size) // (size - overlap))
    starts = np.rint(np.linspace(0, length - size, count)).astype(int)
    return Axis(length, size, tuple(starts.tolist()))


def _rise(distance: np.ndarray, overlap: int) -> np.ndarray:
    """The weight at a distance from a window's edge, from 0 at the edge to 1 at the overlap's."""
    if overlap <= 0:
        return np.ones_like(distance)
    return np.sin(np.pi / 2 * np.clip(distance / overlap, 0, 1)) ** 2


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of a scene, row by row from the upper left.

    Attributes:
      rows: along the columns' direction, from north to south.
      columns: from west to east.
    """

    rows: Axis
    columns: Axis

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.rows.starts) * len(self.columns.starts)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a window."""
        return self.rows.size, self.columns.size

    def place(self, index: int) -> tuple[int, int]:
        """Row and column of the upper left pixel of a window."""
        row, column = divmod(index, len(self.columns.starts))
        return self.rows.starts[row], self.columns.starts[column]


def cut_scene(height: int, width: int, size: int, overlap: int) -> Windows:
    """The windows of a scene; see `cut`."""
    return Windows(cut(height, size, overlap), cut(width, size, overlap))
