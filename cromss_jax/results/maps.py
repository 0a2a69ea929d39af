"""Predicted class maps as georeferenced GeoTIFFs in the legend's colours."""

from collections.abc import Sequence

import numpy as np
import rasterio
import rasterio.io
from etils import epath

from cromss_jax import files, sensors
from cromss_jax.legend import Legend


def write_map(
    path: epath.Path,
    classes: np.ndarray,
    crs: str,
    transform: Sequence[float],
    legend: Legend,
) -> None:
    """Writes a class map as a GeoTIFF. A killed process leaves no partial file.

    Args:
      path: file name that ends in `.tif`.
      classes: [H, W] uint8, indices into `legend`; 255 means no data.
      crs: coordinate reference system as WKT; empty if unknown.
      transform: the six numbers of rasterio's Affine, which maps pixels to coordinates.
      legend: names and colours, stored in the file's tags and colour table.
    """
    with rasterio.io.MemoryFile() as memory:
        _write(memory, classes, crs, transform, legend)
        files.write_whole(path, bytes(memory.getbuffer()))


def _write(
    memory: rasterio.io.MemoryFile,
    classes: np.ndarray,
    crs: str,
    transform: Sequence[float],
    legend: Legend,
) -> None:
    height, width = classes.shape
    with memory.open(
        driver="GTiff",
        height=height,
        width=width,
        count=1,
        dtype="uint8",
        nodata=sensors.IGNORE_LABEL,
        crs=rasterio.CRS.from_wkt(crs) if crs else None,
        transform=rasterio.Affine(*transform),
        compress="deflate",
    ) as file:
        file.write(classes, 1)
        colours = {i: (*rgb, 255) for i, rgb in enumerate(legend.colours_rgb().tolist())}
        file.write_colormap(1, colours)
        file.update_tags(**{f"class_{i}": name for i, name in enumerate(legend.names)})
