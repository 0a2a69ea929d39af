"""Reads members of zip, tar and tar.gz archives without unpacking them, also of archives in slices.

Publishers cut large archives into byte slices such as `s1.tar.gz.partaa`, `s1.tar.gz.partab`.
Slices are read as one stream; they need not be joined.
"""

import dataclasses
import functools
import io
import pathlib
import re
import tarfile
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import indexed_gzip

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
# Archives whose members cannot be read in place. They are named in the report.
OTHER_SUFFIXES = (
    ".7z", ".bz2", ".gz", ".lz4", ".lzma", ".rar", ".tbz", ".tbz2", ".txz", ".tzst", ".xz", ".z",
    ".zst",
)  # fmt: skip
_SLICE = re.compile(
    r"(?P<archive>.+(?:\.zip|\.tar|\.tar\.gz|\.tgz))\."
    # Without "part", two letters or a number; not the ending of a compressed file.
    r"(?:part[-_]?|(?=\d|[a-z]{2}$)(?!gz|bz|xz|lz))(?P<slice>[a-z]{2,4}|\d{1,4})",
    re.IGNORECASE,
)
_SPANNED = re.compile(r"(?P<archive>.+)\.z\d{2,3}", re.IGNORECASE)
# A gzip stream gets one entry point (32 KiB of memory) for this number of bytes. A read inflates
# from the last entry point before it. The buffer has the same length, so that neighbouring files
# are inflated once.
GZIP_SPACING = 16 << 20
# More entry points would take too much memory in every process: large archives have a wider
# spacing.
MAX_GZIP_POINTS = 8192
# What one file of a data set may have, unpacked: a whole band of a Sentinel-2 scene has 241 MB.
MAX_FILE_BYTES = 512 << 20
# No tar.gz of imagery shrinks so much; zeros shrink a thousandfold.
_MAX_RATIO = 200
# tar ends with zeros that fill its last block.
_MAX_PADDING = 16 << 20


class ArchiveError(ValueError):
    """An archive that cannot be read; the message is for the user."""


@dataclasses.dataclass(frozen=True)
class ArchivePath:
    """An archive on disk.

    Attributes:
      name: its file name, without the ending of a slice.
      parts: its slices in order; one if it is not cut.
    """

    name: str
    parts: tuple[pathlib.Path, ...]

    @property
    def stem(self) -> str:
        """The name without the ending of the archive."""
        lower = self.name.lower()
        suffix = next(s for s in sorted(ARCHIVE_SUFFIXES, key=len)[::-1] if lower.endswith(s))
        return self.name[: -len(suffix)]


def check_size(size: int) -> None:
    """Raises OSError for a file that is larger than those of data sets, before it is read."""
    if size > MAX_FILE_BYTES:
        raise OSError(
            f"has {size:,} bytes unpacked, more than the {MAX_FILE_BYTES:,} that a file may have"
        )


def is_archive(name: str) -> bool:
    """Whether a file name is that of an archive or a slice of one.

    Zarr stores in zip files (`*.zarr.zip`) are no archives of GeoTIFFs.
    """
    if name.lower().endswith(".zarr.zip"):
        return False
    return name.lower().endswith(ARCHIVE_SUFFIXES) or _SLICE.fullmatch(name) is not None


def base_name(name: str) -> str:
    """The file name of an archive without the ending of a slice."""
    match = _SLICE.fullmatch(name)
    return match["archive"] if match else name


def is_other_archive(name: str) -> bool:
    """Whether a file is an archive of a kind that cannot be read in place."""
    return name.lower().endswith(OTHER_SUFFIXES) or _SPANNED.fullmatch(name) is not None


def group_slices(paths: Iterable[pathlib.Path]) -> list[ArchivePath]:
    """Groups the slices of each archive, in order.

    Raises:
      ArchiveError: if a slice is missing between others, or before the first.
    """
    slices: dict[tuple[pathlib.Path, str], list[tuple[str, pathlib.Path]]] = {}
    for path in paths:
        match = _SLICE.fullmatch(path.name)
        name, slice_name = (match["archive"], match["slice"]) if match else (path.name, "")
        slices.setdefault((path.parent, name), []).append((slice_name.lower(), path))
    groups = []
    for (parent, name), parts in sorted(
        slices.items(), key=lambda item: str(item[0][0] / item[0][1])
    ):
        whole = [path for slice_name, path in parts if not slice_name]
        if whole:  # A joined archive beside its slices.
            groups.append(ArchivePath(name, (whole[0],)))
            continue
        numbered = sorted((_slice_number(slice_name), path) for slice_name, path in parts)
        # Letters begin with "aa", numbers with 0 or 1.
        first = min(1, numbered[0][0]) if parts[0][0].isdecimal() else 0
        expected = range(first, first + len(numbered))
        if [number for number, _ in numbered] != list(expected):
            found = ", ".join(path.name for _, path in numbered)
            raise ArchiveError(
                f"slices of {parent / name} are missing: found {found}; fetch the others"
            )
        groups.append(ArchivePath(name, tuple(path for _, path in numbered)))
    return groups


def _slice_number(name: str) -> int:
    """The position of a slice: "aa" is 0, "ab" is 1; "001" is 1."""
    if name.isdecimal():
        return int(name)
    return functools.reduce(lambda number, letter: 26 * number + ord(letter) - ord("a"), name, 0)


