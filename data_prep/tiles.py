"""Reads tiles of one date, and cuts them into patches."""

import numpy as np
import tensorflow_datasets as tfds

from cromss_jax import sensors
from data_prep import bands, errors, geotiff, records, sources, tile_files
from data_prep.labels import LabelMap


def read_tile(
    tile: tile_files.Tile, *, source: sources.Source, label_map: LabelMap, s2_offset: int
) -> records.Example:
    """Reads, checks and scales one tile of H x W pixels.

    Args:
      tile: the tile.
      source: where its files are.
      label_map: of its labels.
      s2_offset: see `bands.scale_s2`.

    Returns:
      s1 (H,W,2), s2 (H,W,13) in the order of `sensors.S2_BANDS`, labels (1,H,W), all uint8;
      `season` 0; `location_id`; `height` and `width`; `crs` and `transform` (6,) of the S2 file.

    Raises:
      errors.BadFileError: if the files do not belong together, or one of them is missing,
        damaged, of another size than the labels, of another dtype or number of bands than needed,
        or holds values it must not.
    """
    if tile.fault:
        raise errors.BadFileError(*tile.fault)
    label_file = bands.read_bands(source, tile.paths["labels"])
    # Files of more than one band have the labels in the second.
    band = 0 if len(label_file.pixels) == 1 else 1
    labels = label_map.apply(tile.paths["labels"], label_file.pixels[band])
    s1 = _read_image(source, tile.paths["s1"], len(sensors.S1_BANDS))
    s2 = _read_image(source, tile.paths["s2"], len(sensors.S2_BANDS))
    return {
        "s1": np.stack(
            [
                bands.scale_s1(tile.paths["s1"], name, pixels, labels.shape)
                for name, pixels in zip(sensors.S1_BANDS, s1.pixels, strict=True)
            ],
            axis=-1,
        ),
        "s2": np.stack(
            [
                bands.scale_s2(tile.paths["s2"], name, pixels, labels.shape, s2_offset)
                for name, pixels in zip(sensors.S2_BANDS, s2.pixels, strict=True)
            ],
            axis=-1,
        ),
        "labels": labels[None],
        "season": 0,
        "height": labels.shape[0],
        "width": labels.shape[1],
        "location_id": tile.location_id,
        "crs": s2.crs,
        "transform": np.array(s2.transform[:6], np.float64),
    }


def _read_image(source: sources.Source, path: str, num_bands: int) -> geotiff.Bands:
    image = bands.read_bands(source, path)
    if len(image.pixels) != num_bands:
        raise errors.BadFileError(path, f"has {len(image.pixels)} bands, {num_bands} are needed")
    return image


def _window(example: records.Example, row: int, column: int, side: int) -> records.Example:
    """The `side` x `side` pixels of a tile from a row and column on, padded beyond its edge.

    Images repeat their edge, and labels are 255 there; `height` and `width` give the real pixels.
    """
    height = min(side, example["height"] - row)
    width = min(side, example["width"] - column)
    rows, columns = slice(row, row + height), slice(column, column + width)
    padding = ((0, side - height), (0, side - width))
    window = dict(example, height=height, width=width)
    for name in ("s1", "s2"):
        window[name] = np.pad(example[name][rows, columns], (*padding, (0, 0)), mode="edge")
    window["labels"] = np.pad(
        example["labels"][:, rows, columns],
        ((0, 0), *padding),
        constant_values=sensors.IGNORE_LABEL,
    )
    a, b, c, d, e, f = example["transform"]
    corner = (a * column + b * row + c, d * column + e * row + f)
    window["transform"] = np.array([a, b, corner[0], d, e, corner[1]], np.float64)
    return window


def num_patches(size: tuple[int, int], patch_size: int) -> int:
    """Number of patches without overlap that cover a tile; 1 if `patch_size` is 0."""
    if not patch_size:
        return 1
    height, width = size
    return -(-height // patch_size) * -(-width // patch_size)


def read_records(
    tile: tile_files.Tile,
    *,
    source: sources.Source,
    label_map: LabelMap,
    s2_offset: int,
    tile_size: int,
    patch_size: int,
) -> list[records.Example]:
    """Reads one tile as one record, or as one record for each of its patches.

    Args:
      tile: the tile.
      source: where its files are.
      label_map: of its labels.
      s2_offset: see `bands.scale_s2`.
      tile_size: T, to which tiles are padded at the bottom and the right; 0 takes the tile's.
      patch_size: side of the patches, padded likewise; 0 does not cut tiles.

    Returns:
      Records as in `read_tile` and `features`. A patch has its row and column in the tile
      appended to its `location_id`. Patches without labels are omitted.

    Raises:
      errors.BadFileError: see `read_tile`.
    """
    example = read_tile(tile, source=source, label_map=label_map, s2_offset=s2_offset)
    if not patch_size:
        side = tile_size or max(example["height"], example["width"])
        return [_window(example, 0, 0, side)]
    patches = []
    for row in range(0, example["height"], patch_size):
        for column in range(0, example["width"], patch_size):
            patch = _window(example, row, column, patch_size)
            if (patch["labels"] != sensors.IGNORE_LABEL).any():
                patch["location_id"] += f"_{row}_{column}"
                patches.append(patch)
    return patches


def features(side: int) -> tfds.features.FeaturesDict:
    """The features of a record of `side` x `side` pixels; see `read_tile`."""
    array = records.array_feature
    return tfds.features.FeaturesDict(
        {
            "s1": array(side, side, len(sensors.S1_BANDS)),
            "s2": array(side, side, len(sensors.S2_BANDS)),
            "labels": array(1, side, side),
            "season": np.int32,
            "height": np.int32,
            "width": np.int32,
            "location_id": tfds.features.Text(),
            "crs": tfds.features.Text(),
            "transform": array(6, dtype=np.float64),
        }
    )
