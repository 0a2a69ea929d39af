"""Layouts of PyTorch `state_dict`s: converting weights to a layout, and recognising a layout."""

import dataclasses
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from cromss_jax import sensors
from cromss_jax.networks import resnet
from cromss_jax.weights import torch_keys
from cromss_jax.weights.network import (
    DECODER_MARKS,
    ENCODERS_ALONE,
    PREFIXES,
    Arrays,
    Network,
    Weights,
    WeightsError,
    part_of,
)

LAYOUTS = ("lightning", "unet", "encoder", "torchvision")

# Components of keys that parallel training and torch.compile add; they name no module.
_TRANSPARENT = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# Prefixes of an encoder within a network, each with the one that must stand beside it: the
# published late and mid fusion, smp's models, DeCUR. The longest come first.
_ENCODERS = {
    "model1.encoder.": "model2.encoder.",
    "model2.encoder.": "model1.encoder.",
    "encoder1.": "encoder.",
    "encoder.": "encoder.",
    "backbone_1.": "backbone_2.",
    "backbone_2.": "backbone_1.",
}

# Words in the names of networks that training keeps beside the one to use: moving averages
# (state_dict_ema, model_ema, encoder_k, momentum_encoder, target_network), and DINO's student,
# whose teacher is the result.
_COPIES = {"ema", "momentum", "averaged", "average", "avg", "swa", "target", "k", "key", "student"}

# Where Lightning keeps the trained network if `state_dict` is its moving average (WeightAveraging).
_TRAINED = "current_model_state."

# Heads that classification and self-supervised methods put on a ResNet.
_HEADS = {"fc", "head", "heads", "classifier", "linear", "last_linear", "mlp"}
_HEADS |= {"projector", "projection_head", "predictor", "prediction_head", "prototypes"}

# Fusions whose keys only the published code has, so that their bands are known.
_PUBLISHED = ("mid", "late")

# Numbers of Sentinel-2 channels that have one usual meaning in other files, too: red, green, blue;
# and all bands by number.
_USUAL = (3, 13)

# For the other numbers: what the channels may be, for the user to choose from.
_CANDIDATES = {
    4: ("B2,B3,B4,B8", "B4,B3,B2,B8"),
    6: ("B2,B3,B4,B8A,B11,B12 (HLS)", "B2,B3,B4,B8,B11,B12"),
    9: (
        "B2,B3,B4,B5,B6,B7,B8,B11,B12 (CromSS)",
        "B2,B3,B4,B5,B6,B7,B8,B8A and an index such as NDVI, which this program cannot use",
    ),
    10: ("B2,B3,B4,B5,B6,B7,B8,B8A,B11,B12 (BigEarthNet)",),
    12: (
        "B1,B2,B3,B4,B5,B6,B7,B8,B8A,B9,B11,B12 (Level-2A, CromSS)",
        "ten bands and S1 in one convolution (BigEarthNet-MM), which this program cannot use",
    ),
}


def _one_modality(network: Network, modality: str | None, layout: str) -> str:
    if modality is None and len(network.bands) == 1:
        (modality,) = network.bands
    if modality not in network.bands:
        raise WeightsError(
            f"layout {layout} holds one modality, and the weights are a {network}: choose one by "
            + " or ".join(f"--modality={m}" for m in network.bands)
        )
    return modality


