"""What the images and the other labels say about the class of each pixel.

Four witnesses, each a distribution over the classes:
- the *images* of the season: for every class, the entangled confidence that the method gives it
  (`method.selection.entangle`), averaged over the sensors. Where S1 and S2 disagree it is low for
  both of their classes.
- the *other seasons*: the mean of their images' distributions;
- the *neighbours*: the labels around the pixel and in all seasons, as smoothed for the targets
  (`method.smoothing.smoothing_prior`);
- the *dates*: the labels of the pixel itself at other dates.

They are combined by a product of powers, which is a weighted vote of log-probabilities:

    r_k = images_k  seasons_k^0.25  neighbours_k^0.5  dates_k^0.3, normalised over the classes k

The exponents say that witnesses repeat each other: seasons show the same land, and errors of labels
come in patches. 1 - r_label is the evidence that the label is wrong, and the class of the largest r
is what it should be. Dimensions: S seasons, T tile size, C classes.
"""

from collections.abc import Mapping

import numpy as np

from cromss_jax import sensors

WEIGHTS = {"images": 1.0, "seasons": 0.25, "neighbours": 0.5, "dates": 0.3}
LEAST = 1e-4  # no witness rules a class out

# What contradicts a label, by index.
REASONS = (
    "the label fits",
    "S1 and S2 see the same other class",
    "S1 and S2 see different other classes",
    "S1 sees another class",
    "S2 sees another class",
    "other dates or neighbours",
)
_FITS, _SAME, _DIFFERENT, _ONE, _OTHERS = 0, 1, 2, {"s1": 3, "s2": 4}, 5
# Those of labels on which S1 and S2 see the same class.
AGREEING = (_SAME, _OTHERS)


def entangled(probs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The entangled confidence of every class, as a distribution.

    Args:
      probs: [..., C] float32 by modality.

    Returns:
      [..., C] float32: of two modalities the normalised mean of (p_d + p_1 p_2) / 2 over d; of one
      its probabilities.
    """
    if len(probs) == 1:
        (own,) = probs.values()
        return own
    first, second = probs.values()
    both = (first + second) / 4 + first * second / 2
    return both / both.sum(axis=-1, keepdims=True)


def other_seasons(images: np.ndarray) -> np.ndarray:
    """The mean over the other seasons, [S, ..., C]; uniform where there is only one."""
    count, num_classes = len(images), images.shape[-1]
    if count == 1:
        return np.full(images.shape, 1 / num_classes, np.float32)
    return (images.sum(axis=0, keepdims=True) - images) / (count - 1)


def other_dates(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How often each class is the label of the pixel at the other dates.

    Every class has 1 / C of a vote more, so that a few dates rule nothing out. A date with the very
    labels of another one repeats its map, and is no witness of it.

    Args:
      labels: [S, T, T] uint8, `IGNORE_LABEL` where there is none.
      num_classes: C.

    Returns:
      [S, T, T, C] float32, summing to one; uniform where no other date has a label.
    """
    differs = np.array([[np.any(a != b) for b in labels] for a in labels], np.float32)
    votes = (labels[..., None] == np.arange(num_classes)).astype(np.float32)
    counts = np.tensordot(differs, votes, axes=1)
    return (counts + np.float32(1 / num_classes)) / (counts.sum(axis=-1, keepdims=True) + 1)


def combine(witnesses: Mapping[str, np.ndarray]) -> np.ndarray:
    """The weighted product of witnesses, by the exponents of `WEIGHTS`.

    Args:
      witnesses: [..., C] by name.

    Returns:
      [..., C] float32, summing to one.
    """
    logs = sum(
        np.float32(WEIGHTS[name]) * np.log(np.maximum(values, LEAST))
        for name, values in witnesses.items()
    )
    product = np.exp(logs - logs.max(axis=-1, keepdims=True))
    return product / product.sum(axis=-1, keepdims=True)


def label_probability(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """P[label], [...]; 1 where there is no label."""
    known = labels != sensors.IGNORE_LABEL
    index = np.where(known, labels, 0)[..., None].astype(np.int64)
    return np.where(known, np.take_along_axis(probs, index, axis=-1)[..., 0], np.float32(1))


def reasons(
    probs: Mapping[str, np.ndarray], labels: np.ndarray, suggested: np.ndarray
) -> np.ndarray:
    """What contradicts labels, as indices of `REASONS`.

    Args:
      probs: [..., C] by modality.
      labels: [...] integers.
      suggested: [...] the class that labels should be.

    Returns:
      [...] uint8; 0 where the label is what it should be.
    """
    seen = {m: p.argmax(axis=-1) for m, p in probs.items()}
    found = np.full(labels.shape, _OTHERS, np.uint8)
    for modality, classes in seen.items():
        found[classes != labels] = _ONE[modality]
    if len(seen) == 2:
        first, second = seen.values()
        both = (first != labels) & (second != labels)
        found[both] = np.where(first == second, _SAME, _DIFFERENT)[both]
    found[suggested == labels] = _FITS
    return found
