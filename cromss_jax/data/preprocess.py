"""From decoded records to what the networks see, on the device and inside the jitted step.

A batch of records is the dict that the host makes: uint8 arrays at native resolution,
    s1 [B, T, T, 2], s2_10m [B, T, T, 4], s2_20m [B, T/2, T/2, 6], s2_60m [B, T/6, T/6, 3] (or
    s2 [B, T, T, 13] where a data set comes at 10 m), labels [B, S, T, T] of all seasons, season
    [B] int32, and truth [B, T, T] where there is one.
A batch of examples is what leaves: imagery in [0, 1], labels, prior, cropped and augmented.

Upsampling, the prior's filter, crop and flips work along each axis by itself: they are one matrix
an axis, the rows of the filter that are crop, in the order in which they are. Only rotation mixes
the axes. It comes last, for the samples that are rotated.
Dimensions: B batch, T tile size, S seasons, H = W crop size, K bands, C classes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cromss_jax import sensors
from cromss_jax.method import smoothing
from cromss_jax.networks import packing

Records = Maps = Mapping[str, jax.Array]

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


def upsample(
    bands: jax.Array,
    factor: int,
    crop: smoothing.Crop = None,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Brings bands to 10 m, to the grey level PIL's `resize(..., BICUBIC)` of uint8 images.

    Args:
      bands: [B, h, w, K] uint8.
      factor: whole number of output pixels a pixel.
      crop: rows [B, H] and columns [B, W] of the upsampled image to return; all unless given.
      dtype: a float one; bfloat16 has all whole numbers up to 256, too.

    Returns:
      [B, H, W, K] of `dtype`, whole numbers in 0..255.
    """
    values = bands.astype(dtype)
    if factor == 1 and crop is None:
        return values
    # PIL filters along rows first and rounds to 8 bits after each pass.
    for axis in (2, 1):
        size = bands.shape[axis]
        matrix = bicubic_matrix(size, factor) if factor > 1 else np.eye(size, dtype=np.float32)
        if crop is not None:
            matrix = jnp.take(matrix, crop[axis - 1], axis=0)
        values = smoothing.along_axis(matrix, values, axis)
        values = jnp.clip(jnp.floor(values + 0.5), 0.0, 255.0).astype(dtype)
    return values


def _take(images: jax.Array, names: Sequence[str], chosen: Sequence[str]) -> jax.Array:
    """Bands of [B, h, w, K] by name: slices, which move less than a gather."""
    return jnp.stack([images[..., names.index(name)] for name in chosen], axis=-1)


def stack_bands(
    records: Records,
    modality: str,
    s2_bands: Sequence[str],
    crop: smoothing.Crop = None,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Grey levels of a modality at 10 m, [B, H, W, K], bands as asked for.

    Whole numbers in 0..255; the networks see them divided by 255. `crop` and `dtype` as for
    `upsample`.
    """
    if modality == "s1":
        return upsample(records["s1"], 1, crop, dtype)
    if "s2" in records:
        return upsample(_take(records["s2"], sensors.S2_BANDS, s2_bands), 1, crop, dtype)
    stacked, names = [], []
    for resolution, group in sensors.S2_BANDS_BY_RESOLUTION.items():
        used = [band for band in group if band in s2_bands]
        if used:
            chosen = _take(records[f"s2_{resolution}m"], group, used)
            stacked.append(upsample(chosen, resolution // 10, crop, dtype))
            names += used
    return _take(jnp.concatenate(stacked, axis=-1), names, s2_bands)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where each sample of a batch is looked at: crop, then flips, then rotation about the centre.

    Attributes:
      top: [B] int32, first row of the crop.
      left: [B] int32, first column of the crop.
      flip_rows: [B] bool, upside down.
      flip_columns: [B] bool, left to right.
      angle: [B] float32, radians, counter-clockwise; None where no sample is ever rotated.
    """

    top: jax.Array
    left: jax.Array
    flip_rows: jax.Array
    flip_columns: jax.Array
    angle: jax.Array | None

    def crop(self, size: int, cell: int) -> tuple[jax.Array, jax.Array]:
        """Rows and columns of the tile that the crop of `size` shows, [B, size] int32 each.

        In the order of `packing.order`, from first to last in cells of a single pixel.
        """
        steps = packing.order(size, cell)[None]

        def positions(offset: jax.Array, flip: jax.Array) -> jax.Array:
            return offset[:, None] + jnp.where(flip[:, None], size - 1 - steps, steps)

        return positions(self.top, self.flip_rows), positions(self.left, self.flip_columns)


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
        angle=jnp.where(rotated, angle, 0.0) if rotation_probability > 0 else None,
    )


