"""ResNet U-Nets for one or two modalities, parameter for parameter segmentation_models_pytorch's.

Every attribute path is the key of the corresponding tensor in the `state_dict` of
segmentation_models_pytorch (smp) 0.6.0 or, for two modalities, of the published code:

* `UNet`: `encoder.*`, `decoder.*`, `segmentation_head.*`;
* `MidFusion`: the same with `encoder1.*` (S1) beside `encoder.*` (S2);
* `LateFusion`: `model1.*` (S1) and `model2.*` (S2), each a U-Net.

`torch_keys` moves the values. Arrays are NHWC, convolution kernels HWIO. Activations are computed
in `dtype`; parameters, BatchNorm statistics and the returned logits are float32.

Source: Liu et al., "CromSS" (arXiv 2405.01217); He et al., "Deep residual learning" (2016);
Ronneberger et al., "U-Net" (2015).
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from cromss_jax.layers import BatchNorm, Conv, KernelInit, draw_kernels, max_pool, upsample
from cromss_jax.sensors import MODALITIES

# What smp 0.6.0 leaves in each kind of convolution.
# torchvision's ResNet: kaiming_normal_(mode="fan_out", nonlinearity="relu").
ENCODER_INIT = KernelInit("normal", 2.0, "out")
# A first convolution of other than 3 bands is replaced, and gets torch's default for any
# convolution: kaiming_uniform_(a=sqrt(5)), of gain sqrt(2 / (1 + 5)).
PATCHED_CONV_INIT = KernelInit("uniform", 1 / 3, "in")
# kaiming_uniform_(mode="fan_in", nonlinearity="relu").
DECODER_INIT = KernelInit("uniform", 2.0, "in")
# xavier_uniform_.
HEAD_INIT = KernelInit("uniform", 1.0, "average")

DECODER_CHANNELS = (256, 128, 64, 32, 16)
# Five halvings between the image and the deepest features.
STRIDE = 32


def _conv_bn(layers: Sequence, x: jax.Array, train: bool) -> jax.Array:
    conv, norm = layers
    return norm(conv(x), train)


class BasicBlock(nnx.Module):
    """The residual block of ResNet-18 and 34: two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int):
        self.conv1 = _encoder_conv(in_channels, channels, 3, stride)
        self.bn1 = BatchNorm(channels)
        self.conv2 = _encoder_conv(channels, channels, 3, 1)
        self.bn2 = BatchNorm(channels)
        self.downsample = _downsample(in_channels, channels, stride)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H / stride, W / stride, channels]."""
        y = jax.nn.relu(self.bn1(self.conv1(x), train))
        y = self.bn2(self.conv2(y), train)
        shortcut = x if self.downsample is None else _conv_bn(self.downsample, x, train)
        return jax.nn.relu(y + shortcut)


class Bottleneck(nnx.Module):
    """The residual block of ResNet-50: 1x1, 3x3 (which carries the stride), 1x1."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        out_channels = channels * self.expansion
        self.conv1 = _encoder_conv(in_channels, channels, 1, 1)
        self.bn1 = BatchNorm(channels)
        self.conv2 = _encoder_conv(channels, channels, 3, stride)
        self.bn2 = BatchNorm(channels)
        self.conv3 = _encoder_conv(channels, out_channels, 1, 1)
        self.bn3 = BatchNorm(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H / stride, W / stride, 4 channels]."""
        y = jax.nn.relu(self.bn1(self.conv1(x), train))
        y = jax.nn.relu(self.bn2(self.conv2(y), train))
        y = self.bn3(self.conv3(y), train)
        shortcut = x if self.downsample is None else _conv_bn(self.downsample, x, train)
        return jax.nn.relu(y + shortcut)


def _encoder_conv(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> Conv:
    return Conv(in_channels, out_channels, kernel_size, stride=stride, init=ENCODER_INIT)


def _downsample(in_channels: int, out_channels: int, stride: int) -> nnx.List | None:
    """The shortcut's projection, where its shape changes."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = _encoder_conv(in_channels, out_channels, 1, stride)
    return nnx.List([conv, BatchNorm(out_channels)])


# Block and number of blocks per stage, by depth.
RESNETS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


