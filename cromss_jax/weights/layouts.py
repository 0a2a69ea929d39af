"""Layouts of PyTorch `state_dict`s: converting weights to a layout, and recognising a layout."""

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

# Prefixes of all keys, from wrappers: data parallelism, Lightning, torch.compile. And prefixes of
# the encoder to use, from self-supervised methods: MoCo v2, MoCo v3, DINO.
_WRAPPERS = ("module.", "net.", "_orig_mod.", "encoder_q.", "base_encoder.", "backbone.")

# Prefixes of DeCUR, which has one encoder per modality.
_BACKBONES = ("backbone_1.", "backbone_2.")


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


def from_layout(arrays: Arrays, bands: Mapping[str, tuple[str, ...]] | None = None) -> Weights:
    """Recognises the network in a PyTorch `state_dict` of any layout.

    Args:
      arrays: by the file's keys, which may have prefixes of wrappers and of other methods.
      bands: band names by modality if known. Otherwise those of the published networks with 2 (S1),
        3, 9, 12 and 13 bands are assumed, and a note says so.

    Returns:
      The weights. Skipped tensors and assumptions are in the notes.

    Raises:
      WeightsError: if keys, shapes or kinds do not match any supported network.
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
            "not a supported network: it needs a first convolution named encoder1.conv1.weight, "
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
            f"{m.upper()} has {len(names)} bands, assumed to be {' '.join(names)}"
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


def _skipped(keys: Sequence[str], why: str) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"skipped {', '.join(keys[:3])}{more}: {why}"


def _unwrap(arrays: Arrays) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Converts keys to those of the published code; skips tensors of other parts, with notes."""
    notes, found = [], dict(arrays)

    def keep(prefixes: tuple[str, ...]) -> None:
        outside = sorted(key for key in found if not key.startswith(prefixes))
        if outside:
            notes.append(_skipped(outside, f"outside of `{'` and `'.join(prefixes)}`"))
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
        # S1's encoder is the one with two bands; the files have both orders.
        s1, s2 = sorted(backbones, key=lambda part: _shape(part, "conv1.weight")[1])
        parts = {"encoder1.": s1, "encoder.": s2}
    else:
        parts = {"encoder." if "conv1.weight" in found else "": found}
    for prefix, part in parts.items():
        heads = sorted(key for key in part if key.startswith("fc.")) if prefix else []
        if heads:
            notes.append(_skipped(heads, "a classifier or projection, which is not used"))
        parts[prefix] = {prefix + k: v for k, v in part.items() if k not in heads}
    return {k: v for part in parts.values() for k, v in part.items()}, tuple(notes)


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
    counts: Mapping[str | None, int], known: Mapping[str, tuple[str, ...]] | None
) -> dict[str, tuple[str, ...]]:
    """Bands by modality, from the numbers of bands and the known names.

    Args:
      counts: number of bands by modality; the key None stands for a single, unknown modality.
      known: names of the bands by modality, if they are known.
    """
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
                + ": give their names in order by `python -m cromss_jax.convert from_torch "
                "--bands=B2,B3,B4,B8 ...`"
            )
        bands[modality] = tuple(names)
    return bands
