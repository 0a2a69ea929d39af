"""From decoded records to what the networks see, on the device and inside the jitted step.

A batch of records is the dict that the host makes: uint8 arrays at native resolution,
    s1 [B, T, T, 2], s2_10m [B, T, T, 4], s2_20m [B, T/2, T/2, 6], s2_60m [B, T/6, T/6, 3] (or
    s2 [B, T, T, 13] where a data set comes at 10 m), labels [B, S, T, T] of all seasons, season
    [B] int32, and truth [B, T, T] where there is one.
A batch of examples is what leaves: imagery in [0, 1], labels, prior, cropped and augmented.
Dimensions: B batch, T tile size, S seasons, H = W crop size, K bands, C classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cromss_jax import sensors, smoothing

Records = Mapping[str, jax.Array]


def bicubic_matrix(size: int, factor: int) -> np.ndarray:
    """Bicubic upsampling along an axis, as PIL's resize: a = -0.5, taps renormalised at borders.

    Returns:
      [size * factor, size] float32; rows sum to 1.
    """
    positions = (np.arange(size * factor) + 0.5) / factor - 0.5
    distance = np.abs(positions[:, None] - np.arange(size)[None])
    a = -0.5
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def upsample(bands: jax.Array, factor: int) -> jax.Array:
    """Brings bands to 10 m, to the grey level PIL's `resize(..., BICUBIC)` of uint8 images.

    Args:
      bands: [B, h, w, K] uint8.
      factor: whole number of output pixels a pixel.

    Returns:
      [B, h * factor, w * factor, K] float32, whole numbers in 0..255.
    """
    values = bands.astype(jnp.float32)
    if factor == 1:
        return values
    _, height, width, _ = bands.shape
    # PIL filters rows first and rounds to 8 bits after each pass.
    for equation, size in (("wj,bhjk->bhwk", width), ("hi,biwk->bhwk", height)):
        matrix = bicubic_matrix(size, factor)
        values = jnp.einsum(equation, matrix, values, precision="highest")
        values = jnp.clip(jnp.floor(values + 0.5), 0.0, 255.0)
    return values


def stack_bands(records: Records, modality: str, s2_bands: Sequence[str]) -> jax.Array:
    """Imagery of a modality at 10 m, [B, T, T, K] float32 in [0, 1], bands as asked for."""
    if modality == "s1":
        return records["s1"].astype(jnp.float32) / 255.0
    if "s2" in records:
        order = np.array([sensors.S2_BANDS.index(band) for band in s2_bands])
        return records["s2"][..., order].astype(jnp.float32) / 255.0
    stacked, names = [], []
    for resolution, group in sensors.S2_BANDS_BY_RESOLUTION.items():
        used = [band for band in group if band in s2_bands]
        if used:
            chosen = records[f"s2_{resolution}m"][..., np.array([group.index(b) for b in used])]
            stacked.append(upsample(chosen, resolution // 10))
            names += used
    order = np.array([names.index(band) for band in s2_bands])
    return jnp.concatenate(stacked, axis=-1)[..., order] / 255.0


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where each sample of a batch is looked at: crop, then flips, then rotation about the centre.

    Attributes:
      top: [B] int32, first row of the crop.
      left: [B] int32, first column of the crop.
      flip_rows: [B] bool, upside down.
      flip_columns: [B] bool, left to right.
      angle: [B] float32, radians, counter-clockwise.
    """

    top: jax.Array
    left: jax.Array
    flip_rows: jax.Array
    flip_columns: jax.Array
    angle: jax.Array


def random_geometry(
    key: jax.Array,
    batch_size: int,
    margin: int,
    *,
    flip_probability: float,
    rotation_probability: float,
    max_angle: float,
) -> Geometry:
    """Draws crops, flips and rotations.

    Args:
      key: PRNG key, one a step.
      batch_size: B, of the global batch.
      margin: tile size minus crop size, pixels.
      flip_probability: chance of one of the three flips (rows, columns, both), each as likely.
      rotation_probability: chance of a rotation by U(-max_angle, max_angle).
      max_angle: degrees.
    """
    keys = jax.random.split(key, 5)
    corner = jax.random.randint(keys[0], (2, batch_size), 0, margin + 1)
    flipped = jax.random.bernoulli(keys[1], flip_probability, (batch_size,))
    which = jax.random.randint(keys[2], (batch_size,), 0, 3)
    rotated = jax.random.bernoulli(keys[3], rotation_probability, (batch_size,))
    limit = float(np.deg2rad(max_angle))
    angle = jax.random.uniform(keys[4], (batch_size,), minval=-limit, maxval=limit)
    return Geometry(
        top=corner[0],
        left=corner[1],
        flip_rows=flipped & (which != 1),
        flip_columns=flipped & (which != 0),
        angle=jnp.where(rotated, angle, 0.0),
    )