class ResNetEncoder(nnx.Module):
    """torchvision's ResNet without its classifier.

    [B, H, W, K] -> features at strides 2, 4, 8, 16, 32:
    [B, H/2, W/2, 64], [B, H/4, W/4, 64 e], [B, H/8, W/8, 128 e], [B, H/16, W/16, 256 e],
    [B, H/32, W/32, 512 e], with e = 1 for ResNet-18 and 34 and e = 4 for ResNet-50.
    """

    def __init__(self, depth: int, in_channels: int):
        block, num_blocks = RESNETS[depth]
        init = ENCODER_INIT if in_channels == 3 else PATCHED_CONV_INIT
        self.conv1 = Conv(in_channels, 64, 7, stride=2, init=init)
        self.bn1 = BatchNorm(64)
        channels = 64
        for stage in range(4):
            width = 64 * 2**stage
            blocks = nnx.List()
            for index in range(num_blocks[stage]):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width, stride))
                channels = width * block.expansion
            setattr(self, f"layer{stage + 1}", blocks)
        self.out_channels = (64, *(64 * 2**stage * block.expansion for stage in range(4)))

    def __call__(self, x: jax.Array, train: bool) -> list[jax.Array]:
        """Returns the five feature maps, finest first."""
        x = jax.nn.relu(self.bn1(self.conv1(x), train))
        features = [x]
        x = max_pool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x, train)
            features.append(x)
        return features


class DecoderBlock(nnx.Module):
    """Upsampling, concatenation with the skipped features, two 3x3 conv-BatchNorm-ReLU."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        def conv_bn(in_channels: int) -> nnx.List:
            conv = Conv(in_channels, out_channels, 3, init=DECODER_INIT)
            return nnx.List([conv, BatchNorm(out_channels)])

        self.conv1 = conv_bn(in_channels + skip_channels)
        self.conv2 = conv_bn(out_channels)

    def __call__(self, x: jax.Array, skip: jax.Array | None, train: bool) -> jax.Array:
        """Maps [B, H, W, in_channels] and [B, 2 H, 2 W, skip] to [B, 2 H, 2 W, out_channels]."""
        x = upsample(x)
        if skip is not None:
            x = jnp.concatenate([x, skip], axis=-1)
        x = jax.nn.relu(_conv_bn(self.conv1, x, train))
        return jax.nn.relu(_conv_bn(self.conv2, x, train))


class UNetDecoder(nnx.Module):
    """Five decoder blocks from the deepest features back to the image's size."""

    def __init__(self, encoder_channels: Sequence[int]):
        deepest, *skips = reversed(encoder_channels)
        in_channels = (deepest, *DECODER_CHANNELS[:-1])
        sizes = zip(in_channels, (*skips, 0), DECODER_CHANNELS, strict=True)
        self.blocks = nnx.List([DecoderBlock(*size) for size in sizes])

    def __call__(self, features: Sequence[jax.Array], train: bool) -> jax.Array:
        """Maps an encoder's features, finest first, to [B, H, W, 16]."""
        x, *skips = reversed(features)
        for block, skip in zip(self.blocks, (*skips, None), strict=True):
            x = block(x, skip, train)
        return x


def _segmentation_head(num_classes: int) -> nnx.List:
    channels = DECODER_CHANNELS[-1]
    return nnx.List([Conv(channels, num_classes, 3, use_bias=True, init=HEAD_INIT)])


