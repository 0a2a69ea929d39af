"""Segmentation networks for one or two modalities, parameter for parameter those of PyTorch.

Every attribute path is the key of the corresponding tensor in the `state_dict` of
segmentation_models_pytorch (smp) 0.6.0 or, for two modalities, of the published code:

* `SegmentationNetwork`: `encoder.*`, `decoder.*`, `segmentation_head.*`;
* `MidFusion`: the same with `encoder1.*` (S1) beside `encoder.*` (S2);
* `LateFusion`: `model1.*` (S1) and `model2.*` (S2), each a whole network.

`torch_keys` moves the values. Arrays are NHWC, convolution kernels HWIO. Activations are computed
in `dtype`; parameters, BatchNorm statistics and the returned logits are float32.

Source: Liu et al., "CromSS" (arXiv 2405.01217), whose networks are U-Nets; `resnet` and `decoders`
name those of the parts.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from cromss_jax.networks.decoders import DECODERS, STRIDES, segmentation_head
from cromss_jax.networks.layers import draw_kernels, resize
from cromss_jax.networks.packing import unpack_planes
from cromss_jax.networks.resnet import RESNETS, ResNetEncoder, encode_beside
from cromss_jax.sensors import MODALITIES

# Pixels along the side of the cells of packed images; features of stride 4 are then as they are.
PACKED_CELL = 4

# Multiples of it suit every decoder.
STRIDE = max(STRIDES.values())


def _check_image(image: jax.Array, num_channels: int, stride: int, cell: int) -> None:
    """Raises ValueError unless `image` is [B, H, W, num_channels] of multiples of `stride`."""
    if image.ndim != 4 or image.shape[-1] != cell**2 * num_channels:
        raise ValueError(
            f"image of shape {image.shape}: the network needs [B, H, W, {cell**2 * num_channels}]"
        )
    height, width = (size * cell for size in image.shape[1:3])
    if height % stride or width % stride:
        padded_height, padded_width = (-(-size // stride) * stride for size in (height, width))
        raise ValueError(
            f"image of {height} x {width} pixels: the network needs multiples of {stride}, "
            f"pad it to {padded_height} x {padded_width}"
        )


def _modality_key(key: jax.Array | None, modality: str) -> jax.Array | None:
    """A key of the modality's own, so that what is dropped in one is not dropped in the other."""
    return None if key is None else jax.random.fold_in(key, MODALITIES.index(modality))


class SegmentationNetwork(nnx.Module):
    """One encoder, decoder and head: `smp.Unet("resnet<depth>")` or another by `decoder`."""

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
        """Features of one or two images, each under an encoder of its own."""
        cell = PACKED_CELL if self.packed else 1
        for encoder, image in zip(encoders, images, strict=True):
            _check_image(image, encoder.conv1.weight.shape[2], self.stride, cell)
        images = [image.astype(self.dtype) for image in images]
        if self.packed and len(encoders) == 2:  # TPUs alone gain by it
            return encode_beside(encoders, images, train)
        return [encoder(x, train) for encoder, x in zip(encoders, images, strict=True)]

    @jax.named_scope("decoder")
    def decode(
        self, features: Sequence[jax.Array], train: bool, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, H, W, C], float32, of an encoder's features."""
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
    """An encoder of the features that a decoder needs."""
    needs = DECODERS[decoder]
    return ResNetEncoder(depth, num_channels, needs.num_features, needs.output_stride)


class SingleModality(SegmentationNetwork):
    """A network that takes and returns a dict of modalities, as the fusion networks do."""

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
    """A whole network each for S1 (`model1`) and S2 (`model2`)."""

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
) -> nnx.Module:
    """Builds a network, initialised as smp does.

    Call it as `network(images, train, train_encoder=True, dropout_key=None)`: `images` maps each
    modality to [B, H, W, K] with H and W multiples of `decoders.STRIDES[decoder]`, the result maps
    it to logits [B, H, W, C], float32. With `train` BatchNorm uses and tracks the batch's
    statistics; without `train_encoder` that holds for the decoder alone, and the encoders use and
    keep their running statistics. In training, decoders that have dropout do it if given a
    `dropout_key`.

    Args:
      fusion: "mid" (two encoders, shared decoder), "late" (two networks) or "none" (one network).
      depth: of the ResNet encoders: 18, 34 or 50; 10 is a small one.
      num_channels: number of bands K by modality: "s1" and "s2", or one of them without fusion.
      num_classes: C.
      dtype: of the activations, float32 or bfloat16. Parameters are float32.
      rngs: the `params` stream draws the initial kernels.
      decoder: "unet", "pspnet", "deeplabv3plus" or "fpn".
      packed: whether a U-Net computes its layers of few channels on packed images, which spares a
        TPU most of their memory traffic and costs arithmetic. It takes `packing.pack`ed images, in
        cells of `PACKED_CELL` = 4, [B, H / 4, W / 4, 16 K], and returns logits in the order of
        `packing.planes`, [B, 16, H W / 16, C]. Parameters are the same, values but for the order
        of sums, and gradients but where `layers.max_pool` meets ties.

    Raises:
      ValueError: for an unknown `fusion`, `depth`, `dtype` or `decoder`, for modalities that do
        not suit `fusion`, for packing another decoder than the U-Net's; when called, for an image
        of another size or number of bands than described.
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
            f"num_channels names the modalities {list(num_channels)}: fusion {fusion!r} needs "
            f"{needed} of {list(MODALITIES)}"
        )
    if packed and decoder != "unet":
        raise ValueError(f"decoder {decoder!r} cannot be packed, only 'unet'")
    network = FUSIONS[fusion](depth, num_channels, num_classes, dtype, decoder, packed)
    draw_kernels(network, rngs)
    return network
