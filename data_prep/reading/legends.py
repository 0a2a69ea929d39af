"""Legends from files: CSV, QGIS styles, and the colour tables of rasters."""

import csv
import io
import os
import pathlib
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterable

# Before rasterio: it chooses the database of coordinate reference systems.
from data_prep.reading import proj  # noqa: F401 # isort: skip

import rasterio
import rasterio.enums
import rasterio.errors
import rasterio.io
import rasterio.shutil
from etils import epath

from cromss_jax import presets
from cromss_jax.legend import Legend, LegendError
from data_prep import errors
from data_prep.reading import geotiff

_COLUMNS = ("value", "name", "colour")
# A QGIS style with 250 classes has 100 kB.
MAX_BYTES = 16 << 20
_RASTERS = (".tif", ".tiff", ".vrt", ".img")


def read_legend(given: str) -> Legend:
    """A preset by its name, or the legend of a file.

    Args:
      given: a name of `presets.LEGENDS`, or the path of a CSV file, a QGIS style (.qml) or a raster
        (.tif, .tiff, .vrt, .img).

    Raises:
      errors.BuildError: if there is no such legend, or it is wrong; one sentence.
    """
    if given in presets.LEGENDS:
        return presets.LEGENDS[given]
    known = f"a preset ({', '.join(presets.LEGENDS)}), a .csv file, a .qml file or a raster"
    suffix = pathlib.PurePath(given).suffix.lower()
    readers = {".csv": _read_csv, ".qml": _read_qml, **dict.fromkeys(_RASTERS, _read_raster)}
    if suffix not in readers:
        raise errors.BuildError(f"the legend {given} is not {known}")
    path = epath.Path(os.path.expanduser(given))
    if not path.is_file():
        raise errors.BuildError(f"the legend {given} does not exist: give {known}")
    if path.stat().length > MAX_BYTES and suffix not in _RASTERS:
        raise errors.BuildError(
            f"{given} has {path.stat().length:,} bytes, more than the {MAX_BYTES:,} that a legend "
            "may have"
        )
    try:
        return readers[suffix](path)
    except LegendError as error:
        raise errors.BuildError(f"{given}: {error}") from error


