"""Initialising a network from the weights of another, part by part and band by band."""

from collections.abc import Sequence

import numpy as np

from cromss_jax.weights.network import PARTS, Weights, WeightsError, part_of


def transfer(
    source: Weights, target: Weights, parts: Sequence[str] = PARTS
) -> tuple[Weights, list[str]]:
    """Initialises a network from the weights of another, part by part.

    An encoder is copied to the encoder of its modality. A decoder or head is copied to that of its
    modality or to the shared one. The first convolution is copied band by band. A part of the
    target keeps its initial values if the source does not have it, has two candidates for it, or
    has another decoder. A head is copied only if the classes are the same: the names in their order
    if both cards say them, else their number.

    Args:
      source: the weights to copy from.
      target: randomly initialised weights of the wanted network; `classes` in its card are the
        names of its classes.
      parts: the `PARTS` that may be copied.

    Returns:
      The weights, and one message for the user about each part.

    Raises:
      WeightsError: if the depths differ or nothing can be copied.
    """
    ours, theirs = target.network, source.network
    if ours.depth != theirs.depth:
        raise WeightsError(
            f"the weights are a {theirs} and config.network.depth is {ours.depth}: set it to "
            f"{theirs.depth} to start from them"
        )
    arrays, report, taken = dict(target.arrays), [], 0
    users_by_prefix: dict[str, list[tuple[str, str]]] = {}
    for user, prefix in ours.prefixes.items():
        users_by_prefix.setdefault(prefix, []).append(user)
    for prefix, users in users_by_prefix.items():
        name = f"{users[0][1]} of {' and '.join(m.upper() for m, _ in users)}"
        origins = sorted({theirs.prefixes[user] for user in users if user in theirs.prefixes})
        if len(origins) != 1:
            report.append(f"{name}: randomly initialised, the weights have {len(origins)} of them")
            continue
        part = part_of(source.arrays, origins[0])
        modality, kind = users[0]
        if kind not in parts:
            report.append(f"{name}: randomly initialised")
            continue
        if kind != "encoder" and ours.decoder != theirs.decoder:
            report.append(f"{name}: randomly initialised, the weights are a {theirs}")
            continue
        how = "from the weights"
        if kind == "segmentation_head":
            difference = _other_classes(source, target)
            if difference:
                report.append(f"{name}: randomly initialised, {difference}")
                continue
            if not source.card.get("classes"):
                how += ", which do not name their classes: their number is the same"
        taken += 1
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
        raise WeightsError(
            f"the weights are a {theirs}, which has no part in common with a {ours}: use other "
            "weights"
        )
    return Weights(ours, arrays), report


def _other_classes(source: Weights, target: Weights) -> str:
    """How the classes of two networks differ, as a clause; empty if they are the same."""
    ours, theirs = target.network.num_classes, source.network.num_classes
    if ours != theirs:
        return f"the weights have {theirs} classes"
    names = source.card.get("classes") or (), target.card.get("classes") or ()
    for index, (their_name, our_name) in enumerate(zip(*names, strict=False)):
        if their_name != our_name:
            return f"class {index} of the weights is {their_name!r}, not {our_name!r}"
    return ""


def _adapt(
    theirs: np.ndarray, their_bands: tuple[str, ...], ours: np.ndarray, our_bands: tuple[str, ...]
) -> tuple[np.ndarray, str]:
    """The first convolution's kernel [64, K, 7, 7], copied by band name; and a message."""
    adapted = ours.copy()
    for index, band in enumerate(our_bands):
        if band in their_bands:
            adapted[:, index] = theirs[:, their_bands.index(band)]
    new = [band for band in our_bands if band not in their_bands]
    unused = [band for band in their_bands if band not in our_bands]
    how = "from the weights, the first convolution by band name"
    how += f"; randomly initialised for {' '.join(new)}" if new else ""
    how += f"; not used: {' '.join(unused)}" if unused else ""
    return adapted, how