def centre_geometry(batch_size: int, margin: int) -> Geometry:
    """The crop in the middle, neither flipped nor rotated."""
    offset = jnp.full((batch_size,), margin // 2, jnp.int32)
    still = jnp.zeros((batch_size,), bool)
    return Geometry(offset, offset, still, still, jnp.zeros((batch_size,)))


def _reflect(coordinate: jax.Array, size: int) -> jax.Array:
    """Folds coordinates into [0, size - 1], the border reflected without repeating its pixel."""
    period = 2 * (size - 1)
    return (size - 1) - jnp.abs(coordinate % period - (size - 1))


def _source_coordinates(geometry: Geometry, size: int) -> tuple[jax.Array, jax.Array]:
    """Rows and columns, [B, H, W] float32, that the rotated crop shows, in the unrotated crop."""
    centre = (size - 1) / 2
    rows = (jnp.arange(size, dtype=jnp.float32) - centre).reshape(1, -1, 1)
    columns = (jnp.arange(size, dtype=jnp.float32) - centre).reshape(1, 1, -1)
    cos = jnp.cos(geometry.angle).reshape(-1, 1, 1)
    sin = jnp.sin(geometry.angle).reshape(-1, 1, 1)
    # Rows grow downwards: this sign turns the picture counter-clockwise.
    source_rows = cos * rows + sin * columns + centre
    source_columns = cos * columns - sin * rows + centre
    return _reflect(source_rows, size), _reflect(source_columns, size)


def _pick(images: jax.Array, rows: jax.Array, columns: jax.Array, geometry: Geometry, size: int):
    """Pixels [B, H, W, K] of tiles [B, T, T, K] at whole coordinates of the flipped crop."""
    rows = jnp.where(geometry.flip_rows.reshape(-1, 1, 1), size - 1 - rows, rows)
    columns = jnp.where(geometry.flip_columns.reshape(-1, 1, 1), size - 1 - columns, columns)
    rows += geometry.top.reshape(-1, 1, 1)
    columns += geometry.left.reshape(-1, 1, 1)
    flat = images.reshape(images.shape[0], -1, images.shape[-1])
    index = rows * images.shape[2] + columns
    return jax.vmap(lambda pixels, where: pixels.at[where].get(mode="promise_in_bounds"))(
        flat, index
    )


def view(images: jax.Array, geometry: Geometry, size: int) -> jax.Array:
    """Crops, flips and rotates imagery or priors, bilinear, borders reflected.

    Args:
      images: [B, T, T, K] float32.
      geometry: one entry a sample.
      size: H = W, the crop size.

    Returns:
      [B, H, W, K] float32. Samples that are not rotated keep their pixels' exact values.
    """
    rows, columns = _source_coordinates(geometry, size)
    row, column = jnp.floor(rows), jnp.floor(columns)
    down, right = (rows - row)[..., None], (columns - column)[..., None]
    row, column = row.astype(jnp.int32), column.astype(jnp.int32)
    below, beside = jnp.minimum(row + 1, size - 1), jnp.minimum(column + 1, size - 1)

    upper = (1 - right) * _pick(images, row, column, geometry, size)
    upper += right * _pick(images, row, beside, geometry, size)
    lower = (1 - right) * _pick(images, below, column, geometry, size)
    lower += right * _pick(images, below, beside, geometry, size)
    return (1 - down) * upper + down * lower


def view_labels(labels: jax.Array, geometry: Geometry, size: int) -> jax.Array:
    """The same view of a label map, nearest pixel: [B, T, T] integers -> [B, H, W]."""
    rows, columns = _source_coordinates(geometry, size)
    row = jnp.floor(rows + 0.5).astype(jnp.int32)
    column = jnp.floor(columns + 0.5).astype(jnp.int32)
    return _pick(labels[..., None], row, column, geometry, size)[..., 0]


def drawn_labels(records: Records) -> jax.Array:
    """The labels of each record's own season, [B, T, T] int32."""
    season = records["season"].reshape(-1, 1, 1, 1)
    is_drawn = jnp.arange(records["labels"].shape[1]).reshape(1, -1, 1, 1) == season
    return jnp.sum(jnp.where(is_drawn, records["labels"], 0), axis=1, dtype=jnp.int32)


def examples(
    records: Records,
    geometry: Geometry,
    *,
    modalities: Sequence[str],
    s2_bands: Sequence[str],
    crop_size: int,
    num_classes: int,
    prior_kind: str | None,
) -> dict[str, jax.Array]:
    """What the step works on.

    Args:
      records: a batch as the host decodes it (module docstring).
      geometry: views of the batch's samples.
      modalities: which of "s1" and "s2".
      s2_bands: names of the Sentinel-2 bands, in the network's order.
      crop_size: H = W.
      num_classes: C.
      prior_kind: of `smoothing.smoothing_prior`, made from the whole tile before the crop; None
        leaves it out.

    Returns:
      One [B, H, W, K] float32 in [0, 1] a modality; `labels` [B, H, W] int32, 255 where ignored;
      `truth` likewise where the records have it; `prior` [B, H, W, C] float32.
    """
    labels = drawn_labels(records)

    batch = {m: view(stack_bands(records, m, s2_bands), geometry, crop_size) for m in modalities}
    batch["labels"] = view_labels(labels, geometry, crop_size)
    if "truth" in records:
        truth = records["truth"].astype(jnp.int32)
        batch["truth"] = view_labels(truth, geometry, crop_size)
    if prior_kind is not None:
        prior = smoothing.smoothing_prior(records["labels"], labels, num_classes, prior_kind)
        batch["prior"] = view(prior, geometry, crop_size)
    return batch
