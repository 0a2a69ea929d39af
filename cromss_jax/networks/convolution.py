"""Convolution in the form that is fast on the device it runs on.

XLA's CPU backend computes the gradients of a convolution as convolutions with windows as large as
the image, at a third of the speed of its matrix products. On CPUs, this module therefore computes
convolutions of many channels as matrix products: the same sums in another order. On other devices
they stay convolutions, on GPUs with their channels padded to what the matrix units take. What comes
after upsampling by two is there the transpose of a strided convolution.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp

from cromss_jax import platforms
from cromss_jax.networks import packing

# With fewer channels, copying the patches costs more time than the matrix product saves.
_MIN_CHANNELS = 32

# A GPU's matrix units take multiples of so many channels.
_GPU_CHANNELS = 8

# With fewer pixels per sample, `_outer_products` is slower by sample than in a single product.
_MIN_PIXELS = 1024


def patches(x: jax.Array, size: int, stride: int = 1, dilation: int = 1) -> jax.Array:
    """The pixels in each window of a convolution, from the last pixel of the window to the first.

    Args:
      x: [B, H, W, C]; `size // 2 * dilation` zeros are added on each side.
      size: side of the square window, pixels.
      stride: distance between windows, pixels.
      dilation: distance between the pixels of a window.

    Returns:
      [B, H / stride, W / stride, size^2 C], ordered by rows of a window, columns, channels.
    """
    _, height, width, _ = x.shape
    margin = size // 2 * dilation
    x = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    offsets = range((size - 1) * dilation, -1, -dilation)
    return jnp.concatenate(
        [x[:, i : i + height : stride, j : j + width : stride] for i in offsets for j in offsets],
        axis=-1,
    )


def _outer_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sum over samples and pixels of outer products: [B, H, W, M] and [B, H, W, N] to [M, N]."""
    # XLA transposes the first factor in memory, so the one with fewer channels comes first.
    if x.shape[-1] > y.shape[-1]:
        return _outer_products(y, x).T
    if math.prod(x.shape[1:3]) < _MIN_PIXELS:
        return jax.lax.dot_general(x, y, (((0, 1, 2), (0, 1, 2)), ((), ())))
    # XLA sums over pixels on one thread. With one product per sample it uses all threads.
    return jax.lax.dot_general(x, y, (((1, 2), (1, 2)), ((0,), (0,)))).sum(0)


def _convolve(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    if kernel.shape[0] == 1 and stride == 1:
        return x @ kernel[0, 0]
    plain = functools.partial(_lax_convolve, stride=stride, dilation=dilation)
    if not any(channels % _GPU_CHANNELS for channels in kernel.shape[2:]):
        return plain(x, kernel)

    def padded(x: jax.Array, kernel: jax.Array) -> jax.Array:
        """With channels of zeros up to the number that a GPU's matrix units need."""
        num_channels = kernel.shape[3]
        more = [-channels % _GPU_CHANNELS for channels in kernel.shape[2:]]
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, more[0])])
        kernel = jnp.pad(kernel, [(0, 0)] * 2 + [(0, count) for count in more])
        return plain(x, kernel)[..., :num_channels]

    return platforms.choose(x, kernel, gpu=padded, default=plain)


