"""Segmentation networks for one or two modalities, with the same parameters as in PyTorch.

Every attribute path is the key of the corresponding tensor in the `state_dict` of
segmentation_models_pytorch (smp) 0.6.0. For two modalities it is the key in the published code:

* `SegmentationNetwork`: `encoder.*`, `decoder.*`, `segmentation_head.*`;
* `MidFusion`: the same, with `encoder1.*` for S1 and `encoder.*` for S2;
* `LateFusion`: `model1.*` (S1) and `model2.*` (S2), each a complete network.

`weights.torch_keys` converts the values. Arrays are NHWC, convolution kernels HWIO. Activations are
computed in `dtype`; parameters, BatchNorm statistics and the returned logits are float32.

Source: Liu et al., "CromSS" (arXiv 2405.01217), whose networks are U-Nets. The sources of the parts
are in `resnet` and `decoders`.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from cromss_jax.networks.decoders import DECODERS, STRIDES, UNetBlock, segmentation_head
from cromss_jax.networks.layers import BatchNorm, draw_kernels
from cromss_jax.networks.packing import unpack_planes
from cromss_jax.networks.resampling import resize
from cromss_jax.networks.resnet import (
    RESNETS,
    BasicBlock,
    Bottleneck,
    ResNetEncoder,
    encode_together,
)
from cromss_jax.sensors import MODALITIES

# Side of the cells of packed images, pixels. Features of stride 4 then need no packing.
PACKED_CELL = 4

# Image sizes divisible by this number of pixels suit every decoder.
STRIDE = max(STRIDES.values())


def _check_image(image: jax.Array, num_channels: int, stride: int, cell: int) -> None:
    """Checks that `image` is [B, H, W, num_channels] with H and W divisible by `stride`."""
    if image.ndim != 4 or image.shape[-1] != cell**2 * num_channels:
        raise ValueError(
            f"the image has shape {image.shape}: the network needs "
            f"[B, H, W, {cell**2 * num_channels}]"
        )
    height, width = (size * cell for size in image.shape[1:3])
    if height % stride or width % stride:
        padded_height, padded_width = (-(-size // stride) * stride for size in (height, width))
        raise ValueError(
            f"the image has {height} x {width} pixels: both must be divisible by {stride}, "
            f"pad it to {padded_height} x {padded_width}"
        )


def _modality_key(key: jax.Array | None, modality: str) -> jax.Array | None:
    """The modality's own dropout key, so that dropout differs between the modalities."""
    return None if key is None else jax.random.fold_in(key, MODALITIES.index(modality))


