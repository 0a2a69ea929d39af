"""Predicted maps as GeoTIFFs: classes where they lie on the Earth, in their usual colours."""

from collections.abc import Sequence

import numpy as np
import rasterio
import rasterio.io
from etils import epath

from cromss_jax import files, sensors


def write_map(
    path: epath.Path,
    classes: np.ndarray,
    crs: str,
    transform: Sequence[float],
    legend: sensors.Legend,
) -> None:
    """Writes a class map, whole or not at all.

    Args:
      path: ends in `.tif`.
      classes: [H, W] uint8, indices into `legend`; 255 is written as no data.
      crs: coordinate reference system as WKT; empty if it is not known.
      transform: the six numbers of rasterio's Affine, pixels to coordinates.
      legend: names and colours, kept in the file's colour table and tags.
    """
    with rasterio.io.MemoryFile() as memory:
        _write(memory, classes, crs, transform, legend)
        files.write_whole(path, bytes(memory.getbuffer()))


def _write(
    memory: rasterio.io.MemoryFile,
    classes: np.ndarray,
    crs: str,
    transform: Sequence[float],
    legend: sensors.Legend,
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
        # "#rrggbb" each
        colours = {i: (*bytes.fromhex(c[1:]), 255) for i, c in enumerate(legend.values())}
        file.write_colormap(1, colours)
        file.update_tags(**{f"class_{i}": name for i, name in enumerate(legend)})
