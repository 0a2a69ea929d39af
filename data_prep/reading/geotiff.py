"""Reads and writes GeoTIFFs. Incomplete files are refused."""

import contextlib
import dataclasses
import logging
import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

# Before rasterio: it chooses the database of coordinate reference systems.
from data_prep.reading import proj  # noqa: F401 # isort: skip

import rasterio
import rasterio._err  # GDAL's errors, which rasterio passes on in places
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

# All pixels of a file: a whole scene at 10 m in four bands of uint16 has 0.96 GB.
MAX_PIXEL_BYTES = 1 << 30

# Hyperspectral sensors have some hundreds.
MAX_BANDS = 1000

# A whole scene at 10 m in four bands and the smallest blocks, 16 x 16, has 1.9 million.
MAX_BLOCKS = 2 << 20

# Of an alpha band. Software also calls the second of two label bands one.
_ALPHA_VALUES = (0, 255, 65535)
# The mask of a band is the alpha band of its file.
_ALPHA_FLAGS = [rasterio.enums.MaskFlags.per_dataset, rasterio.enums.MaskFlags.alpha]

# What rasterio raises for damaged files: its own errors, those of GDAL, and what Python says of a
# reference system that is no text.
DAMAGE = (rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError, UnicodeDecodeError)


class GeotiffError(ValueError):
    """A file that is no GeoTIFF, is incomplete, or has another number of bands than needed."""


@dataclasses.dataclass(frozen=True)
class Image:
    """Bands of a file, rows from north to south and columns from west to east.

    Attributes:
      pixels: (K, H, W), of the file's dtype.
      valid: (K, H, W) bool, False where the file's nodata tag, mask or alpha band says so, and for
        NaN and infinity; None if all pixels are valid.
      crs: coordinate reference system as WKT; empty if the file names none.
      transform: (a, b, c, d, e, f): x = a * column + b * row + c, y = d * column + e * row + f,
        in the units of `crs`. The identity if the file has none.
      scales: of each band; physical value = pixel * scale + offset.
      offsets: of each band.
      descriptions: names of the bands; empty where the file has none.
      tags: metadata of the file.
      is_turned: whether the file stores its rows from south to north, or columns east to west.
    """

    pixels: np.ndarray
    valid: np.ndarray | None
    crs: str
    transform: Affine
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    descriptions: tuple[str, ...]
    tags: Mapping[str, str]
    is_turned: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[1:]

    @property
    def is_georeferenced(self) -> bool:
        """Whether the file says where it is."""
        return bool(self.crs) and self.transform != Affine.identity()

    def bands(self, indexes: Sequence[int]) -> "Image":
        """Some of the bands, in the given order."""
        return dataclasses.replace(
            self,
            pixels=self.pixels[list(indexes)],
            valid=None if self.valid is None else self.valid[list(indexes)],
            scales=tuple(self.scales[i] for i in indexes),
            offsets=tuple(self.offsets[i] for i in indexes),
            descriptions=tuple(self.descriptions[i] for i in indexes),
        )

    def window(self, height: int, width: int) -> "Image":
        """The upper left part of that many pixels."""
        return dataclasses.replace(
            self,
            pixels=self.pixels[:, :height, :width],
            valid=None if self.valid is None else self.valid[:, :height, :width],
        )


def read_band(data: bytes) -> Image:
    """Reads the one band of a GeoTIFF; an alpha band is its mask and does not count.

    Args:
      data: the whole file. Reading from memory takes no longer than from a path, and works for
        files in an archive, too.

    Raises:
      GeotiffError: if the file is no GeoTIFF, is cut short, or has more than one band.
    """
    image = read_bands(data)
    if len(image.pixels) != 1:
        raise GeotiffError(f"has {len(image.pixels)} bands, one is needed")
    return image