class _JoinedFile(io.RawIOBase):
    """The bytes of several files one after the other, for reading."""

    def __init__(self, paths: Sequence[pathlib.Path]):
        self._files = [path.open("rb") for path in paths]
        sizes = [path.stat().st_size for path in paths]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._starts[-1]}
        self._position = max(0, base[whence] + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        for file, start, end in zip(self._files, self._starts, self._starts[1:], strict=False):
            if start <= self._position < end:
                file.seek(self._position - start)
                count = file.readinto(memoryview(buffer)[: end - self._position])
                self._position += count
                return count
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


def _open_parts(parts: Sequence[pathlib.Path], owner: object) -> io.BufferedReader:
    """Opens an archive, cut into slices or not, until its owner is no longer used."""
    file = parts[0].open("rb") if len(parts) == 1 else io.BufferedReader(_JoinedFile(parts))
    weakref.finalize(owner, file.close)
    return file


# Where a member is: its name in a zip, offset and size in a tar.
Address = str | tuple[int, int]


class Zip:
    """A zip archive."""

    def __init__(self, path: ArchivePath):
        """Opens the archive.

        Raises:
          ArchiveError: if it is one of several volumes.
        """
        first = path.parts[0]
        if any(_is_volume(other, first) for other in first.parent.iterdir()):
            raise ArchiveError(
                f"{first} is the last of several volumes of a zip archive: join them with "
                f"zip -s 0 {first.name} --out joined.zip, and remove the volumes"
            )
        file = _open_parts(path.parts, self)
        self._file = zipfile.ZipFile(file)

    def members(self) -> Iterator[tuple[str, Address]]:
        """Yields the name and the address of each file."""
        for member in self._file.infolist():
            if not member.is_dir():
                yield member.filename, member.filename

    def read(self, member: Address) -> bytes:
        """Reads one file; the size that it declares is never exceeded."""
        check_size(self._file.getinfo(member).file_size)
        return self._file.read(member)


def _is_volume(path: pathlib.Path, last: pathlib.Path) -> bool:
    """Whether a file is a volume (`NAME.z01`) of a zip archive whose last volume is `last`."""
    match = _SPANNED.fullmatch(path.name)
    return match is not None and match["archive"] == last.stem


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, Address]]:
    while (member := tar.next()) is not None:
        # A TarFile remembers every member; millions of them would take gigabytes.
        tar.members.clear()
        if member.isreg():
            yield member.name, (member.offset_data, member.size)
    # tarfile takes a header that is cut short, or none, for the end.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("the end of the archive is missing")


class Tar:
    """An uncompressed tar archive."""

    def __init__(self, path: ArchivePath):
        self._file = _open_parts(path.parts, self)

    def members(self) -> Iterator[tuple[str, Address]]:
        """Yields the name and the address of each file."""
        with tarfile.open(fileobj=self._file, mode="r:") as tar:
            yield from _tar_members(tar)

    def read(self, member: Address) -> bytes:
        """Reads one file."""
        offset, size = member
        check_size(size)
        self._file.seek(offset)
        return self._file.read(size)


class TarGz:
    """A tar.gz and the index of its gzip stream."""

    def __init__(self, path: ArchivePath, gzip_index: bytes | None = None):
        """Opens the archive.

        Args:
          path: of the archive.
          gzip_index: what `gzip_index` returned; None to make one while reading `members`.
        """
        self._path = path
        self._compressed_size = sum(part.stat().st_size for part in path.parts)
        spacing = max(GZIP_SPACING, self._compressed_size // MAX_GZIP_POINTS)
        self._file = indexed_gzip.IndexedGzipFile(
            fileobj=_open_parts(path.parts, self), spacing=spacing, buffer_size=GZIP_SPACING
        )
        if gzip_index is not None:
            self._file.import_index(fileobj=io.BytesIO(gzip_index))

    def members(self) -> Iterator[tuple[str, Address]]:
        """Yields the name and the address of each file."""
        # Seeking from header to header builds the index: one pass over the archive.
        with tarfile.open(fileobj=self._file, mode="r:") as tar:
            for name, (offset, size) in _tar_members(tar):
                if size > MAX_FILE_BYTES and size > _MAX_RATIO * self._compressed_size:
                    raise ArchiveError(
                        f"{self._path.parts[0]} has {self._compressed_size:,} bytes, and {name} in "
                        f"it {size:,}: not unpacked, as no imagery shrinks so much"
                    )
                yield name, (offset, size)
            end = tar.offset
        self._file.seek(end)
        while self._file.read(_MAX_PADDING):
            if self._file.tell() > end + _MAX_PADDING:
                raise ArchiveError(
                    f"{self._path.parts[0]} goes on after the end of the tar archive in it: fetch "
                    "it again"
                )
        self._file.build_full_index()

    def gzip_index(self) -> bytes:
        """The entry points of the gzip stream, after `members` has been read."""
        file = io.BytesIO()
        self._file.export_index(fileobj=file)
        return file.getvalue()

    def read(self, member: Address) -> bytes:
        """Reads one file."""
        offset, size = member
        check_size(size)
        self._file.seek(offset)
        return self._file.read(size)


Archive = Zip | Tar | TarGz


def open_archive(path: ArchivePath, gzip_index: bytes | None = None) -> Archive:
    """Opens an archive, by the ending of its name."""
    name = path.name.lower()
    if name.endswith(".zip"):
        return Zip(path)
    return Tar(path) if name.endswith(".tar") else TarGz(path, gzip_index)
