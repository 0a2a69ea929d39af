"""Spatial-temporal label smoothing with neighbouring pixels and other seasons (Section III-C).

Dimensions: B batch, S seasons, T tile size, H height and W width of the crop, C classes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cromss_jax import platforms

SIGMA = 3.0  # pixels
RADIUS = 12  # truncated at 4 sigma

PRIOR_KINDS = ("ts", "t", "s")
# Row indices [B, H] and column indices [B, W] of the tile; None for the whole tile.
Crop = tuple[jax.Array, jax.Array] | None


def gaussian_matrix(size: int) -> np.ndarray:
    """The Gaussian filter along an axis of `size` pixels, as a matrix.

    Sigma is 3, truncated at 12 pixels. Borders are half-sample symmetric (… 1 0 | 0 1 …).

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
    """Multiplies each row or column of maps by a matrix.

    Args:
      matrix: [N, n], or [B, N, n] with one matrix per sample.
      maps: [B, h, w, C] of any float dtype, of size n along `axis`.
      axis: 1 for columns, 2 for rows.

    Returns:
      [B, H, W, C] float32, of size N along `axis`.
    """
    batch = "b" if matrix.ndim == 3 else ""
    equation = batch + {1: "ni,biwc->bnwc", 2: "ni,bhic->bhnc"}[axis]

    def in_float32(matrix: jax.Array, maps: jax.Array) -> jax.Array:
        # A TPU would round to bfloat16, and the prior would not sum to one.
        return jnp.einsum(equation, matrix, maps.astype(jnp.float32), precision="highest")

    if maps.dtype != jnp.bfloat16:
        return in_float32(matrix, maps)
    by_parts = functools.partial(_by_parts, equation)
    return platforms.choose(matrix, maps, gpu=by_parts, default=in_float32)


def _by_parts(equation: str, matrix: jax.Array, maps: jax.Array) -> jax.Array:
    """A product with bfloat16 maps as exact as in float32, on the matrix units of a GPU.

    Three bfloat16 numbers of 8 bits hold the 24 bits of a float32. The three products are one,
    of three times the length, so that their sum needs no memory.
    """
    parts, rest = [], matrix
    for _ in range(3):
        parts.append(rest.astype(jnp.bfloat16))
        rest = rest - parts[-1].astype(jnp.float32)
    summed = equation.split(",")[1].index("i")
    return jnp.einsum(
        equation,
        jnp.concatenate(parts, axis=-1),
        jnp.concatenate([maps] * 3, axis=summed),
        preferred_element_type=jnp.float32,
    )


def _filtered(maps: jax.Array, crop: Crop) -> jax.Array:
    """Gaussian filter of [B, T, T, C] along both axes, normalised over the classes.

    Between the two axes, maps are stored in the dtype of the input. The result is float32.
    """
    num_classes, dtype = maps.shape[-1], maps.dtype
    # Sums over the classes first and then filters: a ninth of the data to read (C = 9).
    total = jnp.sum(maps.astype(jnp.float32), axis=-1, keepdims=True)
    for axis in (1, 2):
        matrix = gaussian_matrix(maps.shape[axis])
        if crop is not None:
            matrix = jnp.take(matrix, crop[axis - 1], axis=0)
        maps, total = along_axis(matrix, maps.astype(dtype), axis), along_axis(matrix, total, axis)
    return jnp.where(total > 0, maps / jnp.where(total > 0, total, 1.0), 1.0 / num_classes)


def temporal_prior(
    season_labels: jax.Array,
    num_classes: int,
    crop: Crop = None,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Class frequencies over all seasons, filtered in space.

    Args:
      season_labels: [B, S, T, T] integers. Labels outside 0..C-1 are not counted; a season that
        holds only such labels has no effect.
      num_classes: C.
      crop: as for `smoothing_prior`.
      dtype: as for `smoothing_prior`.

    Returns:
      [B, H, W, C] float32, summing to one over C; uniform where no label lies within the filter.
    """
    # The sum is as good as the mean, because the filtered result is normalised.
    seasons = [season_labels[:, season] for season in range(season_labels.shape[1])]
    counts = sum(jax.nn.one_hot(labels, num_classes, dtype=dtype) for labels in seasons)
    return _filtered(counts, crop)


def spatial_prior(
    labels: jax.Array, num_classes: int, crop: Crop = None, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Class frequencies around each pixel of one season, [B, T, T] -> [B, H, W, C]."""
    return _filtered(jax.nn.one_hot(labels, num_classes, dtype=dtype), crop)


@jax.named_scope("prior")
def smoothing_prior(
    season_labels: jax.Array,
    labels: jax.Array,
    num_classes: int,
    kind: str,
    crop: Crop = None,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """The prior M of a sample, computed from the whole tile and returned for a crop.

    Args:
      season_labels: [B, S, T, T], the labels of all seasons.
      labels: [B, T, T], the labels of the drawn season.
      num_classes: C.
      kind: "t" temporal, "s" spatial, "ts" their mean.
      crop: indices of the tile's rows [B, H] and columns [B, W] to return, in this order; by
        default the whole tile.
      dtype: stores the class frequencies between the filter's two axes.

    Returns:
      [B, H, W, C] float32, summing to one over C.
    """
    if kind == "ts":
        temporal = temporal_prior(season_labels, num_classes, crop, dtype)
        return (temporal + spatial_prior(labels, num_classes, crop, dtype)) / 2
    if kind == "t":
        return temporal_prior(season_labels, num_classes, crop, dtype)
    if kind == "s":
        return spatial_prior(labels, num_classes, crop, dtype)
    raise ValueError(f"unknown smoothing prior {kind!r}: choose one of {PRIOR_KINDS}")


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
