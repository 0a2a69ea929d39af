"""Vector files: polygons that users bring, and GeoPackages that are whole when they appear."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import pyogrio
import rasterio.warp
import shapely

from cromss_jax.errors import UserError

_POLYGONS = ("Polygon", "MultiPolygon")
# Columns that every GeoPackage has for itself, and what a file's own are called in it.
_TAKEN = {"fid": "source_fid", "geom": "source_geom"}


class VectorError(UserError):
    """A vector file that cannot be used. The message is for the user."""


@dataclasses.dataclass(frozen=True)
class Polygons:
    """Polygons with a table.

    Attributes:
      shapes: [N] shapely geometries; None for rows without one.
      fields: [N] each, by the name of the column.
      crs: as "EPSG:32632" or WKT.
    """

    shapes: np.ndarray
    fields: Mapping[str, np.ndarray]
    crs: str

    def in_crs(self, crs: str) -> np.ndarray:
        """The geometries in another reference system, [N]."""
        return reproject(self.shapes, self.crs, crs)


def reproject(shapes: np.ndarray, source: str, target: str) -> np.ndarray:
    """Geometries [N] from one reference system in another; None stays None."""
    source, target = (rasterio.CRS.from_string(text) for text in (source, target))
    if source == target:
        return shapes

    def move(points: np.ndarray) -> np.ndarray:
        return np.stack(rasterio.warp.transform(source, target, *points.T), axis=1)

    return shapely.transform(shapes, move)


def read(path: str) -> Polygons:
    """Reads polygons from what GDAL knows: GeoPackage, shapefile, GeoJSON and others.

    Raises:
      VectorError: if the file cannot be read, holds no polygons, or has no reference system.
    """
    try:
        meta, _, geometry, values = pyogrio.raw.read(path, force_2d=True)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
        raise VectorError(
            f"{path} cannot be read as polygons ({error}): give a GeoPackage, shapefile or GeoJSON"
        ) from error
    if geometry is None or not len(geometry):
        raise VectorError(f"{path} holds no polygons: give a file with at least one")
    shapes = shapely.from_wkb(geometry)
    for number, shape in enumerate(shapes):
        if shape is not None and shape.geom_type not in _POLYGONS:
            raise VectorError(
                f"{path} holds a {shape.geom_type} as feature {number + 1}: polygons are needed"
            )
    if not meta["crs"]:
        raise VectorError(f"{path} does not say its reference system: set it, as by ogr2ogr -a_srs")
    names = [_TAKEN.get(name.lower(), name) for name in meta["fields"]]
    return Polygons(shapes, dict(zip(names, values, strict=True)), meta["crs"])


def write(path: pathlib.Path, found: Polygons, kind: str) -> None:
    """Writes a GeoPackage with one layer, called like the file; it appears when it is whole.

    Args:
      path: of the file.
      found: what it holds.
      kind: "Polygon", or "Unknown" for a mixture with multipolygons.

    Raises:
      VectorError: if GDAL cannot write it.
    """
    unfinished = path.with_name(f"{path.stem}.unfinished{path.suffix}")
    unfinished.unlink(missing_ok=True)
    try:
        pyogrio.raw.write(
            unfinished,
            np.array([shapely.to_wkb(shape) for shape in found.shapes], object),
            list(found.fields.values()),
            list(found.fields),
            geometry_type=kind,
            crs=found.crs,
            driver="GPKG",
            layer=path.stem,
        )
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
        raise VectorError(f"{path} cannot be written: {error}") from error
    os.replace(unfinished, path)
