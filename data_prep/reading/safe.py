"""Sentinel-2 products as they are distributed: `.SAFE` folders, and zip files of them."""

import pathlib
import re
import zipfile
import zlib

from data_prep import errors

_BAND = re.compile(r"_(B\d[0-9A])(?:_(\d\d)m)?\.jp2$", re.IGNORECASE)
_SCL = re.compile(r"_SCL_(\d\d)m\.jp2$", re.IGNORECASE)
# How GDAL names a file in a zip file.
_IN_ZIP = "/vsizip/"
_METADATA = re.compile(r"(^|/)MTD_MSIL(1C|2A)\.xml$")


def is_product(path: pathlib.Path) -> bool:
    """Whether a path is that of a product, by its name."""
    name = path.name.upper()
    return name.endswith((".SAFE", ".SAFE.ZIP")) or bool(re.fullmatch(r"S2[A-D]_MSI.*\.ZIP", name))


def _members(path: pathlib.Path) -> dict[str, str]:
    """Names of the files of a product, and the paths by which GDAL opens them.

    Raises:
      errors.BadFileError: if it cannot be read.
    """
    if path.is_dir():
        return {file.relative_to(path).as_posix(): str(file) for file in sorted(path.rglob("*.*"))}
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise errors.BadFileError(str(path), f"cannot be read as a zip file: {error}") from error
    return {name: f"{_IN_ZIP}{path}/{name}" for name in names}


def file_of(opened: str) -> pathlib.Path:
    """The file on disk that GDAL opens by a path: itself, or the archive that holds it."""
    path = pathlib.Path(opened.removeprefix(_IN_ZIP))
    return path if path.exists() else next(p for p in path.parents if p.is_file())


def band_files(path: pathlib.Path) -> list[str]:
    """The file of each band, at its finest resolution.

    Raises:
      errors.BadFileError: if there is none.
    """
    found: dict[str, tuple[int, str]] = {}
    for name, opened in _members(path).items():
        match = _BAND.search(name)
        if match and "IMG_DATA" in name:
            # L1C has each band once and says no resolution.
            metres = int(match[2] or 10)
            band = match[1].upper()
            found[band] = min(found.get(band, (metres, opened)), (metres, opened))
    if not found:
        raise errors.BadFileError(
            str(path), "has no bands (GRANULE/*/IMG_DATA/**/*_B??*.jp2): is the download complete?"
        )
    return [opened for _, opened in found.values()]


def scene_classification(path: pathlib.Path) -> str:
    """The file of the scene classification (SCL), at its finest resolution.

    Raises:
      errors.BadFileError: if there is none, as in L1C.
    """
    found = [
        (int(match[1]), opened)
        for name, opened in _members(path).items()
        if (match := _SCL.search(name))
    ]
    if not found:
        raise errors.BadFileError(
            str(path), "has no scene classification (*_SCL_20m.jp2), which products of L2A have"
        )
    return min(found)[1]


def _read_member(path: pathlib.Path, name: str) -> str:
    """The text of a file in a zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name).decode(errors="replace")
    # The last is raised for what is encrypted.
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise errors.BadFileError(str(path), f"{name} cannot be read: {error}") from error


def metadata(path: pathlib.Path) -> tuple[str, str]:
    """The text of the product's metadata, and its level, L1C or L2A.

    Raises:
      errors.BadFileError: if it has none.
    """
    for name, opened in _members(path).items():
        if match := _METADATA.search(name):
            if path.is_dir():
                text = pathlib.Path(opened).read_text(errors="replace")
            else:
                text = _read_member(path, name)
            return text, f"L{match[2]}"
    raise errors.BadFileError(str(path), "has no MTD_MSIL1C.xml or MTD_MSIL2A.xml")
