"""Convolution that runs fast on CPUs, too.

XLA's CPU backend computes the gradients of a convolution as convolutions with windows as large as
the image, at a third of the speed of its matrix products. On CPUs, wide convolutions are therefore
matrix products here: the same sums in another order. Elsewhere nothing changes.
"""

import functools

import jax
import jax.numpy as jnp

# With fewer channels a patch is so narrow that copying it costs more than its product spares.
_MIN_CHANNELS = 32


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
    return jax.lax.dot_general(x, y, (((0, 1, 2), (0, 1, 2)), ((), ())))


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
    turned = kernel.transpose(0, 1, 3, 2).reshape(size**2 * out_channels, in_channels)
    by_kernel = _outer(x, seen).reshape(in_channels, size, size, out_channels)
    return seen @ turned, by_kernel.transpose(1, 2, 0, 3)


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
