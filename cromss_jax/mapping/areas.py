"""How much of a map each class covers."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import rasterio

from cromss_jax.mapping.blending import NODATA
from cromss_jax.mapping.cogs import Grid

# Half axes of the ellipsoid of WGS 84 in metres.
_A, _B = 6378137.0, 6356752.314245
# Rows that are read at once.
_ROWS = 256


def pixel_areas(grid: Grid) -> np.ndarray | None:
    """Area of a pixel of each row in m², [H] float64; None where the CRS is unknown.

    Of a projected CRS, as in the projection: in UTM within 0.1 %. Of a CRS in degrees, on the
    ellipsoid.
    """
    if not grid.crs:
        return None
    crs = rasterio.CRS.from_wkt(grid.crs)
    a, b, _, d, e, f = grid.transform
    if not crs.is_geographic:
        _, metres = crs.linear_units_factor
        return np.full(grid.height, abs(a * e - b * d) * metres**2)
    edges = np.radians(f + e * np.arange(grid.height + 1))
    return np.abs(np.diff(_zone(np.sin(edges)))) * math.radians(abs(a))


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
