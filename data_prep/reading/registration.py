"""Estimates how far two images of different sensors are apart.

Brightness of radar and optical images has little in common, but edges of fields, coasts and towns
are in both. The magnitudes of their gradients are correlated for all shifts of a few pixels, and
the correlations of several tiles are added: the true shift is the same in all of them, peaks by
chance are not.
"""

import dataclasses
import math

import numpy as np
from scipy import ndimage

MAX_SHIFT = 16
# Standard deviations by which the peak exceeds the other shifts. By chance, the largest of 1089
# values is about 3.3 above; neighbouring shifts are alike, so that there are fewer.
CLEAR = 6.0
# Pixels of smoothing: the grain of radar images is a pixel or two.
_SIGMA = 1.5
# Gradients above this percentile count as much as it: a ship is no more of an edge than a coast.
_PERCENTILE = 95


@dataclasses.dataclass(frozen=True)
class Shift:
    """An estimated shift.

    Attributes:
      rows: by which the second image must be moved down to lie on the first, in pixels.
      columns: to the right.
      clearness: of the peak, in standard deviations; below `CLEAR` the shift is not known.
    """

    rows: int
    columns: int
    clearness: float

    @property
    def is_clear(self) -> bool:
        """Whether the shift is known."""
        return self.clearness >= CLEAR

    @property
    def distance(self) -> float:
        """Pixels."""
        return math.hypot(self.rows, self.columns)


class Correlation:
    """Adds the correlations of tiles."""

    def __init__(self):
        side = 2 * MAX_SHIFT + 1
        self._sum = np.zeros((side, side))
        self.num_tiles = 0

    def add(self, first: np.ndarray, second: np.ndarray, valid: np.ndarray) -> None:
        """Adds a tile.

        Args:
          first: (H, W) float, of one sensor.
          second: (H, W) float, of the other.
          valid: (H, W) bool, where both are.
        """
        # Edges of nodata would be in both.
        inner = ndimage.binary_erosion(valid, iterations=math.ceil(4 * _SIGMA), border_value=1)
        if min(valid.shape) < 4 * MAX_SHIFT or inner.mean() < 0.5:
            return
        edges = [_edges(image, valid, inner) for image in (first, second)]
        norms = [math.sqrt(float((e**2).sum())) for e in edges]
        if not all(norms):
            return
        height, width = valid.shape
        size = (height + MAX_SHIFT, width + MAX_SHIFT)
        product = np.fft.rfft2(edges[0], size) * np.fft.rfft2(edges[1], size).conj()
        surface = np.fft.irfft2(product, size)
        shifts = np.arange(-MAX_SHIFT, MAX_SHIFT + 1)
        self._sum += surface[np.ix_(shifts, shifts)] / (norms[0] * norms[1])
        self.num_tiles += 1

    def shift(self) -> Shift | None:
        """The most likely shift; None without tiles."""
        if not self.num_tiles:
            return None
        row, column = np.unravel_index(np.argmax(self._sum), self._sum.shape)
        others = np.ones(self._sum.shape, bool)
        others[max(row - 4, 0) : row + 5, max(column - 4, 0) : column + 5] = False
        values = self._sum[others]
        clearness = (self._sum[row, column] - values.mean()) / max(float(values.std()), 1e-12)
        return Shift(int(row) - MAX_SHIFT, int(column) - MAX_SHIFT, float(clearness))


def _edges(image: np.ndarray, valid: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The magnitude of the gradient, without its mean, 0 outside of `inner`."""
    filled = np.where(valid, image, image[valid].mean())
    magnitude = ndimage.gaussian_gradient_magnitude(filled.astype(np.float64), _SIGMA)
    magnitude = np.minimum(magnitude, np.percentile(magnitude[inner], _PERCENTILE))
    return np.where(inner, magnitude - magnitude[inner].mean(), 0)