class SegmentationNetwork(nnx.Module):
    """One encoder, decoder and head: `smp.Unet("resnet<depth>")`, or another smp model."""

    def __init__(
        self,
        depth: int,
        num_channels: int,
        num_classes: int,
        dtype: DTypeLike,
        decoder: str = "unet",
        packed: bool = False,
    ):
        self.dtype = jnp.dtype(dtype)
        self.packed = packed
        self.stride = STRIDES[decoder]
        self.encoder = make_encoder(depth, num_channels, decoder)
        self.decoder = DECODERS[decoder](self.encoder.out_channels)
        self.segmentation_head = segmentation_head(self.decoder, num_classes)

    def __call__(
        self,
        image: jax.Array,
        train: bool,
        *,
        train_encoder: bool = True,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Maps an image [B, H, W, K] to logits [B, H, W, C], float32; see `make_network`."""
        (features,) = self.encode([self.encoder], [image], train and train_encoder)
        return self.decode(features, train, dropout_key)

    @jax.named_scope("encoder")
    def encode(
        self, encoders: Sequence[ResNetEncoder], images: Sequence[jax.Array], train: bool
    ) -> list[list[jax.Array]]:
        """Features of one or two images, each from its own encoder."""
        cell = PACKED_CELL if self.packed else 1
        for encoder, image in zip(encoders, images, strict=True):
            _check_image(image, encoder.conv1.weight.shape[2], self.stride, cell)
        images = [image.astype(self.dtype) for image in images]
        if self.packed and len(encoders) == 2:  # faster on TPUs only
            return encode_together(encoders, images, train)
        return [encoder(x, train) for encoder, x in zip(encoders, images, strict=True)]

    @jax.named_scope("decoder")
    def decode(
        self, features: Sequence[jax.Array], train: bool, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, H, W, C], float32, from an encoder's features."""
        (head,) = self.segmentation_head
        if self.packed:
            logits = head(self.decoder.packed(features, train))
            return unpack_planes(logits, head.weight.shape[-1]).astype(jnp.float32)
        logits = head(self.decoder(features, train, dropout_key)).astype(jnp.float32)
        factor = self.decoder.head_upsampling
        if factor == 1:
            return logits
        _, height, width, _ = logits.shape
        return resize(logits, factor * height, factor * width)


def make_encoder(depth: int, num_channels: int, decoder: str = "unet") -> ResNetEncoder:
    """Builds an encoder that computes the features that a decoder needs."""
    needs = DECODERS[decoder]
    return ResNetEncoder(depth, num_channels, needs.num_features, needs.output_stride)


class SingleModality(SegmentationNetwork):
    """A network for one modality that takes and returns a dict, as the fusion networks do."""

    def __init__(
        self,
        depth: int,
        num_channels: Mapping[str, int],
        num_classes: int,
        dtype: DTypeLike,
        decoder: str = "unet",
        packed: bool = False,
    ):
        ((self.modality, channels),) = num_channels.items()
        super().__init__(depth, channels, num_classes, dtype, decoder, packed)

    def __call__(
        self,
        images: Mapping[str, jax.Array],
        train: bool,
        *,
        train_encoder: bool = True,
        dropout_key: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """See `make_network`."""
        logits = super().__call__(
            images[self.modality],
            train,
            train_encoder=train_encoder,
            dropout_key=_modality_key(dropout_key, self.modality),
        )
        return {self.modality: logits}


class MidFusion(SegmentationNetwork):
    """One encoder for S1 (`encoder1`), one for S2 (`encoder`), a shared decoder and head.

    The decoder runs first on S1's features, then on S2's, as in the published code. In training,
    its BatchNorms normalise each modality by its own statistics and track both, in this order.
    """

    def __init__(
        self,
        depth: int,
        num_channels: Mapping[str, int],
        num_classes: int,
        dtype: DTypeLike,
        decoder: str = "unet",
        packed: bool = False,
    ):
        self.encoder1 = make_encoder(depth, num_channels["s1"], decoder)
        super().__init__(depth, num_channels["s2"], num_classes, dtype, decoder, packed)

    def __call__(
        self,
        images: Mapping[str, jax.Array],
        train: bool,
        *,
        train_encoder: bool = True,
        dropout_key: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """See `make_network`."""
        encoders = (self.encoder1, self.encoder)
        features = self.encode(encoders, [images[m] for m in MODALITIES], train and train_encoder)
        return {
            m: self.decode(own, train, _modality_key(dropout_key, m))
            for m, own in zip(MODALITIES, features, strict=True)
        }


class LateFusion(nnx.Module):
    """Two complete networks, for S1 (`model1`) and S2 (`model2`)."""

    def __init__(
        self,
        depth: int,
        num_channels: Mapping[str, int],
        num_classes: int,
        dtype: DTypeLike,
        decoder: str = "unet",
        packed: bool = False,
    ):
        self.model1, self.model2 = (
            SegmentationNetwork(depth, num_channels[m], num_classes, dtype, decoder, packed)
            for m in MODALITIES
        )

    def __call__(
        self,
        images: Mapping[str, jax.Array],
        train: bool,
        *,
        train_encoder: bool = True,
        dropout_key: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """See `make_network`."""
        networks = (self.model1, self.model2)
        features = self.model1.encode(
            [network.encoder for network in networks],
            [images[m] for m in MODALITIES],
            train and train_encoder,
        )
        return {
            m: network.decode(own, train, _modality_key(dropout_key, m))
            for m, network, own in zip(MODALITIES, networks, features, strict=True)
        }


FUSIONS = {"mid": MidFusion, "late": LateFusion, "none": SingleModality}


def make_network(
    fusion: str,
    depth: int,
    num_channels: Mapping[str, int],
    num_classes: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    decoder: str = "unet",
    packed: bool = False,
    rematerialise: bool = False,
    fused_norms: bool = False,
) -> nnx.Module:
    """Builds a network, initialised as smp does.

    Call it as `network(images, train, train_encoder=True, dropout_key=None)`. `images` maps each
    modality to [B, H, W, K], H and W divisible by `decoders.STRIDES[decoder]`. The result maps each
    modality to logits [B, H, W, C], float32. With `train`, BatchNorm uses and tracks the batch's
    statistics. With `train` but without `train_encoder`, only the decoder does so; the encoders use
    their running statistics and leave them unchanged. Dropout, in decoders that have it, is applied
    in training if a `dropout_key` is given.

    Args:
      fusion: "mid" (two encoders, shared decoder), "late" (two networks) or "none" (one network).
      depth: depth of the ResNet encoders: 18, 34 or 50; 10 is a small network for first tries.
      num_channels: number of bands K by modality: "s1" and "s2", or one of them without fusion.
      num_classes: C.
      dtype: dtype of the activations, float32 or bfloat16. Parameters are float32.
      rngs: its `params` stream gives the keys for the initial kernels.
      decoder: "unet", "pspnet", "deeplabv3plus" or "fpn".
      packed: whether a U-Net computes its layers of few channels on packed images. On a TPU this
        saves most of these layers' memory traffic and costs arithmetic. The network then takes
        images from `packing.pack` with cells of `PACKED_CELL` = 4, [B, H / 4, W / 4, 16 K], and
        returns logits in the order of `packing.planes`, [B, 16, H W / 16, C]. The parameters are
        the same. Values differ only by the order of sums; gradients also differ where pixels tie
        in `resampling.max_pool`.
      rematerialise: whether activations within the encoders' and the U-Net's blocks are computed
        again for the gradient instead of stored. Values are the same up to rounding.
      fused_norms: whether BatchNorms are computed by `fused`, which suits GPUs. Values are the same
        up to rounding.

    Raises:
      ValueError: for an unknown `fusion`, `depth`, `dtype` or `decoder`; for modalities that do
        not suit `fusion`; for `packed` with a decoder other than the U-Net's. The call raises it
        for an image of the wrong size or number of bands.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {fusion!r}: choose one of {list(FUSIONS)}")
    if depth not in RESNETS:
        raise ValueError(f"unknown ResNet depth {depth!r}: choose one of {list(RESNETS)}")
    if decoder not in DECODERS:
        raise ValueError(f"unknown decoder {decoder!r}: choose one of {list(DECODERS)}")
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"unknown compute dtype {dtype!r}: choose float32 or bfloat16")
    needed = 1 if fusion == "none" else len(MODALITIES)
    if len(num_channels) != needed or not set(num_channels) <= set(MODALITIES):
        raise ValueError(
            f"num_channels has the modalities {list(num_channels)}: fusion {fusion!r} needs "
            f"{needed} of {list(MODALITIES)}"
        )
    if packed and decoder != "unet":
        raise ValueError(f"decoder {decoder!r} does not support packed images: use 'unet'")
    network = FUSIONS[fusion](depth, num_channels, num_classes, dtype, decoder, packed)
    draw_kernels(network, rngs)
    for _, module in nnx.iter_modules(network):
        if rematerialise and isinstance(module, BasicBlock | Bottleneck | UNetBlock):
            module.rematerialise = True
        if fused_norms and isinstance(module, BatchNorm):
            module.fused = True
    return network