def to_layout(
    weights: Weights, layout: str, modality: str | None
) -> tuple[Network, dict[str, np.ndarray]]:
    """Converts weights to the layout of a PyTorch `state_dict`.

    Args:
      weights: the weights.
      layout: "lightning" for the published code's keys with the prefix `net.`; "unet" for the keys
        of the smp model of one modality (`smp.Unet`, or `smp.PSPNet` and so on, depending on the
        decoder); "encoder" or "torchvision" for the keys of smp's encoder, which are torchvision's
        without `fc`.
      modality: the modality to convert; needed if the weights have two and the layout holds one.

    Returns:
      The description of the converted network, and its arrays.

    Raises:
      WeightsError: if the weights do not contain what the layout needs.
    """
    network = weights.network
    if layout == "lightning":
        if network.fusion in ENCODERS_ALONE:
            raise WeightsError(
                "layout lightning needs a complete network, and the weights are only an encoder: "
                "use layout encoder"
            )
        if modality is not None:
            raise WeightsError("layout lightning holds all modalities: remove --modality")
        return network, {f"net.{key}": array for key, array in weights.arrays.items()}
    modality = _one_modality(network, modality, layout)
    bands = {modality: network.bands[modality]}
    prefixes = {p: prefix for (m, p), prefix in network.prefixes.items() if m == modality}
    if layout == "unet":
        if network.fusion in ENCODERS_ALONE:
            raise WeightsError(
                "layout unet needs a decoder, and the weights are only an encoder: use layout "
                "encoder"
            )
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
    """Checks bands by modality and returns them as `Network.bands`.

    Raises:
      WeightsError: if they are not names of the modality's sensor, or if a name occurs twice.
    """
    known = {"s1": sensors.S1_BANDS, "s2": sensors.S2_BANDS}
    is_mapping = isinstance(bands, Mapping) and bands and set(bands) <= set(known)
    if not is_mapping or not all(isinstance(names, list | tuple) for names in bands.values()):
        raise WeightsError(
            f"the bands are {bands!r}: needed is a list of band names for s1, s2 or both"
        )
    for modality, names in bands.items():
        unknown = [name for name in names if name not in known[modality]]
        if unknown or len(set(names)) < len(names) or not names:
            raise WeightsError(
                f"the bands of {modality.upper()} are {', '.join(map(str, names)) or 'none'}: "
                f"choose from {', '.join(known[modality])}, each at most once"
            )
    return {modality: tuple(names) for modality, names in bands.items()}


