"""Pooling and resizing with PyTorch's semantics: max and average pooling, upsampling, resize.

Arrays are NHWC. `max_pool` also takes packed images (see `packing`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cromss_jax import platforms
from cromss_jax.networks import packing


def max_pool(x: jax.Array, channels: int) -> jax.Array:
    """3x3 maximum with stride 2 and padding 1: [B, H, W, C] to [B, H / 2, W / 2, C], H, W even.

    An image packed in cells of 2 x 2 pixels is also accepted; the result is not packed. Pixels can
    tie, mostly in bfloat16. The gradient then goes to the first of the largest pixels, as in
    PyTorch; for packed images it goes to all of the largest pixels in equal parts.

    Raises:
      ValueError: for larger cells.
    """
    cell = packing.cell_size(x, channels)
    if cell > 2:
        raise ValueError(
            f"the image is packed in cells of {cell} x {cell} pixels: max pooling needs cells of "
            "2 x 2 or an image that is not packed"
        )
    if cell == 2:
        # Along the rows of cells, then along their columns.
        return _max_of_pairs(_max_of_pairs(x, 1), 2)
    return platforms.choose(x, cpu=_max_by_axes, gpu=_max_by_axes, default=_max_of_windows)


def _max_of_windows(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        window_dimensions=(1, 3, 3, 1),
        window_strides=(1, 2, 2, 1),
        padding=((0, 0), (1, 1), (1, 1), (0, 0)),
    )


def _max_by_axes(x: jax.Array) -> jax.Array:
    """The same as `_max_of_windows`, with a faster gradient on CPUs (five times) and GPUs.

    On GPUs the gradient of `_max_of_windows` is a scatter by atomic additions, whose order and thus
    rounding differs from run to run.
    """
    # Along rows first, so that of tied pixels the one in the first row is chosen.
    return _max_along(_max_along(x, 2), 1)


def _shifted(x: jax.Array, axis: int, by: int, fill: float = -jnp.inf) -> jax.Array:
    """Shifts [B, H, W, C] by a number of pixels along `axis`; new pixels have the value `fill`."""
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (by, -by, 0)
    return jax.lax.pad(x, jnp.array(fill, x.dtype), padding)


def _pairs(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The pixels of [B, H, W, C] at even and at odd positions along an axis of even length."""
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    first, second = jnp.split(pairs, 2, axis + 1)
    return first.squeeze(axis + 1), second.squeeze(axis + 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_along(x: jax.Array, axis: int) -> jax.Array:
    """Maximum of three pixels along an axis of even length, with stride 2 and padding 1.

    Args:
      x: [B, H, W, C].
      axis: 1 or 2.

    Returns:
      [B, H / 2, W, C] or [B, H, W / 2, C].
    """
    first, second = _pairs(x, axis)
    return jnp.maximum(jnp.maximum(_shifted(second, axis, 1), first), second)


def _max_along_forward(x: jax.Array, axis: int) -> tuple[jax.Array, tuple]:
    largest = _max_along(x, axis)
    return largest, (x, largest)


def _max_along_backward(axis: int, residuals: tuple, output_grad: jax.Array) -> tuple[jax.Array]:
    """The gradient goes to the first of the largest pixels."""
    x, largest = residuals
    first, second = _pairs(x, axis)
    before_is = _shifted(second, axis, 1) == largest
    first_is = ~before_is & (first == largest)
    first_grad = jnp.where(first_is, output_grad, 0)
    second_grad = jnp.where(before_is | first_is, 0, output_grad)
    # A second pixel is also the one before the next pair.
    next_largest, next_grad = _shifted(largest, axis, -1), _shifted(output_grad, axis, -1, 0)
    second_grad += jnp.where(second == next_largest, next_grad, 0)
    return (jnp.stack([first_grad, second_grad], axis + 1).reshape(x.shape),)


_max_along.defvjp(_max_along_forward, _max_along_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_of_pairs(x: jax.Array, axis: int) -> jax.Array:
    """Maximum of three pixels: the two of each cell and the last one of the previous cell.

    Args:
      x: [B, H, W, 2 C], cells of two pixels: the first pixel's channels, then the second's.
      axis: axis of the cells, 1 or 2.

    Returns:
      [B, H, W, C].
    """
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.maximum(jnp.maximum(first, second), _shifted(second, axis, 1))


def _max_of_pairs_forward(x: jax.Array, axis: int) -> tuple[jax.Array, tuple]:
    largest = _max_of_pairs(x, axis)
    return largest, (x, largest)


def _max_of_pairs_backward(axis: int, residuals: tuple, output_grad: jax.Array) -> tuple[jax.Array]:
    """The gradient goes to the largest pixels in equal parts."""
    x, largest = residuals
    first, second = jnp.split(x, 2, axis=-1)
    pixels = (first, second, _shifted(second, axis, 1))
    share = output_grad / sum((pixel == largest).astype(output_grad.dtype) for pixel in pixels)
    # A second pixel also belongs to the window of the next cell.
    next_largest, next_share = _shifted(largest, axis, -1), _shifted(share, axis, -1, 0)
    first_grad = jnp.where(first == largest, share, 0)
    second_grad = jnp.where(second == largest, share, 0)
    second_grad += jnp.where(second == next_largest, next_share, 0)
    return (jnp.concatenate([first_grad, second_grad], axis=-1),)


_max_of_pairs.defvjp(_max_of_pairs_forward, _max_of_pairs_backward)


def upsample(x: jax.Array) -> jax.Array:
    """Nearest-neighbour upsampling by two: [B, H, W, C] to [B, 2 H, 2 W, C]."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def pooling_matrix(size: int, num_cells: int) -> np.ndarray:
    """Adaptive average pooling along an axis; cells overlap if `size` is not divisible by them.

    Returns:
      [num_cells, size] float32; rows sum to 1.
    """
    cells, positions = np.arange(num_cells)[:, None], np.arange(size)[None]
    start, end = cells * size // num_cells, -(-(cells + 1) * size // num_cells)
    inside = (positions >= start) & (positions < end)
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def linear_matrix(size: int, new_size: int) -> np.ndarray:
    """Linear interpolation along an axis; first and last positions are kept (`align_corners`).

    Returns:
      [new_size, size] float32; rows sum to 1.
    """
    positions = np.linspace(0, size - 1, new_size)
    distance = np.abs(positions[:, None] - np.arange(size)[None])
    return np.maximum(0, 1 - distance).astype(np.float32)


def _apply_matrices(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """Applies [H', H] to the rows and [W', W] to the columns of [B, H, W, C], in float32."""
    y = x.astype(jnp.float32)
    y = jnp.einsum("hi,biwc->bhwc", rows, y, precision="highest")
    y = jnp.einsum("wj,bhjc->bhwc", columns, y, precision="highest")
    return y.astype(x.dtype)


def average_pool(x: jax.Array, grid_size: int) -> jax.Array:
    """Adaptive average pooling as in torch: [B, H, W, C] to [B, grid_size, grid_size, C]."""
    _, height, width, _ = x.shape
    return _apply_matrices(x, pooling_matrix(height, grid_size), pooling_matrix(width, grid_size))


def resize(x: jax.Array, height: int, width: int) -> jax.Array:
    """Bilinear interpolation as in torch with `align_corners`, to [B, height, width, C]."""
    rows, columns = linear_matrix(x.shape[1], height), linear_matrix(x.shape[2], width)
    return _apply_matrices(x, rows, columns)
