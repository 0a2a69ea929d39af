"""Spatial-temporal label smoothing (paper, Section III-C): what neighbours and other seasons say.

Dimensions: B batch, S seasons, T tile size, H height and W width of what is shown, C classes.
"""

import jax
import jax.numpy as jnp
import numpy as np

SIGMA = 3.0  # pixels
RADIUS = 12  # truncated at 4 sigma

PRIOR_KINDS = ("ts", "t", "s")
Shown = tuple[jax.Array, jax.Array] | None


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


def along_axis(matrix: jax.Array, maps: jax.Array, axis: int) -> jax.Array:
    """`matrix` times each row or column of maps.

    Args:
      matrix: [N, n], or [B, N, n] with one for each sample.
      maps: [B, h, w, C] of any float dtype, n long along `axis`.
      axis: 1 for columns, 2 for rows.

    Returns:
      [B, H, W, C] float32, N long along `axis`.
    """
    batch = "b" if matrix.ndim == 3 else ""
    equation = {1: "ni,biwc->bnwc", 2: "ni,bhic->bhnc"}[axis]
    # float32 products: TPUs would round to bfloat16, and a prior would not sum to one.
    maps = maps.astype(jnp.float32)
    return jnp.einsum(batch + equation, matrix, maps, precision="highest")


def _filtered(maps: jax.Array, shown: Shown) -> jax.Array:
    """Gaussian filter of [B, T, T, C] along both axes, normalised over the classes.

    Between the axes maps are kept in their dtype; what returns is float32.
    """
    num_classes, dtype = maps.shape[-1], maps.dtype
    # The filtered sum of the classes, rather than the sum of the filtered: a ninth of it to read.
    total = jnp.sum(maps.astype(jnp.float32), axis=-1, keepdims=True)
    for axis in (1, 2):
        matrix = gaussian_matrix(maps.shape[axis])
        if shown is not None:
            matrix = jnp.take(matrix, shown[axis - 1], axis=0)
        maps, total = along_axis(matrix, maps.astype(dtype), axis), along_axis(matrix, total, axis)
    return jnp.where(total > 0, maps / jnp.where(total > 0, total, 1.0), 1.0 / num_classes)


def temporal_prior(
    season_labels: jax.Array,
    num_classes: int,
    shown: Shown = None,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Class frequencies over all seasons, filtered in space.

    Args:
      season_labels: [B, S, T, T] integers. Labels outside 0..C-1 are left out of their pixel's
        frequencies; a season of nothing else does not count.
      num_classes: C.
      shown: as for `smoothing_prior`.
      dtype: likewise.

    Returns:
      [B, H, W, C] float32, summing to one over C; uniform where no label is near.
    """
    # Their sum does as well as their mean: what is filtered is normalised.
    seasons = [season_labels[:, season] for season in range(season_labels.shape[1])]
    counts = sum(jax.nn.one_hot(labels, num_classes, dtype=dtype) for labels in seasons)
    return _filtered(counts, shown)


def spatial_prior(
    labels: jax.Array, num_classes: int, shown: Shown = None, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Class frequencies around each pixel of one season, [B, T, T] -> [B, H, W, C]."""
    return _filtered(jax.nn.one_hot(labels, num_classes, dtype=dtype), shown)


@jax.named_scope("prior")
def smoothing_prior(
    season_labels: jax.Array,
    labels: jax.Array,
    num_classes: int,
    kind: str,
    shown: Shown = None,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """The prior M of a sample, of the whole tile whatever is shown of it.

    Args:
      season_labels: [B, S, T, T], the labels of all seasons.
      labels: [B, T, T], those of the drawn season.
      num_classes: C.
      kind: "t" temporal, "s" spatial, "ts" their mean.
      shown: rows [B, H] and columns [B, W] of the tile to return the prior of, in their order;
        all of them unless given.
      dtype: in which frequencies are kept between the filter's two axes.

    Returns:
      [B, H, W, C] float32, summing to one over C.
    """
    if kind == "ts":
        temporal = temporal_prior(season_labels, num_classes, shown, dtype)
        return (temporal + spatial_prior(labels, num_classes, shown, dtype)) / 2
    if kind == "t":
        return temporal_prior(season_labels, num_classes, shown, dtype)
    if kind == "s":
        return spatial_prior(labels, num_classes, shown, dtype)
    raise ValueError(f"smoothing prior {kind!r} is none of {PRIOR_KINDS}")


@jax.named_scope("prior")
def smoothed_targets(
    labels: jax.Array, prior: jax.Array, prior_weight: float, uniform_weight: float
) -> jax.Array:
    """Targets y' = (1 - a - b) onehot(y) + a M + b / C, zero vectors at ignored pixels.

    Args:
      labels: [B, H, W] integers; those outside 0..C-1 are ignored pixels.
      prior: [B, H, W, C] of any float dtype, M.
      prior_weight: a.
      uniform_weight: b.

    Returns:
      [B, H, W, C] float32.
    """
    num_classes = prior.shape[-1]
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    targets = (1.0 - prior_weight - uniform_weight) * one_hot
    targets += prior_weight * prior.astype(jnp.float32) + uniform_weight / num_classes
    return jnp.where(jnp.sum(one_hot, axis=-1, keepdims=True) > 0, targets, 0.0)
