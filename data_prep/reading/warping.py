"""Brings windows of rasters onto one grid.

The pixels of a grid's window are computed from the source pixels around it, and do not depend on
how the grid is cut: coordinates are transformed to a millionth of a source pixel, where GDAL by
default accepts an eighth, interpolated between few points of each chunk.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import rasterio
import rasterio.errors
import rasterio.io
import rasterio.transform
import rasterio.vrt
import rasterio.warp
import rasterio.windows
from affine import Affine
from rasterio.enums import Resampling

from data_prep import errors
from data_prep.reading.rasters import Layer

# In source pixels. Equal to transforming each pixel centre by itself.
_TOLERANCE = 1e-6
# Source pixels around a window: those of the cubic kernel, and one for rounding.
_MARGIN = 3


def apply(transform: Sequence[float], column: float, row: float) -> tuple[float, float]:
    """The coordinates of a place in pixels."""
    a, b, c, d, e, f = transform[:6]
    return a * column + b * row + c, d * column + e * row + f


@dataclasses.dataclass(frozen=True)
class Grid:
    """Square or oblong pixels in a CRS.

    Attributes:
      crs: WKT.
      transform: see `geotiff.Image`.
      height: in pixels.
      width: in pixels.
    """

    crs: str
    transform: tuple[float, ...]
    height: int
    width: int

    def window(self, row: int, column: int, height: int, width: int) -> "Grid":
        """A part of the grid; it may lie outside of it."""
        a, b, _, d, e, _ = self.transform
        x, y = apply(self.transform, column, row)
        return Grid(self.crs, (a, b, x, d, e, y), height, width)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, bottom, right and top, in the units of the CRS."""
        return rasterio.transform.array_bounds(self.height, self.width, Affine(*self.transform))


def bounds_in(
    path: str, bounds: tuple[float, float, float, float], crs: str, to_crs: str
) -> tuple[float, float, float, float]:
    """Bounds in another CRS.

    Raises:
      errors.BadFileError: naming `path`, if there is no transformation.
    """
    if crs == to_crs:
        return bounds
    try:
        found = _transformed(bounds, crs, to_crs)
    except rasterio.errors.RasterioError as error:
        raise errors.BadFileError(path, f"its CRS cannot be used: {error}") from error
    if not np.isfinite(found).all():
        raise errors.BadFileError(path, "lies outside of the area of its CRS")
    return found


# PROJ may look for a transformation for 70 ms, and a tile's layers are mostly of one CRS.
@functools.lru_cache(maxsize=64)
def _transformed(
    bounds: tuple[float, float, float, float], crs: str, to_crs: str
) -> tuple[float, float, float, float]:
    crs, to_crs = map(rasterio.CRS.from_wkt, (crs, to_crs))
    return rasterio.warp.transform_bounds(crs, to_crs, *bounds)


def source_window(
    layer: Layer, grid: Grid, margin: int = _MARGIN
) -> rasterio.windows.Window | None:
    """The pixels of a layer that a grid needs; None if it needs none.

    Args:
      layer: of any CRS.
      grid: the wanted one.
      margin: pixels around it, of the larger of both kinds.

    Raises:
      errors.BadFileError: if the CRS cannot be transformed.
    """
    left, bottom, right, top = bounds_in(layer.path, grid.bounds, grid.crs, layer.crs)
    if left > right:  # degrees on both sides of the antimeridian, of which a layer has one
        west, _, east, _ = layer.bounds
        right += 360
        if min(right - 360, east) - max(left - 360, west) > min(right, east) - max(left, west):
            left, right = left - 360, right - 360
    to_pixels = ~Affine(*layer.transform)
    corners = [apply(to_pixels, x, y) for x in (left, right) for y in (bottom, top)]
    columns, rows = zip(*corners, strict=True)
    # Kernels are wider where pixels become larger.
    ratio = max(
        1.0,
        (max(columns) - min(columns)) / grid.width,
        (max(rows) - min(rows)) / grid.height,
    )
    margin = math.ceil(margin * ratio)
    first_column = max(math.floor(min(columns)) - margin, 0)
    first_row = max(math.floor(min(rows)) - margin, 0)
    last_column = min(math.ceil(max(columns)) + margin, layer.width)
    last_row = min(math.ceil(max(rows)) + margin, layer.height)
    if first_column >= last_column or first_row >= last_row:
        return None
    return rasterio.windows.Window(
        first_column, first_row, last_column - first_column, last_row - first_row
    )


