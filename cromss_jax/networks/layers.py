"""Layers with PyTorch's semantics and attribute names, for `resnet`, `decoders` and `models`.

Arrays are NHWC, convolution kernels HWIO. Parameters and statistics are float32; a layer computes
in its input's dtype. `Conv`, `BatchNorm` and `max_pool` take packed images too (see `packing`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cromss_jax.networks import packing
from cromss_jax.networks.convolution import convolve


@dataclasses.dataclass(frozen=True)
class KernelInit:
    """The distribution of a convolution's initial kernel: mean 0, variance `scale / fan`.

    Attributes:
      distribution: "normal" or "uniform".
      scale: positive.
      fan: "in" or "out", the kernel's area times its input or output channels, or "average".
      with_bias: whether a bias is drawn too, of the same variance; else it is zero.
    """

    distribution: str
    scale: float
    fan: str
    with_bias: bool = False

    def std(self, shape: tuple[int, int, int, int]) -> float:
        """Standard deviation for a kernel of HWIO shape."""
        height, width, in_channels, out_channels = shape
        channels = {
            "in": in_channels,
            "out": out_channels,
            "average": (in_channels + out_channels) / 2,
        }
        return math.sqrt(self.scale / (height * width * channels[self.fan]))


# What torch leaves in any convolution: kaiming_uniform_(a=sqrt(5)), of gain sqrt(2 / (1 + 5)),
# and biases of the same bound.
TORCH_INIT = KernelInit("uniform", 1 / 3, "in", with_bias=True)


class Conv(nnx.Module):
    """Square convolution with torch's symmetric padding of `kernel_size // 2 * dilation`.

    The kernel is zero until `draw_kernels`. Computes in its input's dtype. A 1x1 kernel is applied
    as a matrix product, which XLA's CPU backend runs faster, forward and backward, than its
    convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        use_bias: bool = False,
        init: KernelInit,
    ):
        self.init = init
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.weight = nnx.Param(jnp.zeros(shape))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if use_bias else None
        self.stride = stride
        self.dilation = dilation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H / stride, W / stride, out_channels]."""
        cell = packing.cell_size(x, self.weight.shape[2])
        if cell > 1 and self.dilation > 1:
            raise ValueError("a dilated convolution cannot run on packed images")
        if cell > 1:
            kernel = packing.pack_kernel(self.weight[...], cell, stride=self.stride)
            y = convolve(x, kernel.astype(x.dtype))
        elif self.weight.shape[0] == 1:
            y = convolve(x[:, :: self.stride, :: self.stride], self.weight[...].astype(x.dtype))
        else:
            y = convolve(x, self.weight[...].astype(x.dtype), self.stride, self.dilation)
        if self.bias is not None:
            y += _per_channel(self.bias[...], y).astype(x.dtype)
        return y


def _per_channel(values: jax.Array, x: jax.Array) -> jax.Array:
    """[C] for every channel of an image, of a packed one each cell's n pixels: [1, 1, 1, n C]."""
    if x.shape[-1] > values.size:  # what changes nothing would be traced, too
        values = jnp.tile(values, x.shape[-1] // values.size)
    return values.reshape(1, 1, 1, -1)


def _widened(x: jax.Array) -> jax.Array:
    """In float32, in which statistics are computed, at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class DepthwiseConv(Conv):
    """Square convolution of each channel by itself, as torch's with as many groups as channels.

    It adds up shifted copies, which XLA's CPU backend runs 30 times faster forward and 10 times
    backward than its grouped convolution.
    """

    def __init__(self, num_channels: int, kernel_size: int, *, dilation: int = 1, init: KernelInit):
        super().__init__(1, num_channels, kernel_size, dilation=dilation, init=init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H, W, C]."""
        kernel = self.weight[...].astype(x.dtype)
        size, (_, height, width, _) = kernel.shape[0], x.shape
        padding = size // 2 * self.dilation
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        y = 0
        for row, column in itertools.product(range(size), repeat=2):
            top, left = row * self.dilation, column * self.dilation
            shifted = x[:, top : top + height, left : left + width]
            y += shifted * kernel[row, column].reshape(1, 1, 1, -1)
        return y


class BatchNorm(nnx.Module):
    """Batch normalisation with torch's semantics.

    Normalises by the biased variance and moves the unbiased one into the running variance, by
    `MOMENTUM` of the new value. Statistics are float32 whatever the input's dtype and, under
    `jax.jit`, those of the whole batch however it is sharded. Of bfloat16 they are computed around
    the running mean.
    """

    MOMENTUM = 0.1
    EPSILON = 1e-5

    def __init__(self, num_channels: int):
        self.weight = nnx.Param(jnp.ones(num_channels))
        self.bias = nnx.Param(jnp.zeros(num_channels))
        self.running_mean = nnx.BatchStat(jnp.zeros(num_channels))
        self.running_var = nnx.BatchStat(jnp.ones(num_channels))
        # Nothing reads it; torch counts it, so a checkpoint keeps it on its way there and back.
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises [B, H, W, C]; with `train` by the batch's statistics, and tracks them."""
        if train:
            mean, var = self._statistics(x)
            self.track(mean, var, x.size // mean.size)
        else:
            mean, var = self.running_mean[...], self.running_var[...]
        mean, scale, bias = (_per_channel(v, x) for v in (mean, self.scale(var), self.bias[...]))
        return ((_widened(x) - mean) * scale + bias).astype(x.dtype)

    def _statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and biased variance of each channel of the batch, [C] each."""

        def mean_of(values: jax.Array) -> jax.Array:
            means = values.mean((0, 1, 2))
            if means.size > self.weight.size:
                means = means.reshape(-1, self.weight.size).mean(0)
            return means

        wide = _widened(x)
        if x.dtype == jnp.bfloat16:
            # In one pass. What cancels is (distance of the mean from the running one / standard
            # deviation)^2 times float32's rounding, which is 2^16 times finer than the input's.
            centred = wide - _per_channel(self.running_mean[...], x)
            shift, squares = mean_of(centred), mean_of(jnp.square(centred))
            return self.running_mean[...] + shift, jnp.maximum(squares - jnp.square(shift), 0)
        mean = mean_of(wide)
        # The variance's derivative by the mean is zero: not asking for it saves a pass.
        centred = wide - _per_channel(jax.lax.stop_gradient(mean), x)
        return mean, mean_of(jnp.square(centred))

    def scale(self, var: jax.Array) -> jax.Array:
        """What centred values are multiplied by, [C]."""
        return jax.lax.rsqrt(var + self.EPSILON) * self.weight[...]

    def track(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        """Moves the running statistics towards a batch's, [C] each, of `count` pixels."""
        if count < 2:
            raise ValueError(
                "BatchNorm found one value per channel in training mode and needs at least two: "
                "use a larger batch or larger images"
            )
        unbiased = var * (count / (count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            new = jax.lax.stop_gradient(new)
            # Not `running[...] =`, which asks a traced value for its sharding: JAX then searches
            # the whole trace for an error message, and tracing takes four times as long.
            running.set_value((1 - self.MOMENTUM) * running[...] + self.MOMENTUM * new)
        self.num_batches_tracked.set_value(self.num_batches_tracked[...] + 1)


class GroupNorm(nnx.Module):
    """Normalisation of each sample's groups of channels, with torch's semantics.

    Normalises by the biased variance; statistics are float32 whatever the input's dtype.
    """

    EPSILON = 1e-5

    def __init__(self, num_groups: int, num_channels: int):
        self.num_groups = num_groups
        self.weight = nnx.Param(jnp.ones(num_channels))
        self.bias = nnx.Param(jnp.zeros(num_channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [B, H, W, C]."""
        batch, height, width, channels = x.shape
        grouped = (batch, height, width, self.num_groups, channels // self.num_groups)
        x32 = x.astype(jnp.float32).reshape(grouped)
        mean = x32.mean((1, 2, 4), keepdims=True)
        var = jnp.square(x32 - jax.lax.stop_gradient(mean)).mean((1, 2, 4), keepdims=True)
        y = ((x32 - mean) * jax.lax.rsqrt(var + self.EPSILON)).reshape(x.shape)
        y = y * self.weight[...].reshape(1, 1, 1, -1) + self.bias[...].reshape(1, 1, 1, -1)
        return y.astype(x.dtype)


def conv_bn(layers: Sequence, x: jax.Array, train: bool) -> jax.Array:
    """Applies a convolution and its BatchNorm.

    In bfloat16, where memory and not arithmetic is what a step waits for, a 1x1 convolution to more
    channels trains as one with its BatchNorm in its kernel.
    """
    conv, norm = layers
    # Separable ones are not a single product.
    if train and isinstance(conv, Conv) and x.dtype == jnp.bfloat16:
        size, _, in_channels, out_channels = conv.weight.shape
        if size == 1 and in_channels < out_channels and conv.bias is None:
            return normalised_product(conv, norm, x)
    return norm(conv(x), train)


def normalised_product(conv: Conv, norm: BatchNorm, x: jax.Array) -> jax.Array:
    """`norm(conv(x), train=True)` of a 1x1 convolution without bias, by a single product.

    The products' mean and variance follow from those of what is multiplied: with mean m and
    covariance S of the pixels of x, a channel of kernel w has mean w.m and variance w.S w. So the
    kernel can be scaled first. Of the product before its normalisation, wider than x, nothing is
    written or read, nor of its gradient.
    """
    x = x[:, :: conv.stride, :: conv.stride]
    kernel = conv.weight[0, 0]
    pixels = x.reshape(-1, x.shape[-1])
    mean = _widened(pixels).mean(0)
    squares = jnp.einsum("nc,nd->cd", pixels, pixels, preferred_element_type=mean.dtype)
    covariance = squares / len(pixels) - jnp.outer(mean, mean)

    # Of small matrices, in float32 on TPUs too.
    product = functools.partial(jnp.matmul, precision="highest")
    # Rounded, a variance of 0 can be less.
    var = jnp.maximum((kernel * product(covariance, kernel)).sum(0), 0)
    norm.track(product(mean, kernel), var, len(pixels))
    scaled = (kernel * norm.scale(var).reshape(1, -1)).astype(x.dtype)
    # As rounded: what is subtracted is the mean of the very products.
    shift = norm.bias[...] - product(mean, _widened(scaled))
    y = _widened(convolve(x, scaled.reshape(1, 1, *scaled.shape)))
    return (y + shift.reshape(1, 1, 1, -1)).astype(x.dtype)


def materialised(x: jax.Array) -> jax.Array:
    """x, which CPUs write to memory before they use it; and so its gradient.

    XLA's CPU backend computes what several operations read again in each of them, and with it what
    that was computed from: the output of a residual block from those of all blocks before it. It
    heeds this where `sharding.compiler_options` are given; the other backends need it not.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def max_pool(x: jax.Array, channels: int) -> jax.Array:
    """3x3 maximum with stride 2 and padding 1: [B, H, W, C] to [B, H / 2, W / 2, C], H, W even.

    Of an image in cells of 2 x 2 pixels it makes one that is not packed. Where pixels tie, as
    bfloat16's do, the gradient then goes to all of the largest in equal parts; otherwise, as in
    PyTorch, to the first of them.

    Raises:
      ValueError: for other cells.
    """
    cell = packing.cell_size(x, channels)
    if cell > 2:
        raise ValueError(f"cells of {cell} x {cell} pixels cannot be pooled, only of 2 x 2")
    if cell == 2:
        # Along the rows of cells, then along their columns.
        return _max_of_pairs(_max_of_pairs(x, 1), 2)
    return jax.lax.platform_dependent(x, cpu=_max_by_axes, default=_max_of_windows)


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
    """`_max_of_windows`, whose gradient takes XLA's CPU backend five times as long."""
    # Along a row first: of pixels that tie the first one is in the first of the rows.
    return _max_along(_max_along(x, 2), 1)


def _moved(x: jax.Array, axis: int, by: int, what_comes_in: float = -jnp.inf) -> jax.Array:
    """[B, H, W, C] moved by so many pixels along `axis`."""
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (by, -by, 0)
    return jax.lax.pad(x, jnp.array(what_comes_in, x.dtype), padding)


def _pairs(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """[B, H, W, C] at even positions along an axis of even length, and at odd ones."""
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
    return jnp.maximum(jnp.maximum(_moved(second, axis, 1), first), second)


def _max_along_forward(x: jax.Array, axis: int) -> tuple[jax.Array, tuple]:
    largest = _max_along(x, axis)
    return largest, (x, largest)


def _max_along_backward(axis: int, residuals: tuple, slope: jax.Array) -> tuple[jax.Array]:
    """The gradient goes to the first of the largest ones."""
    x, largest = residuals
    first, second = _pairs(x, axis)
    before_is = _moved(second, axis, 1) == largest
    first_is = ~before_is & (first == largest)
    by_first = jnp.where(first_is, slope, 0)
    by_second = jnp.where(before_is | first_is, 0, slope)
    # The one before the next two, too.
    next_largest, next_slope = _moved(largest, axis, -1), _moved(slope, axis, -1, 0)
    by_second += jnp.where(second == next_largest, next_slope, 0)
    return (jnp.stack([by_first, by_second], axis + 1).reshape(x.shape),)


_max_along.defvjp(_max_along_forward, _max_along_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_of_pairs(x: jax.Array, axis: int) -> jax.Array:
    """Maximum of three along an axis of cells of two: the cell's, and the last of the one before.

    Args:
      x: [B, H, W, 2 C], the first ones' channels, then the second ones'.
      axis: of the cells, 1 or 2.

    Returns:
      [B, H, W, C].
    """
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.maximum(jnp.maximum(first, second), _moved(second, axis, 1))


def _max_of_pairs_forward(x: jax.Array, axis: int) -> tuple[jax.Array, tuple]:
    largest = _max_of_pairs(x, axis)
    return largest, (x, largest)


def _max_of_pairs_backward(axis: int, residuals: tuple, slope: jax.Array) -> tuple[jax.Array]:
    """The gradient goes to the largest ones, in equal parts."""
    x, largest = residuals
    first, second = jnp.split(x, 2, axis=-1)
    seen = (first, second, _moved(second, axis, 1))
    share = slope / sum((pixel == largest).astype(slope.dtype) for pixel in seen)
    # The cell after sees the second one, too.
    next_largest, next_share = _moved(largest, axis, -1), _moved(share, axis, -1, 0)
    by_first = jnp.where(first == largest, share, 0)
    by_second = jnp.where(second == largest, share, 0)
    by_second += jnp.where(second == next_largest, next_share, 0)
    return (jnp.concatenate([by_first, by_second], axis=-1),)


_max_of_pairs.defvjp(_max_of_pairs_forward, _max_of_pairs_backward)


def upsample(x: jax.Array) -> jax.Array:
    """Nearest-neighbour upsampling by two: [B, H, W, C] to [B, 2 H, 2 W, C]."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def pooling_matrix(size: int, num_cells: int) -> np.ndarray:
    """Adaptive average pooling along an axis: cells overlap where their number does not divide it.

    Returns:
      [num_cells, size] float32; rows sum to 1.
    """
    cells, positions = np.arange(num_cells)[:, None], np.arange(size)[None]
    start, end = cells * size // num_cells, -(-(cells + 1) * size // num_cells)
    inside = (positions >= start) & (positions < end)
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def linear_matrix(size: int, new_size: int) -> np.ndarray:
    """Linear interpolation along an axis, first and last positions kept (`align_corners`).

    Returns:
      [new_size, size] float32; rows sum to 1.
    """
    positions = np.linspace(0, size - 1, new_size)
    distance = np.abs(positions[:, None] - np.arange(size)[None])
    return np.maximum(0, 1 - distance).astype(np.float32)


def _apply_matrices(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """[H', H] and [W', W] on [B, H, W, C], in float32."""
    y = x.astype(jnp.float32)
    y = jnp.einsum("hi,biwc->bhwc", rows, y, precision="highest")
    y = jnp.einsum("wj,bhjc->bhwc", columns, y, precision="highest")
    return y.astype(x.dtype)


def average_pool(x: jax.Array, grid_size: int) -> jax.Array:
    """Adaptive average pooling as torch's: [B, H, W, C] to [B, grid_size, grid_size, C]."""
    _, height, width, _ = x.shape
    return _apply_matrices(x, pooling_matrix(height, grid_size), pooling_matrix(width, grid_size))


def resize(x: jax.Array, height: int, width: int) -> jax.Array:
    """Bilinear interpolation as torch's with `align_corners`, to [B, height, width, C]."""
    rows, columns = linear_matrix(x.shape[1], height), linear_matrix(x.shape[2], width)
    return _apply_matrices(x, rows, columns)


def dropout(x: jax.Array, rate: float, key: jax.Array | None, *, whole_channels: bool) -> jax.Array:
    """Zeroes a random part of [B, H, W, C] and scales the rest so that the mean stays.

    Args:
      x: the values.
      rate: probability of being zeroed, in [0, 1).
      key: decides which; None leaves everything as it is.
      whole_channels: a sample's channel is zeroed whole (torch's Dropout2d), or single values.
    """
    if key is None:
        return x
    batch, _, _, channels = x.shape
    shape = (batch, 1, 1, channels) if whole_channels else x.shape
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0)


def draw_kernels(network: nnx.Module, rngs: nnx.Rngs) -> None:
    """Draws every convolution of `network` from its `KernelInit`, in place.

    All kernels of a distribution come from one long draw: compiling one for each of some hundred
    shapes takes XLA's CPU backend a minute.
    """
    convs = [module for _, module in nnx.iter_modules(network) if isinstance(module, Conv)]
    limit = math.sqrt(3)  # of a uniform distribution of variance 1
    draws = {
        "normal": jax.random.normal,
        "uniform": functools.partial(jax.random.uniform, minval=-limit, maxval=limit),
    }
    for distribution, draw in draws.items():
        # Variables and their standard deviations.
        chosen = []
        for conv in convs:
            if conv.init.distribution != distribution:
                continue
            std = conv.init.std(conv.weight.shape)
            chosen.append((conv.weight, std))
            if conv.bias is not None and conv.init.with_bias:
                chosen.append((conv.bias, std))
        ends = list(itertools.accumulate(variable.size for variable, _ in chosen))
        values = draw(rngs.params(), (ends[-1],))
        for (variable, std), part in zip(chosen, jnp.split(values, ends[:-1]), strict=True):
            variable.set_value(part.reshape(variable.shape) * std)
