"""Spatial-temporal label smoothing (paper, Section III-C): what neighbours and other seasons say.

Dimensions: B batch, S seasons, H height, W width, C classes.
"""

import jax
import jax.numpy as jnp
import numpy as np

SIGMA = 3.0  # pixels
RADIUS = 12  # truncated at 4 sigma

PRIOR_KINDS = ("ts", "t", "s")


def gaussian_matrix(size: int) -> np.ndarray:
    """The Gaussian filter along an axis of `size` pixels, as a matrix.

    Sigma 3, truncated at 12 pixels, normalised; borders are half-sample symmetric (… 1 0 | 0 1 …).

    Returns:
      [size, size] float32; the filtered signal is `matrix @ signal`. Rows sum to 1.
    """
    offsets = np.arange(-RADIUS, RADIUS + 1)
    taps = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    taps /= taps.sum()
    matrix = np.zeros((size, size))
    for offset, tap in zip(offsets, taps, strict=True):
        folded = (np.arange(size) + offset) % (2 * size)
        source = np.minimum(folded, 2 * size - 1 - folded)
        np.add.at(matrix, (np.arange(size), source), tap)
    return matrix.astype(np.float32)


def _filtered(maps: jax.Array) -> jax.Array:
    """Gaussian filter of [B, H, W, C] along H and W, normalised over the classes."""
    _, height, width, num_classes = maps.shape
    # float32 products: TPUs would round to bfloat16 and the prior would not sum to one.
    blurred = jnp.einsum("hi,biwc->bhwc", gaussian_matrix(height), maps, precision="highest")
    blurred = jnp.einsum("wj,bhjc->bhwc", gaussian_matrix(width), blurred, precision="highest")
    total = jnp.sum(blurred, axis=-1, keepdims=True)
    return jnp.where(total > 0, blurred / jnp.where(total > 0, total, 1.0), 1.0 / num_classes)


def temporal_prior(season_labels: jax.Array, num_classes: int) -> jax.Array:
    """Class frequencies over all seasons, filtered in space.

    Args:
      season_labels: [B, S, H, W] integers. Labels outside 0..C-1 are left out of their pixel's
        frequencies; a season of nothing else does not count.
      num_classes: C.

    Returns:
      [B, H, W, C] float32, summing to one over C; uniform where no label is near.
    """
    one_hot = jax.nn.one_hot(season_labels, num_classes, dtype=jnp.float32)
    return _filtered(jnp.mean(one_hot, axis=1))


def spatial_prior(labels: jax.Array, num_classes: int) -> jax.Array:
    """Class frequencies around each pixel of one season, [B, H, W] -> [B, H, W, C]."""
    return _filtered(jax.nn.one_hot(labels, num_classes, dtype=jnp.float32))


@jax.named_scope("prior")
def smoothing_prior(
    season_labels: jax.Array, labels: jax.Array, num_classes: int, kind: str
) -> jax.Array:
    """The prior M of a sample.

    Args:
      season_labels: [B, S, H, W], the labels of all seasons.
      labels: [B, H, W], those of the drawn season.
      num_classes: C.
      kind: "t" temporal, "s" spatial, "ts" their mean.

    Returns:
      [B, H, W, C] float32, summing to one over C.
    """
    if kind == "ts":
        temporal = temporal_prior(season_labels, num_classes)
        return (temporal + spatial_prior(labels, num_classes)) / 2
    if kind == "t":
        return temporal_prior(season_labels, num_classes)
    if kind == "s":
        return spatial_prior(labels, num_classes)
    raise ValueError(f"smoothing prior {kind!r} is none of {PRIOR_KINDS}")


@jax.named_scope("prior")
def smoothed_targets(
    labels: jax.Array, prior: jax.Array, prior_weight: float, uniform_weight: float
) -> jax.Array:
    """Targets y' = (1 - a - b) onehot(y) + a M + b / C, zero vectors at ignored pixels.

    Args:
      labels: [B, H, W] integers; those outside 0..C-1 are ignored pixels.
      prior: [B, H, W, C] float32, M.
      prior_weight: a.
      uniform_weight: b.

    Returns:
      [B, H, W, C] float32.
    """
    num_classes = prior.shape[-1]
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    targets = (1.0 - prior_weight - uniform_weight) * one_hot
    targets += prior_weight * prior + uniform_weight / num_classes
    return jnp.where(jnp.sum(one_hot, axis=-1, keepdims=True) > 0, targets, 0.0)
