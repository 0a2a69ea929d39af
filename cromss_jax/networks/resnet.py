"""torchvision's ResNets as encoders, with the same parameters.

Every attribute path is the key of the corresponding tensor in the `state_dict` of
segmentation_models_pytorch's encoders, which are torchvision's ResNets without `fc`.

Source: He et al., "Deep residual learning" (2016).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from cromss_jax.networks.layers import (
    TORCH_INIT,
    BatchNorm,
    Conv,
    KernelInit,
    conv_bn,
    materialised,
    run_block,
)
from cromss_jax.networks.resampling import max_pool

# torchvision's initialisation: kaiming_normal_(mode="fan_out", nonlinearity="relu").
ENCODER_INIT = KernelInit("normal", 2.0, "out")


class BasicBlock(nnx.Module):
    """The residual block of ResNet-18 and 34: two 3x3 convolutions."""

    expansion = 1
    rematerialise = False

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int = 1):
        self.conv1 = _encoder_conv(in_channels, channels, 3, stride, dilation)
        self.bn1 = BatchNorm(channels)
        self.conv2 = _encoder_conv(channels, channels, 3, 1, dilation)
        self.bn2 = BatchNorm(channels)
        self.downsample = _downsample(in_channels, channels, stride)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H / stride, W / stride, channels]."""
        y = self.bn1(self.conv1(x), train, relu=True)
        y = self.bn2(self.conv2(y), train)
        shortcut = x if self.downsample is None else conv_bn(self.downsample, x, train)
        return materialised(jax.nn.relu(y + shortcut))


class Bottleneck(nnx.Module):
    """The residual block of ResNet-50: 1x1, 3x3 (which carries the stride), 1x1."""

    expansion = 4
    rematerialise = False

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int = 1):
        out_channels = channels * self.expansion
        self.conv1 = _encoder_conv(in_channels, channels, 1, 1)
        self.bn1 = BatchNorm(channels)
        self.conv2 = _encoder_conv(channels, channels, 3, stride, dilation)
        self.bn2 = BatchNorm(channels)
        self.conv3 = _encoder_conv(channels, out_channels, 1, 1)
        self.bn3 = BatchNorm(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H / stride, W / stride, 4 channels]."""
        y = self.bn1(self.conv1(x), train, relu=True)
        y = self.bn2(self.conv2(y), train, relu=True)
        y = conv_bn((self.conv3, self.bn3), y, train)
        shortcut = x if self.downsample is None else conv_bn(self.downsample, x, train)
        return materialised(jax.nn.relu(y + shortcut))


def _encoder_conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, dilation: int = 1
) -> Conv:
    return Conv(
        in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, init=ENCODER_INIT
    )


def _downsample(in_channels: int, out_channels: int, stride: int) -> nnx.List | None:
    """The shortcut's projection; None if the block keeps the shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = _encoder_conv(in_channels, out_channels, 1, stride)
    return nnx.List([conv, BatchNorm(out_channels)])


@dataclasses.dataclass(frozen=True)
class ResNet:
    """The architecture of a ResNet.

    Attributes:
      block: class of the residual blocks.
      num_blocks: number of blocks in each of the four stages.
      width: channels of the stem, and of the first stage before the block's expansion.
    """

    block: type[BasicBlock] | type[Bottleneck]
    num_blocks: tuple[int, int, int, int]
    width: int = 64


# By depth. ResNet-10 is not a published architecture; it is small, for tests and first tries.
RESNETS = {
    10: ResNet(BasicBlock, (1, 1, 1, 1), width=16),
    18: ResNet(BasicBlock, (2, 2, 2, 2)),
    34: ResNet(BasicBlock, (3, 4, 6, 3)),
    50: ResNet(Bottleneck, (3, 4, 6, 3)),
}


