"""Reads members of zip, tar and tar.gz archives in place, without unpacking them."""

import dataclasses
import functools
import os
import pathlib
import tarfile
import zipfile
from collections.abc import Iterator

import indexed_gzip

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
# A gzip stream gets one entry point (32 KiB of memory) for this number of bytes. A read inflates
# from the last entry point before it. The buffer has the same length, so that neighbouring files
# are inflated once.
GZIP_SPACING = 16 << 20


@functools.lru_cache(maxsize=8)
def _open_zip(path: pathlib.Path, pid: int) -> zipfile.ZipFile:
    """One open ZipFile per process: a forked child must not share its parent's file position."""
    del pid
    return zipfile.ZipFile(path)


@dataclasses.dataclass(frozen=True)
class Zip:
    """A zip archive. Members are addressed by name."""

    path: pathlib.Path

    def members(self) -> Iterator[tuple[str, str]]:
        """Yields the name and the address of each file."""
        for member in _open_zip(self.path, os.getpid()).infolist():
            if not member.is_dir():
                yield member.filename, member.filename

    def read(self, member: str) -> bytes:
        """Reads one file."""
        return _open_zip(self.path, os.getpid()).read(member)


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, tuple[int, int]]]:
    while (member := tar.next()) is not None:
        # A TarFile remembers every member; millions of them would take gigabytes.
        tar.members.clear()
        if member.isreg():
            yield member.name, (member.offset_data, member.size)


@dataclasses.dataclass(frozen=True)
class Tar:
    """An uncompressed tar archive. Members are addressed by offset and size."""

    path: pathlib.Path

    def members(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yields the name and the address of each file."""
        with tarfile.open(self.path, "r:") as tar:
            yield from _tar_members(tar)

    def read(self, member: tuple[int, int]) -> bytes:
        """Reads one file."""
        offset, size = member
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class TarGz:
    """A tar.gz and the index of its gzip stream. Pickled with its index, so workers can read."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._file = indexed_gzip.IndexedGzipFile(
            os.fspath(path), spacing=GZIP_SPACING, buffer_size=GZIP_SPACING
        )

    def members(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yields the name and the address of each file."""
        # Seeking from header to header builds the index: one pass over the archive.
        with tarfile.open(fileobj=self._file, mode="r:") as tar:
            yield from _tar_members(tar)
        self._file.build_full_index()

    def read(self, member: tuple[int, int]) -> bytes:
        """Reads one file."""
        offset, size = member
        self._file.seek(offset)
        return self._file.read(size)


Archive = Zip | Tar | TarGz


def open_archive(path: pathlib.Path) -> Archive:
    """Opens an archive, by the ending of its name."""
    if path.name.endswith(".zip"):
        return Zip(path)
    return Tar(path) if path.name.endswith(".tar") else TarGz(path)
