"""The table of scenes: which files each acquisition has, and which of their bands are needed.

A CSV file with one row an acquisition and the columns `scene,date,s2,s1,labels[,truth][,mask]`.
Rows with the same scene are its dates. Files are paths or patterns (`*`, `?`, `**`), relative to
the folder of the table, several separated by `;`.
"""

import csv
import dataclasses
import datetime
import glob
import io
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from cromss_jax import sensors
from data_prep import errors
from data_prep.options import Options
from data_prep.reading import rasters, safe
from data_prep.reading.rasters import Layer

REQUIRED = ("scene", "date", "labels")
COLUMNS = ("scene", "date", "s2", "s1", "labels", "truth", "mask")
# Of Sentinel-1A's launch.
_FIRST_DATE = datetime.datetime(2014, 4, 3)
# Layers that share their grid and dtype.
Group = tuple[Layer, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      line: in the file.
      scene: name of the scene.
      date: of the acquisition.
      files: by column, the files that its cell names; empty where the cell is.
    """

    line: int
    scene: str
    date: datetime.datetime
    files: Mapping[str, tuple[pathlib.Path, ...]]


@dataclasses.dataclass(frozen=True)
class Acquisition:
    """The rasters of one date of a scene.

    Attributes:
      scene: its name.
      date: of the acquisition.
      s2: the Sentinel-2 bands that are needed, by grid; empty without Sentinel-2.
      s1: VV and VH likewise.
      labels: of each file the band of labels.
      truth: likewise; may be empty.
      mask: likewise; its pixels other than 0 are ignored.
      s2_date: of the Sentinel-2 files, where their names say it.
      s1_date: of the Sentinel-1 files, likewise.
      s2_level: L1C, L2A, or empty where the files do not say.
      metadata: texts that may say the offset of Sentinel-2.
    """

    scene: str
    date: datetime.datetime
    s2: tuple[Group, ...]
    s1: tuple[Group, ...]
    labels: tuple[Layer, ...]
    truth: tuple[Layer, ...]
    mask: tuple[Layer, ...]
    s2_date: datetime.datetime | None
    s1_date: datetime.datetime | None
    s2_level: str
    metadata: tuple[str, ...]

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.scene} {self.date:%Y-%m-%d}"

    @property
    def s2_bands(self) -> tuple[str, ...]:
        """Names of the Sentinel-2 bands, in the usual order."""
        names = {layer.name for group in self.s2 for layer in group}
        return tuple(name for name in sensors.S2_BANDS if name in names)


def read(path: str | os.PathLike, required: Sequence[str] = REQUIRED) -> list[Row]:
    """Reads the table, and finds its files.

    Args:
      path: of the table.
      required: columns that must be there; a map needs no labels.

    Raises:
      errors.BuildError: naming the line and the cell that are wrong.
    """
    path = pathlib.Path(path).expanduser().absolute()
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise errors.BuildError(
            f"--table={path} does not exist: a CSV file with the columns {','.join(COLUMNS)} is "
            "needed, of which s1 or s2, truth and mask may be left out"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise errors.BuildError(f"--table={path} cannot be read as UTF-8 text: {error}") from error
    reader = csv.reader(io.StringIO(text))
    try:
        header, *lines = [(reader.line_num, cells) for cells in reader] or [(1, [])]
    except csv.Error as error:
        raise errors.BuildError(f"--table={path} is damaged or no table: {error}") from error
    header = [cell.strip().lower() for cell in header[1]]
    unknown = [name for name in header if name not in COLUMNS or header.count(name) > 1]
    missing = [name for name in required if name not in header]
    if unknown or missing:
        fault = f"has no column {missing[0]}" if missing else f"has a column {unknown[0]!r}"
        if not missing and header.count(unknown[0]) > 1:
            fault += f" {header.count(unknown[0])} times"
        raise errors.BuildError(
            f"{path} {fault}: its first line must name the columns {','.join(COLUMNS)}, separated "
            "by commas, of which s1 or s2, truth and mask may be left out; it is "
            f"{text.partition(chr(10))[0].strip()!r}"
        )
    rows = [
        _row(path, line, header, cells, required)
        for line, cells in lines
        if any(map(str.strip, cells))
    ]
    if not rows:
        raise errors.BuildError(f"{path} has no rows: write one for each acquisition")
    _check(path, rows)
    return rows


def _row(
    path: pathlib.Path,
    line: int,
    header: Sequence[str],
    cells: Sequence[str],
    required: Sequence[str],
) -> Row:
    """A row from its cells."""
    where = f"{path}, line {line}"
    if len(cells) != len(header):
        raise errors.BuildError(
            f"{where} has {len(cells)} cells, the first line {len(header)}: put text that holds a "
            "comma in quotes"
        )
    row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    if not row["scene"]:
        raise errors.BuildError(f"{where} has no scene: give it a name")
    if pathlib.Path(row["scene"]).name != row["scene"]:
        raise errors.BuildError(
            f"{where} has the scene {row['scene']!r}, which files are named after: take out the /"
        )
    files = {
        name: find_files(path.parent, f"{where}: {name}", row.get(name, ""))
        for name in COLUMNS
        if name not in ("scene", "date")
    }
    if not files["labels"] and "labels" in required:
        raise errors.BuildError(f"{where} has no labels: name the files of its label map")
    if not files["s2"] and not files["s1"]:
        raise errors.BuildError(f"{where} has neither s2 nor s1: name the files of one of them")
    return Row(line, row["scene"], _date(where, row["date"]), files)


def _date(where: str, text: str) -> datetime.datetime:
    """A date such as 2022-10-05, 20221005 or 2022-10-05T11:54:11."""
    try:
        date = datetime.datetime.fromisoformat(text).replace(tzinfo=None)
    except ValueError as error:
        raise errors.BuildError(
            f"{where} has the date {text!r}: write it as 2022-10-05 or 2022-10-05T11:54:11"
        ) from error
    if not _FIRST_DATE <= date <= datetime.datetime.now() + datetime.timedelta(days=1):
        raise errors.BuildError(
            f"{where} has the date {text}, but Sentinel images are of {_FIRST_DATE:%Y} or later, "
            "and of the past"
        )
    return date


def find_files(folder: pathlib.Path, where: str, cell: str) -> tuple[pathlib.Path, ...]:
    """The files and products that a cell or a flag names, sorted, each once.

    Args:
      folder: that relative paths and patterns start from.
      where: the cell or the flag, for errors.
      cell: paths and patterns, separated by `;`.

    Raises:
      errors.BuildError: for a pattern without a match, and for a folder that is no product.
    """
    found: dict[pathlib.Path, None] = {}
    for pattern in filter(None, map(str.strip, cell.split(";"))):
        shown = pattern if pattern.isprintable() else repr(pattern)
        try:
            # A path as it is may hold brackets.
            exact = folder / os.path.expanduser(pattern)
            matches = [exact] if exact.exists() else []
            if not matches:
                names = glob.glob(os.path.expanduser(pattern), root_dir=folder, recursive=True)
                matches = [folder / name for name in sorted(names)]
        except (OSError, ValueError) as error:  # too long, or with a character that no path has
            raise errors.BuildError(f"{where} names {shown}, which is no path ({error})") from error
        if not matches:
            raise errors.BuildError(f"{where} names {shown}, which matches no file in {folder}")
        for match in matches:
            if match.is_dir() and not safe.is_product(match):
                raise errors.BuildError(
                    f"{where} names the folder {match.name}, which is no .SAFE product: "
                    f"name its files, for instance {shown.rstrip('/')}/*.tif"
                )
            found[match] = None
    return tuple(found)


def _check(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Refuses a table whose rows cannot become records of one form."""
    dates: dict[tuple, int] = {}
    images: dict[tuple, int] = {}
    for row in rows:
        where = f"{path}, line {row.line}"
        other = dates.setdefault((row.scene, row.date), row.line)
        if other != row.line:
            raise errors.BuildError(
                f"{where}: {row.scene} has the date {row.date:%Y-%m-%d} also in "
                f"line {other}: keep one, or name all its files in one row, separated by ;"
            )
        for column in ("s2", "s1", "truth"):
            if bool(row.files[column]) != bool(rows[0].files[column]):
                first, second = sorted((row, rows[0]), key=lambda r: not r.files[column])
                raise errors.BuildError(
                    f"{path}: line {first.line} has {column}, line {second.line} has none: all "
                    "rows must have it, or none"
                )
        image = row.files["s2"] or row.files["s1"]
        other = images.setdefault((image, row.files["labels"]), row.line)
        if other != row.line and row.files["labels"]:
            raise errors.BuildError(
                f"{where} names the imagery and labels of line {other}: keep one of the two rows"
            )
        if row.files["truth"] and row.files["truth"] == row.files["labels"]:
            raise errors.BuildError(
                f"{where} names the same files as labels and as truth, so that the labels would be "
                "always right: name others, or leave the column truth out"
            )


def acquisition(row: Row, options: Options) -> Acquisition:
    """Opens the files of a row, and finds out which bands they hold.

    Args:
      row: of the table.
      options: its modalities and bands; without `s2_bands`, all bands that are there.

    Raises:
      errors.BadFileError: if a file cannot be used, or a band is missing.
    """
    files = {m: row.files[m] if m in options.modalities else () for m in sensors.MODALITIES}
    level, texts = _level(files["s2"])
    return Acquisition(
        scene=row.scene,
        date=row.date,
        s2=_bands(files["s2"], sensors.S2_BANDS, options.s2_bands, level or options.s2_level),
        s1=_bands(files["s1"], sensors.S1_BANDS, sensors.S1_BANDS),
        labels=_maps(row.files["labels"]),
        truth=_maps(row.files["truth"]),
        mask=_maps(row.files["mask"]),
        s2_date=_date_in_name(files["s2"]),
        s1_date=_date_in_name(files["s1"]),
        s2_level=level,
        metadata=texts,
    )


def _date_in_name(files: Sequence[pathlib.Path]) -> datetime.datetime | None:
    """The date in the name of the first file, or of its folder if that is named as a granule."""
    if not files:
        return None
    patterns = (
        (files[0].name, r"(?<!\d)(20\d{6}(?:T\d{6})?)(?!\d)"),
        (files[0].parent.name, r"^S1[A-D]_\w+?_(20\d{6}T\d{6})_"),
    )
    for text, pattern in patterns:
        if match := re.search(pattern, text):
            try:
                return datetime.datetime.fromisoformat(match[1])
            except ValueError:
                # Eight digits that are no date.
                continue
    return None


def _level(files: Iterable[pathlib.Path]) -> tuple[str, tuple[str, ...]]:
    """The processing level of Sentinel-2 files, if they say it, and texts on their offset."""
    texts = []
    levels = set()
    for path in files:
        if safe.is_product(path):
            text, level = safe.metadata(path)
            texts.append(text)
            levels.add(level)
        elif match := re.search(r"MSI_?(?:L(1C|2A))", str(path), re.IGNORECASE):
            levels.add(f"L{match[1].upper()}")
        texts.append(f"_{path.name}_")
    if len(levels) > 1:
        raise errors.BadFileError(str(path), "is L2A where other files are L1C, or the reverse")
    return (levels.pop() if levels else ""), tuple(texts)


def _maps(files: Iterable[pathlib.Path]) -> tuple[Layer, ...]:
    """The band of labels of each file: the only one, the one called label, or of two the second.

    Raises:
      errors.BadFileError: for other files of several bands, such as pictures of maps.
    """
    found = []
    for path in files:
        opened = safe.scene_classification(path) if safe.is_product(path) else str(path)
        layers = rasters.layers(opened)
        called = [layer for layer in layers if layer.description.lower() == "label"]
        if len(layers) > 2 and len(called) != 1:
            raise errors.BadFileError(
                opened,
                f"has {len(layers)} bands, as a picture of a map has: give the map itself, whose "
                "values are classes, or call its band of classes label in the file",
            )
        found.append(called[0] if called else layers[-1])
    return tuple(found)


def _bands(
    files: Sequence[pathlib.Path], known: Sequence[str], wanted: Sequence[str], level: str = ""
) -> tuple[Group, ...]:
    """The wanted bands of an image, by grid, the finest first.

    Raises:
      errors.BadFileError: if one is missing, or there are several of it.
    """
    if not files:
        return ()
    found: dict[str, Layer] = {}
    for path in files:
        for opened in safe.band_files(path) if safe.is_product(path) else [str(path)]:
            for layer in _named(rasters.layers(opened), known, wanted, level):
                if layer.dtype == "uint8" and layer.scale == 1:
                    raise errors.BadFileError(layer.path, "dtype uint8, but raw values are needed")
                other = found.setdefault(layer.name, layer)
                if other is layer:
                    continue
                if other.pixel_size == layer.pixel_size:
                    raise errors.BadFileError(
                        layer.path,
                        f"holds {layer.name}, as {other.path} does: name one of the two",
                    )
                found[layer.name] = min(other, layer, key=lambda kept: kept.pixel_size)
    names = wanted or [name for name in known if name in found]
    missing = [name for name in names if name not in found]
    if missing or not names:
        raise errors.BadFileError(
            str(files[0]),
            f"no file holds {', '.join(missing) or 'a band'}, found {', '.join(found) or 'none'}: "
            "name the files of all bands; a data set may do without some by --s2_bands",
        )
    groups: dict[tuple, list[Layer]] = {}
    for name in names:
        groups.setdefault((*found[name].grid, found[name].dtype), []).append(found[name])
    return tuple(tuple(group) for group in sorted(groups.values(), key=lambda g: g[0].pixel_size))


def _named(
    layers: list[Layer], known: Sequence[str], wanted: Sequence[str], level: str
) -> list[Layer]:
    """The layers of a file that are bands, each with its name; by position where it has none."""
    named = [layer for layer in layers if layer.name in known]
    if named:
        return named
    by_count = {len(known): known, len(wanted): wanted}
    if known == sensors.S2_BANDS:
        by_count[12] = sensors.S2_BAND_SUBSETS[12]
    if len(layers) == 12 and level == "L1C" and len(wanted) != 12:
        raise errors.BadFileError(
            layers[0].path,
            "has 12 bands without names, as L2A has, whose values differ from those of L1C: for "
            "L2A build with --s2_level=L2A, for L1C describe the bands in the file",
        )
    if len(layers) not in by_count or len(layers) == 1:
        needed = ", ".join(wanted or known)
        raise errors.BadFileError(
            layers[0].path,
            f"has {len(layers)} {'band' if len(layers) == 1 else 'bands'} without names: describe "
            f"them in the file ({needed}), name the file after its band, or, for a data set of "
            "several in the usual order, give --s2_bands",
        )
    return [
        dataclasses.replace(layer, name=name)
        for layer, name in zip(layers, by_count[len(layers)], strict=True)
    ]
