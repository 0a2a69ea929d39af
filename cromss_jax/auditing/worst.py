"""A picture of the worst locations: image, labels, and what they should be."""

import pathlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from cromss_jax import sensors
from cromss_jax.auditing import maps
from cromss_jax.data import input_pipeline

FILE, COUNT = "worst.png", 12


def rank(tiles: Sequence[maps.Tile], names: Sequence[str]) -> list[maps.Tile]:
    """Of each named location the date whose labels are probably worst, by its map.

    Args:
      tiles: of all locations, with maps on disk.
      names: of the locations that are wanted, in the order of the result.
    """
    found: dict[str, tuple[float, maps.Tile]] = {}
    for tile in tiles:
        if tile.location in names:
            percent = maps.read(tile, maps.WRONG)
            known = percent != sensors.IGNORE_LABEL
            mean = float(percent[known].mean()) if known.any() else 0.0
            if tile.location not in found or mean > found[tile.location][0]:
                found[tile.location] = mean, tile
    return [found[name][1] for name in names]


def draw(
    folder: pathlib.Path,
    dataset: input_pipeline.TileDataset,
    tiles: Sequence[maps.Tile],
    records: Sequence[int],
) -> None:
    """Writes `worst.png`, a row for each tile.

    Args:
      folder: of the audit.
      dataset: that was audited.
      tiles: to show, with maps on disk.
      records: the index of the record of each.
    """
    from cromss_jax.results import pictures  # late: a second that nobody else waits

    rows = [_row(dataset, tile, record) for tile, record in zip(tiles, records, strict=True)]
    shown = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    picture = pictures.draw_samples(shown, ("B4", "B3", "B2"), dataset.legend)
    pictures.save_picture(epath.Path(folder / FILE), picture)


def _row(dataset: input_pipeline.TileDataset, tile: maps.Tile, record: int) -> dict:
    """What is shown of a tile, by the names of `pictures.draw_samples`."""
    arrays = dataset.source[record]
    row = {
        "labels": maps.read(tile, maps.GIVEN),
        "suggested/": maps.read(tile, maps.SUGGESTED),
        "wrong_probability/": np.minimum(maps.read(tile, maps.WRONG), 100) / 100,
    }
    if "truth" in arrays:
        row["truth"] = arrays["truth"]
    places = {
        name: arrays[array][..., i]
        for array, names in sensors.arrays_of(dataset.bands).items()
        for i, name in enumerate(names)
    }
    colours = [places.get(band) for band in ("B4", "B3", "B2")]
    if all(c is not None and c.shape == row["labels"].shape for c in colours):
        row["s2"] = np.stack(colours, axis=-1) / 255
    elif {"VV", "VH"} <= places.keys():
        row["s1"] = np.stack([places["VV"], places["VH"]], axis=-1) / 255
    return row
