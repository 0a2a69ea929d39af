"""Decoders and heads of segmentation_models_pytorch (smp), with its default settings.

Each decoder states its `smp` class, what it needs from the encoder, and the settings of its head.
Every attribute path is the key of the corresponding tensor in smp 0.6.0's `state_dict`. A None in
a list stands for a layer without parameters, so that the other layers keep their index. Arrays are
NHWC.

Source: Ronneberger et al., "U-Net" (2015); Zhao et al., "Pyramid scene parsing network" (2017);
Chen et al., "Encoder-decoder with atrous separable convolution" (2018); Kirillov et al., "Panoptic
feature pyramid networks" (2019).
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from cromss_jax.networks.convolution import convolve, convolve_upsampled
from cromss_jax.networks.layers import (
    TORCH_INIT,
    BatchNorm,
    Conv,
    DepthwiseConv,
    GroupNorm,
    KernelInit,
    conv_bn,
    dropout,
    run_block,
)
from cromss_jax.networks.packing import cell_size, pack_kernel
from cromss_jax.networks.resampling import average_pool, resize, upsample

# kaiming_uniform_(mode="fan_in", nonlinearity="relu"), zero biases.
DECODER_INIT = KernelInit("uniform", 2.0, "in")
# xavier_uniform_, zero biases.
HEAD_INIT = KernelInit("uniform", 1.0, "average")

UNET_CHANNELS = (256, 128, 64, 32, 16)


class Decoder(nnx.Module):
    """Base class of the decoders.

    A decoder is built from the encoder's numbers of channels, finest features first, and is called
    as `decoder(features, train, dropout_key)`. Dropout is applied only in training and only if a
    key is given; the key is used once.

    Attributes:
      num_features: number of the encoder's feature maps that are computed.
      output_stride: largest stride of the features; later encoder stages are dilated instead.
      head_kernel_size: kernel size of the head's convolution.
      head_upsampling: factor from the size of the head's convolution to the size of the image.
      head_init: initialisation of the head's convolution.
      out_channels: number of channels that the decoder returns and the head takes.
    """

    num_features = 5
    output_stride = 32
    head_kernel_size = 1
    head_upsampling = 4
    head_init = HEAD_INIT
    out_channels: int


class UNetBlock(nnx.Module):
    """Upsampling, concatenation with the skipped features, two 3x3 conv-BatchNorm-ReLU.

    Neither the upsampled nor the concatenated features are written to memory.
    """

    rematerialise = False

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        def conv_bn(in_channels: int) -> nnx.List:
            conv = Conv(in_channels, out_channels, 3, init=DECODER_INIT)
            return nnx.List([conv, BatchNorm(out_channels)])

        self.skip_channels = skip_channels
        self.conv1 = conv_bn(in_channels + skip_channels)
        self.conv2 = conv_bn(out_channels)

    def __call__(self, x: jax.Array, skip: jax.Array | None, train: bool) -> jax.Array:
        """Maps [B, H, W, in_channels] and [B, 2 H, 2 W, skip] to [B, 2 H, 2 W, out_channels]."""
        own, skipped = self._kernels()
        y = convolve_upsampled(x, own)
        if skip is not None:
            y += convolve(skip, skipped.astype(x.dtype))
        return self._rest(y, train)

    def packed(self, x: jax.Array, skip: jax.Array | None, train: bool) -> jax.Array:
        """The same on packed images (see `packing`).

        The cells are n x n pixels of `x` and 2 n x 2 n pixels of `skip` and of the result. Maps
        [B, h, w, n^2 in_channels] and [B, h, w, 4 n^2 skip] to [B, h, w, 4 n^2 out_channels].
        """
        own, skipped = self._kernels()
        cell = cell_size(x, own.shape[2])
        y = convolve(x, pack_kernel(own, cell, upsampling=2).astype(x.dtype))
        if skip is not None:
            y += convolve(skip, pack_kernel(skipped, 2 * cell).astype(x.dtype))
        return self._rest(y, train)

    def _kernels(self) -> tuple[jax.Array, jax.Array]:
        """The first convolution's kernels for the upsampled and for the skipped features.

        The sum of the two convolutions equals one convolution of the concatenated features. It
        avoids writing these to memory and splitting their gradient.
        """
        kernel = self.conv1[0].weight[...]
        in_channels = kernel.shape[2] - self.skip_channels
        return kernel[:, :, :in_channels], kernel[:, :, in_channels:]

    def _rest(self, y: jax.Array, train: bool) -> jax.Array:
        """The layers after the first convolution."""
        x = self.conv1[1](y, train, relu=True)
        return conv_bn(self.conv2, x, train, relu=True)


class UNetDecoder(Decoder):
    """The decoder of `smp.Unet`: five blocks from the deepest features to the image's size."""

    head_kernel_size = 3
    head_upsampling = 1

    def __init__(self, encoder_channels: Sequence[int]):
        # The numbers of channels in smp, which has a stem of 64; fewer for a narrower stem.
        channels = [count * encoder_channels[0] // 64 for count in UNET_CHANNELS]
        self.out_channels = channels[-1]
        deepest, *skips = reversed(encoder_channels)
        sizes = zip((deepest, *channels[:-1]), (*skips, 0), channels, strict=True)
        self.blocks = nnx.List([UNetBlock(*size) for size in sizes])

    def __call__(
        self, features: Sequence[jax.Array], train: bool, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Maps features to [B, H, W, out_channels]. There is no dropout."""
        x, *skips = reversed(features)
        for block, skip in zip(self.blocks, (*skips, None), strict=True):
            x = run_block(block, x, skip, train=train)
        return x

    def packed(self, features: Sequence[jax.Array], train: bool) -> jax.Array:
        """Maps features to packed [B, H/4, W/4, 4^2 out_channels].

        The finest features are packed in cells of 2 x 2 pixels.
        """
        x, *skips = reversed(features)
        *coarse, finest, last = self.blocks
        for block, skip in zip(coarse, skips[:-1], strict=True):
            x = run_block(block, x, skip, train=train)
        x = finest.packed(x, skips[-1], train)
        return last.packed(x, None, train)


class PSPBlock(nnx.Module):
    """Pooling to a coarse grid, 1x1 convolution, and back to the features' size."""

    def __init__(self, in_channels: int, out_channels: int, grid_size: int):
        self.grid_size = grid_size
        # A grid of one cell has one value per image: too few for BatchNorm, so it has a bias.
        has_norm = grid_size > 1
        conv = Conv(in_channels, out_channels, 1, use_bias=not has_norm, init=DECODER_INIT)
        layers = [conv, BatchNorm(out_channels)] if has_norm else [conv]
        self.pool = nnx.List([None, nnx.List(layers)])

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H, W, out_channels]."""
        _, (conv, *norm) = self.pool
        y = conv(average_pool(x, self.grid_size))
        for layer in norm:
            y = layer(y, train)
        return resize(jax.nn.relu(y), *x.shape[1:3])


class PSPModule(nnx.Module):
    """The features concatenated with their averages on four grids."""

    def __init__(self, in_channels: int):
        sizes = (1, 2, 3, 6)
        out_channels = in_channels // len(sizes)
        self.blocks = nnx.List([PSPBlock(in_channels, out_channels, size) for size in sizes])

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H, W, 2 in_channels]."""
        return jnp.concatenate([*(block(x, train) for block in self.blocks), x], axis=-1)


class PSPDecoder(Decoder):
    """The decoder of `smp.PSPNet`: a pyramid of averages over the features at stride 8."""

    num_features = 3
    head_kernel_size = 3
    head_upsampling = 8
    out_channels = 512
    dropout_rate = 0.2

    def __init__(self, encoder_channels: Sequence[int]):
        deepest = encoder_channels[-1]
        self.psp = PSPModule(deepest)
        conv = Conv(2 * deepest, self.out_channels, 1, init=DECODER_INIT)
        self.conv = nnx.List([conv, BatchNorm(self.out_channels)])

    def __call__(
        self, features: Sequence[jax.Array], train: bool, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Maps features to [B, H/8, W/8, 512]. Dropout zeroes whole channels."""
        x = conv_bn(self.conv, self.psp(features[-1], train), train, relu=True)
        return dropout(x, self.dropout_rate, dropout_key if train else None, whole_channels=True)


class SeparableConv(nnx.List):
    """A 3x3 convolution within each channel, then a 1x1 convolution across channels."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1):
        depthwise = DepthwiseConv(in_channels, 3, dilation=dilation, init=TORCH_INIT)
        super().__init__([depthwise, Conv(in_channels, out_channels, 1, init=TORCH_INIT)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H, W, out_channels]."""
        depthwise, pointwise = self
        return pointwise(depthwise(x))


class ASPP(nnx.Module):
    """Atrous spatial pyramid pooling: convolutions at several dilations, and the image average."""

    rates = (12, 24, 36)
    dropout_rate = 0.5

    def __init__(self, in_channels: int, out_channels: int):
        def pointwise(in_channels: int) -> Conv:
            return Conv(in_channels, out_channels, 1, init=TORCH_INIT)

        convs = [
            pointwise(in_channels),
            *(SeparableConv(in_channels, out_channels, rate) for rate in self.rates),
        ]
        pooling = nnx.List([None, pointwise(in_channels), BatchNorm(out_channels)])
        self.convs = nnx.List(
            [*(nnx.List([conv, BatchNorm(out_channels)]) for conv in convs), pooling]
        )
        self.project = nnx.List([pointwise(5 * out_channels), BatchNorm(out_channels)])

    def __call__(self, x: jax.Array, train: bool, dropout_key: jax.Array | None) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H, W, out_channels]. Dropout zeroes single values."""
        *convs, (_, *pooling) = self.convs
        branches = [conv_bn(conv, x, train, relu=True) for conv in convs]
        pooled = conv_bn(pooling, average_pool(x, 1), train, relu=True)
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        y = conv_bn(self.project, jnp.concatenate(branches, axis=-1), train, relu=True)
        return dropout(y, self.dropout_rate, dropout_key if train else None, whole_channels=False)


class DeepLabV3PlusDecoder(Decoder):
    """The decoder of `smp.DeepLabV3Plus`: ASPP at stride 16, refined by features at stride 4.

    The encoder's last stage is dilated by 2 instead of strided. smp does not initialise this
    decoder: its convolutions and the head keep torch's default, including the head's bias.
    """

    output_stride = 16
    head_init = TORCH_INIT
    out_channels = 256

    def __init__(self, encoder_channels: Sequence[int]):
        channels, fine_channels = self.out_channels, 48
        self.aspp = nnx.List(
            [
                ASPP(encoder_channels[-1], channels),
                SeparableConv(channels, channels),
                BatchNorm(channels),
            ]
        )
        fine_conv = Conv(encoder_channels[1], fine_channels, 1, init=TORCH_INIT)
        self.block1 = nnx.List([fine_conv, BatchNorm(fine_channels)])
        merging = SeparableConv(fine_channels + channels, channels)
        self.block2 = nnx.List([merging, BatchNorm(channels)])

    def __call__(
        self, features: Sequence[jax.Array], train: bool, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Maps features to [B, H/4, W/4, 256]. Dropout in ASPP zeroes single values."""
        aspp, *refining = self.aspp
        x = aspp(features[-1], train, dropout_key)
        x = conv_bn(refining, x, train, relu=True)
        fine = conv_bn(self.block1, features[1], train, relu=True)
        x = jnp.concatenate([resize(x, *fine.shape[1:3]), fine], axis=-1)
        return conv_bn(self.block2, x, train, relu=True)


class FPNBlock(nnx.Module):
    """One level of the pyramid: the coarser level upsampled, plus the encoder's features."""

    def __init__(self, skip_channels: int, channels: int):
        self.skip_conv = Conv(skip_channels, channels, 1, use_bias=True, init=DECODER_INIT)

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        """Maps [B, H, W, channels] and [B, 2 H, 2 W, skip_channels] to [B, 2 H, 2 W, channels]."""
        return upsample(x) + self.skip_conv(skip)


class ConvGroupNorm(nnx.Module):
    """3x3 convolution, GroupNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        conv = Conv(in_channels, out_channels, 3, init=DECODER_INIT)
        self.block = nnx.List([conv, GroupNorm(32, out_channels)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H, W, out_channels]."""
        conv, norm = self.block
        return jax.nn.relu(norm(conv(x)))


class FPNSegmentationBlock(nnx.Module):
    """Brings a level of the pyramid to stride 4, doubling its size after each convolution."""

    def __init__(self, in_channels: int, out_channels: int, num_doublings: int):
        self.num_doublings = num_doublings
        sizes = [in_channels, *[out_channels] * max(1, num_doublings)]
        self.block = nnx.List([ConvGroupNorm(*pair) for pair in itertools.pairwise(sizes)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, h, w, in_channels] to [B, h 2^n, w 2^n, out_channels], n = num_doublings."""
        for layer in self.block:
            x = layer(x)
            if self.num_doublings:
                _, height, width, _ = x.shape
                x = resize(x, 2 * height, 2 * width)
        return x


class FPNDecoder(Decoder):
    """The decoder of `smp.FPN`: a pyramid of features at strides 4 to 32, summed at stride 4."""

    out_channels = 128
    dropout_rate = 0.2

    def __init__(self, encoder_channels: Sequence[int]):
        channels = 256
        self.p5 = Conv(encoder_channels[-1], channels, 1, use_bias=True, init=DECODER_INIT)
        self.p4 = FPNBlock(encoder_channels[-2], channels)
        self.p3 = FPNBlock(encoder_channels[-3], channels)
        self.p2 = FPNBlock(encoder_channels[-4], channels)
        self.seg_blocks = nnx.List(
            [FPNSegmentationBlock(channels, self.out_channels, n) for n in (3, 2, 1, 0)]
        )

    def __call__(
        self, features: Sequence[jax.Array], train: bool, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Maps features to [B, H/4, W/4, 128]. Dropout zeroes whole channels."""
        c2, c3, c4, c5 = features[-4:]
        p5 = self.p5(c5)
        p4 = self.p4(p5, c4)
        p3 = self.p3(p4, c3)
        p2 = self.p2(p3, c2)
        levels = zip(self.seg_blocks, (p5, p4, p3, p2), strict=True)
        x = sum(block(level) for block, level in levels)
        return dropout(x, self.dropout_rate, dropout_key if train else None, whole_channels=True)


DECODERS = {
    "unet": UNetDecoder,
    "pspnet": PSPDecoder,
    "deeplabv3plus": DeepLabV3PlusDecoder,
    "fpn": FPNDecoder,
}
# By decoder: the image's height and width must be divisible by this number of pixels.
STRIDES = {name: min(cls.output_stride, 2**cls.num_features) for name, cls in DECODERS.items()}


def pad_to_stride(image: jax.Array, stride: int) -> jax.Array:
    """Pads an image at its lower and right border by reflection, to multiples of `stride`.

    Args:
      image: [B, H, W, K].
      stride: a value of `STRIDES`.

    Returns:
      [B, H', W', K] with H' and W' the next multiples. The caller crops results to H, W.
    """
    _, height, width, _ = image.shape
    borders = ((0, 0), (0, -height % stride), (0, -width % stride), (0, 0))
    return jnp.pad(image, borders, mode="reflect")


def segmentation_head(decoder: Decoder, num_classes: int) -> nnx.List:
    """The head's convolution; the upsampling after it has no parameters."""
    conv = Conv(
        decoder.out_channels,
        num_classes,
        decoder.head_kernel_size,
        use_bias=True,
        init=decoder.head_init,
    )
    return nnx.List([conv])
