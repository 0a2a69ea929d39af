"""Packed images: each square cell of pixels becomes one pixel with many channels.

A TPU stores channels in rows of 128, so an image of 16 channels takes the memory and the time of
one with 128. A packed image [B, H / n, W / n, n^2 C] holds the n x n pixels of a cell as channels:
row by row, with each pixel's own channels together. A convolution of a packed image is a
convolution with a larger kernel that is partly zero. The result differs only by the order of sums.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def cell_size(x: jax.Array, channels: int) -> int:
    """Side of the cells, in pixels, of an image of `channels` channels; 1 if it is not packed.

    Raises:
      ValueError: if the channels of `x` are not `channels` times a square number.
    """
    cell = math.isqrt(x.shape[-1] // channels)
    if cell**2 * channels != x.shape[-1]:
        raise ValueError(
            f"the image has {x.shape[-1]} channels: the layer needs {channels}, or {channels} "
            "times a square number for packed images"
        )
    return cell


def order(size: int, cell: int) -> np.ndarray:
    """Row (or column) indices: first the first row of every cell, then the second, [size] int.

    Raises:
      ValueError: if `size` is not divisible by `cell`.
    """
    if size % cell:
        raise ValueError(f"the size is {size} pixels: packing needs a multiple of {cell}")
    return np.arange(size).reshape(-1, cell).T.reshape(-1)


def in_order(x: jax.Array, cell: int) -> jax.Array:
    """Brings [H, H, ...] from the `order` of cells to the natural order.

    With `cell` = H / cell it does the reverse.
    """
    size, _, *more = x.shape
    x = x.reshape(cell, size // cell, cell, size // cell, *more)
    return x.swapaxes(0, 1).swapaxes(2, 3).reshape(size, size, *more)


def pack(x: jax.Array, cell: int) -> jax.Array:
    """Packs [B, H, W, C] in the `order` of cells to [B, H / cell, W / cell, cell^2 C]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, cell, height // cell, cell, width // cell, channels)
    x = x.transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, height // cell, width // cell, cell**2 * channels)


def planes(x: jax.Array, cell: int) -> jax.Array:
    """Sorts pixels by their position in the cell: first the first pixel of every cell, and so on.

    Maps [B, H, W, ...] in the `order` of cells to [B, cell^2, H W / cell^2, ...].
    """
    batch, height, width, *more = x.shape
    x = x.reshape(batch, cell, height // cell, width, *more)
    # A transposition moves twice as many bytes as this when compiled for v5e.
    columns = jnp.split(x, cell, axis=3)
    columns = [c.reshape(batch, cell, height * width // cell**2, *more) for c in columns]
    return jnp.stack(columns, axis=2).reshape(batch, cell**2, -1, *more)


def unpack_planes(x: jax.Array, channels: int) -> jax.Array:
    """Unpacks an image into the order of `planes`: [B, h, w, cell^2 C] -> [B, cell^2, h w, C].

    This order saves a TPU the more expensive half of unpacking: each image's matrix of h w cells by
    cell^2 C channels is only transposed, and pixels of different cells are not interleaved.
    """
    batch, height, width, lanes = x.shape
    x = x.reshape(batch, height * width, lanes).transpose(0, 2, 1)
    x = x.reshape(batch, lanes // channels, channels, height * width)
    return x.transpose(0, 1, 3, 2)


def _taps(size: int, cell: int, stride: int, upsampling: int) -> np.ndarray:
    """Which input pixel each kernel tap reads along one axis, [3, cell, out_cell, size], 0 or 1.

    The axes are: input cell (previous, own, next), pixel in that cell, pixel in the output cell,
    kernel tap.
    """
    out_cell = cell * upsampling // stride
    output, tap = np.arange(out_cell)[:, None], np.arange(size)[None]
    position = (output * stride + tap - size // 2) // upsampling
    if position.min() < -cell or position.max() >= 2 * cell:
        raise ValueError(
            f"a kernel of {size} pixels reaches beyond the neighbouring cells of {cell} pixels: "
            "use larger cells or a smaller kernel"
        )
    offsets = np.arange(-cell, 2 * cell).reshape(3, cell, 1, 1)
    return (offsets == position).astype(np.float32)


def pack_kernel(kernel: jax.Array, cell: int, *, stride: int = 1, upsampling: int = 1) -> jax.Array:
    """The kernel for packed images that gives the same result as `kernel` for plain images.

    Args:
      kernel: [size, size, C, D] of a convolution with padding `size // 2`.
      cell: side of the input's cells, pixels.
      stride: stride of the convolution.
      upsampling: factor of nearest-neighbour upsampling of the input before the convolution.

    Returns:
      [3, 3, cell^2 C, out_cell^2 D] with out_cell = cell * upsampling / stride, to be used with
      stride 1 and padding 1.

    Raises:
      ValueError: for a kernel that reaches beyond the neighbouring cells.
    """
    size, _, channels, out_channels = kernel.shape
    taps = _taps(size, cell, stride, upsampling)
    out_cell = taps.shape[2]
    # Sums of at most four taps, in float32: exact enough for any compute dtype.
    packed = jnp.einsum("yiok,xjpl,klcd->yxijcopd", taps, taps, kernel, precision="highest")
    return packed.reshape(3, 3, cell**2 * channels, out_cell**2 * out_channels)
