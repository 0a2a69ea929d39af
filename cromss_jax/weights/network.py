"""Weights with a description of their network: modalities, bands, depth, parts.

Arrays have the keys of the published code and PyTorch's axis order. This module needs no PyTorch.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cromss_jax import presets, sensors
from cromss_jax.errors import UserError
from cromss_jax.networks import resnet
from cromss_jax.networks.fusion import make_network
from cromss_jax.weights import torch_keys

Arrays = Mapping[str, np.ndarray]

PARTS = ("encoder", "decoder", "segmentation_head")

# Key prefixes of the parts, by fusion and modality. "encoder" is an encoder without decoder and
# head, "encoders" are two of them.
PREFIXES = {
    "mid": {
        "s1": ("encoder1.", "decoder.", "segmentation_head."),
        "s2": ("encoder.", "decoder.", "segmentation_head."),
    },
    "late": {
        "s1": tuple(f"model1.{part}." for part in PARTS),
        "s2": tuple(f"model2.{part}." for part in PARTS),
    },
    "none": dict.fromkeys(sensors.MODALITIES, tuple(f"{part}." for part in PARTS)),
    "encoder": dict.fromkeys(sensors.MODALITIES, ("encoder.",)),
    "encoders": {"s1": ("encoder1.",), "s2": ("encoder.",)},
}

# Values of `Network.fusion` without decoder and head.
ENCODERS_ALONE = ("encoder", "encoders")

# By decoder: its name for people, and a prefix that only its own keys have.
DECODER_MARKS = {
    "unet": ("U-Net", "blocks.0."),
    "pspnet": ("PSPNet", "psp."),
    "deeplabv3plus": ("DeepLabV3+", "aspp.0."),
    "fpn": ("FPN", "p5."),
}


class WeightsError(UserError):
    """Weights differ from their description, or do not fit the network or file that needs them."""


@dataclasses.dataclass(frozen=True)
class Network:
    """Description of a network.

    Attributes:
      fusion: "mid", "late" or "none"; "encoder" for only the encoder of one modality, "encoders"
        for only those of two.
      depth: depth of the ResNet.
      bands: names of the bands by modality, in the order of the first convolution's channels.
      num_classes: C, None for encoders alone.
      decoder: "unet", "pspnet", "deeplabv3plus" or "fpn"; no meaning for encoders alone.
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
            # From the data set. Runs of earlier versions without it have Dynamic World's.
            num_classes=config["network"].get("num_classes", len(presets.DYNAMIC_WORLD)),
            decoder=config["network"].get("decoder", "unet"),
        )

    @property
    def prefixes(self) -> dict[tuple[str, str], str]:
        """Key prefix by (modality, part). In mid fusion, both modalities share some of them."""
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


@functools.cache  # because tracing a network takes a second
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

    # Float32 also in a process that set jax_enable_x64, where the default is float64.
    with jax.enable_x64(False):
        return nnx.split(nnx.eval_shape(make))


@dataclasses.dataclass(frozen=True)
class Weights:
    """A network's description and its arrays.

    Attributes:
      network: the description.
      arrays: all parameters and statistics, by the published code's keys.
      notes: messages for the user about assumptions and skipped tensors.
      card: information about the weights (see `cards`), empty if unknown.
    """

    network: Network
    arrays: Arrays
    notes: tuple[str, ...] = ()
    card: Mapping = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """Raises WeightsError if keys are missing or unexpected, or have the wrong shape or kind.

        The message lists all of them.
        """
        try:
            torch_keys.check_torch_state(self.arrays, self.network.abstract_state())
        except ValueError as error:
            raise WeightsError(f"read as a {self.network}: {error}") from error

    def state(self) -> nnx.State:
        """The arrays as a network's state in float32, copied."""
        return torch_keys.from_torch_state(self.arrays, self.network.abstract_state())

    def module(self) -> nnx.Module:
        """The network as a module with these arrays, on the default device.

        Encoders alone are an `nnx.Dict` with `encoder`, or with `encoder1` (S1) and `encoder` (S2).
        """
        return nnx.merge(self.network.definition(), jax.tree.map(jnp.asarray, self.state()))


def part_of(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose keys start with `prefix`; the prefix is removed."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
