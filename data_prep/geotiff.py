"""Reads and writes GeoTIFFs. Incomplete files are refused."""

import contextlib
import dataclasses
import logging
import os
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import rasterio
import rasterio.enums
import rasterio.errors
import rasterio.io
from affine import Affine

# GDAL's messages about damaged files are raised here as errors.
logging.getLogger("rasterio").setLevel(logging.CRITICAL)

# Bytes of one value of each TIFF field type.
_FIELD_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
    16: 8, 17: 8, 18: 8,
}  # fmt: skip


class GeotiffError(ValueError):
    """A file that is no GeoTIFF, is incomplete, or has another number of bands than needed."""


@dataclasses.dataclass(frozen=True)
class Band:
    """One band as stored.

    Attributes:
      pixels: (H, W), of the file's dtype.
      crs: coordinate reference system as WKT; empty if the file names none.
      transform: (a, b, c, d, e, f): x = a * column + b * row + c, y = d * column + e * row + f,
        in the units of `crs`. The identity if the file has none.
    """

    pixels: np.ndarray
    crs: str
    transform: Affine


@dataclasses.dataclass(frozen=True)
class Bands:
    """All bands of a file as stored: like `Band`, with pixels (K, H, W)."""

    pixels: np.ndarray
    crs: str
    transform: Affine


def read_band(data: bytes) -> Band:
    """Reads the one band of a GeoTIFF.

    Args:
      data: the whole file. Reading from memory takes no longer than from a path, and works for
        files in an archive, too.

    Raises:
      GeotiffError: if the file is no GeoTIFF, is cut short, or has more than one band.
    """
    bands = read_bands(data)
    if len(bands.pixels) != 1:
        raise GeotiffError(f"has {len(bands.pixels)} bands, one is needed")
    return Band(bands.pixels[0], bands.crs, bands.transform)


def read_bands(data: bytes) -> Bands:
    """Reads all bands of a GeoTIFF, stored pixel by pixel or band by band.

    Args:
      data: the whole file.

    Raises:
      GeotiffError: if the file is no GeoTIFF, or is cut short.
    """
    with _open(data) as dataset:
        _check_blocks(dataset)
        crs = dataset.crs.to_wkt() if dataset.crs else ""
        bands = Bands(dataset.read(), crs, dataset.transform)
        _check_tags(data)
    return bands


def read_size(data: bytes) -> tuple[int, int]:
    """Height and width of a GeoTIFF, from its header alone.

    Args:
      data: the whole file.

    Raises:
      GeotiffError: if the file is no GeoTIFF, or its header is cut short.
    """
    with _open(data) as dataset:
        return dataset.height, dataset.width


def write(
    path: str | os.PathLike, pixels: np.ndarray, crs: str, transform: Affine, **options: str
) -> None:
    """Writes a GeoTIFF.

    Args:
      path: where; its folder exists.
      pixels: (K, H, W), of any dtype that GeoTIFF knows.
      crs: coordinate reference system, such as "EPSG:32632".
      transform: see `Band`.
      **options: GDAL's creation options, such as compress="deflate".

    Raises:
      OSError: if the file cannot be written.
    """
    count, height, width = pixels.shape
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=count, dtype=pixels.dtype,
        crs=rasterio.CRS.from_string(crs), transform=transform, **options,
    ) as file:  # fmt: skip
        file.write(pixels)


@contextlib.contextmanager
def _open(data: bytes) -> Iterator[rasterio.io.DatasetReader]:
    """Opens a file in memory. Damage that GDAL finds is raised as GeotiffError."""
    if not data:
        raise GeotiffError("empty file")
    try:
        with (
            # Otherwise GDAL looks for side-car files beside every tile.
            rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"),
            warnings.catch_warnings(),
            rasterio.io.MemoryFile(data) as memory,
        ):
            # Training does not need a georeference.
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with memory.open(driver="GTiff") as dataset:
                yield dataset
    except (rasterio.errors.RasterioError, struct.error) as error:
        raise GeotiffError("no GeoTIFF, or cut short") from error


def _check_blocks(dataset: rasterio.io.DatasetReader) -> None:
    """Refuses a file with blocks that were never written: GDAL would read them as zeros."""
    height, width = dataset.block_shapes[0]
    # With pixel interleaving, all bands share their blocks.
    shared = dataset.interleaving == rasterio.enums.Interleaving.pixel
    for band in [1] if shared else dataset.indexes:
        for row in range(-(-dataset.height // height)):
            for column in range(-(-dataset.width // width)):
                offset = f"BLOCK_OFFSET_{column}_{row}"
                if dataset.get_tag_item(offset, "TIFF", bidx=band) is None:
                    raise GeotiffError(
                        f"cut short, or sparse: no pixels stored at row {row * height}"
                    )


def _check_tags(data: bytes) -> None:
    """Refuses a file with tags whose values are past its end.

    GDAL reads such tags, including the georeference and the table of blocks, as absent or zero.
    """
    order = "<" if data[:2] == b"II" else ">"
    big_tiff = struct.unpack_from(order + "H", data, 2)[0] == 43
    start = struct.unpack_from(order + ("Q" if big_tiff else "I"), data, 8 if big_tiff else 4)[0]
    count_format, entry_format = ("Q", "HHQQ") if big_tiff else ("H", "HHII")
    inline_bytes = 8 if big_tiff else 4
    (entries,) = struct.unpack_from(order + count_format, data, start)
    start += struct.calcsize(order + count_format)
    for _ in range(entries):
        tag, field_type, count, offset = struct.unpack_from(order + entry_format, data, start)
        start += struct.calcsize(order + entry_format)
        size = count * _FIELD_BYTES.get(field_type, 1)
        if size > inline_bytes and offset + size > len(data):
            raise GeotiffError(f"cut short: tag {tag} ends past the end of the file")
