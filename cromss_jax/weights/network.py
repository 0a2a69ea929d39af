"""Weights of a network outside of training: what they are and which parts they have.

Arrays stand under the keys of the published code, in PyTorch's axes. No PyTorch here.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cromss_jax import sensors
from cromss_jax.networks import resnet
from cromss_jax.networks.fusion import make_network
from cromss_jax.weights import torch_keys

Arrays = Mapping[str, np.ndarray]
PARTS = ("encoder", "decoder", "segmentation_head")
# Where the parts of each modality are, by fusion. "encoder" is an encoder without its network.
PREFIXES = {
    "mid": {"s1": ("encoder1.", "decoder.", "segmentation_head.")}
    | {"s2": ("encoder.", "decoder.", "segmentation_head.")},
    "late": {m: tuple(f"{name}.{part}." for part in PARTS) for m, name in
             (("s1", "model1"), ("s2", "model2"))},
    "none": dict.fromkeys(sensors.MODALITIES, tuple(f"{part}." for part in PARTS)),
    "encoder": dict.fromkeys(sensors.MODALITIES, ("encoder.",)),
    "encoders": {"s1": ("encoder1.",), "s2": ("encoder.",)},
}  # fmt: skip
# Those without decoder and head.
ENCODERS_ALONE = ("encoder", "encoders")
# How a decoder is called, and how the keys of its own begin.
DECODER_MARKS = {
    "unet": ("U-Net", "blocks.0."),
    "pspnet": ("PSPNet", "psp."),
    "deeplabv3plus": ("DeepLabV3+", "aspp.0."),
    "fpn": ("FPN", "p5."),
}


class WeightsError(ValueError):
    """Weights are not what they are said to be, or don't fit where they shall go."""


@dataclasses.dataclass(frozen=True)
class Network:
    """What a network is.

    Attributes:
      fusion: "mid", "late", "none"; "encoder" for the encoder of one modality alone, "encoders" for
        those of two.
      depth: of the ResNet.
      bands: names of the bands by modality, in the order of the first convolution's channels.
      num_classes: C, None for an encoder.
      decoder: "unet", "pspnet", "deeplabv3plus" or "fpn"; says nothing of an encoder.
    """

    fusion: str
    depth: int
    bands: Mapping[str, tuple[str, ...]]
    num_classes: int | None
    decoder: str = "unet"

    @classmethod
    def of_config(cls, config: Mapping) -> "Network":
        """The network that a run's configuration describes."""
        bands = {"s1": sensors.S1_BANDS, "s2": tuple(config["s2_bands"])}
        return cls(
            fusion=config["network"]["fusion"],
            depth=config["network"]["depth"],
            bands={modality: bands[modality] for modality in config["modalities"]},
            # Finetuning takes the classes of its data set.
            num_classes=config["network"].get("num_classes", sensors.NUM_CLASSES),
            decoder=config["network"].get("decoder", "unet"),
        )

    @property
    def prefixes(self) -> dict[tuple[str, str], str]:
        """Where each (modality, part) begins; mid fusion's modalities share some."""
        return {
            (modality, part): prefix
            for modality in self.bands
            for part, prefix in zip(PARTS, PREFIXES[self.fusion][modality], strict=False)
        }

    def abstract_state(self) -> nnx.State:
        """Shapes and dtypes of all parameters and statistics."""
        return self._split()[1]

    def definition(self) -> nnx.GraphDef:
        """The float32 network without its arrays, for `nnx.merge`."""
        return self._split()[0]

    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        num_channels = tuple((modality, len(bands)) for modality, bands in self.bands.items())
        return _split(self.fusion, self.depth, num_channels, self.num_classes, self.decoder)

    def __str__(self) -> str:
        name, _ = DECODER_MARKS[self.decoder]
        fusion = (
            f"{self.fusion} fusion" if self.decoder == "unet" else f"{name} {self.fusion} fusion"
        )
        kinds = {"none": name, "encoder": "encoder", "encoders": "encoders"}
        kind = kinds.get(self.fusion, fusion)
        bands = " + ".join(f"{m.upper()} {' '.join(names)}" for m, names in self.bands.items())
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        return f"ResNet-{self.depth} {kind} of {bands}{classes}"


@functools.cache  # tracing a network takes a second
def _split(
    fusion: str,
    depth: int,
    num_channels: tuple[tuple[str, int], ...],
    num_classes: int | None,
    decoder: str,
) -> tuple[nnx.GraphDef, nnx.State]:
    def make():
        if fusion == "encoder":
            ((_, channels),) = num_channels
            return nnx.Dict(encoder=resnet.ResNetEncoder(depth, channels))
        if fusion == "encoders":
            names = {"s1": "encoder1", "s2": "encoder"}
            encoders = {names[m]: resnet.ResNetEncoder(depth, k) for m, k in num_channels}
            return nnx.Dict(**encoders)
        return make_network(
            fusion, depth, dict(num_channels), num_classes, jnp.float32, nnx.Rngs(0), decoder
        )

    return nnx.split(nnx.eval_shape(make))


@dataclasses.dataclass(frozen=True)
class Weights:
    """A network with its arrays.

    Attributes:
      network: what it is.
      arrays: every parameter and statistic, under the published code's keys.
      notes: what was found beside them, sentences for the user.
      card: what is known of them (cards), empty if nothing is.
    """

    network: Network
    arrays: Arrays
    notes: tuple[str, ...] = ()
    card: Mapping = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.state()

    def state(self) -> nnx.State:
        """The arrays as a network's state of float32.

        Raises:
          WeightsError: naming every key that is missing, unexpected, of another shape or kind.
        """
        try:
            return torch_keys.from_torch_state(self.arrays, self.network.abstract_state())
        except ValueError as error:
            raise WeightsError(f"taken for a {self.network}: {error}") from error

    def module(self) -> nnx.Module:
        """The network with the arrays in it, on the default device.

        Encoders alone are in an `nnx.Dict`: `encoder`, or `encoder1` (S1) and `encoder` (S2).
        """
        return nnx.merge(self.network.definition(), jax.tree.map(jnp.asarray, self.state()))


def part_of(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose keys begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
