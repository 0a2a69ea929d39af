"""How much of a map each class covers."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import rasterio
import rasterio.warp

from cromss_jax.mapping.blending import NODATA
from cromss_jax.mapping.cogs import Grid

# Half axes of the ellipsoid of WGS 84 in metres.
_A, _B = 6378137.0, 6356752.314245
# By which share a projection's areas may differ from true ones to be taken.
_KEPT = 0.005
# Of an edge of a row, straight in the projection, between which it is straight on another map.
_POINTS = 9
# Rows that are read at once.
_ROWS = 256


def pixel_areas(grid: Grid) -> np.ndarray | None:
    """Area of a pixel of each row in m², [H] float64; None where the CRS is unknown.

    Of a projection that keeps areas, as UTM does within 0.1 %, the projection's; else, as of
    degrees or Web Mercator, the mean of the row on the ellipsoid.
    """
    if not grid.crs:
        return None
    crs = rasterio.CRS.from_wkt(grid.crs)
    true = _on_ellipsoid(grid, crs)
    if crs.is_geographic:
        return true
    a, b, _, d, e, _ = grid.transform
    _, metres = crs.linear_units_factor
    projected = np.full(grid.height, abs(a * e - b * d) * metres**2)
    return projected if np.allclose(projected, true, rtol=_KEPT) else true


def _on_ellipsoid(grid: Grid, crs: rasterio.CRS) -> np.ndarray:
    """Mean area of the pixels of each row in m², [H], by an equal-area map of the ellipsoid."""
    a, b, c, d, e, f = grid.transform
    rows = np.arange(grid.height + 1)[:, None]
    columns = np.linspace(0, grid.width, _POINTS)
    points = np.stack([c + a * columns + b * rows, f + d * columns + e * rows])
    if not crs.is_geographic:
        degrees = rasterio.warp.transform(crs, "OGC:CRS84", *points.reshape(2, -1))
        points = np.reshape(degrees, points.shape)
    x = np.unwrap(np.radians(points[0]), axis=1)
    y = _zone(np.sin(np.radians(points[1])))
    # Around the row: along its upper edge, and back along its lower one.
    x, y = (np.concatenate([z[:-1], z[1:, ::-1]], axis=1) for z in (x, y))
    doubled = x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)
    return np.abs(doubled.sum(axis=1)) / 2 / grid.width


def _zone(sine: np.ndarray) -> np.ndarray:
    """Area between the equator and a latitude of a lune of one radian, in m²."""
    eccentricity = math.sqrt(1 - (_B / _A) ** 2)
    scaled = eccentricity * sine
    return _B**2 / 2 * (sine / (1 - scaled**2) + np.arctanh(scaled) / eccentricity)


def count(
    read: Callable[[int, int], np.ndarray], grid: Grid, num_classes: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels and area of each class of a map, the last entry for pixels without data.

    Args:
      read: classes of the rows from one number to another, uint8 [rows, width].
      grid: of the map.
      num_classes: C.

    Returns:
      [C + 1] int64 pixels, and [C + 1] float64 km²; None where the CRS is unknown.
    """
    row_areas = pixel_areas(grid)
    pixels = np.zeros(num_classes + 1, np.int64)
    areas = np.zeros(num_classes + 1)
    for start in range(0, grid.height, _ROWS):
        stop = min(start + _ROWS, grid.height)
        for row, classes in enumerate(read(start, stop), start):
            found = np.bincount(np.where(classes == NODATA, num_classes, classes))
            found = np.pad(found, (0, num_classes + 1 - len(found)))
            pixels += found
            if row_areas is not None:
                areas += found * row_areas[row] / 1e6
    return pixels, None if row_areas is None else areas


def table(names: Sequence[str], pixels: np.ndarray, areas: np.ndarray | None) -> str:
    """Table in Markdown: pixels, km² and share of each class.

    Args:
      names: of the C classes.
      pixels: [C + 1], the last entry is nodata; see `count`.
      areas: [C + 1] in km², or None.
    """
    size = pixels if areas is None else areas
    total = size[:-1].sum()
    lines = ["| class | pixels | km² | share of the mapped area |", "|---|---|---|---|"]
    for i, name in enumerate((*names, "no data")):
        area = "–" if areas is None else f"{areas[i]:.2f}"
        share = f"{size[i] / total:.2%}" if i < len(names) and total else "–"
        lines.append(f"| {name} | {pixels[i]} | {area} | {share} |")
    return "\n".join(lines) + "\n"
