"""The maps of an audit: four rasters for each date of each location, and where they lie."""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping

import numpy as np
import rasterio
from rasterio.windows import Window

from cromss_jax import sensors
from cromss_jax.auditing import evidence
from cromss_jax.legend import Legend
from cromss_jax.mapping import cogs
from cromss_jax.mapping.styles import PERCENT, Entry

# Below the folder of an audit. `data_prep` reads them under these names, too.
FOLDER = "maps"
GIVEN, WRONG, SUGGESTED, REASON = "given", "wrong_probability", "suggested", "reason"
LAYERS = (GIVEN, WRONG, SUGGESTED, REASON)
_REASONS = tuple(
    Entry(i, colour, text)
    for i, (text, colour) in enumerate(
        zip(
            evidence.REASONS,
            ("#e0e0e0", "#b30000", "#fc8d59", "#7b3294", "#2166ac", "#fdd049"),
            strict=True,
        )
    )
)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A date of a location: its maps, or its part of the maps of a scene.

    Attributes:
      folder: of the maps.
      location: the location's name.
      season: which of its dates, from 0.
      date: of its image as in "20210703", or "season 0" where the data set does not say it.
      grid: where it lies.
      corner: row and column of its first pixel on the maps.
    """

    folder: pathlib.Path
    location: str
    season: int
    date: str
    grid: cogs.Grid
    corner: tuple[int, int] = (0, 0)


def tile_of(folder: pathlib.Path, record: Mapping, season: int) -> Tile:
    """The tile of a record.

    Args:
      folder: of the audit.
      record: of the data set.
      season: its number among those of the location.
    """
    name = record["location_id"].decode()
    known = [k for k in ("s2_timestamp", "timestamp", "s1_timestamp") if record.get(k)]
    date = record[known[0]].decode()[:10].replace("-", "") if known else f"season {season}"
    height, width = record["labels"].shape[1:]
    grid = cogs.Grid(
        height, width, record["crs"].decode(), tuple(float(x) for x in record["transform"])
    )
    return Tile(folder / FOLDER / name / f"season_{season}", name, season, date, grid)


def write(tile: Tile, layers: Mapping[str, np.ndarray], legend: Legend) -> None:
    """Writes the maps of a tile that has maps of its own.

    Args:
      tile: where they lie.
      layers: uint8 [H, W] by name: `given` and `suggested` classes, `wrong_probability` in percent,
        `reason` as an index of `evidence.REASONS`; 255 in all of them where there is no label.
      legend: of the classes.
    """
    work = tile.folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    for name in LAYERS:
        pixels = np.ascontiguousarray(layers[name], np.uint8)
        (work / f"{name}.raw").write_bytes(pixels.tobytes())
    finish(work, tile.grid, tile.folder, legend)
    shutil.rmtree(work)


def finish(work: pathlib.Path, grid: cogs.Grid, folder: pathlib.Path, legend: Legend) -> None:
    """Writes maps whose pixels are on disk.

    Args:
      work: folder of their pixels, `given.raw` and so on, uint8 row by row.
      grid: where they lie.
      folder: to write to.
      legend: of the classes.
    """
    classes = tuple(Entry(i, colour, name) for i, (name, colour) in enumerate(legend.pairs()))
    for layer in (
        cogs.Layer(GIVEN, ("class of the label",), classes, True),
        cogs.Layer(WRONG, ("label is wrong",), PERCENT, False, "%"),
        cogs.Layer(SUGGESTED, ("class it should be",), classes, True),
        cogs.Layer(REASON, ("what contradicts the label",), _REASONS, True),
    ):
        cogs.write(work / f"{layer.name}.raw", layer, grid, folder)


def layers_of(
    labels: np.ndarray, wrong: np.ndarray, suggested: np.ndarray, reason: np.ndarray
) -> dict[str, np.ndarray]:
    """What `write` takes, from what is known of a date, each [H, W]; `wrong` in [0, 1]."""
    known = labels != sensors.IGNORE_LABEL
    found = {
        GIVEN: labels,
        WRONG: np.rint(100 * wrong).astype(np.uint8),
        SUGGESTED: suggested,
        REASON: reason,
    }
    return {k: np.where(known, v, np.uint8(sensors.IGNORE_LABEL)) for k, v in found.items()}


def read(tile: Tile, name: str) -> np.ndarray:
    """A map of a tile, uint8 [H, W], by the names of `layers_of`."""
    row, column = tile.corner
    with rasterio.open(tile.folder / f"{name}.tif") as file:
        return file.read(1, window=Window(column, row, tile.grid.width, tile.grid.height))
