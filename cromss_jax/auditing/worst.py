"""A picture of the worst locations: image, labels, and what they should be."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from cromss_jax import sensors
from cromss_jax.auditing import maps
from cromss_jax.legend import Legend

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
            wrong = float(percent[known].sum())  # by how many: of few labels, all may be
            if tile.location not in found or wrong > found[tile.location][0]:
                found[tile.location] = wrong, tile
    return [found[name][1] for name in names]


def draw(
    folder: pathlib.Path,
    tiles: Sequence[maps.Tile],
    images: Sequence[Mapping[str, np.ndarray]],
    legend: Legend,
) -> None:
    """Writes `worst.png`, a row for each tile.

    Args:
      folder: of the audit.
      tiles: to show, with maps on disk.
      images: of each, see `subjects.Subject.image`.
      legend: of the classes.
    """
    from cromss_jax.results import pictures  # late: a second that nobody else waits

    rows = [_row(tile, image) for tile, image in zip(tiles, images, strict=True)]
    shown = {name: _stack([row[name] for row in rows]) for name in rows[0]}
    picture = pictures.draw_samples(shown, ("B4", "B3", "B2"), legend)
    pictures.save_picture(epath.Path(folder / FILE), picture)


def _stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[n, H, W, ...] from [h, w, ...]; smaller ones, at the edges of a scene, end in nothing."""
    sizes = np.max([array.shape[:2] for array in arrays], axis=0)
    fill = sensors.IGNORE_LABEL if arrays[0].dtype == np.uint8 else 0
    out = np.full((len(arrays), *sizes, *arrays[0].shape[2:]), fill, arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: array.shape[0], : array.shape[1]] = array
    return out


def _row(tile: maps.Tile, image: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is shown of a tile, by the names of `pictures.draw_samples`."""
    percent = maps.read(tile, maps.WRONG)
    row = {
        "labels": maps.read(tile, maps.GIVEN),
        "suggested/": maps.read(tile, maps.SUGGESTED),
        # Pixels without a label are left white.
        "wrong_probability/": np.where(percent > 100, np.nan, percent / 100),
    }
    if "truth" in image:
        row["truth"] = image["truth"]
    colours = [image.get(band) for band in ("B4", "B3", "B2")]
    if all(c is not None and c.shape == row["labels"].shape for c in colours):
        row["s2"] = np.stack(colours, axis=-1) / 255
    elif {"VV", "VH"} <= image.keys():
        row["s1"] = np.stack([image["VV"], image["VH"]], axis=-1) / 255
    return row
