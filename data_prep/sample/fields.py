"""Random fields: smooth noise of a chosen scale, from which all of the procedural land is made."""

import functools
import math

import numpy as np
from scipy import fft, special


@functools.lru_cache(maxsize=256)
def _matern_gain(n: int, scale: float, smoothness: float) -> np.ndarray:
    """Amplitudes of the low frequencies of a Matérn field of variance 1 on n x n pixels.

    Rows are frequencies 0..h, -h..-1 along y, columns 0..h along x. Higher frequencies contribute
    less than a thousandth.
    """
    reach = 1000 ** (1 / (smoothness + 1)) / (2 * np.pi * scale)
    h = min((n - 1) // 2, math.ceil(reach * n))
    rows = np.concatenate([np.arange(h + 1), np.arange(-h, 0)]) / n
    columns = np.arange(h + 1) / n
    k = 2 * np.pi * scale * np.hypot(rows[:, None], columns)
    gain = (1 + k**2) ** (-(smoothness + 1) / 2)
    gain[0, 0] = 0
    # Column 0 has no mirror image: the transform counts it once, and only its real part.
    gain[:, 0] *= math.sqrt(2)
    variance = ((gain[:, 0] ** 2).sum() + 4 * (gain[:, 1:] ** 2).sum()) / n**4
    return (gain / math.sqrt(variance)).astype(np.float32)


def gaussian_field(
    rng: np.random.Generator, size: int, scale: float, smoothness: float = 1.5
) -> np.ndarray:
    """A Gaussian random field [size,size] float32, mean 0, variance 1.

    Args:
      rng: the source of randomness.
      size: pixels along a side.
      scale: correlation length in pixels.
      smoothness: of the Matérn covariance; lower values give rougher fields.
    """
    # The transform is periodic: the margin keeps opposite edges of the tile uncorrelated.
    n = fft.next_fast_len(size + math.ceil(2 * scale), real=True)
    gain = _matern_gain(n, scale, smoothness)
    h = gain.shape[1] - 1
    noise = rng.standard_normal((2, *gain.shape), dtype=np.float32)
    spectrum = np.zeros((n, h + 1), np.complex64)
    spectrum[np.r_[: h + 1, -h:0]] = gain * (noise[0] + 1j * noise[1])
    lines = fft.ifft(spectrum, axis=0)[:size]
    return fft.irfft(lines, n=n, axis=1)[:, :size]


def uniform_field(rng: np.random.Generator, size: int, scale: float) -> np.ndarray:
    """Like `gaussian_field`, but each pixel uniform in 0..1: a share p of them lies below p."""
    return special.ndtr(gaussian_field(rng, size, scale))


def pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x and y, each [size,size] float32."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return x, y
