"""The layouts of PyTorch `state_dict`s: arranging weights as one, and finding out what one is."""

import dataclasses
from collections.abc import Mapping, Sequence

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
# What wrappers put before every key: data parallelism, Lightning, torch.compile; and what
# self-supervised methods put before those of the encoder to keep: MoCo v2 and v3, DINO.
_WRAPPERS = ("module.", "net.", "_orig_mod.", "encoder_q.", "base_encoder.", "backbone.")
# DeCUR keeps an encoder for each modality.
_BACKBONES = ("backbone_1.", "backbone_2.")


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
        if network.fusion in ENCODERS_ALONE:
            raise WeightsError("layout lightning needs a whole network, and this is an encoder")
        if modality is not None:
            raise WeightsError("layout lightning holds the whole network: leave out --modality")
        return network, {f"net.{key}": array for key, array in weights.arrays.items()}
    modality = _one_modality(network, modality, layout)
    bands = {modality: network.bands[modality]}
    prefixes = {p: prefix for (m, p), prefix in network.prefixes.items() if m == modality}
    if layout == "unet":
        if network.fusion in ENCODERS_ALONE:
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
        m: _shape(arrays, PREFIXES[fusion][m or "s2"][0] + "conv1.weight")[1] for m in modalities
    }
    if not bands:
        named = _bands(first, None)
        notes += tuple(
            f"its {len(names)} bands of {m.upper()} are taken for {' '.join(names)}, by number"
            for m, names in named.items()
        )
    network = Network(
        fusion=fusion,
        depth=_depth(part_of(arrays, PREFIXES[fusion]["s2"][0])),
        bands=_bands(first, bands),
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
        if (known.block, known.num_blocks) == (block, blocks):
            return depth
    raise WeightsError(
        f"an encoder of {', '.join(map(str, blocks))} {block.__name__}s; known are ResNet-"
        + ", ".join(map(str, resnet.RESNETS))
    )


def _decoder(decoder: Arrays) -> str:
    """The name of a decoder, by its keys."""
    for name, (_, mark) in DECODER_MARKS.items():
        if any(key.startswith(mark) for key in decoder):
            return name
    raise WeightsError(
        "no decoder of ours: expected keys that begin with "
        + " or ".join(f"{mark} ({name})" for name, mark in DECODER_MARKS.values())
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