def _lax_convolve(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
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
    """Multiplies each pixel by the whole kernel and adds the products to their output pixels."""
    batch, height, width, in_channels = x.shape
    size, _, _, out_channels = kernel.shape
    products = x @ kernel.transpose(2, 0, 1, 3).reshape(in_channels, size**2 * out_channels)
    products = products.reshape(batch, height, width, size, size, out_channels)
    margin = size // 2 * dilation
    products = jnp.pad(products, [(0, 0), (margin, margin), (margin, margin), *[(0, 0)] * 3])
    shifted = [
        products[:, i * dilation :, j * dilation :, i, j][:, :height, :width]
        for i in range(size)
        for j in range(size)
    ]
    return sum(shifted)


def _unstrided_gradients(
    x: jax.Array, kernel: jax.Array, output_grad: jax.Array, dilation: int
) -> tuple[jax.Array, jax.Array]:
    """Gradients for image and kernel, both from patches of the output's gradient."""
    size, _, in_channels, out_channels = kernel.shape
    # The gradient uses the kernel mirrored, hence windows that start with their last pixel.
    windows = patches(output_grad, size, dilation=dilation)
    kernel_grad = _outer_products(x, windows).reshape(in_channels, size, size, out_channels)
    kernel_grad = kernel_grad.transpose(1, 2, 0, 3)
    if size == 1:
        # XLA multiplies a matrix without transposing it in memory; larger kernels it transposes.
        return jax.lax.dot_general(output_grad, kernel[0, 0], (((3,), (1,)), ((), ()))), kernel_grad
    transposed = kernel.transpose(0, 1, 3, 2).reshape(size**2 * out_channels, in_channels)
    return windows @ transposed, kernel_grad


def _gradients_by_products(
    x: jax.Array, kernel: jax.Array, output_grad: jax.Array, stride: int, dilation: int
) -> tuple[jax.Array, jax.Array]:
    if stride == 1:
        return _unstrided_gradients(x, kernel, output_grad, dilation)
    windows = patches(x, kernel.shape[0], stride, dilation)
    kernel_grad = _outer_products(windows, output_grad).reshape(kernel.shape)[::-1, ::-1]
    _, pull = jax.vjp(lambda x: _convolve(x, kernel, stride, dilation), x)
    return *pull(output_grad), kernel_grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Square convolution with torch's symmetric padding of `size // 2 * dilation`.

    Args:
      x: [B, H, W, in_channels], H and W multiples of `stride`.
      kernel: [size, size, in_channels, out_channels] of x's dtype, size odd.
      stride: distance between windows, pixels.
      dilation: distance between the pixels of a window.

    Returns:
      [B, H / stride, W / stride, out_channels] of x's dtype.
    """
    size, _, in_channels, out_channels = kernel.shape
    by_convolution = functools.partial(_convolve, stride=stride, dilation=dilation)
    # Products hold size^2 out_channels numbers per pixel; patches would hold size^2 in_channels.
    is_narrowing = in_channels > out_channels >= _MIN_CHANNELS
    # XLA's CPU backend falls back to plain loops if the kernel is larger than the image.
    is_tiny = min(x.shape[1:3]) < size
    if stride > 1 or not (is_narrowing or is_tiny):
        return by_convolution(x, kernel)
    by_products = functools.partial(_convolve_by_products, dilation=dilation)
    return platforms.choose(x, kernel, cpu=by_products, default=by_convolution)


def _forward(x, kernel, stride, dilation):
    return convolve(x, kernel, stride, dilation), (x, kernel)


def _backward(stride, dilation, residuals, output_grad):
    def by_convolutions(x, kernel, output_grad):
        _, pull = jax.vjp(lambda x, k: _convolve(x, k, stride, dilation), x, kernel)
        return pull(output_grad)

    if output_grad.shape[-1] < _MIN_CHANNELS:
        return by_convolutions(*residuals, output_grad)
    by_products = functools.partial(_gradients_by_products, stride=stride, dilation=dilation)
    return platforms.choose(*residuals, output_grad, cpu=by_products, default=by_convolutions)


convolve.defvjp(_forward, _backward)


# Upsampling turns an input pixel into two output pixels along each axis, 0 and 1. A 3x3 window at
# output 0 covers the previous input pixel (0) and its own (1); at output 1 it covers its own input
# pixel (0) and the next one (1). Keys are (output, input); values are the taps that connect them.
_TAPS = {(0, 0): (0,), (0, 1): (1, 2), (1, 0): (0, 1), (1, 1): (2,)}
# All pairs in two dimensions: (row output, row input, column output, column input).
_PAIRS = tuple((*rows, *columns) for rows in _TAPS for columns in _TAPS)


def _has_tap(pair: tuple[int, int, int, int], row: int, column: int) -> bool:
    return row in _TAPS[pair[:2]] and column in _TAPS[pair[2:]]


def _summed_kernels(kernel: jax.Array) -> jax.Array:
    """A 1x1 kernel for each of `_PAIRS`, the sum of its taps: [3, 3, C, D] to [C, 16 D].

    These are the non-zero parts of `packing.pack_kernel`'s result. On CPUs these sums are faster
    than the products in `pack_kernel`.
    """
    taps = list(itertools.product(range(3), repeat=2))
    sums = [sum(kernel[tap] for tap in taps if _has_tap(pair, *tap)) for pair in _PAIRS]
    return jnp.concatenate(sums, axis=-1)


def _tap_gradients(kernel_grads: jax.Array) -> jax.Array:
    """The kernel's gradient from the one of `_summed_kernels`: [C, 16 D] to [3, 3, C, D]."""
    parts = jnp.split(kernel_grads, len(_PAIRS), axis=-1)

    def tap_gradient(row: int, column: int) -> jax.Array:
        pairs = zip(_PAIRS, parts, strict=True)
        return sum(part for pair, part in pairs if _has_tap(pair, row, column))

    return jnp.stack([jnp.stack([tap_gradient(i, j) for j in range(3)]) for i in range(3)])


def _upsampled_by_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, height, width, _ = x.shape
    y = _convolve(x, packing.pack_kernel(kernel, 1, upsampling=2).astype(x.dtype), 1, 1)
    y = y.reshape(batch, height, width, 2, 2, -1).swapaxes(2, 3)
    return y.reshape(batch, 2 * height, 2 * width, -1)


def _upsampled_by_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies each pixel by all kernels and adds the products to their output pixels."""
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
    x: jax.Array, kernel: jax.Array, output_grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients for image and kernel, both from the output gradients that each pixel affects."""
    batch, height, width, _ = x.shape
    output_grad = output_grad.reshape(batch, height, 2, width, 2, -1)
    output_grad = jnp.pad(output_grad, [(0, 0), (1, 1), (0, 0), (1, 1), (0, 0), (0, 0)])
    windows = [
        output_grad[:, 2 - i - m : 2 - i - m + height, i, 2 - j - n : 2 - j - n + width, j]
        for i, m, j, n in _PAIRS
    ]
    windows = jnp.concatenate(windows, axis=-1)
    kernel_grads = _outer_products(x, windows).astype(kernel.dtype)
    return windows @ _summed_kernels(kernel).astype(x.dtype).T, _tap_gradients(kernel_grads)


def _four_taps(kernel: jax.Array) -> jax.Array:
    """The kernel [4, 4, D, C] whose strided convolution is the transpose of the upsampled one.

    Along an axis an input pixel reaches the four output pixels around it through the taps 2, 1 + 2,
    0 + 1 and 0 of the kernel [3, 3, C, D].
    """
    for axis in (0, 1):
        before, after = ([(n, 1 - n) if i == axis else (0, 0) for i in range(4)] for n in (0, 1))
        kernel = jnp.flip(kernel, axis)
        kernel = jnp.pad(kernel, before) + jnp.pad(kernel, after)
    return kernel.swapaxes(2, 3)


def _downsampled(y: jax.Array, taps: jax.Array) -> jax.Array:
    """The strided convolution, [B, 2 H, 2 W, D] to [B, H, W, C]."""
    return jax.lax.conv_general_dilated(
        y,
        taps.astype(y.dtype),
        window_strides=(2, 2),
        padding=[(1, 1)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _upsampled_by_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradient of a strided convolution for its input, a single operation of cuDNN.

    16 products per input pixel, and the output's pixels need not be sorted.
    """
    batch, height, width, _ = x.shape
    shape = (batch, 2 * height, 2 * width, kernel.shape[3])
    taps = _four_taps(kernel)
    _, pull = jax.vjp(lambda y: _downsampled(y, taps), jnp.zeros(shape, x.dtype))
    return pull(x)[0]


def _transpose_gradients(
    x: jax.Array, kernel: jax.Array, output_grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients for image and kernel: the strided convolution, and its gradient for the taps.

    Differentiated directly, a transposed convolution gets a window as large as the image.
    """
    taps, pull_taps = jax.vjp(_four_taps, kernel)
    input_grad, pull = jax.vjp(lambda taps: _downsampled(output_grad, taps), taps)
    return input_grad, *pull_taps(*pull(x))


@jax.custom_vjp
def convolve_upsampled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution after nearest-neighbour upsampling by two, without the upsampled image.

    An input pixel becomes four output pixels. Each of these depends on 2x2 input pixels, through
    sums of the taps. On CPUs and GPUs this takes 16 products per input pixel instead of 36.

    Args:
      x: [B, H, W, in_channels].
      kernel: [3, 3, in_channels, out_channels] float32; the upsampled image is padded by one zero.

    Returns:
      [B, 2 H, 2 W, out_channels] of x's dtype.
    """
    return platforms.choose(
        x,
        kernel,
        cpu=_upsampled_by_products,
        gpu=_upsampled_by_transpose,
        default=_upsampled_by_convolution,
    )


def _upsampled_forward(x, kernel):
    return convolve_upsampled(x, kernel), (x, kernel)


def _upsampled_backward(residuals, output_grad):
    def by_convolutions(x, kernel, output_grad):
        _, pull = jax.vjp(_upsampled_by_convolution, x, kernel)
        return pull(output_grad)

    return platforms.choose(
        *residuals,
        output_grad,
        cpu=_upsampled_gradients,
        gpu=_transpose_gradients,
        default=by_convolutions,
    )


convolve_upsampled.defvjp(_upsampled_forward, _upsampled_backward)
