"""Reads tiles of one date, and cuts them into patches."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds

from cromss_jax import sensors
from cromss_jax.legend import Legend
from data_prep import errors
from data_prep.datasets import tile_files
from data_prep.options import Options
from data_prep.reading import bands, geotiff, grids, nodata, offsets
from data_prep.reading.labels import read_labels
from data_prep.report import Finding
from data_prep.writing import records


def read_tile(
    tile: tile_files.Tile,
    *,
    source: bands.Reader,
    legends: Mapping[str, Legend],
    label_band: int,
    options: Options,
) -> tuple[records.Example | None, tuple[Finding, ...]]:
    """Reads, checks and scales one tile of H x W pixels.

    Args:
      tile: the tile.
      source: where its files are.
      legends: of its labels and, if it has one, of its truth: by "labels" and "truth".
      label_band: see `tile_layouts.Layout`.
      options: see `Options`.

    Returns:
      s1 (H,W,2), s2 (H,W,K) with the bands of `options`, labels (1,H,W), 255 also where one of the
      sensors has no valid pixel, truth (H,W) if there is one, all uint8; `season` 0; `location_id`;
      `height` and `width`; `crs` and `transform` (6,) of the S2 file, or of S1 without it. None in
      place of it if too many pixels are invalid. Besides, findings.

    Raises:
      errors.BadFileError: if the files do not belong together, or one of them is missing,
        damaged, of the wrong size, dtype or number of bands, contains invalid values, or is not
        where the others are.
    """
    if tile.fault:
        raise errors.BadFileError(*tile.fault)
    images: dict[str, geotiff.Image] = {}
    found: tuple[Finding, ...] = ()
    for modality, names in options.bands.items():
        product = {"s1": (), "s2": tuple(sensors.S2_STATISTICS[options.s2_level])}[modality]
        file = bands.read_bands(source, tile.paths[modality])
        images[modality], image_found = bands.pick_bands(tile.paths[modality], file, names, product)
        found += image_found
    # The image that the others are compared with.
    main = "s2" if "s2" in images else "s1"
    maps = {}
    for kind, legend in legends.items():
        band = label_band if kind == "labels" else 1
        maps[kind], map_found = _read_labels(
            tile.paths[kind], source, legend, images[main], tile.paths[main], band
        )
        found += map_found
    labels = maps["labels"]
    for modality, image in images.items():
        bands.check_size(tile.paths[modality], image, labels.shape)
        found += grids.compare(images[main], tile.paths[modality], image, tile.paths[main])
    scaled, valid, scale_found = _scale(tile, images, options)
    found += scale_found
    share = 1 - float(valid.mean())
    if share > options.max_invalid:
        detail = f"{share:.1%} of the pixels are invalid"
        return None, (*found, Finding("tile skipped", tile.paths[main], detail, share))
    example = {
        **scaled,
        "labels": nodata.ignore(labels, valid)[None],
        "season": 0,
        "height": labels.shape[0],
        "width": labels.shape[1],
        "location_id": tile.location_id,
        "crs": images[main].crs,
        "transform": np.array(images[main].transform[:6], np.float64),
    }
    if "truth" in maps:
        example["truth"] = maps["truth"]
    return example, found


def _scale(
    tile: tile_files.Tile, images: Mapping[str, geotiff.Image], options: Options
) -> tuple[records.Example, np.ndarray, tuple[Finding, ...]]:
    """The images of a tile as uint8, where all are valid (H,W), and findings."""
    found: tuple[Finding, ...] = ()
    scaled, seen = {}, []
    values: dict[str, bands.Values] = {}
    if "s1" in images:
        values["s1"] = bands.s1_values(tile.paths["s1"], images["s1"])
    if "s2" in images:
        values["s2"] = _mark_zeros(
            bands.s2_values(tile.paths["s2"], images["s2"]), options.bands["s2"]
        )
    for value in values.values():
        found += value.findings
    offset, offset_found = _s2_offset(tile, images, values, options)
    found += offset_found
    statistics = sensors.S2_STATISTICS[options.s2_level]
    for modality, value in values.items():
        stack = []
        for i, name in enumerate(options.bands[modality]):
            pixels, valid = value.pixels[i], value.valid[i]
            if modality == "s1":
                stack.append(bands.scale(name, pixels, valid))
            else:
                stack.append(bands.scale_s2(name, pixels, valid, offset, statistics))
        scaled[modality] = np.stack(stack, axis=-1)
        seen.append(value.valid.all(axis=0))
        kind = f"{modality.upper()} invalid"
        found += nodata.findings(tile.paths[modality], kind, seen[-1])
    return scaled, np.logical_and.reduce(seen), found


def _s2_offset(
    tile: tile_files.Tile,
    images: Mapping[str, geotiff.Image],
    values: Mapping[str, bands.Values],
    options: Options,
) -> tuple[int, tuple[Finding, ...]]:
    """What to subtract from raw S2 pixels, and findings."""
    if "s2" not in values or options.s2_offset is not None:
        return options.s2_offset or 0, ()
    evidence = {
        name: (values["s2"].pixels[i], values["s2"].valid[i])
        for i, name in enumerate(options.bands["s2"])
    }
    texts = [f"{name}: {value}" for name, value in images["s2"].tags.items()]
    return offsets.detect(tile.paths["s2"], evidence, texts)


def _mark_zeros(values: bands.Values, names: Sequence[str]) -> bands.Values:
    """Marks the zeros of S2 that are nodata; see `nodata.mark_zeros`."""
    zero = dict(zip(names, values.zero, strict=True))
    valid = nodata.mark_zeros(zero, dict(zip(names, values.valid, strict=True)))
    return dataclasses.replace(values, valid=np.stack([valid[n] for n in names]))


def _read_labels(
    path: str,
    source: bands.Reader,
    legend: Legend,
    image: geotiff.Image,
    image_path: str,
    band: int,
) -> tuple[np.ndarray, tuple[Finding, ...]]:
    """Labels (H,W) on the grid of an image, and findings."""
    file = bands.read_bands(source, path)
    file = file.bands([band if len(file.pixels) > 1 else 0])
    labels, found = read_labels(path, file, legend, image.size)
    return labels, (*found, *grids.compare(image, path, file, image_path))


def _window(example: records.Example, row: int, column: int, side: int) -> records.Example:
    """The `side` x `side` pixels of a tile from a row and column on, padded beyond its edge.

    Images repeat their edge, and labels are 255 there; `height` and `width` give the real pixels.
    """
    height = min(side, example["height"] - row)
    width = min(side, example["width"] - column)
    rows, columns = slice(row, row + height), slice(column, column + width)
    padding = ((0, side - height), (0, side - width))
    window = dict(example, height=height, width=width)
    for name in {"s1", "s2"} & example.keys():
        window[name] = np.pad(example[name][rows, columns], (*padding, (0, 0)), mode="edge")
    window["labels"] = np.pad(
        example["labels"][:, rows, columns],
        ((0, 0), *padding),
        constant_values=sensors.IGNORE_LABEL,
    )
    if "truth" in example:
        window["truth"] = np.pad(
            example["truth"][rows, columns], padding, constant_values=sensors.IGNORE_LABEL
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
    legends: Mapping[str, Legend],
    label_band: int,
    options: Options,
    tile_size: int,
    patch_size: int,
) -> records.Reading:
    """Reads one tile as one record, or as one record for each of its patches.

    Args:
      tile: the tile.
      source: where its files are.
      legends: see `read_tile`.
      label_band: see `read_tile`.
      options: see `Options`.
      tile_size: T, to which tiles are padded at the bottom and the right; 0 takes the tile's.
      patch_size: side of the patches, padded likewise; 0 does not cut tiles.

    Returns:
      Records as in `read_tile` and `features`. A patch has its row and column in the tile
      appended to its `location_id`. Patches without labels are omitted.

    Raises:
      errors.BadFileError: see `read_tile`.
    """
    example, findings = read_tile(
        tile, source=source, legends=legends, label_band=label_band, options=options
    )
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


def features(
    side: int, described: Sequence[sensors.Band], has_truth: bool = False
) -> tfds.features.FeaturesDict:
    """The features of a record of `side` x `side` pixels with these bands; see `read_tile`."""
    array = records.array_feature
    images = {
        name: array(side, side, len(names)) for name, names in sensors.arrays_of(described).items()
    }
    truth = {"truth": array(side, side)} if has_truth else {}
    return tfds.features.FeaturesDict(
        images
        | truth
        | {
            "labels": array(1, side, side),
            "season": np.int32,
            "height": np.int32,
            "width": np.int32,
            "location_id": tfds.features.Text(),
            "crs": tfds.features.Text(),
            "transform": array(6, dtype=np.float64),
        }
    )