def centre_geometry(batch_size: int, margin: int) -> Geometry:
    """The crop in the middle, neither flipped nor rotated."""
    offset = jnp.full((batch_size,), margin // 2, jnp.int32)
    still = jnp.zeros((batch_size,), bool)
    return Geometry(offset, offset, still, still, None)


def _reflect(coordinate: jax.Array, size: int) -> jax.Array:
    """Folds coordinates into [0, size - 1], the border reflected without repeating its pixel."""
    period = 2 * (size - 1)
    return (size - 1) - jnp.abs(coordinate % period - (size - 1))


def _source_coordinates(angle: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Rows and columns, [H, W] float32, that the rotated crop shows, in the unrotated crop."""
    centre = (size - 1) / 2
    rows = (jnp.arange(size, dtype=jnp.float32) - centre).reshape(-1, 1)
    columns = (jnp.arange(size, dtype=jnp.float32) - centre).reshape(1, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Rows grow downwards: this sign turns the picture counter-clockwise.
    source_rows = cos * rows + sin * columns + centre
    source_columns = cos * columns - sin * rows + centre
    return _reflect(source_rows, size), _reflect(source_columns, size)


def _rotate(images: Maps, labels: Maps, angle: jax.Array, dtype: jnp.dtype) -> tuple[Maps, Maps]:
    """Turns a sample about its centre, its border reflected.

    Block by block: a block's pixels come from one small square of the crop, and are that square's
    pixels times a matrix of weights. To gather them one by one moves 53 GB an image as compiled for
    v5e.

    Args:
      images: by name [H, H, K] float32, turned bilinearly.
      labels: by name [H, H, 1] float32, turned to the nearest pixel.
      angle: radians, counter-clockwise.
      dtype: of what returns.

    Returns:
      Both, turned.
    """
    maps = [*images.values(), *labels.values()]
    size, ends = maps[0].shape[0], np.cumsum([x.shape[-1] for x in maps])
    block = math.gcd(size, BLOCK)
    # The pixels of a block turned by any angle lie within (block - 1) sqrt(2) of each other, in
    # rows as in columns, reflected or not; each needs the pixel at or before it and the one after.
    side = min(math.ceil((block - 1) * math.sqrt(2)) + 2, size)

    def into_blocks(x: jax.Array) -> jax.Array:
        """[H, W] -> [H / block, W / block, block^2]."""
        x = x.reshape(size // block, block, size // block, block)
        return x.swapaxes(1, 2).reshape(-1, size // block, block**2)

    maps = jnp.concatenate(maps, axis=-1)
    cut = jax.vmap(lambda i, j: jax.lax.dynamic_slice(maps, (i, j, 0), (side, side, ends[-1])))

    def row_of_blocks(source: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Rows and columns that the pixels show, [N, block^2] each -> [block, W, bands]."""
        first = [
            jnp.minimum(jnp.floor(jnp.min(where, axis=-1)).astype(jnp.int32), size - side)
            for where in source
        ]

        def seen(source: Sequence[jax.Array], squares: jax.Array) -> jax.Array:
            steps = [f[:, None, None] + jnp.arange(side).reshape(1, 1, -1) for f in first]
            down, right = (
                jnp.maximum(0.0, 1.0 - jnp.abs(where[:, :, None] - step))
                for where, step in zip(source, steps, strict=True)
            )
            weights = down[:, :, :, None] * right[:, :, None, :]
            # float32 products: pixels that are not between others keep their values.
            return jnp.einsum("npij,nijk->npk", weights, squares, precision="highest")

        squares, num_images = cut(*first), ends[len(images) - 1]
        turned = [seen(source, squares[..., :num_images])]
        turned.append(seen([jnp.floor(x + 0.5) for x in source], squares[..., num_images:]))
        turned = jnp.concatenate(turned, axis=-1).astype(dtype)
        turned = turned.reshape(-1, block, block, ends[-1])
        return turned.swapaxes(0, 1).reshape(block, size, ends[-1])

    # A row at a time: what it needs stays on the chip.
    source = tuple(into_blocks(x) for x in _source_coordinates(angle, size))
    turned = jax.lax.map(row_of_blocks, source).reshape(size, size, -1)
    turned = dict(zip([*images, *labels], jnp.split(turned, ends[:-1], axis=-1), strict=True))
    return {name: turned[name] for name in images}, {name: turned[name] for name in labels}


def rotate_some(images: Maps, labels: Maps, angle: jax.Array, cell: int) -> tuple[Maps, Maps]:
    """Turns those samples whose angle is not 0; the others are not touched.

    Args:
      images: by name [B, H, H, K], of one float dtype.
      labels: by name [B, H, H, 1] of the same.
      angle: [B] float32.
      cell: rows and columns are in the order of `packing.order`.

    Returns:
      Both, turned, in the same order.
    """

    def one(i: jax.Array, maps: tuple[Maps, Maps]) -> tuple[Maps, Maps]:
        sample = turned[i]
        # Widened at once: else XLA brings all samples of a band to the chip for each of them.
        taken = jax.tree.map(lambda x: x[sample].astype(jnp.float32), maps)
        images, labels = jax.tree.map(lambda x: packing.in_order(x, cell), taken)
        own = _rotate(images, labels, angle[sample], dtype)
        own = jax.tree.map(lambda x: packing.in_order(x, x.shape[0] // cell), own)
        return jax.tree.map(lambda x, y: x.at[sample].set(y), maps, own)

    dtype = jnp.result_type(*images.values())
    turned = jnp.flatnonzero(angle, size=angle.size, fill_value=0)
    return jax.lax.fori_loop(0, jnp.count_nonzero(angle), one, (images, labels))


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
    cell: int = 1,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """What the step works on.

    Args:
      records: a batch as the host decodes it (module docstring).
      geometry: views of the batch's samples.
      modalities: which of "s1" and "s2".
      s2_bands: names of the Sentinel-2 bands, in the network's order.
      crop_size: H = W.
      num_classes: C.
      prior_kind: of `smoothing.smoothing_prior`, made from the whole tile; None leaves it out.
      cell: more than 1, which must divide H, packs images (`packing.pack`) and cuts all else into
        `packing.planes`.
      dtype: in which images and prior are kept, that of the networks.

    Returns:
      One [B, H, W, K] in [0, 1] a modality; `labels` [B, H, W] uint8, 255 where ignored; `truth`
      likewise where the records have it; `prior` [B, H, W, C]. Packed, images are
      [B, H / cell, W / cell, cell^2 K], and of all else cell^2 x (H W / cell^2) stands for H x W.
    """
    crop = geometry.crop(crop_size, cell)
    drawn = drawn_labels(records)
    images = {m: stack_bands(records, m, s2_bands, crop, dtype) for m in modalities}
    if prior_kind is not None:
        prior = smoothing.smoothing_prior(
            records["labels"], drawn, num_classes, prior_kind, crop, dtype
        )
        images["prior"] = prior.astype(dtype)
    labels = {"labels": drawn}
    if "truth" in records:
        labels["truth"] = records["truth"]
    labels = {name: upsample(x[..., None], 1, crop, dtype) for name, x in labels.items()}
    if geometry.angle is not None:
        images, labels = rotate_some(images, labels, geometry.angle, cell)

    told = {name: x[..., 0].astype(jnp.uint8) for name, x in labels.items()}
    if prior_kind is not None:
        told["prior"] = images.pop("prior")
    if cell > 1:
        images = {m: packing.pack(x, cell) for m, x in images.items()}
        told = {name: packing.planes(x, cell) for name, x in told.items()}
        # Without the barrier XLA makes float32 of bfloat16 first, and then cells and planes of it.
        images, told = jax.lax.optimization_barrier((images, told))
    return {m: (x.astype(jnp.float32) / 255.0).astype(dtype) for m, x in images.items()} | told
