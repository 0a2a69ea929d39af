"""Rasters of any size that are read window by window: their bands, where they lie, their pixels.

A `Layer` is a band of a file. Its header is read once; processes open the file again where they
read. GeoTIFF, COG, VRT and JPEG 2000 are read, also inside of zip files.
"""

import dataclasses
import functools
import os
import re
import threading
import warnings
from collections.abc import Sequence

import numpy as np

# Before rasterio: it chooses the database of coordinate reference systems.
from data_prep.reading import proj  # noqa: F401 # isort: skip

import rasterio
import rasterio.enums
import rasterio.errors
import rasterio.io
import rasterio.transform
import rasterio.windows
from affine import Affine

from data_prep import errors
from data_prep.reading import bands, geotiff

# GDAL keeps decoded blocks of at most so many MB in each process. Without a limit it takes 5 % of
# the memory of the machine. A row of blocks of a Sentinel-2 scene takes 150 MB.
os.environ.setdefault("GDAL_CACHEMAX", "256")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One band of a file.

    Attributes:
      name: such as B2 or VV; empty where the file does not say.
      path: as GDAL opens it.
      index: of the band in the file, from 1.
      crs: WKT.
      transform: see `geotiff.Image`.
      height: in pixels.
      width: in pixels.
      dtype: of the pixels.
      scale: physical value = pixel * scale + offset.
      offset: see `scale`.
      description: of the band in the file.
    """

    name: str
    path: str
    index: int
    crs: str
    transform: tuple[float, ...]
    height: int
    width: int
    dtype: str
    scale: float = 1.0
    offset: float = 0.0
    description: str = ""

    @property
    def grid(self) -> tuple:
        """What layers share whose pixels lie at the same places."""
        return self.crs, self.transform, self.height, self.width

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, bottom, right and top, in the units of the CRS, whichever way the rows go."""
        x, y, other_x, other_y = rasterio.transform.array_bounds(
            self.height, self.width, Affine(*self.transform)
        )
        return min(x, other_x), min(y, other_y), max(x, other_x), max(y, other_y)

    @property
    def metres(self) -> float | None:
        """The side of a pixel in metres; None in a CRS without."""
        crs = rasterio.CRS.from_wkt(self.crs)
        return self.pixel_size * crs.linear_units_factor[1] if crs.is_projected else None

    @property
    def pixel_size(self) -> float:
        """The smaller side of a pixel, in the units of the CRS."""
        a, b, _, d, e, _ = self.transform
        return min(float(np.hypot(a, d)), float(np.hypot(b, e)))


def _open(path: str) -> rasterio.io.DatasetReader:
    """Opens a file for good, for the calling thread; the least used ones are closed."""
    return _open_for(path, threading.get_ident())


# GDAL's files must not be read by two threads at once.
@functools.lru_cache(maxsize=512)
def _open_for(path: str, thread: int) -> rasterio.io.DatasetReader:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path)


def layers(path: str) -> list[Layer]:
    """The bands of a file, without alpha bands.

    Names come from the descriptions of the bands, of a file of one band also from its name.

    Raises:
      errors.BadFileError: if it cannot be opened, has no CRS, or is in radar geometry.
    """
    try:
        file = _open(path)
    except geotiff.DAMAGE as error:
        raise errors.BadFileError(path, f"cannot be opened as a raster: {error}") from error
    if file.count > geotiff.MAX_BANDS:
        raise errors.BadFileError(
            path, f"has {file.count:,} bands, more than {geotiff.MAX_BANDS:,}"
        )
    if file.transform == Affine.identity() and file.gcps[0]:
        raise errors.BadFileError(
            path,
            "has ground control points and no grid, as Sentinel-1 GRD in radar geometry: correct "
            "the terrain first, for instance with SNAP",
        )
    crs = file.crs.to_wkt() if file.crs else ""
    if not crs or crs.startswith(("LOCAL_CS", "ENGCRS")) or file.transform == Affine.identity():
        raise errors.BadFileError(
            path,
            "does not say where it lies: give it a CRS and a transform, with gdal_edit or QGIS",
        )
    kept = [
        i
        for i in file.indexes
        if file.count == 1 or file.colorinterp[i - 1] != rasterio.enums.ColorInterp.alpha
    ]
    found = [
        Layer(
            bands.band_name(file.descriptions[i - 1] or ""),
            path,
            i,
            crs,
            tuple(file.transform[:6]),
            file.height,
            file.width,
            file.dtypes[i - 1],
            file.scales[i - 1],
            file.offsets[i - 1],
            file.descriptions[i - 1] or "",
        )
        for i in kept
    ]
    if len(found) == 1 and not found[0].name:
        name = re.sub(r"\.[^.]*$", "", path.rpartition("/")[2])
        return [dataclasses.replace(found[0], name=_name_in(name))]
    return found


def _name_in(file_name: str) -> str:
    """The band that a file name says last, as in T29UNU_20221005T115411_B04_10m."""
    for part in reversed(re.split(r"[^A-Za-z0-9]+", file_name)):
        if (name := bands.band_name(part)) not in ("", "B"):
            return name
    return ""


def read(
    group: Sequence[Layer],
    window: rasterio.windows.Window,
    size: tuple[int, int] | None = None,
) -> geotiff.Image:
    """The pixels of layers that share their grid.

    Args:
      group: of one grid, from one file or several.
      window: inside of the grid.
      size: height and width of a sample of the pixels, from overviews where there are any; None
        for all.

    Returns:
      Pixels (K, h, w) with the valid ones as the files mark them; see `geotiff.Image`. Rows and
      columns are as stored.

    Raises:
      errors.BadFileError: if a file cannot be read.
    """
    by_path: dict[str, list[int]] = {}
    for i, layer in enumerate(group):
        by_path.setdefault(layer.path, []).append(i)
    shape = (len(group), *(size or (int(window.height), int(window.width))))
    pixels = np.empty(shape, np.result_type(*(layer.dtype for layer in group)))
    valid = np.ones(shape, bool)
    for path, places in by_path.items():
        indexes = [group[i].index for i in places]
        try:
            file = _open(path)
            pixels[places] = file.read(indexes, window=window, out_shape=(len(indexes), *shape[1:]))
            if any(
                file.mask_flag_enums[i - 1] != [rasterio.enums.MaskFlags.all_valid] for i in indexes
            ):
                valid[places] = (
                    file.read_masks(indexes, window=window, out_shape=(len(indexes), *shape[1:]))
                    > 0
                )
        except geotiff.DAMAGE as error:
            raise errors.BadFileError(path, f"cannot be read: {error}") from error
    if np.issubdtype(pixels.dtype, np.floating):
        valid &= np.isfinite(pixels)
    a, b, c, d, e, f = group[0].transform
    column, row = window.col_off, window.row_off
    x, y = a * column + b * row + c, d * column + e * row + f
    # A sample has larger pixels.
    wide, high = window.width / shape[2], window.height / shape[1]
    transform = Affine(a * wide, b * high, x, d * wide, e * high, y)
    return geotiff.Image(
        pixels,
        valid,
        group[0].crs,
        transform,
        scales=tuple(layer.scale for layer in group),
        offsets=tuple(layer.offset for layer in group),
        descriptions=tuple(layer.name for layer in group),
        tags={},
    )
