"""Images of few channels as images of many: each square cell of pixels becomes one pixel.

A TPU keeps channels side by side in rows of 128; an image of 16 channels takes the memory, and the
time, of one of 128. A packed image [B, H / n, W / n, n^2 C] holds the n x n pixels of a cell as
channels: row by row, a pixel's own channels last. Convolutions of packed images are convolutions
with larger, partly empty kernels, equal but for the order of their sums.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def cell_size(x: jax.Array, channels: int) -> int:
    """Pixels along the side of the cells of an image of so many channels; 1 if it is not packed.

    Raises:
      ValueError: if neither so many channels nor square cells of as many lie in `x`.
    """
    cell = math.isqrt(x.shape[-1] // channels)
    if cell**2 * channels != x.shape[-1]:
        raise ValueError(f"{x.shape[-1]} channels are no square cells of {channels}")
    return cell


def order(size: int, cell: int) -> np.ndarray:
    """Rows, or columns, of an image: the cells' first ones, then their second ones, [size] int.

    Raises:
      ValueError: if `size` is no multiple of `cell`.
    """
    if size % cell:
        raise ValueError(f"{size} pixels cannot be packed by {cell}: use a multiple of it")
    return np.arange(size).reshape(-1, cell).T.reshape(-1)


def in_order(x: jax.Array, cell: int) -> jax.Array:
    """[H, H, ...] in the `order` of cells to their natural order, or back with H / cell."""
    size, _, *more = x.shape
    x = x.reshape(cell, size // cell, cell, size // cell, *more)
    return x.swapaxes(0, 1).swapaxes(2, 3).reshape(size, size, *more)


def pack(x: jax.Array, cell: int) -> jax.Array:
    """[B, H, W, C] in the `order` of cells -> [B, H / cell, W / cell, cell^2 C]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, cell, height // cell, cell, width // cell, channels)
    x = x.transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, height // cell, width // cell, cell**2 * channels)


def planes(x: jax.Array, cell: int) -> jax.Array:
    """Such an image, its cells' first pixels, then their second ones, and so on.

    [B, H, W, ...] -> [B, cell^2, H W / cell^2, ...]
    """
    batch, height, width, *more = x.shape
    x = x.reshape(batch, cell, height // cell, width, *more)
    # Rather than transposed, which moves twice as much as compiled for v5e.
    columns = jnp.split(x, cell, axis=3)
    columns = [c.reshape(batch, cell, height * width // cell**2, *more) for c in columns]
    return jnp.stack(columns, axis=2).reshape(batch, cell**2, -1, *more)


def unpack_planes(x: jax.Array, channels: int) -> jax.Array:
    """A packed image in the order of `planes`: [B, h, w, cell^2 C] -> [B, cell^2, h w, C].

    The order spares a TPU the costlier half of unpacking: an image's matrix of h w pixels by
    cell^2 C channels is transposed, and pixels need not be put between each other.
    """
    batch, height, width, lanes = x.shape
    x = x.reshape(batch, height * width, lanes).transpose(0, 2, 1)
    x = x.reshape(batch, lanes // channels, channels, height * width)
    return x.transpose(0, 1, 3, 2)


def _taps(size: int, cell: int, stride: int, upsampling: int) -> np.ndarray:
    """Which pixel each tap of a convolution along an axis meets, [3, cell, out_cell, size] 0 or 1.

    By cell (the one before, its own, the next), pixel in that cell, pixel of the output's cell, and
    tap.
    """
    out_cell = cell * upsampling // stride
    output, tap = np.arange(out_cell)[:, None], np.arange(size)[None]
    position = (output * stride + tap - size // 2) // upsampling
    if position.min() < -cell or position.max() >= 2 * cell:
        raise ValueError(f"a kernel of {size} pixels reaches too far for cells of {cell}")
    offsets = np.arange(-cell, 2 * cell).reshape(3, cell, 1, 1)
    return (offsets == position).astype(np.float32)


def pack_kernel(kernel: jax.Array, cell: int, *, stride: int = 1, upsampling: int = 1) -> jax.Array:
    """The kernel that does to packed images what `kernel` does to images.

    Args:
      kernel: [size, size, C, D], of a convolution with `size // 2` zeros around the image.
      cell: of the input's packing.
      stride: of the convolution.
      upsampling: by which the input would first be upsampled to the nearest pixel.

    Returns:
      [3, 3, cell^2 C, out_cell^2 D], out_cell = cell * upsampling / stride, for stride 1 and one
      zero around the packed image.

    Raises:
      ValueError: for a kernel that reaches beyond the cells beside its own.
    """
    size, _, channels, out_channels = kernel.shape
    taps = _taps(size, cell, stride, upsampling)
    out_cell = taps.shape[2]
    # Sums of at most four taps, in float32: exact enough for any compute dtype.
    packed = jnp.einsum("yiok,xjpl,klcd->yxijcopd", taps, taps, kernel, precision="highest")
    return packed.reshape(3, 3, cell**2 * channels, out_cell**2 * out_channels)
