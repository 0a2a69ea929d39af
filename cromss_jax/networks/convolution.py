"""Convolution that runs fast on CPUs, too.

XLA's CPU backend computes the gradients of a convolution as convolutions with windows as large as
the image, at a third of the speed of its matrix products. On CPUs, wide convolutions are therefore
matrix products here: the same sums in another order. Elsewhere they stay convolutions.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp

from cromss_jax.networks import packing

# With fewer channels a patch is so narrow that copying it costs more than its product spares.
_MIN_CHANNELS = 32

# Of samples with fewer pixels, the sum over samples takes longer than summing each first spares.
_MIN_PIXELS = 1024


def patches(x: jax.Array, size: int, stride: int = 1, dilation: int = 1) -> jax.Array:
    """What a convolution's windows see, from the last pixel of a window to the first.

    Args:
      x: [B, H, W, C], surrounded by `size // 2 * dilation` zeros.
      size: of the square window, in pixels.
      stride: between windows.
      dilation: between the pixels of a window.

    Returns:
      [B, H / stride, W / stride, size^2 C]: rows of a window, then columns, then channels.
    """
    _, height, width, _ = x.shape
    margin = size // 2 * dilation
    x = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    offsets = range((size - 1) * dilation, -1, -dilation)
    return jnp.concatenate(
        [x[:, i : i + height : stride, j : j + width : stride] for i in offsets for j in offsets],
        axis=-1,
    )


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sum over samples and pixels of outer products: [B, H, W, M] and [B, H, W, N] to [M, N]."""
    # XLA transposes the first one in memory: the narrower one, for that is less to move.
    if x.shape[-1] > y.shape[-1]:
        return _outer(y, x).T
    if math.prod(x.shape[1:3]) < _MIN_PIXELS:
        return jax.lax.dot_general(x, y, (((0, 1, 2), (0, 1, 2)), ((), ())))
    # It sums over pixels on one thread. By samples it does so on all of them.
    return jax.lax.dot_general(x, y, (((1, 2), (1, 2)), ((0,), (0,)))).sum(0)


