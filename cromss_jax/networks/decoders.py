"""What stands on an encoder: decoders and heads of segmentation_models_pytorch, by its defaults.

Each decoder says which `smp` class it is of, what it needs of the encoder and how its head is made.
Every attribute path is the key of the corresponding tensor in smp 0.6.0's `state_dict`; a None in
a list keeps the place of a layer without parameters. Arrays are NHWC.

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
    average_pool,
    conv_bn,
    dropout,
    resize,
    upsample,
)
from cromss_jax.networks.packing import cell_size, pack_kernel

# kaiming_uniform_(mode="fan_in", nonlinearity="relu"), zero biases.
DECODER_INIT = KernelInit("uniform", 2.0, "in")
# xavier_uniform_, zero biases.
HEAD_INIT = KernelInit("uniform", 1.0, "average")

UNET_CHANNELS = (256, 128, 64, 32, 16)


class Decoder(nnx.Module):
    """What the decoders have in common.

    A decoder is made for the encoder's channels, finest features first, and called as
    `decoder(features, train, dropout_key)`. It drops something in training only, and only if
    given a key; it draws from it once.

    Attributes:
      num_features: how many of the encoder's feature maps are computed.
      output_stride: of the deepest features, at most; what would go beyond it is dilated.
      head_kernel_size: of the head's convolution.
      head_upsampling: how often the image's size is that of the head's convolution.
      head_init: of the head's convolution.
      out_channels: that the head takes.
    """

    num_features = 5
    output_stride = 32
    head_kernel_size = 1
    head_upsampling = 4
    head_init = HEAD_INIT
    out_channels: int


class UNetBlock(nnx.Module):
    """Upsampling, concatenation with the skipped features, two 3x3 conv-BatchNorm-ReLU.

    Neither the upsampled nor the concatenated features are made.
    """

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
        """The same in cells: of n x n pixels of `x`, 2 n x 2 n pixels of `skip` and of the result.

        Maps [B, h, w, n^2 in_channels] and [B, h, w, 4 n^2 skip] to [B, h, w, 4 n^2 out_channels].
        """
        own, skipped = self._kernels()
        cell = cell_size(x, own.shape[2])
        y = convolve(x, pack_kernel(own, cell, upsampling=2).astype(x.dtype))
        if skip is not None:
            y += convolve(skip, pack_kernel(skipped, 2 * cell).astype(x.dtype))
        return self._rest(y, train)

    def _kernels(self) -> tuple[jax.Array, jax.Array]:
        """The first convolution's, for what is upsampled and for the skipped features.

        The sum of both convolutions is the one of what is concatenated, which would have to be
        written first, and its gradient cut.
        """
        kernel = self.conv1[0].weight[...]
        in_channels = kernel.shape[2] - self.skip_channels
        return kernel[:, :, :in_channels], kernel[:, :, in_channels:]

    def _rest(self, y: jax.Array, train: bool) -> jax.Array:
        """What follows the first convolution."""
        x = jax.nn.relu(self.conv1[1](y, train))
        return jax.nn.relu(conv_bn(self.conv2, x, train))


class UNetDecoder(Decoder):
    """`smp.Unet`'s: five blocks from the deepest features back to the image's size."""

    head_kernel_size = 3
    head_upsampling = 1

    def __init__(self, encoder_channels: Sequence[int]):
        # As many as smp's on a stem of 64 channels, fewer on a narrower one.
        channels = [count * encoder_channels[0] // 64 for count in UNET_CHANNELS]
        self.out_channels = channels[-1]
        deepest, *skips = reversed(encoder_channels)
        sizes = zip((deepest, *channels[:-1]), (*skips, 0), channels, strict=True)
        self.blocks = nnx.List([UNetBlock(*size) for size in sizes])

    def __call__(
        self, features: Sequence[jax.Array], train: bool, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Maps features to [B, H, W, out_channels]. Has no dropout."""
        x, *skips = reversed(features)
        for block, skip in zip(self.blocks, (*skips, None), strict=True):
            x = block(x, skip, train)
        return x

    def packed(self, features: Sequence[jax.Array], train: bool) -> jax.Array:
        """Maps features, the finest in cells of 2 x 2, to [B, H/4, W/4, 4^2 out_channels]."""
        x, *skips = reversed(features)
        *coarse, finest, last = self.blocks
        for block, skip in zip(coarse, skips[:-1], strict=True):
            x = block(x, skip, train)
        x = finest.packed(x, skips[-1], train)
        return last.packed(x, None, train)


