"""Layers with PyTorch's semantics and attribute names, for `resnet`, `decoders` and `fusion`.

Arrays are NHWC, convolution kernels HWIO. Parameters and statistics are float32; a layer computes
in its input's dtype. `Conv` and `BatchNorm` also take packed images (see `packing`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from cromss_jax import platforms
from cromss_jax.errors import UserError
from cromss_jax.networks import fused, packing
from cromss_jax.networks.convolution import convolve


@dataclasses.dataclass(frozen=True)
class KernelInit:
    """The distribution of a convolution's initial kernel: mean 0, variance `scale / fan`.

    Attributes:
      distribution: "normal" or "uniform".
      scale: positive.
      fan: "in" or "out", the kernel's area times its input or output channels; "average" is the
        mean of both.
      with_bias: whether a bias is drawn with the same variance; otherwise it is zero.
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


# torch's default for convolutions: kaiming_uniform_(a=sqrt(5)), which has gain sqrt(2 / (1 + 5)),
# and biases with the same bound.
TORCH_INIT = KernelInit("uniform", 1 / 3, "in", with_bias=True)


class Conv(nnx.Module):
    """Square convolution with torch's symmetric padding of `kernel_size // 2 * dilation`.

    The kernel is zero until `draw_kernels` is called. A 1x1 kernel is applied as a matrix product,
    which XLA's CPU backend runs faster than its convolution, forward and backward.
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
            raise ValueError(
                f"packed images do not support dilated convolutions, and the dilation is "
                f"{self.dilation}: use dilation 1 or unpacked images"
            )
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
    """Reshapes [C] to [1, 1, 1, C], or to [1, 1, 1, n C] for packed images of n pixels per cell."""
    if x.shape[-1] > values.size:  # `tile` by 1 would still add an operation to the trace
        values = jnp.tile(values, x.shape[-1] // values.size)
    return values.reshape(1, 1, 1, -1)


def _at_least_float32(x: jax.Array) -> jax.Array:
    """Converts to float32, the dtype of statistics, unless the dtype is wider already."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class DepthwiseConv(Conv):
    """Square convolution within each channel, like torch's with one group per channel.

    Computed as a sum of shifted copies. XLA's CPU backend runs this 30 times faster forward and 10
    times faster backward than its grouped convolution.
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

    Normalises by the biased variance and tracks the unbiased one; a running value moves by
    `MOMENTUM` towards the new value. Statistics are float32 for every input dtype. Under `jax.jit`
    they are the statistics of the whole batch, however it is sharded. For bfloat16 inputs they are
    computed relative to the running mean.

    Attributes:
      fused: whether training uses the functions of `fused`; not for packed images.
    """

    MOMENTUM = 0.1
    EPSILON = fused.EPSILON
    fused = False

    def __init__(self, num_channels: int):
        self.weight = nnx.Param(jnp.ones(num_channels))
        self.bias = nnx.Param(jnp.zeros(num_channels))
        self.running_mean = nnx.BatchStat(jnp.zeros(num_channels))
        self.running_var = nnx.BatchStat(jnp.ones(num_channels))
        # Not used here. torch counts batches, so conversion from and to torch keeps the count.
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array, train: bool, *, relu: bool = False) -> jax.Array:
        """Normalises [B, H, W, C]; with `train`, uses and tracks the batch's statistics.

        With `relu`, negative results become 0.
        """
        if train and self.fused:
            vectors = (self.weight[...], self.bias[...], self.running_mean[...])
            y, mean, var = fused.normalise(x, *vectors, relu)
            self.track(mean, var, x.size // mean.size)
            return y
        y = self._normalised(x, train)
        return jax.nn.relu(y) if relu else y

    def _normalised(self, x: jax.Array, train: bool) -> jax.Array:
        if train:
            mean, var = self._statistics(x)
            self.track(mean, var, x.size // mean.size)
        else:
            mean, var = self.running_mean[...], self.running_var[...]
        mean, scale, bias = (_per_channel(v, x) for v in (mean, self.scale(var), self.bias[...]))
        return ((_at_least_float32(x) - mean) * scale + bias).astype(x.dtype)

    def _statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and biased variance of each channel of the batch, [C] each."""

        def mean_of(values: jax.Array) -> jax.Array:
            means = values.mean((0, 1, 2))
            if means.size > self.weight.size:
                means = means.reshape(-1, self.weight.size).mean(0)
            return means

        wide = _at_least_float32(x)
        if x.dtype == jnp.bfloat16:
            # In one pass over the data. The subtraction below loses accuracy by a factor of
            # ((mean - running mean) / standard deviation)^2 in float32's rounding error, which is
            # 2^16 times smaller than the input's.
            centred = wide - _per_channel(self.running_mean[...], x)
            shift, squares = mean_of(centred), mean_of(jnp.square(centred))
            return self.running_mean[...] + shift, jnp.maximum(squares - jnp.square(shift), 0)
        mean = mean_of(wide)
        # The variance's derivative with respect to the mean is zero; omitting it saves a pass.
        centred = wide - _per_channel(jax.lax.stop_gradient(mean), x)
        return mean, mean_of(jnp.square(centred))

    def scale(self, var: jax.Array) -> jax.Array:
        """The factor for centred values, [C]: weight / standard deviation."""
        return jax.lax.rsqrt(var + self.EPSILON) * self.weight[...]

    def track(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        """Moves the running statistics towards those of a batch of `count` pixels, [C] each."""
        if count < 2:
            raise UserError(
                "BatchNorm found one value per channel in training mode and needs at least two: "
                "use a larger batch or larger images"
            )
        unbiased = var * (count / (count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            new = jax.lax.stop_gradient(new)
            # `running[...] =` asks a traced value for its sharding. JAX then searches the whole
            # trace for an error message, and tracing takes four times as long.
            running.set_value((1 - self.MOMENTUM) * running[...] + self.MOMENTUM * new)
        self.num_batches_tracked.set_value(self.num_batches_tracked[...] + 1)


class GroupNorm(nnx.Module):
    """Normalisation of each sample's groups of channels, with torch's semantics.

    Normalises by the biased variance. Statistics are float32 for every input dtype.
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


def run_block(block: nnx.Module, *inputs: jax.Array | None, train: bool) -> jax.Array:
    """Calls `block(*inputs, train)`.

    If the block's attribute `rematerialise` is true, its activations are not stored for the
    gradient but computed again.
    """
    call = type(block).__call__
    if block.rematerialise:
        call = nnx.remat(call, static_argnums=(1 + len(inputs),))
    return call(block, *inputs, train)


def conv_bn(layers: Sequence, x: jax.Array, train: bool, *, relu: bool = False) -> jax.Array:
    """Applies a convolution and its BatchNorm; with `relu`, negative results become 0.

    In bfloat16, a training step is limited by memory, not by arithmetic. A 1x1 convolution that
    increases the number of channels is then computed by `normalised_product`.
    """
    conv, norm = layers
    # A separable convolution is not a single product.
    if train and isinstance(conv, Conv) and x.dtype == jnp.bfloat16:
        size, _, in_channels, out_channels = conv.weight.shape
        if size == 1 and in_channels < out_channels and conv.bias is None:
            y = normalised_product(conv, norm, x)
            return jax.nn.relu(y) if relu else y
    return norm(conv(x), train, relu=relu)


def normalised_product(conv: Conv, norm: BatchNorm, x: jax.Array) -> jax.Array:
    """`norm(conv(x), train=True)` for a 1x1 convolution without bias, by a single product.

    The output's mean and variance follow from the input's: with mean m and covariance S of the
    pixels of x, an output channel with kernel w has mean w.m and variance w.S w. So the kernel can
    be scaled before the product. The unnormalised output, which has more channels than x, and its
    gradient are never written to memory.
    """
    x = x[:, :: conv.stride, :: conv.stride]
    kernel = conv.weight[0, 0]
    pixels = x.reshape(-1, x.shape[-1])
    if norm.fused:
        y, mean, var = fused.normalised_product(pixels, kernel, norm.weight[...], norm.bias[...])
        norm.track(mean, var, len(pixels))
        return y.reshape(*x.shape[:-1], -1)
    mean = _at_least_float32(pixels).mean(0)
    wide = jnp.promote_types(pixels.dtype, jnp.float32)
    squares = jnp.einsum("nc,nd->cd", pixels, pixels, preferred_element_type=wide)
    covariance = squares / len(pixels) - jnp.outer(mean, mean)

    # The matrices are small, so float32 products are affordable on TPUs too.
    product = functools.partial(jnp.matmul, precision="highest")
    # Rounding can make a variance of 0 negative.
    var = jnp.maximum((kernel * product(covariance, kernel)).sum(0), 0)
    norm.track(product(mean, kernel), var, len(pixels))
    scaled = (kernel * norm.scale(var).reshape(1, -1)).astype(x.dtype)
    # Uses the rounded kernel, so that the mean is exactly that of the products computed below.
    shift = norm.bias[...] - product(mean, _at_least_float32(scaled))
    y = _at_least_float32(convolve(x, scaled.reshape(1, 1, *scaled.shape)))
    return (y + shift.reshape(1, 1, 1, -1)).astype(x.dtype)


def materialised(x: jax.Array) -> jax.Array:
    """Returns x; on CPUs, x and its gradient are written to memory before they are used.

    XLA's CPU backend recomputes a value in every operation that reads it, together with the values
    that it depends on: the output of a residual block would be recomputed from all blocks before
    it. The barrier has an effect only with the options of `sharding.compiler_options`. Other
    backends do not need it.
    """
    return platforms.choose(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def dropout(x: jax.Array, rate: float, key: jax.Array | None, *, whole_channels: bool) -> jax.Array:
    """Zeroes a random part of the values and scales the rest so that the mean is kept.

    Args:
      x: [B, H, W, C].
      rate: probability that a value is zeroed, in [0, 1).
      key: PRNG key; None returns x unchanged.
      whole_channels: whether a channel of a sample is zeroed as a whole (torch's Dropout2d) or
        every value by itself (torch's Dropout).
    """
    if key is None:
        return x
    batch, _, _, channels = x.shape
    shape = (batch, 1, 1, channels) if whole_channels else x.shape
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0)


def draw_kernels(network: nnx.Module, rngs: nnx.Rngs) -> None:
    """Randomly initialises every convolution of `network` by its `KernelInit`, in place.

    All kernels of one distribution come from a single long draw. Compiling a draw for each of about
    a hundred shapes takes XLA's CPU backend a minute.
    """
    convs = [module for _, module in nnx.iter_modules(network) if isinstance(module, Conv)]
    limit = math.sqrt(3)  # a uniform distribution in [-limit, limit] has variance 1
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