def _text(path: epath.Path) -> str:
    """The text of a file."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LegendError("the text is not in UTF-8: save the file in this encoding") from error


def _read_csv(path: epath.Path) -> Legend:
    """Rows `value,name,colour[,class]` below a header, separated by commas, semicolons or tabs.

    Rows with the same entry in `class` become one class. The entries are names of classes, or, all
    of them, the labels 0 to C - 1; a label's class has the name of its first row. Rows where the
    entry is empty are ignored. A class has the colour of its first row. Without the column, each
    row is a class.
    """
    lines = _text(path).splitlines()
    while lines and not lines[0].strip():
        del lines[0]
    header = lines[0] if lines else ""
    delimiter = max(",;\t", key=header.count)
    try:
        rows = list(csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter))
    except csv.Error as error:
        raise LegendError(f"it is damaged or no table ({error})") from error
    columns = [cell.strip().lower().replace("color", "colour") for cell in (rows or [[]])[0]]
    if any(columns.count(name) != 1 for name in _COLUMNS) or columns.count("class") > 1:
        raise LegendError(
            f"the first line is {header[:60]!r}: it names the columns, value,name,colour and, if "
            "several values become one class, class"
        )
    entries = []
    for number, row in enumerate(rows[1:], 2):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) != len(columns):
            raise LegendError(
                f"line {number} has {len(cells)} cells, the header {len(columns)}: put text that "
                f"holds {delimiter!r} in quotes"
            )
        found = dict(zip(columns, cells, strict=True))
        entries.append(
            (
                _whole(found["value"], f"line {number}"),
                found["name"],
                found["colour"].lower(),
                found.get("class"),
            )
        )
    return _legend(entries)


def _whole(text: str, where: str) -> int:
    """A source value from text."""
    if not re.fullmatch(r"[+-]?[0-9]{1,9}(\.0*)?", text):
        raise LegendError(
            f"the value {text[:40]!r} of {where} is not a whole number: write the code that label "
            "maps hold, one a row"
        )
    return int(float(text))


def _legend(entries: Iterable[tuple[int, str, str, str | None]]) -> Legend:
    """A legend from entries: source value, name, colour and class (None: the name).

    Raises:
      LegendError: if it is wrong.
    """
    entries = list(entries)
    names_of: dict[int, str] = {}
    for value, name, _, _ in entries:
        if value in names_of:
            raise LegendError(
                f"value {value} is in the legend twice, as {names_of[value]!r} and as {name!r}: "
                "keep one"
            )
        names_of[value] = name
    groups: dict[str, list[tuple[int, str, str, str | None]]] = {}
    ignored = []
    for entry in entries:
        if entry[3] == "":
            ignored.append(entry[0])
        else:
            groups.setdefault(str(entry[0]) if entry[3] is None else entry[3], []).append(entry)
    has_classes = any(entry[3] for entry in entries)
    names = [group[0][1] for group in groups.values()]
    if has_classes and all(re.fullmatch(r"-?[0-9]{1,9}", key) for key in groups):
        groups = {label: groups[label] for label in sorted(groups, key=int)}
        if [int(label) for label in groups] != list(range(len(groups))):
            raise LegendError(
                f"the labels in the column class are {', '.join(groups)}: they must be 0 to "
                f"{len(groups) - 1} without gaps, or names"
            )
        names = [group[0][1] for group in groups.values()]
    elif has_classes:
        names = list(groups)
    return Legend(
        names=tuple(names),
        colours=tuple(group[0][2] for group in groups.values()),
        values=tuple(tuple(entry[0] for entry in group) for group in groups.values()),
        ignored=tuple(ignored),
    )


def _read_qml(path: epath.Path) -> Legend:
    """The entries of a QGIS style with a palette, or with exact values; transparent is ignored."""
    try:
        root = ET.fromstring(_text(path))
    except ET.ParseError as error:
        raise LegendError(f"the QGIS style is not XML ({error}): save it again in QGIS") from error
    entries = root.findall(".//colorPalette/paletteEntry")
    if not entries:
        entries = root.findall(".//colorrampshader[@colorRampType='EXACT']/item")
    if not entries:
        raise LegendError(
            "the QGIS style has no classes: style the layer as paletted/unique values, and save it "
            "as .qml"
        )
    return _legend(
        (
            _whole(entry.get("value", ""), f"the QGIS entry {entry.get('label', '')!r}"),
            entry.get("label", "").strip(),
            entry.get("color", "").lower(),
            "" if entry.get("alpha") == "0" else None,
        )
        for entry in entries
    )


def _read_raster(path: epath.Path) -> Legend:
    """The colour table of a raster, with its category names or the names in its `legend` tag.

    Its nodata value and transparent colours are ignored.
    """
    try:
        with warnings.catch_warnings():
            # A colour table needs no place on the earth.
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            opened = rasterio.open(os.fspath(path))
        with opened as raster:
            if raster.count > geotiff.MAX_BANDS:
                raise LegendError(f"the raster has {raster.count:,} bands, a map has one")
            colours = _colour_table(raster)
            names = _category_names(raster) or _names_in_tag(raster.tags().get("legend", ""))
            nodata = raster.nodata
    except (*geotiff.DAMAGE, ET.ParseError) as error:
        said = " ".join(str(error).split())
        raise LegendError(f"the raster cannot be read ({said})") from error
    if not colours:
        raise LegendError("the raster has no colour table: write its legend as a CSV file")
    if not names:
        raise LegendError(
            "the raster has a colour table but no category names: write its legend as a CSV file"
        )
    missing = [value for value in names if value not in colours]
    if missing:
        raise LegendError(
            f"the raster names value {missing[0]} ({names[missing[0]]!r}), which its colour table "
            "does not have: write its legend as a CSV file"
        )
    hidden = {value for value in names if colours[value][3] == 0}
    if nodata is not None and float(nodata).is_integer():
        hidden.add(int(nodata))
    classes = {value: name for value, name in names.items() if value not in hidden}
    entries = [
        (value, name, "#" + bytes(colours[value][:3]).hex(), None)
        for value, name in classes.items()
    ]
    return _legend([*entries, *((value, "", "", "") for value in sorted(hidden))])


def _colour_table(raster: rasterio.io.DatasetReader) -> dict[int, tuple[int, int, int, int]]:
    """Red, green, blue and alpha of the first band's values; none if it has no table."""
    if raster.colorinterp[0] != rasterio.enums.ColorInterp.palette:
        return {}
    try:
        return raster.colormap(1)
    except ValueError:  # a damaged file says that it has one
        return {}


def _category_names(raster: rasterio.io.DatasetReader) -> dict[int, str]:
    """GDAL's category names of the first band by value. rasterio has them in no attribute."""
    with rasterio.io.MemoryFile(ext=".vrt") as file:
        rasterio.shutil.copy(raster, file.name, driver="VRT")
        root = ET.fromstring(file.read())
    names = root.findall("VRTRasterBand[@band='1']/CategoryNames/Category")
    return {
        value: name.text.strip() for value, name in enumerate(names) if (name.text or "").strip()
    }


def _names_in_tag(text: str) -> dict[int, str]:
    """The names in ESA WorldCover's tag: lines of a value and its name."""
    lines = re.findall(r"(?m)^\s*([0-9]{1,9})[ \t:=,]+(\S.*)$", text)
    return {int(value): name.strip() for value, name in lines}