def is_inside(layer: Layer, window: rasterio.windows.Window) -> bool:
    """Whether a window of `source_window` ends before the edges of its layer."""
    return (
        window.col_off > 0
        and window.row_off > 0
        and window.col_off + window.width < layer.width
        and window.row_off + window.height < layer.height
    )


def offset(crs: str, transform: Affine, grid: Grid) -> tuple[int, int] | None:
    """Row and column of a grid's corner, where its pixels are those of the source; else None."""
    if crs != grid.crs:
        return None
    corner, right, below = (
        apply(~transform, *apply(grid.transform, *place)) for place in ((0, 0), (1, 0), (0, 1))
    )
    column, row = corner
    steps = (right[0] - column, right[1] - row, below[0] - column, below[1] - row)
    if not np.allclose(steps, (1, 0, 0, 1), rtol=0, atol=1e-6):
        return None
    if abs(column - round(column)) > 1e-6 or abs(row - round(row)) > 1e-6:
        return None
    return round(row), round(column)


def _scales(crs: str, transform: Affine, grid: Grid) -> dict[str, str]:
    """GDAL's options on how much wider its kernels are than a source pixel.

    By itself, GDAL takes the ratio of the bounds. For grids that are turned against each other it
    differs from that of the pixels, and from window to window.
    """
    column, row = grid.width / 2, grid.height / 2
    places = [apply(grid.transform, column + i, row + j) for i, j in ((0, 0), (1, 0), (0, 1))]
    xs, ys = zip(*places, strict=True)
    if crs != grid.crs:
        xs, ys = rasterio.warp.transform(
            rasterio.CRS.from_wkt(grid.crs), rasterio.CRS.from_wkt(crs), xs, ys
        )
    here, right, below = (apply(~transform, x, y) for x, y in zip(xs, ys, strict=True))
    scales = {}
    for name, there in (("XSCALE", right), ("YSCALE", below)):
        ratio = 1 / math.hypot(there[0] - here[0], there[1] - here[1])
        # Of nearly equal pixels, the kernel stays as it is.
        scales[name] = repr(ratio) if ratio < 0.9 else "1"
    return scales


def warp(
    pixels: np.ndarray,
    crs: str,
    transform: Affine,
    grid: Grid,
    kernel: Resampling,
    nodata: float | None,
) -> np.ndarray:
    """Pixels on another grid.

    Args:
      pixels: (K, h, w), of a dtype that GeoTIFF knows.
      crs: of the pixels, WKT.
      transform: of the pixels.
      grid: the wanted one.
      kernel: where the grid's pixels are larger than the source's, it is widened accordingly.
      nodata: the value of invalid pixels, which no kernel uses, and of pixels without a source. May
        be NaN. None if there are none of both, which is four times as fast.

    Returns:
      (K, H, W), of the dtype of `pixels`. Pixels of the same grid are copied.
    """
    place = offset(crs, transform, grid)
    if place is not None:
        out = np.full((len(pixels), grid.height, grid.width), nodata or 0, pixels.dtype)
        row, column = place
        height, width = pixels.shape[1:]
        rows = slice(max(row, 0), min(row + grid.height, height))
        columns = slice(max(column, 0), min(column + grid.width, width))
        if rows.start < rows.stop and columns.start < columns.stop:
            out[
                :,
                rows.start - row : rows.stop - row,
                columns.start - column : columns.stop - column,
            ] = pixels[:, rows, columns]
        return out
    count, height, width = pixels.shape
    marked = {} if nodata is None else {"nodata": nodata}
    with rasterio.io.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", height=height, width=width, count=count, dtype=pixels.dtype,
            crs=rasterio.CRS.from_wkt(crs), transform=transform, **marked,
        ) as file:  # fmt: skip
            file.write(pixels)
        with (
            memory.open() as file,
            rasterio.vrt.WarpedVRT(
                file,
                crs=rasterio.CRS.from_wkt(grid.crs),
                transform=Affine(*grid.transform),
                height=grid.height,
                width=grid.width,
                resampling=kernel,
                tolerance=_TOLERANCE,
                **marked,
                **_scales(crs, transform, grid),
            ) as warped,
        ):
            return warped.read()
