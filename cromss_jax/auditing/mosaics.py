"""Tiles that touch each other as one raster, so that no region ends at the border of a tile."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import rasterio
from rasterio.windows import Window
from scipy.sparse import coo_array, csgraph

from cromss_jax import sensors
from cromss_jax.auditing import maps
from cromss_jax.mapping.cogs import Grid

# Origins of tiles of one grid differ by whole pixels up to this rounding.
_DIGITS = 3
_OPTIONS = {
    "driver": "GTiff", "tiled": True, "blockxsize": 256, "blockysize": 256,
    "compress": "deflate", "zlevel": 1, "SPARSE_OK": True, "BIGTIFF": "IF_SAFER",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Tiles of one date and one grid, each of which touches another, also over corners.

    Attributes:
      tiles: at least one.
      origins: row and column of each in `grid`.
      grid: that holds them all.
    """

    tiles: tuple[maps.Tile, ...]
    origins: tuple[tuple[int, int], ...]
    grid: Grid

    @functools.cached_property
    def _spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of each tile's first pixel, and of the first beyond it, [N, 2] each."""
        starts = np.array(self.origins)
        return starts, starts + [(t.grid.height, t.grid.width) for t in self.tiles]

    def tile_at(self, row: int, column: int) -> maps.Tile:
        """The first tile that holds a pixel."""
        starts, ends = self._spans
        held = ((starts <= (row, column)) & (ends > (row, column))).all(axis=1)
        return self.tiles[int(held.argmax())]


def clusters(tiles: Sequence[maps.Tile]) -> Iterator[Cluster]:
    """Puts tiles together that touch or overlap, in the order of their first tiles."""
    groups = collections.defaultdict(list)
    for tile in tiles:
        a, b, c, d, e, f = tile.grid.transform
        # In pixels from the origin of the reference system.
        column, row = np.linalg.solve([[a, b], [d, e]], [c, f]).round(_DIGITS)
        phase = (round(column % 1, _DIGITS), round(row % 1, _DIGITS))
        place = (int(np.floor(row)), int(np.floor(column)))
        groups[tile.date, tile.grid.crs, a, b, d, e, phase].append((tile, place))
    for members in groups.values():
        owned, places = zip(*members, strict=True)
        for indices in _touching(owned, np.array(places)):
            yield _cluster([owned[i] for i in indices], np.array([places[i] for i in indices]))


def _touching(tiles: Sequence[maps.Tile], places: np.ndarray) -> list[np.ndarray]:
    """Indices of the tiles of each cluster; `places` [N, 2] are their rows and columns."""
    ends = places + [(tile.grid.height, tile.grid.width) for tile in tiles]
    side = max(max(tile.grid.height, tile.grid.width) for tile in tiles)
    # Only tiles that reach into the same square can touch.
    squares = collections.defaultdict(list)
    for i, (start, end) in enumerate(zip(places // side, ends // side, strict=True)):
        for square in itertools.product(
            *(range(a, b + 1) for a, b in zip(start, end, strict=True))
        ):
            squares[square].append(i)
    pairs = {(i, i) for i in range(len(tiles))}
    for members in squares.values():
        for i, j in itertools.combinations(members, 2):
            if (places[i] <= ends[j]).all() and (places[j] <= ends[i]).all():
                pairs.add((i, j))
    rows, columns = np.array(sorted(pairs)).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(tiles),) * 2)
    count, owner = csgraph.connected_components(graph, directed=False)
    return [np.flatnonzero(owner == i) for i in range(count)]


def _cluster(tiles: Sequence[maps.Tile], places: np.ndarray) -> Cluster:
    first = places.min(axis=0)
    sizes = np.array([(tile.grid.height, tile.grid.width) for tile in tiles])
    height, width = (places + sizes).max(axis=0) - first
    row, column = (first - places[0]).tolist()
    grid = tiles[0].grid.window(row, column, int(height), int(width))
    origins = tuple((int(r), int(c)) for r, c in places - first)
    return Cluster(tuple(tiles), origins, grid)


@dataclasses.dataclass(frozen=True)
class Mosaic:
    """What a cluster's tiles say, on disk.

    Attributes:
      key: uint16, 256 x class of the label + suggested class of suspects; 0 elsewhere.
      facts: uint8, three bands: probability in percent, reason, and 1 for suspects.
    """

    key: rasterio.DatasetReader
    facts: rasterio.DatasetReader


@contextlib.contextmanager
def opened(cluster: Cluster, least_percent: int) -> Iterator[Mosaic]:
    """Writes the mosaic of a cluster into a temporary folder; memory holds one tile.

    Where tiles overlap, the later one counts.

    Args:
      cluster: whose maps are read.
      least_percent: probability from which labels are suspects, unless they are suggested, too.
    """
    grid = cluster.grid
    common = {
        "height": grid.height,
        "width": grid.width,
        "transform": rasterio.Affine(*grid.transform),
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(folder) / name for name in ("key.tif", "facts.tif")]
        with (
            rasterio.open(paths[0], "w+", count=1, dtype="uint16", **common, **_OPTIONS) as key,
            rasterio.open(paths[1], "w+", count=3, dtype="uint8", **common, **_OPTIONS) as facts,
        ):
            for tile, (row, column) in zip(cluster.tiles, cluster.origins, strict=True):
                window = Window(column, row, tile.grid.width, tile.grid.height)
                given, wrong, suggested, reason = (
                    maps.read(tile, name)
                    for name in (maps.GIVEN, maps.WRONG, maps.SUGGESTED, maps.REASON)
                )
                known = given != sensors.IGNORE_LABEL
                suspect = known & (wrong >= least_percent) & (given != suggested)
                own = np.where(suspect, given.astype(np.uint16) * 256 + suggested, 0)
                stacked = np.stack([wrong, reason, suspect.astype(np.uint8)])
                key.write(np.where(known, own, key.read(1, window=window)), 1, window=window)
                facts.write(np.where(known, stacked, facts.read(window=window)), window=window)
        with rasterio.open(paths[0]) as key, rasterio.open(paths[1]) as facts:
            yield Mosaic(key, facts)
