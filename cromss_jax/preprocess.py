"""From decoded records to what the networks see, on the device and inside the jitted step.

A batch of records is the dict that the host makes: uint8 arrays at native resolution,
    s1 [B, T, T, 2], s2_10m [B, T, T, 4], s2_20m [B, T/2, T/2, 6], s2_60m [B, T/6, T/6, 3] (or
    s2 [B, T, T, 13] where a data set comes at 10 m), labels [B, S, T, T] of all seasons, season
    [B] int32, and truth [B, T, T] where there is one.
A batch of examples is what leaves: imagery in [0, 1], labels, prior, cropped and augmented.
Dimensions: B batch, T tile size, S seasons, H = W crop size, K bands, C classes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cromss_jax import sensors, smoothing

Records = Mapping[str, jax.Array]

# Pixels along the side of the squares that a rotated crop is made of.
BLOCK = 8


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


def _take(images: jax.Array, bands: Sequence[int]) -> jax.Array:
    """Bands of [B, h, w, K] by position. Sliced, where an array of positions is gathered by."""
    return jnp.stack([images[..., band] for band in bands], axis=-1)


def stack_bands(records: Records, modality: str, s2_bands: Sequence[str]) -> jax.Array:
    """Imagery of a modality at 10 m, [B, T, T, K] float32 in [0, 1], bands as asked for."""
    if modality == "s1":
        return records["s1"].astype(jnp.float32) / 255.0
    if "s2" in records:
        order = [sensors.S2_BANDS.index(band) for band in s2_bands]
        return _take(records["s2"], order).astype(jnp.float32) / 255.0
    stacked, names = [], []
    for resolution, group in sensors.S2_BANDS_BY_RESOLUTION.items():
        used = [band for band in group if band in s2_bands]
        if used:
            chosen = _take(records[f"s2_{resolution}m"], [group.index(band) for band in used])
            stacked.append(upsample(chosen, resolution // 10))
            names += used
    order = [names.index(band) for band in s2_bands]
    return _take(jnp.concatenate(stacked, axis=-1), order) / 255.0


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


def _squares(images: jax.Array, rows: jax.Array, columns: jax.Array, side: int) -> jax.Array:
    """Squares cut out of tiles: [B, T, T, K] and corners [B, N] x 2 -> [B, N, side, side, K]."""
    batch, height, width, bands = images.shape
    # Bands lie beside each other along a row, which fills the lanes of a TPU.
    flat = images.reshape(batch, height, width * bands)

    def cut(tile: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(tile, (row, column * bands), (side, side * bands))

    squares = jax.vmap(jax.vmap(cut, in_axes=(None, 0, 0)))(flat, rows, columns)
    return squares.reshape(*rows.shape, side, side, bands)


def _interpolate(
    images: jax.Array, rows: jax.Array, columns: jax.Array, geometry: Geometry, size: int
) -> jax.Array:
    """Tiles at coordinates of the crop before its flips, bilinear.

    Block by block: a block's pixels come from one small square of the tile, and are that square's
    pixels times a matrix of weights. To gather them one by one moves 53 GB an image as compiled for
    v5e; this less than 1 GB, most of it on the chip.

    Args:
      images: [B, T, T, K] float32.
      rows: [B, H, W] float32 in [0, size - 1].
      columns: likewise.
      geometry: one entry a sample; its angle is in the coordinates already.
      size: H = W.

    Returns:
      [B, H, W, K] float32.
    """
    batch, bands = images.shape[0], images.shape[-1]
    block = math.gcd(size, BLOCK)
    # The pixels of a block turned by any angle lie within (block - 1) sqrt(2) of each other, in
    # rows as in columns, reflected or not; each needs the pixel at or before it and the one after.
    side = min(math.ceil((block - 1) * math.sqrt(2)) + 2, size)

    def one_axis(
        where: jax.Array, flip: jax.Array, offset: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Of N blocks: first row of the tile, [B, N], and weights [B, N, block^2, side]."""
        flip, offset = flip.reshape(-1, 1), offset.reshape(-1, 1)
        first = jnp.minimum(jnp.floor(jnp.min(where, axis=-1)).astype(jnp.int32), size - side)
        start = offset + jnp.where(flip, size - side - first, first)
        steps = jnp.arange(side).reshape(1, -1)
        steps = jnp.where(flip, side - 1 - steps, steps)
        shown = (first[..., None] + steps[:, None]).astype(jnp.float32)
        distance = where[..., None] - shown[..., None, :]
        return start, jnp.maximum(0.0, 1.0 - jnp.abs(distance))

    def row_of_blocks(where: tuple[jax.Array, jax.Array]) -> jax.Array:
        """[B, W / block, block^2] x 2 -> [B, block, W, K]."""
        top, down = one_axis(where[0], geometry.flip_rows, geometry.top)
        left, right = one_axis(where[1], geometry.flip_columns, geometry.left)
        squares = _squares(images, top, left, side)
        weights = down[..., :, None] * right[..., None, :]
        # float32 products: pixels that are not between others keep their values.
        seen = jnp.einsum("bnpij,bnijk->bnpk", weights, squares, precision="highest")
        seen = seen.reshape(batch, size // block, block, block, bands)
        return seen.transpose(0, 2, 1, 3, 4).reshape(batch, block, size, bands)

    def into_blocks(where: jax.Array) -> jax.Array:
        """[B, H, W] -> [H / block, B, W / block, block^2]."""
        cut = where.reshape(batch, size // block, block, size // block, block)
        return cut.transpose(1, 0, 3, 2, 4).reshape(-1, batch, size // block, block**2)

    seen = jax.lax.map(row_of_blocks, (into_blocks(rows), into_blocks(columns)))
    return seen.transpose(1, 0, 2, 3, 4).reshape(batch, size, size, bands)


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
    return _interpolate(images, rows, columns, geometry, size)


def view_labels(labels: jax.Array, geometry: Geometry, size: int) -> jax.Array:
    """The same view of a label map, nearest pixel: [B, T, T] of 0..255 -> [B, H, W] int32."""
    rows, columns = _source_coordinates(geometry, size)
    rows, columns = jnp.floor(rows + 0.5), jnp.floor(columns + 0.5)
    values = labels[..., None].astype(jnp.float32)
    return _interpolate(values, rows, columns, geometry, size)[..., 0].astype(jnp.int32)


def drawn_labels(records: Records) -> jax.Array:
    """The labels of each record's own season, [B, T, T] int32."""
    season = records["season"].reshape(-1, 1, 1, 1)
    is_drawn = jnp.arange(records["labels"].shape[1]).reshape(1, -1, 1, 1) == season
    return jnp.sum(jnp.where(is_drawn, records["labels"], 0), axis=1, dtype=jnp.int32)


@jax.named_scope("preprocessing")
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
    seen = {m: stack_bands(records, m, s2_bands) for m in modalities}
    if prior_kind is not None:
        seen["prior"] = smoothing.smoothing_prior(
            records["labels"], labels, num_classes, prior_kind
        )
    # One view of all bands costs little more than one of a single band.
    ends = np.cumsum([x.shape[-1] for x in seen.values()])
    bands = view(jnp.concatenate(list(seen.values()), axis=-1), geometry, crop_size)
    batch = dict(zip(seen, jnp.split(bands, ends[:-1], axis=-1), strict=True))
    batch["labels"] = view_labels(labels, geometry, crop_size)
    if "truth" in records:
        truth = records["truth"].astype(jnp.int32)
        batch["truth"] = view_labels(truth, geometry, crop_size)
    return batch
