"""Writes layers of a map as cloud-optimised GeoTIFFs that GIS programs open with their legend."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from xml.sax.saxutils import escape

import numpy as np
import rasterio
import rasterio._err
import rasterio.errors
import rasterio.shutil
from rasterio.windows import Window

from cromss_jax.mapping import styles
from cromss_jax.mapping.blending import NODATA
from cromss_jax.mapping.styles import Entry

# GDAL keeps decoded blocks of so many MB, where by default it takes 5 % of the machine's memory.
CACHE_MB = 256
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a layer's file says besides its pixels.

    Attributes:
      name: of the file, without its suffix.
      bands: descriptions of its bands.
      entries: of the legend. They are the classes, or stops of a colour ramp.
      is_classes: which of the two. Overviews show the most frequent class, or the mean.
      unit: of the pixels; empty for classes.
    """

    name: str
    bands: tuple[str, ...]
    entries: tuple[Entry, ...]
    is_classes: bool
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where a map lies.

    Attributes:
      height: in pixels.
      width: in pixels.
      crs: WKT, empty if unknown.
      transform: the six numbers of rasterio's Affine.
    """

    height: int
    width: int
    crs: str
    transform: Sequence[float]

    def window(self, row: int, column: int, height: int, width: int) -> "Grid":
        """The grid of a part, or of more, of these pixels."""
        a, b, c, d, e, f = self.transform
        moved = (a, b, c + a * column + b * row, d, e, f + d * column + e * row)
        return Grid(height, width, self.crs, moved)

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Columns and rows [N, 2] of points [N, 2] in the reference system."""
        a, b, c, d, e, f = self.transform
        return np.linalg.solve([[a, b], [d, e]], (points - [c, f]).T).T


def write(raw: pathlib.Path, layer: Layer, grid: Grid, folder: pathlib.Path) -> pathlib.Path:
    """Writes a layer with its side-cars `.tif.aux.xml` (names of the classes) and `.qml` (QGIS).

    A file has its final name when it is whole, and the `.tif` gets it last.

    Args:
      raw: its pixels, uint8, row by row and band by band.
      layer: what else the file says.
      grid: where it lies.
      folder: to write to, on the same disk as `raw`, in whose folder the file is prepared.

    Returns:
      The path of the `.tif`.

    Raises:
      OSError: if GDAL cannot write it, as on a full disk.
    """
    source, unfinished = raw.with_suffix(".vrt"), raw.with_suffix(".tif")
    side_car = unfinished.with_name(f"{unfinished.name}.aux.xml")
    for left_over in (unfinished, side_car):
        left_over.unlink(missing_ok=True)
    source.write_text(_vrt(raw, layer, grid))
    final = folder / f"{layer.name}.tif"
    try:
        with rasterio.Env(GDAL_CACHEMAX=CACHE_MB):
            rasterio.shutil.copy(
                source,
                unfinished,
                driver="COG",
                COMPRESS="DEFLATE",
                BLOCKSIZE=str(_BLOCK),
                OVERVIEW_RESAMPLING="MODE" if layer.is_classes else "AVERAGE",
                NUM_THREADS="ALL_CPUS",
                BIGTIFF="IF_SAFER",
            )
        with rasterio.open(unfinished) as file:  # its last block: closing tells no error
            file.read(window=Window(grid.width - 1, grid.height - 1, 1, 1))
    # GDAL's own errors come through `copy` as they are.
    except (rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError) as error:
        raise OSError(f"{final} cannot be written: {error}") from error
    style = unfinished.with_suffix(".qml")
    style.write_text(styles.qml(layer.entries, is_classes=layer.is_classes))
    style.replace(final.with_suffix(".qml"))
    if side_car.exists():
        side_car.replace(final.with_name(f"{final.name}.aux.xml"))
    os.replace(unfinished, final)
    return final


def _vrt(raw: pathlib.Path, layer: Layer, grid: Grid) -> str:
    """A virtual file in GDAL's XML that gives raw pixels their description."""
    a, b, c, d, e, f = grid.transform
    lines = [f'<VRTDataset rasterXSize="{grid.width}" rasterYSize="{grid.height}">']
    if grid.crs:
        lines.append(f'<SRS dataAxisToSRSAxisMapping="1,2">{escape(grid.crs)}</SRS>')
    lines.append(f"<GeoTransform>{c!r}, {a!r}, {b!r}, {f!r}, {d!r}, {e!r}</GeoTransform>")
    if layer.is_classes:
        tags = "".join(
            f'<MDI key="class_{entry.value}">{escape(entry.label)}</MDI>' for entry in layer.entries
        )
        lines.append(f"<Metadata>{tags}</Metadata>")
    size = grid.height * grid.width
    for i, name in enumerate(layer.bands):
        lines += [
            f'<VRTRasterBand dataType="Byte" band="{i + 1}" subClass="VRTRawRasterBand">',
            f"<Description>{escape(name)}</Description>",
            f"<UnitType>{escape(layer.unit)}</UnitType>" if layer.unit else "",
            f"<NoDataValue>{NODATA}</NoDataValue>",
            _classes(layer.entries) if layer.is_classes else "",
            f'<SourceFilename relativeToVRT="1">{escape(raw.name)}</SourceFilename>',
            f"<ImageOffset>{i * size}</ImageOffset><PixelOffset>1</PixelOffset>",
            f"<LineOffset>{grid.width}</LineOffset></VRTRasterBand>",
        ]
    return "\n".join([*lines, "</VRTDataset>\n"])


def _classes(entries: Sequence[Entry]) -> str:
    """Colour table and names of the classes, whose values are 0, 1, 2, ..."""
    names = "".join(f"<Category>{escape(entry.label)}</Category>" for entry in entries)
    rgb = [bytes.fromhex(entry.colour[1:]) for entry in entries]
    colours = "".join(f'<Entry c1="{r}" c2="{g}" c3="{b}" c4="255"/>' for r, g, b in rgb)
    return (
        "<ColorInterp>Palette</ColorInterp>"
        f"<ColorTable>{colours}</ColorTable><CategoryNames>{names}</CategoryNames>"
    )
