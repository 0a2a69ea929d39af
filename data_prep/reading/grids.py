"""Compares the grids of images and labels of a location."""

import functools

import numpy as np

# Before rasterio: it chooses the database of coordinate reference systems.
from data_prep.reading import proj  # noqa: F401 # isort: skip

import rasterio
import rasterio.errors
import rasterio.warp
from affine import Affine

from data_prep import errors
from data_prep.reading import geotiff
from data_prep.report import Finding

# In pixels of 10 m. Sentinel-1 and -2 of SSL4EO-S12 are up to 5 apart, which is known; bands of 60
# m may be a pixel of theirs larger.
MAX_SHIFT = 8.0
_WGS84 = rasterio.CRS.from_epsg(4326)


def compare(
    reference: geotiff.Image, path: str, image: geotiff.Image, reference_path: str
) -> tuple[Finding, ...]:
    """Checks that an image lies where the reference does.

    Args:
      reference: with pixels of 10 m.
      path: of the image, for errors.
      image: of any resolution.
      reference_path: for errors.

    Returns:
      A finding if the grids differ, or cannot be compared.

    Raises:
      errors.BadFileError: if a corner is further than `MAX_SHIFT` from that of the reference.
    """
    if not (reference.is_georeferenced and image.is_georeferenced):
        missing = path if reference.is_georeferenced else reference_path
        return (Finding("not georeferenced", missing, "no coordinates, or no known CRS"),)
    if reference.crs == image.crs and reference.transform == image.transform:
        return ()
    corners = _corners(image)
    if reference.crs != image.crs:
        corners = _reproject(path, corners, image.crs, reference.crs)
    expected = _corners(reference)
    columns, rows = _to_pixels(reference, corners)
    expected_columns, expected_rows = _to_pixels(reference, expected)
    shift = max(np.abs(columns - expected_columns).max(), np.abs(rows - expected_rows).max())
    if not shift <= MAX_SHIFT:
        raise errors.BadFileError(
            path,
            f"is {_distance(shift)} off {reference_path.rpartition('/')[2]} "
            f"({_name(image.crs)} and {_name(reference.crs)}), at most {MAX_SHIFT:g} pixels are "
            "accepted: bring both to one grid, for instance with gdalwarp",
        )
    # Half a pixel of the image comes from rounding: those of SSL4EO-S12 at 60 m are 25 m off.
    if shift <= 0.5 * max(1, reference.size[0] / image.size[0]):
        return ()
    return (Finding("grids shifted", path, f"{shift:.1f} pixels of 10 m"),)


def degrees(crs: str, x: float, y: float) -> tuple[float, float]:
    """Longitude and latitude of a place in a CRS, given as WKT."""
    (longitude,), (latitude,) = rasterio.warp.transform(_parsed(crs), _WGS84, [x], [y])
    return longitude, latitude


@functools.lru_cache(maxsize=256)
def _parsed(crs: str) -> rasterio.CRS:
    return rasterio.CRS.from_wkt(crs)


def _corners(image: geotiff.Image) -> np.ndarray:
    """Coordinates (4, 2) of the outer corners."""
    height, width = image.size
    columns, rows = np.array([(0, 0), (width, 0), (0, height), (width, height)]).T
    return np.stack(_apply(image.transform, columns, rows), axis=-1)


def _to_pixels(image: geotiff.Image, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows of points (N, 2)."""
    return _apply(~image.transform, points[:, 0], points[:, 1])


def _apply(transform: Affine, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b, c, d, e, f = transform[:6]
    return a * x + b * y + c, d * x + e * y + f


def _reproject(path: str, points: np.ndarray, crs: str, to_crs: str) -> np.ndarray:
    """Transforms points (N, 2) to another CRS.

    Raises:
      errors.BadFileError: if there is no transformation.
    """
    try:
        x, y = rasterio.warp.transform(
            rasterio.CRS.from_wkt(crs), rasterio.CRS.from_wkt(to_crs), points[:, 0], points[:, 1]
        )
    except rasterio.errors.RasterioError as error:
        raise errors.BadFileError(path, f"its CRS {_name(crs)} cannot be used: {error}") from error
    return np.stack([x, y], axis=-1)


def _distance(pixels: float) -> str:
    if not np.isfinite(pixels):
        return "far"
    return f"{pixels / 100:.1f} km" if pixels > 100 else f"{pixels:.0f} pixels of 10 m"


def _name(crs: str) -> str:
    code = rasterio.CRS.from_wkt(crs).to_epsg()
    return f"EPSG:{code}" if code else crs.split('"')[1]
