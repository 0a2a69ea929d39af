"""Starting one network from the weights of another, part by part and band by band."""

from collections.abc import Sequence

import numpy as np

from cromss_jax.weights.network import PARTS, Weights, WeightsError, part_of


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