def read_bands(data: bytes) -> Image:
    """Reads all bands of a GeoTIFF, stored pixel by pixel or band by band.

    Args:
      data: the whole file.

    Raises:
      GeotiffError: if the file is no GeoTIFF, is cut short, or is in radar geometry.
    """
    with _open(data) as dataset:
        _check_pixels(dataset)
        _check_blocks(dataset)
        if dataset.transform == Affine.identity() and dataset.gcps[0]:
            raise GeotiffError(
                "has ground control points and no grid, as Sentinel-1 GRD in radar geometry: "
                "correct the terrain first, for instance with SNAP"
            )
        # Before anything else is asked of the file: this finds out whether it is whole.
        pixels = dataset.read()
        is_alpha = [
            c == rasterio.enums.ColorInterp.alpha and np.isin(band, _ALPHA_VALUES).all()
            for c, band in zip(dataset.colorinterp, pixels, strict=True)
        ]
        indexes = [i for i in dataset.indexes if not is_alpha[i - 1]]
        opaque = (pixels[is_alpha] > 0).all(axis=0) if any(is_alpha) else None
        if opaque is not None:
            pixels = pixels[np.logical_not(is_alpha)]
        crs = dataset.crs.to_wkt() if dataset.crs else ""
        if crs.startswith(("LOCAL_CS", "ENGCRS")):
            crs = ""
        scales, offsets, names = dataset.scales, dataset.offsets, dataset.descriptions
        image = Image(
            pixels,
            _valid_pixels(dataset, indexes, pixels, opaque),
            crs,
            dataset.transform,
            scales=tuple(scales[i - 1] for i in indexes),
            offsets=tuple(offsets[i - 1] for i in indexes),
            descriptions=tuple(names[i - 1] or "" for i in indexes),
            tags=dataset.tags(),
        )
        _check_tags(data)
    return _turn_north_up(image)


def _valid_pixels(
    dataset: rasterio.io.DatasetReader,
    indexes: Sequence[int],
    pixels: np.ndarray,
    opaque: np.ndarray | None,
) -> np.ndarray | None:
    """The valid pixels (K, H, W) by the file's tags, masks and alpha band; None if all are."""
    # GDAL itself uses alpha bands of integers only, and those that hold something else, too.
    valid = None if opaque is None else np.broadcast_to(opaque, pixels.shape)
    not_masks = ([rasterio.enums.MaskFlags.all_valid], _ALPHA_FLAGS)
    flags = dataset.mask_flag_enums
    if any(flags[i - 1] not in not_masks for i in indexes):
        masks = dataset.read_masks(indexes) > 0
        valid = masks if valid is None else valid & masks
    if np.issubdtype(pixels.dtype, np.floating):
        finite = np.isfinite(pixels)
        valid = finite if valid is None else valid & finite
    return None if valid is None or valid.all() else valid


def _turn_north_up(image: Image) -> Image:
    """Turns an image whose rows go from south to north, or whose columns go from east to west."""
    if image.transform == Affine.identity():
        return image
    a, b, c, d, e, f = image.transform[:6]
    height, width = image.size
    rows = slice(None, None, -1) if e > 0 else slice(None)
    columns = slice(None, None, -1) if a < 0 else slice(None)
    if e > 0:
        b, c, e, f = -b, c + b * height, -e, f + e * height
    if a < 0:
        a, c, d, f = -a, c + a * width, -d, f + d * width
    transform = Affine(a, b, c, d, e, f)
    if transform == image.transform:
        return image
    return dataclasses.replace(
        image,
        pixels=np.ascontiguousarray(image.pixels[:, rows, columns]),
        valid=None if image.valid is None else image.valid[:, rows, columns],
        transform=transform,
        is_turned=True,
    )


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
      transform: see `Image`.
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
    except (*DAMAGE, struct.error) as error:
        raise GeotiffError("no GeoTIFF, or cut short") from error


def _check_pixels(dataset: rasterio.io.DatasetReader) -> None:
    """Refuses a file that declares more than memory and time should be given to."""
    if dataset.count > MAX_BANDS:
        raise GeotiffError(f"has {dataset.count:,} bands, more than {MAX_BANDS:,}")
    # One of GDAL's dtypes is none of NumPy's.
    sizes = [
        4 if dtype == "complex_int16" else np.dtype(dtype).itemsize for dtype in dataset.dtypes
    ]
    item_size = max(sizes)
    size = dataset.count * dataset.height * dataset.width * item_size
    if size > MAX_PIXEL_BYTES:
        raise GeotiffError(
            f"declares {dataset.width} x {dataset.height} pixels in {dataset.count} bands, "
            f"{size:,} bytes, more than the {MAX_PIXEL_BYTES:,} that a file may have: cut it into "
            "tiles"
        )


def _check_blocks(dataset: rasterio.io.DatasetReader) -> None:
    """Refuses a file with blocks that were never written: GDAL would read them as zeros."""
    height, width = dataset.block_shapes[0]
    count = dataset.count * -(-dataset.height // height) * -(-dataset.width // width)
    if count > MAX_BLOCKS:
        raise GeotiffError(
            f"has {count:,} blocks, more than the {MAX_BLOCKS:,} that a file may have: write it "
            "with larger ones"
        )
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
