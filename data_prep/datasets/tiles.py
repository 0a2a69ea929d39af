"""Reads tiles of one date, and cuts them into patches."""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds

from cromss_jax import sensors
from data_prep import errors
from data_prep.datasets import tile_files
from data_prep.options import Options
from data_prep.reading import bands, geotiff, grids, nodata, offsets
from data_prep.reading.labels import LabelMap, read_labels
from data_prep.report import Finding
from data_prep.writing import records


def read_tile(
    tile: tile_files.Tile, *, source: bands.Reader, label_map: LabelMap, options: Options
) -> tuple[records.Example | None, tuple[Finding, ...]]:
    """Reads, checks and scales one tile of H x W pixels.

    Args:
      tile: the tile.
      source: where its files are.
      label_map: of its labels.
      options: see `Options`.

    Returns:
      s1 (H,W,2), s2 (H,W,13) in the order of `sensors.S2_BANDS`, labels (1,H,W), 255 also where one
      of the sensors has no valid pixel, all uint8; `season` 0; `location_id`; `height` and `width`;
      `crs` and `transform` (6,) of the S2 file. None in place of it if too many pixels are invalid.
      Besides, findings.

    Raises:
      errors.BadFileError: if the files do not belong together, or one of them is missing,
        damaged, of the wrong size, dtype or number of bands, contains invalid values, or is not
        where the others are.
    """
    if tile.fault:
        raise errors.BadFileError(*tile.fault)
    s1, found = _read_image(source, tile.paths["s1"], sensors.S1_BANDS)
    s2, s2_found = _read_image(source, tile.paths["s2"], sensors.S2_BANDS)
    found += s2_found
    labels, label_found = _read_labels(tile.paths["labels"], source, label_map, s2, tile)
    found += label_found
    for kind, image in (("s1", s1), ("s2", s2)):
        bands.check_size(tile.paths[kind], image, labels.shape)
    found += grids.compare(s2, tile.paths["s1"], s1, tile.paths["s2"])
    s1_values = bands.s1_values(tile.paths["s1"], s1)
    s2_values = _mark_zeros(bands.s2_values(tile.paths["s2"], s2))
    found += s1_values.findings + s2_values.findings
    offset = options.s2_offset
    if offset is None:
        evidence = {
            name: (s2_values.pixels[i], s2_values.valid[i])
            for i, name in enumerate(sensors.S2_BANDS)
        }
        texts = [f"{name}: {value}" for name, value in s2.tags.items()]
        offset, offset_found = offsets.detect(tile.paths["s2"], evidence, texts)
        found += offset_found
    valid, share_found = _valid_pixels(tile, s1_values, s2_values, options.max_invalid)
    found += share_found
    if any(finding.kind == "tile skipped" for finding in share_found):
        return None, found
    return {
        "s1": np.stack(
            [
                bands.scale(name, s1_values.pixels[i], s1_values.valid[i])
                for i, name in enumerate(sensors.S1_BANDS)
            ],
            axis=-1,
        ),
        "s2": np.stack(
            [
                bands.scale_s2(name, s2_values.pixels[i], s2_values.valid[i], offset)
                for i, name in enumerate(sensors.S2_BANDS)
            ],
            axis=-1,
        ),
        "labels": nodata.ignore(labels, valid)[None],
        "season": 0,
        "height": labels.shape[0],
        "width": labels.shape[1],
        "location_id": tile.location_id,
        "crs": s2.crs,
        "transform": np.array(s2.transform[:6], np.float64),
    }, found


def _mark_zeros(values: bands.Values) -> bands.Values:
    """Marks the zeros of S2 that are nodata; see `nodata.mark_zeros`."""
    zero = dict(zip(sensors.S2_BANDS, values.zero, strict=True))
    valid = nodata.mark_zeros(zero, dict(zip(sensors.S2_BANDS, values.valid, strict=True)))
    return dataclasses.replace(values, valid=np.stack([valid[n] for n in sensors.S2_BANDS]))


def _valid_pixels(
    tile: tile_files.Tile, s1: bands.Values, s2: bands.Values, max_invalid: float
) -> tuple[np.ndarray, tuple[Finding, ...]]:
    """Where both sensors have valid pixels (H,W), and findings."""
    s1_valid, s2_valid = s1.valid.all(axis=0), s2.valid.all(axis=0)
    found = nodata.findings(tile.paths["s1"], "S1 invalid", s1_valid)
    found += nodata.findings(tile.paths["s2"], "S2 invalid", s2_valid)
    valid = s1_valid & s2_valid
    share = 1 - float(valid.mean())
    if share > max_invalid:
        detail = f"{share:.1%} of the pixels are invalid"
        found += (Finding("tile skipped", tile.paths["s2"], detail, share),)
    return valid, found


def _read_labels(
    path: str,
    source: bands.Reader,
    label_map: LabelMap,
    s2: geotiff.Image,
    tile: tile_files.Tile,
) -> tuple[np.ndarray, tuple[Finding, ...]]:
    """Labels (H,W) on the grid of the S2 image, and findings."""
    image = bands.read_bands(source, path)
    # Files of more than one band have the labels in the second.
    image = image.bands([0 if len(image.pixels) == 1 else 1])
    labels, found = read_labels(path, image, label_map, s2.size)
    return labels, (*found, *grids.compare(s2, path, image, tile.paths["s2"]))


def _read_image(
    source: bands.Reader, path: str, names: tuple[str, ...]
) -> tuple[geotiff.Image, tuple[Finding, ...]]:
    """Reads an image with its bands in the usual order, and findings."""
    return bands.pick_bands(path, bands.read_bands(source, path), names)


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
    source: bands.Reader,
    label_map: LabelMap,
    options: Options,
    tile_size: int,
    patch_size: int,
) -> records.Reading:
    """Reads one tile as one record, or as one record for each of its patches.

    Args:
      tile: the tile.
      source: where its files are.
      label_map: of its labels.
      options: see `Options`.
      tile_size: T, to which tiles are padded at the bottom and the right; 0 takes the tile's.
      patch_size: side of the patches, padded likewise; 0 does not cut tiles.

    Returns:
      Records as in `read_tile` and `features`. A patch has its row and column in the tile
      appended to its `location_id`. Patches without labels are omitted.

    Raises:
      errors.BadFileError: see `read_tile`.
    """
    example, findings = read_tile(tile, source=source, label_map=label_map, options=options)
    if example is None:
        return records.Reading([], findings)
    if not patch_size:
        side = tile_size or max(example["height"], example["width"])
        return records.Reading([_window(example, 0, 0, side)], findings)
    patches = []
    for row in range(0, example["height"], patch_size):
        for column in range(0, example["width"], patch_size):
            patch = _window(example, row, column, patch_size)
            if (patch["labels"] != sensors.IGNORE_LABEL).any():
                patch["location_id"] += f"_{row}_{column}"
                patches.append(patch)
    return records.Reading(patches, findings)


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