class ResNetEncoder(nnx.Module):
    """torchvision's ResNet without its classifier.

    [B, H, W, K] -> features at strides 2, 4, 8, 16, 32:
    [B, H/2, W/2, w], [B, H/4, W/4, w e], [B, H/8, W/8, 2 w e], [B, H/16, W/16, 4 w e],
    [B, H/32, W/32, 8 w e]. The width w is 64, or 16 for ResNet-10. The expansion e is 1, or 4 for
    ResNet-50.

    Args:
      depth: a key of `RESNETS`.
      in_channels: number of bands K.
      num_features: how many of the five feature maps are computed. The parameters of later stages
        exist nevertheless, as in smp.
      output_stride: largest stride; later stages are dilated instead. With 16, the last features
        have stride 16 and come from convolutions of dilation 2.
    """

    def __init__(
        self, depth: int, in_channels: int, num_features: int = 5, output_stride: int = 32
    ):
        resnet = RESNETS[depth]
        expansion = resnet.block.expansion
        # smp replaces the first convolution if there are not 3 bands; it keeps torch's default.
        init = ENCODER_INIT if in_channels == 3 else TORCH_INIT
        self.conv1 = Conv(in_channels, resnet.width, 7, stride=2, init=init)
        self.bn1 = BatchNorm(resnet.width)
        channels = resnet.width
        for stage in range(4):
            width = resnet.width * 2**stage
            dilation = max(1, 4 * 2**stage // output_stride)
            blocks = nnx.List()
            for index in range(resnet.num_blocks[stage]):
                stride = 2 if stage > 0 and index == 0 and dilation == 1 else 1
                blocks.append(resnet.block(channels, width, stride, dilation))
                channels = width * expansion
            setattr(self, f"layer{stage + 1}", blocks)
        stages = (resnet.width * 2**stage * expansion for stage in range(4))
        out_channels = (resnet.width, *stages)
        self.out_channels = out_channels[:num_features]

    def __call__(self, x: jax.Array, train: bool) -> list[jax.Array]:
        """Returns the feature maps, finest first.

        For an image packed in cells of 4 x 4 pixels, the first map is packed in cells of 2 x 2 and
        the others are not packed.
        """
        first, x = self._stem(x, train)
        return [first, *self._run(self._stages(), x, train)]

    def _stages(self) -> list[nnx.List]:
        """The stages whose features are computed."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        return list(stages[: len(self.out_channels) - 1])

    def _stem(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """The first features, and the input of the first stage."""
        x = self.bn1(self.conv1(x), train, relu=True)
        return x, max_pool(x, self.bn1.weight.size)

    @staticmethod
    def _run(stages: Sequence[nnx.List], x: jax.Array, train: bool) -> list[jax.Array]:
        """Runs the stages one after another; returns the output of each."""
        features = []
        for stage in stages:
            for block in stage:
                x = run_block(block, x, train=train)
            features.append(x)
        return features


def _join_parameters(a: jax.Array, b: jax.Array) -> jax.Array:
    """Joins two parameters into one for the concatenated channels; kernels are block-diagonal."""
    if a.ndim == 0:  # num_batches_tracked
        return jnp.stack([a, b])
    if a.ndim == 1:
        return jnp.concatenate([a, b])
    size, _, _, channels = a.shape
    zeros = jnp.zeros((size, size, b.shape[2], channels), a.dtype)
    a = jnp.concatenate([a, zeros], axis=2)
    zeros = jnp.zeros((size, size, a.shape[2] - b.shape[2], b.shape[3]), b.dtype)
    return jnp.concatenate([a, jnp.concatenate([zeros, b], axis=2)], axis=3)


def _split_part(values: jax.Array, index: int) -> jax.Array:
    """The channels of the first (index 0) or second (index 1) encoder; undoes the joining."""
    own = jnp.split(values, 2, axis=-1)[index]
    is_count = jnp.issubdtype(values.dtype, jnp.integer)  # num_batches_tracked
    return own.reshape(()) if is_count else own


def encode_together(
    encoders: Sequence[ResNetEncoder], images: Sequence[jax.Array], train: bool
) -> list[list[jax.Array]]:
    """Two encoders' features, as each would return them for its own image [B, H, W, K].

    The first stages run as one, on the concatenated channels: with 64 channels each, they would
    fill only half of a TPU's row of 128. This costs arithmetic. Finite results differ only by the
    order of sums.
    """
    features, inputs = [], []
    for encoder, image in zip(encoders, images, strict=True):
        first, x = encoder._stem(image, train)
        features.append([first])
        inputs.append(x)

    stages = [encoder.layer1 for encoder in encoders]
    both = nnx.merge(
        nnx.graphdef(stages[0]), jax.tree.map(_join_parameters, *map(nnx.state, stages))
    )
    (x,) = ResNetEncoder._run([both], jnp.concatenate(inputs, axis=-1), train)
    statistics = nnx.state(both, nnx.BatchStat)
    for index, encoder in enumerate(encoders):
        nnx.update(
            encoder.layer1, jax.tree.map(functools.partial(_split_part, index=index), statistics)
        )
        own = _split_part(x, index)
        features[index] += [own, *ResNetEncoder._run(encoder._stages()[1:], own, train)]
    return features