def _convolve(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    if kernel.shape[0] == 1 and stride == 1:
        return x @ kernel[0, 0]
    padding = kernel.shape[0] // 2 * dilation
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _convolve_by_products(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """Products of each pixel with the whole kernel, then moved to the outputs that they add to."""
    batch, height, width, in_channels = x.shape
    size, _, _, out_channels = kernel.shape
    products = x @ kernel.transpose(2, 0, 1, 3).reshape(in_channels, size**2 * out_channels)
    products = products.reshape(batch, height, width, size, size, out_channels)
    margin = size // 2 * dilation
    products = jnp.pad(products, [(0, 0), (margin, margin), (margin, margin), *[(0, 0)] * 3])
    moved = [
        products[:, i * dilation :, j * dilation :, i, j][:, :height, :width]
        for i in range(size)
        for j in range(size)
    ]
    return sum(moved)


def _unstrided_gradients(
    x: jax.Array, kernel: jax.Array, slope: jax.Array, dilation: int
) -> tuple[jax.Array, jax.Array]:
    """Gradients by image and kernel, both from patches of the output's gradient."""
    size, _, in_channels, out_channels = kernel.shape
    # A pixel reaches outputs on its other side, hence windows that begin with their last pixel.
    seen = patches(slope, size, dilation=dilation)
    by_kernel = _outer(x, seen).reshape(in_channels, size, size, out_channels)
    by_kernel = by_kernel.transpose(1, 2, 0, 3)
    if size == 1:
        # A matrix XLA multiplies as it lies, a larger kernel it would turn in memory in any case.
        return jax.lax.dot_general(slope, kernel[0, 0], (((3,), (1,)), ((), ()))), by_kernel
    turned = kernel.transpose(0, 1, 3, 2).reshape(size**2 * out_channels, in_channels)
    return seen @ turned, by_kernel


def _gradients_by_products(
    x: jax.Array, kernel: jax.Array, slope: jax.Array, stride: int, dilation: int
) -> tuple[jax.Array, jax.Array]:
    if stride == 1:
        return _unstrided_gradients(x, kernel, slope, dilation)
    seen = patches(x, kernel.shape[0], stride, dilation)
    by_kernel = _outer(seen, slope).reshape(kernel.shape)[::-1, ::-1]
    _, pull = jax.vjp(lambda x: _convolve(x, kernel, stride, dilation), x)
    return *pull(slope), by_kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Square convolution with torch's symmetric padding of `size // 2 * dilation`.

    Args:
      x: [B, H, W, in_channels], H and W multiples of `stride`.
      kernel: [size, size, in_channels, out_channels] of x's dtype, size odd.
      stride: between windows.
      dilation: between the pixels of a window.

    Returns:
      [B, H / stride, W / stride, out_channels] of x's dtype.
    """
    size, _, in_channels, out_channels = kernel.shape
    by_convolution = functools.partial(_convolve, stride=stride, dilation=dilation)
    # Products are as many numbers as the patches of the output would be, not of the wider input.
    narrows = in_channels > out_channels >= _MIN_CHANNELS
    # XLA's CPU backend falls back to plain loops where the kernel is larger than the image.
    tiny = min(x.shape[1:3]) < size
    if stride > 1 or not (narrows or tiny):
        return by_convolution(x, kernel)
    by_products = functools.partial(_convolve_by_products, dilation=dilation)
    return jax.lax.platform_dependent(x, kernel, cpu=by_products, default=by_convolution)


def _forward(x, kernel, stride, dilation):
    return convolve(x, kernel, stride, dilation), (x, kernel)


def _backward(stride, dilation, residuals, slope):
    def by_convolutions(x, kernel, slope):
        _, pull = jax.vjp(lambda x, k: _convolve(x, k, stride, dilation), x, kernel)
        return pull(slope)

    if slope.shape[-1] < _MIN_CHANNELS:
        return by_convolutions(*residuals, slope)
    by_products = functools.partial(_gradients_by_products, stride=stride, dilation=dilation)
    return jax.lax.platform_dependent(*residuals, slope, cpu=by_products, default=by_convolutions)


convolve.defvjp(_forward, _backward)


# Along an axis, the kernel's taps through which the pixels that one becomes, the former (0) and the
# latter (1), see the first (0) and second (1) of two pixels: the one before and its own, its own
# and the one after.
_TAPS = {(0, 0): (0,), (0, 1): (1, 2), (1, 0): (0, 1), (1, 1): (2,)}
# By rows and columns: which of the pixels that one becomes sees which.
_SIGHTS = tuple((*rows, *columns) for rows in _TAPS for columns in _TAPS)


def _has_tap(sight: tuple[int, int, int, int], row: int, column: int) -> bool:
    return row in _TAPS[sight[:2]] and column in _TAPS[sight[2:]]


def _summed_kernels(kernel: jax.Array) -> jax.Array:
    """A kernel for each of `_SIGHTS`, the sum of its taps: [3, 3, C, D] to [C, 16 D].

    What is not zero in `packing.pack_kernel`'s; its products take CPUs longer than these sums.
    """
    taps = list(itertools.product(range(3), repeat=2))
    sums = [sum(kernel[tap] for tap in taps if _has_tap(sight, *tap)) for sight in _SIGHTS]
    return jnp.concatenate(sums, axis=-1)


def _by_taps(by_kernels: jax.Array) -> jax.Array:
    """The gradient of the kernel from that of `_summed_kernels`: [C, 16 D] to [3, 3, C, D]."""
    parts = jnp.split(by_kernels, len(_SIGHTS), axis=-1)

    def by_tap(row: int, column: int) -> jax.Array:
        sights = zip(_SIGHTS, parts, strict=True)
        return sum(part for sight, part in sights if _has_tap(sight, row, column))

    return jnp.stack([jnp.stack([by_tap(i, j) for j in range(3)]) for i in range(3)])


def _upsampled_by_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, height, width, _ = x.shape
    y = _convolve(x, packing.pack_kernel(kernel, 1, upsampling=2).astype(x.dtype), 1, 1)
    y = y.reshape(batch, height, width, 2, 2, -1).swapaxes(2, 3)
    return y.reshape(batch, 2 * height, 2 * width, -1)


def _upsampled_by_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Products of each pixel with all kernels, then moved to the pixels that they add to."""
    batch, height, width, _ = x.shape
    products = x @ _summed_kernels(kernel).astype(x.dtype)
    products = products.reshape(batch, height, width, 2, 2, 2, 2, -1)
    products = jnp.pad(products, [(0, 0), (1, 1), (1, 1), *[(0, 0)] * 5])

    def pixel(i: int, j: int) -> jax.Array:
        return sum(
            products[:, i + m : i + m + height, j + n : j + n + width, i, m, j, n]
            for m in range(2)
            for n in range(2)
        )

    rows = [jnp.stack([pixel(i, 0), pixel(i, 1)], axis=3) for i in range(2)]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


def _upsampled_gradients(
    x: jax.Array, kernel: jax.Array, slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients by image and kernel, both from the slopes that each pixel's products meet."""
    batch, height, width, _ = x.shape
    slope = slope.reshape(batch, height, 2, width, 2, -1)
    slope = jnp.pad(slope, [(0, 0), (1, 1), (0, 0), (1, 1), (0, 0), (0, 0)])
    seen = [
        slope[:, 2 - i - m : 2 - i - m + height, i, 2 - j - n : 2 - j - n + width, j]
        for i, m, j, n in _SIGHTS
    ]
    seen = jnp.concatenate(seen, axis=-1)
    by_kernels = _outer(x, seen).astype(kernel.dtype)
    return seen @ _summed_kernels(kernel).astype(x.dtype).T, _by_taps(by_kernels)


@jax.custom_vjp
def convolve_upsampled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution of an image upsampled by two to the nearest pixel, without making that.

    A pixel becomes four, each of which sees 2x2 of the pixels through sums of the kernel's taps:
    on CPUs 16 products a pixel in place of 36.

    Args:
      x: [B, H, W, in_channels].
      kernel: [3, 3, in_channels, out_channels] float32, for one zero around the upsampled image.

    Returns:
      [B, 2 H, 2 W, out_channels] of x's dtype.
    """
    return jax.lax.platform_dependent(
        x, kernel, cpu=_upsampled_by_products, default=_upsampled_by_convolution
    )


def _upsampled_forward(x, kernel):
    return convolve_upsampled(x, kernel), (x, kernel)


def _upsampled_backward(residuals, slope):
    def by_convolutions(x, kernel, slope):
        _, pull = jax.vjp(_upsampled_by_convolution, x, kernel)
        return pull(slope)

    return jax.lax.platform_dependent(
        *residuals, slope, cpu=_upsampled_gradients, default=by_convolutions
    )


convolve_upsampled.defvjp(_upsampled_forward, _upsampled_backward)
