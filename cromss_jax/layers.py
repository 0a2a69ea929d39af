"""Layers with PyTorch's semantics and attribute names, for the networks of `models`.

Arrays are NHWC, convolution kernels HWIO. Parameters and statistics are float32; a layer computes
in its input's dtype.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class KernelInit:
    """The distribution of a convolution's initial kernel: mean 0, variance `scale / fan`.

    Attributes:
      distribution: "normal" or "uniform".
      scale: positive.
      fan: "in" or "out", the kernel's area times its input or output channels, or "average".
    """

    distribution: str
    scale: float
    fan: str

    def std(self, shape: tuple[int, int, int, int]) -> float:
        """Standard deviation for a kernel of HWIO shape."""
        height, width, in_channels, out_channels = shape
        channels = {
            "in": in_channels,
            "out": out_channels,
            "average": (in_channels + out_channels) / 2,
        }
        return math.sqrt(self.scale / (height * width * channels[self.fan]))


class Conv(nnx.Module):
    """Square convolution with torch's symmetric padding of `kernel_size // 2`.

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
        use_bias: bool = False,
        init: KernelInit,
    ):
        self.init = init
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.weight = nnx.Param(jnp.zeros(shape))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if use_bias else None
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H / stride, W / stride, out_channels]."""
        kernel = self.weight[...].astype(x.dtype)
        padding = kernel.shape[0] // 2
        if padding == 0:
            y = x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                window_strides=(self.stride, self.stride),
                padding=[(padding, padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype).reshape(1, 1, 1, -1)
        return y


class BatchNorm(nnx.Module):
    """Batch normalisation with torch's semantics.

    Normalises by the biased variance and moves the unbiased one into the running variance, by
    `MOMENTUM` of the new value. Statistics are float32 whatever the input's dtype and, under
    `jax.jit`, those of the whole batch however it is sharded.
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
        x32 = x.astype(jnp.float32)
        if train:
            mean = x32.mean((0, 1, 2), keepdims=True)
            # The variance's derivative by the mean is zero: not asking for it saves a pass.
            var = jnp.square(x32 - jax.lax.stop_gradient(mean)).mean((0, 1, 2), keepdims=True)
            self._track(mean.reshape(-1), var.reshape(-1), x.size // x.shape[-1])
        else:
            mean = self.running_mean[...].reshape(1, 1, 1, -1)
            var = self.running_var[...].reshape(1, 1, 1, -1)
        scale = jax.lax.rsqrt(var + self.EPSILON) * self.weight[...].reshape(1, 1, 1, -1)
        return ((x32 - mean) * scale + self.bias[...].reshape(1, 1, 1, -1)).astype(x.dtype)

    def _track(self, mean: jax.Array, var: jax.Array, count: int) -> None:
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


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum with stride 2 and padding 1: [B, H, W, C] to [B, H / 2, W / 2, C], H, W even."""
    return jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        window_dimensions=(1, 3, 3, 1),
        window_strides=(1, 2, 2, 1),
        padding=((0, 0), (1, 1), (1, 1), (0, 0)),
    )


def upsample(x: jax.Array) -> jax.Array:
    """Nearest-neighbour upsampling by two: [B, H, W, C] to [B, 2 H, 2 W, C]."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def draw_kernels(network: nnx.Module, rngs: nnx.Rngs) -> None:
    """Draws every convolution kernel of `network` from its `KernelInit`, in place.

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
        chosen = [conv for conv in convs if conv.init.distribution == distribution]
        ends = list(itertools.accumulate(conv.weight.size for conv in chosen))
        values = draw(rngs.params(), (ends[-1],))
        for conv, part in zip(chosen, jnp.split(values, ends[:-1]), strict=True):
            shape = conv.weight.shape
            conv.weight.set_value(part.reshape(shape) * conv.init.std(shape))