def _check_image(image: jax.Array, num_channels: int) -> None:
    """Raises ValueError unless `image` is [B, H, W, num_channels], H and W halving five times."""
    if image.ndim != 4 or image.shape[-1] != num_channels:
        raise ValueError(
            f"image of shape {image.shape}: the network needs [B, H, W, {num_channels}]"
        )
    height, width = image.shape[1:3]
    if height % STRIDE or width % STRIDE:
        padded_height, padded_width = (-(-size // STRIDE) * STRIDE for size in (height, width))
        raise ValueError(
            f"image of {height} x {width} pixels: the network needs multiples of {STRIDE}, "
            f"pad it to {padded_height} x {padded_width}"
        )


class UNet(nnx.Module):
    """One encoder, decoder and head: `smp.Unet("resnet<depth>")`."""

    def __init__(self, depth: int, num_channels: int, num_classes: int, dtype: DTypeLike):
        self.dtype = jnp.dtype(dtype)
        self.encoder = ResNetEncoder(depth, num_channels)
        self.decoder = UNetDecoder(self.encoder.out_channels)
        self.segmentation_head = _segmentation_head(num_classes)

    def __call__(self, image: jax.Array, train: bool) -> jax.Array:
        """Maps an image [B, H, W, K] to logits [B, H, W, C], float32."""
        return self.decode(self.encode(self.encoder, image, train), train)

    def encode(self, encoder: ResNetEncoder, image: jax.Array, train: bool) -> list[jax.Array]:
        """Features of an image under one of the network's encoders."""
        _check_image(image, encoder.conv1.weight.shape[2])
        return encoder(image.astype(self.dtype), train)

    def decode(self, features: Sequence[jax.Array], train: bool) -> jax.Array:
        """Logits [B, H, W, C], float32, of an encoder's features."""
        (head,) = self.segmentation_head
        return head(self.decoder(features, train)).astype(jnp.float32)


class SingleModality(UNet):
    """A U-Net that takes and returns a dict of modalities, as the fusion networks do."""

    def __init__(
        self, depth: int, num_channels: Mapping[str, int], num_classes: int, dtype: DTypeLike
    ):
        ((self.modality, channels),) = num_channels.items()
        super().__init__(depth, channels, num_classes, dtype)

    def __call__(self, images: Mapping[str, jax.Array], train: bool) -> dict[str, jax.Array]:
        """See `make_network`."""
        return {self.modality: super().__call__(images[self.modality], train)}


class MidFusion(UNet):
    """An encoder each for S1 (`encoder1`) and S2 (`encoder`), one decoder and head for both.

    The decoder takes S1's features, then S2's, as the published code does: in training its
    BatchNorms normalise each by its own statistics and track both, in this order.
    """

    def __init__(
        self,
        depth: int,
        num_channels: Mapping[str, int],
        num_classes: int,
        dtype: DTypeLike,
    ):
        self.encoder1 = ResNetEncoder(depth, num_channels["s1"])
        super().__init__(depth, num_channels["s2"], num_classes, dtype)

    def __call__(self, images: Mapping[str, jax.Array], train: bool) -> dict[str, jax.Array]:
        """See `make_network`."""
        encoders = {"s1": self.encoder1, "s2": self.encoder}
        features = {m: self.encode(encoders[m], images[m], train) for m in MODALITIES}
        return {modality: self.decode(features[modality], train) for modality in MODALITIES}


class LateFusion(nnx.Module):
    """A complete U-Net each for S1 (`model1`) and S2 (`model2`)."""

    def __init__(
        self,
        depth: int,
        num_channels: Mapping[str, int],
        num_classes: int,
        dtype: DTypeLike,
    ):
        self.model1 = UNet(depth, num_channels["s1"], num_classes, dtype)
        self.model2 = UNet(depth, num_channels["s2"], num_classes, dtype)

    def __call__(self, images: Mapping[str, jax.Array], train: bool) -> dict[str, jax.Array]:
        """See `make_network`."""
        return {"s1": self.model1(images["s1"], train), "s2": self.model2(images["s2"], train)}


FUSIONS = {"mid": MidFusion, "late": LateFusion, "none": SingleModality}


def make_network(
    fusion: str,
    depth: int,
    num_channels: Mapping[str, int],
    num_classes: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Builds a network, initialised as smp does.

    Call it as `network(images, train)`: `images` maps each modality to [B, H, W, K] with H and
    W multiples of 32, the result maps it to logits [B, H, W, C], float32. With `train` BatchNorm
    uses and tracks the batch's statistics.

    Args:
      fusion: "mid" (two encoders, shared decoder), "late" (two U-Nets) or "none" (one U-Net).
      depth: of the ResNet encoders: 18, 34 or 50.
      num_channels: number of bands K by modality: "s1" and "s2", or one of them without fusion.
      num_classes: C.
      dtype: of the activations, float32 or bfloat16. Parameters are float32.
      rngs: the `params` stream draws the initial kernels.

    Raises:
      ValueError: for an unknown `fusion`, `depth` or `dtype`, for modalities that do not suit
        `fusion`; when called, for an image of another size or number of bands than described.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {fusion!r}: choose one of {list(FUSIONS)}")
    if depth not in RESNETS:
        raise ValueError(f"unknown ResNet depth {depth!r}: choose one of {list(RESNETS)}")
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"unknown compute dtype {dtype!r}: choose float32 or bfloat16")
    needed = 1 if fusion == "none" else len(MODALITIES)
    if len(num_channels) != needed or not set(num_channels) <= set(MODALITIES):
        raise ValueError(
            f"num_channels names the modalities {list(num_channels)}: fusion {fusion!r} needs "
            f"{needed} of {list(MODALITIES)}"
        )
    network = FUSIONS[fusion](depth, num_channels, num_classes, dtype)
    draw_kernels(network, rngs)
    return network
