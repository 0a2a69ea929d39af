"""Weights of a network outside of training: what they are, their parts, their PyTorch layouts.

Arrays stand under the keys of the published code (models), in PyTorch's axes. No PyTorch here.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cromss_jax import models, resnet, sensors, torch_keys

Arrays = Mapping[str, np.ndarray]

PARTS = ("encoder", "decoder", "segmentation_head")

# Where the parts of each modality are, by fusion. "encoder" is an encoder without its network.
_PREFIXES = {
    "mid": {"s1": ("encoder1.", "decoder.", "segmentation_head.")}
    | {"s2": ("encoder.", "decoder.", "segmentation_head.")},
    "late": {m: tuple(f"{name}.{part}." for part in PARTS) for m, name in
             (("s1", "model1"), ("s2", "model2"))},
    "none": dict.fromkeys(sensors.MODALITIES, tuple(f"{part}." for part in PARTS)),
    "encoder": dict.fromkeys(sensors.MODALITIES, ("encoder.",)),
    "encoders": {"s1": ("encoder1.",), "s2": ("encoder.",)},
}  # fmt: skip
# Those without decoder and head.
_ENCODERS = ("encoder", "encoders")

# How a decoder is called, and how the keys of its own begin.
_DECODERS = {
    "unet": ("U-Net", "blocks.0."),
    "pspnet": ("PSPNet", "psp."),
    "deeplabv3plus": ("DeepLabV3+", "aspp.0."),
    "fpn": ("FPN", "p5."),
}

LAYOUTS = ("lightning", "unet", "encoder", "torchvision")
# What wrappers put before every key: data parallelism, Lightning, torch.compile; and what
# self-supervised methods put before those of the encoder to keep: MoCo v2 and v3, DINO.
_WRAPPERS = ("module.", "net.", "_orig_mod.", "encoder_q.", "base_encoder.", "backbone.")
# DeCUR keeps an encoder for each modality.
_BACKBONES = ("backbone_1.", "backbone_2.")


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
            for part, prefix in zip(PARTS, _PREFIXES[self.fusion][modality], strict=False)
        }

    def abstract_state(self) -> nnx.State:
        """Shapes and dtypes of all parameters and statistics."""
        num_channels = tuple((modality, len(bands)) for modality, bands in self.bands.items())
        return _abstract_state(
            self.fusion, self.depth, num_channels, self.num_classes, self.decoder
        )

    def __str__(self) -> str:
        name, _ = _DECODERS[self.decoder]
        fusion = (
            f"{self.fusion} fusion" if self.decoder == "unet" else f"{name} {self.fusion} fusion"
        )
        kinds = {"none": name, "encoder": "encoder", "encoders": "encoders"}
        kind = kinds.get(self.fusion, fusion)
        bands = " + ".join(f"{m.upper()} {' '.join(names)}" for m, names in self.bands.items())
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        return f"ResNet-{self.depth} {kind} of {bands}{classes}"


@functools.cache  # tracing a network takes a second
def _abstract_state(
    fusion: str,
    depth: int,
    num_channels: tuple[tuple[str, int], ...],
    num_classes: int | None,
    decoder: str,
) -> nnx.State:
    def make():
        if fusion == "encoder":
            ((_, channels),) = num_channels
            return nnx.Dict(encoder=resnet.ResNetEncoder(depth, channels))
        if fusion == "encoders":
            names = {"s1": "encoder1", "s2": "encoder"}
            encoders = {names[m]: resnet.ResNetEncoder(depth, k) for m, k in num_channels}
            return nnx.Dict(**encoders)
        return models.make_network(
            fusion, depth, dict(num_channels), num_classes, jnp.float32, nnx.Rngs(0), decoder
        )

    return nnx.state(nnx.eval_shape(make), (nnx.Param, nnx.BatchStat))


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


def part_of(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose keys begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _one_modality(network: Network, modality: str | None, layout: str) -> str:
    if modality is None and len(network.bands) == 1:
        (modality,) = network.bands
    if modality not in network.bands:
        raise WeightsError(
            f"layout {layout} holds one modality of the {network}; choose it by "
            + " or ".join(f"--modality={m}" for m in network.bands)
        )
    return modality


def to_layout(
    weights: Weights, layout: str, modality: str | None
) -> tuple[Network, dict[str, np.ndarray]]:
    """Arranges weights as a PyTorch `state_dict`.

    Args:
      weights: of a run.
      layout: "lightning", the published code's keys under `net.`; "unet", those of the smp
        model of one modality (`smp.Unet`, or `smp.PSPNet` and so on by the decoder); "encoder" and
        "torchvision", those of smp's encoder, which are torchvision's without `fc`.
      modality: which to take; needed where there are two and the layout holds one.

    Returns:
      What the network in the layout is, and its arrays.

    Raises:
      WeightsError: if the weights don't hold what the layout needs.
    """
    network = weights.network
    if layout == "lightning":
        if network.fusion in _ENCODERS:
            raise WeightsError("layout lightning needs a whole network, and this is an encoder")
        if modality is not None:
            raise WeightsError("layout lightning holds the whole network: leave out --modality")
        return network, {f"net.{key}": array for key, array in weights.arrays.items()}
    modality = _one_modality(network, modality, layout)
    bands = {modality: network.bands[modality]}
    prefixes = {p: prefix for (m, p), prefix in network.prefixes.items() if m == modality}
    if layout == "unet":
        if network.fusion in _ENCODERS:
            raise WeightsError("layout unet needs a decoder, and this is an encoder alone")
        arrays = {
            f"{part}.{key}": array
            for part, prefix in prefixes.items()
            for key, array in part_of(weights.arrays, prefix).items()
        }
        return dataclasses.replace(network, fusion="none", bands=bands), arrays
    if layout not in LAYOUTS:
        raise WeightsError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    arrays = part_of(weights.arrays, prefixes["encoder"])
    return Network("encoder", network.depth, bands, None), arrays


def check_bands(bands: Mapping) -> dict[str, tuple[str, ...]]:
    """Bands by modality as `Network` wants them.

    Raises:
      WeightsError: unless they are names of one sensor each, none twice.
    """
    known = {"s1": sensors.S1_BANDS, "s2": sensors.S2_BANDS}
    is_mapping = isinstance(bands, Mapping) and bands and set(bands) <= set(known)
    if not is_mapping or not all(isinstance(names, list | tuple) for names in bands.values()):
        raise WeightsError(f"bands are {bands!r}; needed are lists of names by modality, s1 or s2")
    for modality, names in bands.items():
        unknown = [name for name in names if name not in known[modality]]
        if unknown or len(set(names)) < len(names) or not names:
            raise WeightsError(
                f"the bands of {modality.upper()} are {', '.join(map(str, names)) or 'none'}; "
                f"needed are some of {', '.join(known[modality])}, none twice"
            )
    return {modality: tuple(names) for modality, names in bands.items()}


def from_layout(arrays: Arrays, bands: Mapping[str, tuple[str, ...]] | None = None) -> Weights:
    """Finds out what a PyTorch `state_dict` is, in any of the layouts.

    Args:
      arrays: under the file's keys, with prefixes of wrappers and of other methods or without.
      bands: by modality, if they are known; else those of the published networks of 2 (S1), 3, 9,
        12 and 13 bands, which the notes then say.

    Returns:
      The weights. Whatever was found beside the network is in the notes.

    Raises:
      WeightsError: if keys, shapes or kinds don't make a network of ours.
    """
    arrays, notes = _unwrap(arrays)
    if any(np.asarray(array).dtype == np.float64 for array in arrays.values()):
        notes += ("float64 was narrowed to float32",)
    if "encoder1.conv1.weight" in arrays:
        fusion = "mid" if any(key.startswith("decoder.") for key in arrays) else "encoders"
    elif "model1.encoder.conv1.weight" in arrays:
        fusion = "late"
    elif "encoder.conv1.weight" in arrays:
        is_whole = any(not key.startswith("encoder.") for key in arrays)
        fusion = "none" if is_whole else "encoder"
    else:
        left_out = "".join(f"; {note}" for note in notes)
        raise WeightsError(
            "no network of ours: expected a first convolution named encoder1.conv1.weight, "
            "model1.encoder.conv1.weight, encoder.conv1.weight or conv1.weight; found "
            + (", ".join(sorted(arrays)[:5]) or "nothing")
            + left_out
        )
    modalities = (None,) if fusion in ("none", "encoder") else sensors.MODALITIES
    first = {
        m: _shape(arrays, _PREFIXES[fusion][m or "s2"][0] + "conv1.weight")[1] for m in modalities
    }
    if not bands:
        named = _bands(first, None)
        notes += tuple(
            f"its {len(names)} bands of {m.upper()} are taken for {' '.join(names)}, by number"
            for m, names in named.items()
        )
    network = Network(
        fusion=fusion,
        depth=_depth(part_of(arrays, _PREFIXES[fusion]["s2"][0])),
        bands=_bands(first, bands),
        num_classes=None
        if fusion in _ENCODERS
        else _shape(arrays, _PREFIXES[fusion]["s2"][2] + "0.weight")[0],
        decoder="unet"
        if fusion in _ENCODERS
        else _decoder(part_of(arrays, _PREFIXES[fusion]["s2"][1])),
    )
    counts = [
        k for k in torch_keys.keys(network.abstract_state()) if k.endswith("num_batches_tracked")
    ]
    if not any(key in arrays for key in counts):
        arrays |= {key: np.zeros((), np.int64) for key in counts}
        notes += ("num_batches_tracked, which nothing reads, was absent and starts at 0",)
    found = Weights(network, arrays, notes)
    bad = [
        key
        for key, array in torch_keys.to_torch_state(found.state()).items()
        if not np.isfinite(array).all()
    ]
    if bad:
        raise WeightsError(f"NaN or infinite values, in float32, in {', '.join(bad)}")
    return found


def _left_out(keys: Sequence[str], why: str) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"left out {', '.join(keys[:3])}{more}: {why}"


def _unwrap(arrays: Arrays) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Brings keys to those of the published code; what is not of the network is left out."""
    notes, found = [], dict(arrays)

    def keep(prefixes: tuple[str, ...]) -> None:
        outside = sorted(key for key in found if not key.startswith(prefixes))
        if outside:
            notes.append(_left_out(outside, f"outside of `{'` and `'.join(prefixes)}`"))
        for key in outside:
            del found[key]

    def wraps(prefix: str) -> bool:
        return any(k.startswith(prefix) and k.endswith("conv1.weight") for k in found)

    while wrapper := next((w for w in _WRAPPERS if wraps(w)), None):
        keep((wrapper,))
        found = part_of(found, wrapper)
    if all(map(wraps, _BACKBONES)):
        keep(_BACKBONES)
        backbones = [part_of(found, prefix) for prefix in _BACKBONES]
        # S1's is the one of two bands, whichever stands first.
        s1, s2 = sorted(backbones, key=lambda part: _shape(part, "conv1.weight")[1])
        parts = {"encoder1.": s1, "encoder.": s2}
    else:
        parts = {"encoder." if "conv1.weight" in found else "": found}
    for prefix, part in parts.items():
        heads = sorted(key for key in part if key.startswith("fc.")) if prefix else []
        if heads:
            notes.append(_left_out(heads, "a classifier or projection, which we have none of"))
        parts[prefix] = {prefix + k: v for k, v in part.items() if k not in heads}
    return {k: v for part in parts.values() for k, v in part.items()}, tuple(notes)


