"""A scene of the sample world on disk: 13 bands of Sentinel-2 and two of Sentinel-1."""

import dataclasses
import pathlib

import numpy as np
import rasterio
from affine import Affine

from cromss_jax import sensors
from data_prep.sample import world


@dataclasses.dataclass
class SceneFiles:
    """A scene, and a folder for its files.

    Attributes:
      folder: for the files.
      location: what it shows.
      s1: (2, T, T) dB.
      s2: (13, T, T) reflectance * 10000.
      grid: CRS and transform, as rasterio takes them.
    """

    folder: pathlib.Path
    location: world.Location
    s1: np.ndarray
    s2: np.ndarray
    grid: dict

    def write(self, name, pixels, names=(), **changes) -> pathlib.Path:
        """Writes (K, H, W) pixels with names of bands as a GeoTIFF on the scene's grid."""
        path = self.folder / name
        options = {"driver": "GTiff", "count": len(pixels), "dtype": pixels.dtype, **self.grid}
        options |= {"height": pixels.shape[1], "width": pixels.shape[2], **changes}
        with rasterio.open(path, "w", **options) as file:
            file.write(pixels)
            for i, band in enumerate(names):
                file.set_band_description(i + 1, band)
        return path

    def moved(self, rows, columns) -> Affine:
        """The transform of a grid that begins further down and to the right."""
        a, b, c, d, e, f = self.grid["transform"][:6]
        return Affine(a, b, c + 10 * columns, d, e, f - 10 * rows)


def make(folder: pathlib.Path, size: int) -> SceneFiles:
    """A scene of size x size pixels of 10 m; nothing is written yet."""
    location = world.make_location(0, 0, 1, size)
    s2 = np.zeros((13, size, size), np.uint16)
    for metres, names in sensors.S2_BANDS_BY_RESOLUTION.items():
        for i, name in enumerate(names):
            factor = metres // 10
            pixels = location.s2(metres)[0, ..., i].repeat(factor, 0).repeat(factor, 1)
            s2[sensors.S2_BANDS.index(name)] = pixels
    easting, northing = location.origin
    grid = {
        "crs": f"EPSG:{location.epsg}",
        "transform": Affine(10, 0, easting, 0, -10, northing),
    }
    return SceneFiles(folder, location, np.moveaxis(location.s1[0], -1, 0), s2, grid)
