"""Noisy labels with the kinds of errors that Dynamic World has.

Brown et al., "Dynamic World, near real-time global 10 m land use land cover mapping", Scientific
Data 2022: similar classes confused over blobs and parcels, displaced and smoothed borders, lost
small objects, and sometimes a season that is largely wrong. The errors are drawn independently of
the images and for each season, so that no image predicts them.
"""

import numpy as np
from scipy import ndimage

from cromss_jax.presets import DYNAMIC_WORLD
from cromss_jax.sensors import IGNORE_LABEL
from data_prep.sample.fields import gaussian_field, pixel_grid, uniform_field
from data_prep.sample.land import BARE, BUILT, CROPS, GRASS, MARSH, SHRUB, SNOW, TREES, WATER

# What made a label wrong.
NOISE_KINDS = ("right", "confused", "displaced", "smoothed away", "season gone wrong", "cloud")
_NUM_CLASSES = len(DYNAMIC_WORLD)
_RIGHT, _CONFUSED, _DISPLACED, _SMOOTHED, _WRONG_SEASON, _CLOUD = range(len(NOISE_KINDS))

# By true class: the share of its pixels that a season's labels confuse, and with what (weights).
_CONFUSIONS = {
    WATER: (0.16, {MARSH: 6, BARE: 2, TREES: 2}),
    TREES: (0.22, {SHRUB: 6, GRASS: 2, CROPS: 1, MARSH: 1}),
    GRASS: (0.23, {CROPS: 5, SHRUB: 4, TREES: 1}),
    MARSH: (0.19, {GRASS: 4, WATER: 3, TREES: 2, CROPS: 1}),
    CROPS: (0.26, {GRASS: 5, SHRUB: 3, BARE: 2}),
    SHRUB: (0.25, {GRASS: 4, TREES: 3, CROPS: 2, BARE: 2}),
    BUILT: (0.17, {BARE: 5, CROPS: 3, TREES: 1}),
    BARE: (0.19, {BUILT: 3, SHRUB: 4, CROPS: 3}),
    SNOW: (0.20, {BARE: 6, WATER: 2, SHRUB: 2}),
}
# By true class: the part of a confused share that follows parcels. The rest forms blobs.
_CONFUSED_BY_PARCEL = np.array([0, 0.5, 0.5, 0, 0.5, 0.5, 0.5, 0.5, 0], np.float32)


def _confusion_tables() -> tuple[np.ndarray, np.ndarray]:
    """By true class: the confused share [9], and the cumulative odds of each other class [9,9]."""
    shares, odds = np.zeros(_NUM_CLASSES), np.zeros((_NUM_CLASSES, _NUM_CLASSES))
    for true_class, (share, weights) in _CONFUSIONS.items():
        shares[true_class] = share
        for other, weight in weights.items():
            odds[true_class, other] = weight
    cumulative = odds.cumsum(1)
    return shares.astype(np.float32), (cumulative / cumulative[:, -1:]).astype(np.float32)


_SHARES, _CUMULATIVE_ODDS = _confusion_tables()


def _confuse(rng: np.random.Generator, truth: np.ndarray, parcel: np.ndarray) -> np.ndarray:
    """The true map with parcels, then blobs, replaced by a similar class."""
    size = len(truth)
    by_parcel = rng.random((2, parcel.max() + 1), dtype=np.float32)[:, parcel]
    by_blob = (uniform_field(rng, size, 9), uniform_field(rng, size, 14))
    parcel_shares = _SHARES * _CONFUSED_BY_PARCEL
    confused = truth.copy()
    for (chance, choice), shares in (
        (by_parcel, parcel_shares),
        (by_blob, _SHARES - parcel_shares),
    ):
        hit = chance < shares[truth]
        # A value of exactly 1 would be past the last class.
        draw = choice[hit].clip(max=0.999)
        confused[hit] = (draw[:, None] >= _CUMULATIVE_ODDS[truth[hit]]).sum(1)
    return confused


def _smooth(labels: np.ndarray) -> np.ndarray:
    """Every pixel takes the class most common around it."""
    present = np.unique(labels)
    votes = [
        ndimage.gaussian_filter((labels == c).astype(np.float32), 2.0, truncate=2.5)
        for c in present
    ]
    return present[np.argmax(votes, axis=0)]


def noisy_labels(
    rng: np.random.Generator,
    truth: np.ndarray,
    parcel: np.ndarray,
    cloud: np.ndarray,
    season_wrong: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """One season's labels.

    Args:
      rng: of the season.
      truth: [T,T] uint8, the true classes.
      parcel: [T,T] int from 0; half of the confusion follows parcels.
      cloud: [T,T] bool, where no label can be given.
      season_wrong: whether the season is largely wrong.

    Returns:
      Labels [T,T] uint8, `IGNORE_LABEL` under clouds, and what made each wrong, [T,T] uint8, an
      index of `NOISE_KINDS`.
    """
    size = len(truth)
    confused = _confuse(rng, truth, parcel)

    x, y = pixel_grid(size)
    dx, dy = (rng.normal(0, 1.5) + 1.8 * gaussian_field(rng, size, 20) for _ in range(2))
    at = (
        (y + dy).round().astype(int).clip(0, size - 1),
        (x + dx).round().astype(int).clip(0, size - 1),
    )
    displaced = confused[at]
    labels = _smooth(displaced)

    kind = np.where(displaced != truth[at], _CONFUSED, _DISPLACED).astype(np.uint8)
    kind[labels != displaced] = _SMOOTHED
    if season_wrong:
        common = np.bincount(truth.ravel(), minlength=_NUM_CLASSES).argmax()
        others = [c for c in (GRASS, CROPS, SHRUB, BUILT, BARE, SNOW) if c != common]
        pair = rng.choice(np.array(others, np.uint8), 2, replace=False)
        swath = gaussian_field(rng, size, size / 4) > -0.7
        part = (gaussian_field(rng, size, size / 8) > 0.6).astype(int)
        labels = np.where(swath, pair[part], labels)
        kind[swath] = _WRONG_SEASON
    kind[labels == truth] = _RIGHT
    labels[cloud], kind[cloud] = IGNORE_LABEL, _CLOUD
    return labels, kind