def name_bands(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Bands by modality, from names of one sensor.

    Raises:
      WeightsError: if they are not names of one sensor, or if a name occurs twice.
    """
    modality = "s1" if set(names) <= set(sensors.S1_BANDS) else "s2"
    return check_bands({modality: tuple(names)})


def find_network(
    tensors: Mapping[str, Any], take: str | None = None
) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """Finds the network among the tensors of a file, whatever wraps it.

    It is found by its ResNet encoders, so that no list of wrappers (`model.`, `state_dict.net.`,
    `backbone.`) is needed. A file may hold one network, and copies of it.

    Args:
      tensors: anything with a shape, by key. Keys of nested dicts are joined by dots.
      take: which network to use, if not the trained one: its prefix or a component of that, such
        as "state_dict_ema", "student" or "encoder_k".

    Returns:
      The network's tensors by the published code's keys, the prefix that they had, and notes about
      what was left out.

    Raises:
      WeightsError: if there is no ResNet, or if it is not clear which network to use.
    """
    plain = {_without_wrappers(key): tensor for key, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise WeightsError(
            "some tensors have the same key but for a component such as `module.`, so it is not "
            "clear which to use: save only one of them"
        )
    networks = _networks(plain)
    prefix = _choose(sorted(networks), take)
    others = tuple(other for other in sorted(networks) if other not in ("", prefix))
    nested = tuple(other for other in others if other.startswith(prefix))
    own, outside = {}, []
    for key, tensor in plain.items():
        if key.startswith(prefix) and not key.startswith(nested):
            own[key.removeprefix(prefix)] = tensor
        elif not key.startswith(others):
            outside.append(key)
    found, heads, rest = _published_keys(own, networks[prefix])
    outside += [prefix + key for key in rest]
    notes = [
        f"skipped the network under `{other}`: `python -m cromss_jax.convert from_torch "
        f"--take={other.rstrip('.')}` uses it instead"
        for other in others
    ]
    for keys, why in (
        ([prefix + key for key in heads], "a classifier or projection, which is not used"),
        # Single numbers are scores and counters.
        ([key for key in outside if np.ndim(plain[key])], "not part of the network"),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            notes.append(f"skipped {', '.join(sorted(keys)[:3])}{more}: {why}")
    return found, prefix, tuple(notes)


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _TRANSPARENT)


def _networks(tensors: Mapping[str, Any]) -> dict[str, set[str]]:
    """The networks in a file: by prefix, where their encoders are.

    That is keys of `_ENCODERS`, or "" for an encoder without any prefix of its own.
    """
    roots = {key.removesuffix("conv1.weight") for key in tensors if key.endswith("conv1.weight")}
    roots = {root for root in roots if f"{root}layer1.0.conv1.weight" in tensors}
    if not roots:
        raise WeightsError(
            "not a supported network: it needs a ResNet encoder, with keys that end in "
            "conv1.weight and layer1.0.conv1.weight; found "
            + (", ".join(sorted(tensors)[:5]) or "no tensors")
        )
    networks: dict[str, set[str]] = {}
    for root in roots:
        prefix, place = root, ""
        for name, partner in _ENCODERS.items():
            stem = root.removesuffix(name)
            if f".{root}".endswith(f".{name}") and stem + partner in roots:
                prefix, place = stem, name
                break
        networks.setdefault(prefix, set()).add(place)
    return networks


def _choose(prefixes: Sequence[str], take: str | None) -> str:
    """The prefix of the network to use.

    Raises:
      WeightsError: if it is not clear which.
    """
    names = ", ".join(prefix.rstrip(".") or "one without prefix" for prefix in prefixes)
    if take:
        chosen = [prefix for prefix in prefixes if prefix == f"{take}."]
        chosen = chosen or [prefix for prefix in prefixes if f".{take}." in f".{prefix}"]
        if len(chosen) != 1:
            raise WeightsError(
                f"--take={take} names {len(chosen)} of the networks in the file, and one is "
                f"needed: choose from {names}"
            )
    else:
        trained = [p for p in prefixes if not _COPIES.intersection(re.split(r"[._]", p))]
        trained = [p for p in trained if p.startswith(_TRAINED)] or trained
        chosen = prefixes if len(prefixes) == 1 else trained
        if len(chosen) != 1:
            raise WeightsError(
                f"the file holds several networks: {names}; choose one by "
                "`python -m cromss_jax.convert from_torch --take=NAME` and use its output"
            )
    return chosen[0]


def _published_keys(
    tensors: Mapping[str, Any], encoders: Set[str]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Renames a network's keys to those of the published code.

    Args:
      tensors: by key, without the network's prefix.
      encoders: where its encoders are, as of `_networks`.

    Returns:
      The renamed tensors, the keys of heads inside the encoders, and those outside the network.
    """
    renamed = {place: place for place in encoders}
    parts: tuple[str, ...] = ()
    if "" in encoders:
        renamed = {"": "encoder."}
    elif "backbone_1." in encoders:
        # S1's encoder is the one with two bands; the files have both orders.
        shapes = {place: _shape(tensors, f"{place}conv1.weight") for place in sorted(encoders)}
        s1, s2 = sorted(shapes, key=lambda place: shapes[place][1])
        renamed = {s1: "encoder1.", s2: "encoder."}
    else:
        models = {re.sub(r"encoder1?\.$", "", place) for place in encoders}
        parts = tuple(
            model + part for model in models for part in ("decoder.", "segmentation_head.")
        )
    found, heads, rest = {}, [], []
    for key, tensor in tensors.items():
        place = next((place for place in renamed if key.startswith(place)), None)
        if place is not None and key.removeprefix(place).split(".")[0] in _HEADS:
            heads.append(key)
        elif place is not None:
            found[renamed[place] + key.removeprefix(place)] = tensor
        elif key.startswith(parts):
            found[key] = tensor
        else:
            rest.append(key)
    return found, heads, rest


def from_layout(arrays: Arrays, bands: Mapping[str, tuple[str, ...]] | None = None) -> Weights:
    """Recognises the network that arrays belong to.

    Args:
      arrays: by the published code's keys (`find_network`).
      bands: band names by modality, if known. Otherwise they follow from the number of bands where
        that has one usual meaning, or where the keys are those of the published code; a note says
        so.

    Returns:
      The weights, with assumptions in the notes.

    Raises:
      WeightsError: if keys, shapes or kinds do not match any supported network, or if the bands
        are needed.
    """
    arrays, notes = dict(arrays), ()
    if any(np.asarray(array).dtype == np.float64 for array in arrays.values()):
        notes += ("float64 was narrowed to float32",)
    is_whole = any(key.startswith(("decoder.", "segmentation_head.")) for key in arrays)
    if "encoder1.conv1.weight" in arrays:
        fusion = "mid" if is_whole else "encoders"
    elif "model1.encoder.conv1.weight" in arrays:
        fusion = "late"
    else:
        fusion = "none" if is_whole else "encoder"
    modalities = (None,) if fusion in ("none", "encoder") else sensors.MODALITIES
    first = {
        m: _shape(arrays, PREFIXES[fusion][m or "s2"][0] + "conv1.weight")[1] for m in modalities
    }
    named, assumed = _bands(first, bands or {}, fusion in _PUBLISHED)
    notes += assumed
    network = Network(
        fusion=fusion,
        depth=_depth(part_of(arrays, PREFIXES[fusion]["s2"][0])),
        bands=named,
        num_classes=None
        if fusion in ENCODERS_ALONE
        else _shape(arrays, PREFIXES[fusion]["s2"][2] + "0.weight")[0],
        decoder="unet"
        if fusion in ENCODERS_ALONE
        else _decoder(part_of(arrays, PREFIXES[fusion]["s2"][1])),
    )
    counts = [
        k for k in torch_keys.keys(network.abstract_state()) if k.endswith("num_batches_tracked")
    ]
    if not any(key in arrays for key in counts):
        arrays |= {key: np.zeros((), np.int64) for key in counts}
        notes += ("num_batches_tracked is missing and set to 0; it is not used",)
    found = Weights(network, arrays, notes)
    bad = [
        key
        for key, array in torch_keys.to_torch_state(found.state()).items()
        if not np.isfinite(array).all()
    ]
    if bad:
        raise WeightsError(
            f"NaN or infinite values (in float32) in {', '.join(bad)}: use other weights"
        )
    return found


def _shape(arrays: Arrays, key: str) -> tuple[int, ...]:
    shape = np.shape(arrays[key]) if key in arrays else None
    if shape is None or len(shape) != 4:
        found = "is missing" if shape is None else f"has shape {shape}, needs four axes"
        raise WeightsError(f"not a supported network: {key} {found}")
    return shape


def _depth(encoder: Arrays) -> int:
    """The depth of a ResNet, from the number and kind of its blocks."""
    blocks = tuple(
        len({key.split(".")[1] for key in encoder if key.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    block = resnet.Bottleneck if "layer1.0.conv3.weight" in encoder else resnet.BasicBlock
    for depth, known in resnet.RESNETS.items():
        if (known.block, known.num_blocks) == (block, blocks):
            return depth
    raise WeightsError(
        f"not a supported network: the encoder of {', '.join(map(str, blocks))} {block.__name__}s "
        "is none of ResNet-" + ", ".join(map(str, resnet.RESNETS))
    )


def _decoder(decoder: Arrays) -> str:
    """The name of a decoder, from its keys."""
    for name, (_, mark) in DECODER_MARKS.items():
        if any(key.startswith(mark) for key in decoder):
            return name
    raise WeightsError(
        "not a supported decoder: it needs keys that start with "
        + " or ".join(f"{mark} ({name})" for name, mark in DECODER_MARKS.values())
        + "; found "
        + (", ".join(sorted(decoder)[:5]) or "nothing")
    )


def _bands(
    counts: Mapping[str | None, int],
    known: Mapping[str, tuple[str, ...]],
    is_published: bool,
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Bands by modality, and a note about each modality whose bands are assumed.

    Args:
      counts: number of bands by modality; the key None stands for a single, unknown modality.
      known: names of the bands by modality, as far as they are known.
      is_published: whether only the published code has such keys.
    """
    if None in counts:
        (count,) = counts.values()
        guess = "s1" if count == len(sensors.S1_BANDS) else "s2"
        counts = {next(iter(known)) if len(known) == 1 else guess: count}
    bands, notes = {}, []
    for modality, count in counts.items():
        names = known.get(modality)
        if names is None and modality == "s1":
            names = sensors.S1_BANDS if count == len(sensors.S1_BANDS) else None
        elif names is None and (is_published or count in _USUAL):
            names = sensors.S2_BAND_SUBSETS.get(count)
        if names is None or len(names) != count:
            known_as = f"not {' '.join(names)}" if names else "whose names are not known"
            candidates = _CANDIDATES.get(count, ()) if modality == "s2" else ()
            raise WeightsError(
                f"the first convolution of {modality.upper()} takes {count} bands, "
                f"{known_as}: give their names in order, as --bands=B2,B3,... of "
                "`python -m cromss_jax.convert from_torch`, as config.init_from_bands, or as "
                "`bands` of cromss_jax.load"
                + (f"; candidates are {'; or '.join(candidates)}" if candidates else "")
            )
        bands[modality] = tuple(names)
        if modality not in known:
            notes.append(f"{modality.upper()} has {count} bands, assumed to be {' '.join(names)}")
    return bands, tuple(notes)