class PSPBlock(nnx.Module):
    """Pooling to a coarse grid, 1x1 convolution, and back to the features' size."""

    def __init__(self, in_channels: int, out_channels: int, grid_size: int):
        self.grid_size = grid_size
        # Of one image, a single cell is one value: too few for BatchNorm, so it has a bias.
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
    """The features beside what they are on average on four grids."""

    def __init__(self, in_channels: int):
        sizes = (1, 2, 3, 6)
        out_channels = in_channels // len(sizes)
        self.blocks = nnx.List([PSPBlock(in_channels, out_channels, size) for size in sizes])

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H, W, 2 in_channels]."""
        return jnp.concatenate([*(block(x, train) for block in self.blocks), x], axis=-1)


class PSPDecoder(Decoder):
    """`smp.PSPNet`'s: the pyramid of averages over the features at stride 8."""

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
        """Maps features to [B, H/8, W/8, 512]. Drops whole channels."""
        x = jax.nn.relu(conv_bn(self.conv, self.psp(features[-1], train), train))
        return dropout(x, self.dropout_rate, dropout_key if train else None, whole_channels=True)


class SeparableConv(nnx.List):
    """A 3x3 convolution within each channel, then a 1x1 across them."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1):
        depthwise = DepthwiseConv(in_channels, 3, dilation=dilation, init=TORCH_INIT)
        super().__init__([depthwise, Conv(in_channels, out_channels, 1, init=TORCH_INIT)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H, W, out_channels]."""
        depthwise, pointwise = self
        return pointwise(depthwise(x))


class ASPP(nnx.Module):
    """Atrous spatial pyramid pooling: the surroundings at several distances, and the average."""

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
        """Maps [B, H, W, in_channels] to [B, H, W, out_channels]. Drops single values."""
        *convs, (_, *pooling) = self.convs
        branches = [jax.nn.relu(conv_bn(conv, x, train)) for conv in convs]
        pooled = jax.nn.relu(conv_bn(pooling, average_pool(x, 1), train))
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        y = jax.nn.relu(conv_bn(self.project, jnp.concatenate(branches, axis=-1), train))
        return dropout(y, self.dropout_rate, dropout_key if train else None, whole_channels=False)


class DeepLabV3PlusDecoder(Decoder):
    """`smp.DeepLabV3Plus`'s: ASPP at stride 16, refined by the features at stride 4.

    The encoder's last stage is dilated by 2 instead of strided. smp draws nothing of its own
    here: decoder and head start as torch makes convolutions, the head's bias included.
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
        """Maps features to [B, H/4, W/4, 256]. Drops single values within ASPP."""
        aspp, *refining = self.aspp
        x = aspp(features[-1], train, dropout_key)
        x = jax.nn.relu(conv_bn(refining, x, train))
        fine = jax.nn.relu(conv_bn(self.block1, features[1], train))
        x = jnp.concatenate([resize(x, *fine.shape[1:3]), fine], axis=-1)
        return jax.nn.relu(conv_bn(self.block2, x, train))


class FPNBlock(nnx.Module):
    """A step of the pyramid: the coarser level upsampled, plus the encoder's features."""

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
    """`smp.FPN`'s: a pyramid of the features at strides 4 to 32, summed at stride 4."""

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
        """Maps features to [B, H/4, W/4, 128]. Drops whole channels."""
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
# Height and width of the images must be multiples of these.
STRIDES = {name: min(cls.output_stride, 2**cls.num_features) for name, cls in DECODERS.items()}


def pad_to_stride(image: jax.Array, stride: int) -> jax.Array:
    """Reflects the lower and right border of an image of any size, to multiples of `stride`.

    Args:
      image: [B, H, W, K].
      stride: of `STRIDES`.

    Returns:
      [B, H', W', K], H' and W' the next multiples. Results are cropped to H, W by the caller.
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