def _shape(arrays: Arrays, key: str) -> tuple[int, ...]:
    shape = np.shape(arrays[key]) if key in arrays else None
    if shape is None or len(shape) != 4:
        found = "is missing" if shape is None else f"has shape {shape}, needs four axes"
        raise WeightsError(f"no network of ours: {key} {found}")
    return shape


def _depth(encoder: Arrays) -> int:
    """The depth of a ResNet, by the number and kind of its blocks."""
    blocks = tuple(
        len({key.split(".")[1] for key in encoder if key.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    block = resnet.Bottleneck if "layer1.0.conv3.weight" in encoder else resnet.BasicBlock
    for depth, known in resnet.RESNETS.items():
        if known == (block, blocks):
            return depth
    raise WeightsError(
        f"an encoder of {', '.join(map(str, blocks))} {block.__name__}s; known are ResNet-"
        + ", ".join(map(str, resnet.RESNETS))
    )


def _decoder(decoder: Arrays) -> str:
    """The name of a decoder, by its keys."""
    for name, (_, mark) in _DECODERS.items():
        if any(key.startswith(mark) for key in decoder):
            return name
    raise WeightsError(
        "no decoder of ours: expected keys that begin with "
        + " or ".join(f"{mark} ({name})" for name, mark in _DECODERS.values())
        + "; found "
        + (", ".join(sorted(decoder)[:5]) or "nothing")
    )


def _bands(
    counts: Mapping[str | None, int], known: Mapping[str, tuple[str, ...]] | None
) -> dict[str, tuple[str, ...]]:
    """Bands by modality, from their numbers and from what is known; None: a single modality."""
    if None in counts:
        (count,) = counts.values()
        guess = "s1" if count == len(sensors.S1_BANDS) else "s2"
        counts = {next(iter(known)) if known and len(known) == 1 else guess: count}
    bands = {}
    for modality, count in counts.items():
        default = sensors.S1_BANDS if modality == "s1" else sensors.S2_BAND_SUBSETS.get(count)
        names = (known or {}).get(modality, default)
        if names is None or len(names) != count:
            raise WeightsError(
                f"the first convolution of {modality.upper()} takes {count} bands"
                + (f", not {' '.join(names)}" if names else ", whose names are not known")
                + "; name them in their order: `python -m cromss_jax.convert from_torch "
                "--bands=B2,B3,B4,B8 ...`"
            )
        bands[modality] = tuple(names)
    return bands


def transfer(
    source: Weights, target: Weights, parts: Sequence[str] = PARTS
) -> tuple[Weights, list[str]]:
    """Starts a network from the weights of another, part by part.

    Encoders go to the encoder of their modality, decoders and heads to those of their modality or
    to the shared one; the first convolution goes band by band. What the source doesn't have, or
    has twice for one place, or of another decoder or number of classes, stays as it is in the
    target.

    Args:
      source: where from.
      target: of the wanted network, freshly drawn.
      parts: which of `PARTS` may be taken.

    Returns:
      The weights, and what came of each part, sentences for the user.

    Raises:
      WeightsError: if the depths differ or nothing can be taken.
    """
    ours, theirs = target.network, source.network
    if ours.depth != theirs.depth:
        raise WeightsError(
            f"the weights are of a {theirs}; config.network.depth is {ours.depth}, and needs to be "
            f"{theirs.depth} to start from them"
        )
    arrays, report, taken = dict(target.arrays), [], 0
    places: dict[str, list[tuple[str, str]]] = {}
    for place, prefix in ours.prefixes.items():
        places.setdefault(prefix, []).append(place)
    for prefix, users in places.items():
        name = f"{users[0][1]} of {' and '.join(m.upper() for m, _ in users)}"
        origins = sorted({theirs.prefixes[user] for user in users if user in theirs.prefixes})
        if len(origins) != 1:
            why = f"the weights have {len(origins)}" if origins else "the weights have none"
            report.append(f"{name}: as initialised, {why}")
            continue
        part = part_of(source.arrays, origins[0])
        modality, kind = users[0]
        if kind not in parts:
            report.append(f"{name}: as initialised")
            continue
        if kind != "encoder" and ours.decoder != theirs.decoder:
            report.append(f"{name}: as initialised, the weights are of a {theirs}")
            continue
        if kind == "segmentation_head" and ours.num_classes != theirs.num_classes:
            report.append(
                f"{name}: as initialised, the weights are for {theirs.num_classes} classes"
            )
            continue
        taken += 1
        how = "taken"
        if kind == "encoder" and ours.bands[modality] != theirs.bands[modality]:
            part["conv1.weight"], how = _adapt(
                part["conv1.weight"],
                theirs.bands[modality],
                arrays[prefix + "conv1.weight"],
                ours.bands[modality],
            )
        arrays |= {prefix + key: value for key, value in part.items()}
        report.append(f"{name}: {how}")
    if not taken:
        raise WeightsError(f"a {theirs} has no part that a {ours} could start from")
    return Weights(ours, arrays), report


def _adapt(
    theirs: np.ndarray, their_bands: tuple[str, ...], ours: np.ndarray, our_bands: tuple[str, ...]
) -> tuple[np.ndarray, str]:
    """The first convolution's kernel [64, K, 7, 7], each band's from the band of its name."""
    adapted = ours.copy()
    for index, band in enumerate(our_bands):
        if band in their_bands:
            adapted[:, index] = theirs[:, their_bands.index(band)]
    new = [band for band in our_bands if band not in their_bands]
    unused = [band for band in their_bands if band not in our_bands]
    how = "taken, its first convolution by band name"
    how += f"; as initialised for {' '.join(new)}" if new else ""
    how += f"; not used: {' '.join(unused)}" if unused else ""
    return adapted, how
