"""Finds the files of a dataset in folders, zip, tar or tar.gz, and reads them without unpacking.

A dataset is a few *components*: the folders and files its layout begins with, such as `s1`,
`s2c` or `dw_complete_ids.csv`. A file is addressed by its path from the component on, whatever
folders lie above it on disk or in the archive. Folders may lie in a bucket (`gs://`), archives not.
"""

import dataclasses
import functools
import os
import pathlib
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import indexed_gzip
import tqdm
from etils import epath

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
# How many folders may lie between the source directory and a component or an archive.
SEARCH_DEPTH = 2
# A gzip stream gets one entry point (32 KiB of memory) per so many bytes. Every read inflates from
# the point before it, so the buffer has the same length: neighbouring files cost one inflation.
GZIP_SPACING = 16 << 20


class SourceError(FileNotFoundError):
    """The source directory does not hold what the dataset needs."""


def not_found(missing: Sequence[str], source_dir: str | os.PathLike, layout: str) -> SourceError:
    """The error of a tree that lacks something: what was looked for, where, and what is needed.

    Args:
      missing: the components, or folders of them, that were not found.
      source_dir: where they were looked for.
      layout: one sentence on the tree that is needed, and one on how to make a sample of it.
    """
    return SourceError(
        f"{', '.join(missing)} not found in {source_dir}: looked for folders and for "
        f"{', '.join(ARCHIVE_SUFFIXES)} archives there and up to {SEARCH_DEPTH} folders below. "
        f"{layout}"
    )


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is that of a bucket."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike) -> epath.Path:
    """The full path of a file or folder on disk or in a bucket."""
    path = epath.Path(path)
    return path if is_remote(path) else path.expanduser().absolute()


def _entries(folder: epath.Path) -> list[tuple[str, bool]]:
    """Names in a folder, sorted, and whether they are folders; none if there is no folder."""
    if is_remote(folder):
        return sorted((path.name, path.is_dir()) for path in folder.iterdir())
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted((entry.name, entry.is_dir()) for entry in entries)


class UnreadableError(OSError):
    """A file of the source that is missing or that its archive cannot give."""


@functools.lru_cache(maxsize=8)
def _open_zip(path: pathlib.Path, pid: int) -> zipfile.ZipFile:
    """One open ZipFile per process: a forked child must not share its parent's file position."""
    del pid
    return zipfile.ZipFile(path)


@dataclasses.dataclass(frozen=True)
class _Zip:
    path: pathlib.Path

    def members(self) -> Iterator[tuple[str, str]]:
        for member in _open_zip(self.path, os.getpid()).infolist():
            if not member.is_dir():
                yield member.filename, member.filename

    def read(self, member: str) -> bytes:
        return _open_zip(self.path, os.getpid()).read(member)


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, tuple[int, int]]]:
    while (member := tar.next()) is not None:
        # A TarFile remembers every member; millions of them would take gigabytes.
        tar.members.clear()
        if member.isreg():
            yield member.name, (member.offset_data, member.size)


@dataclasses.dataclass(frozen=True)
class _Tar:
    path: pathlib.Path

    def members(self) -> Iterator[tuple[str, tuple[int, int]]]:
        with tarfile.open(self.path, "r:") as tar:
            yield from _tar_members(tar)

    def read(self, member: tuple[int, int]) -> bytes:
        offset, size = member
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class _TarGz:
    """A tar.gz and the index of its gzip stream; both pickle, so workers do not index anew."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._file = indexed_gzip.IndexedGzipFile(
            os.fspath(path), spacing=GZIP_SPACING, buffer_size=GZIP_SPACING
        )

    def members(self) -> Iterator[tuple[str, tuple[int, int]]]:
        # Seeking from header to header builds the index on the way: one pass over the archive.
        with tarfile.open(fileobj=self._file, mode="r:") as tar:
            yield from _tar_members(tar)
        self._file.build_full_index()

    def read(self, member: tuple[int, int]) -> bytes:
        offset, size = member
        self._file.seek(offset)
        return self._file.read(size)


def _open_archive(path: pathlib.Path) -> _Zip | _Tar | _TarGz:
    if path.name.endswith(".zip"):
        return _Zip(path)
    return _Tar(path) if path.name.endswith(".tar") else _TarGz(path)


class Source:
    """The files of one dataset, by their path from the component on. Picklable."""

    def __init__(self, source_dir: str | os.PathLike, components: Sequence[str]):
        """Looks for the components and indexes the archives that may hold missing ones.

        A component that exists as a folder or file is read from there; archives are consulted
        for the others alone.

        Args:
          source_dir: a folder holding components and archives in any mixture, up to
            `SEARCH_DEPTH` folders down, or the path of one archive.
          components: names of the folders and files that the dataset's layout begins with.

        Raises:
          SourceError: if `source_dir` does not exist, if a component lies in two places, or if
            an archive is damaged.
        """
        self._components = tuple(components)
        self._folders: dict[str, epath.Path] = {}
        self._archives: list[_Zip | _Tar | _TarGz] = []
        self._tree: dict[str, Any] = {}
        source_dir = absolute(source_dir)
        if source_dir.is_file() and source_dir.name.endswith(ARCHIVE_SUFFIXES):
            archives = [source_dir]
        elif source_dir.is_dir():
            archives = self._search(source_dir, SEARCH_DEPTH)
        else:
            raise SourceError(
                f"{source_dir} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)})"
            )
        for path in archives:
            # `s1.tar.gz` beside its extracted `s1` would be indexed for nothing.
            if len(self._folders) < len(components) and path.name.split(".")[0] not in self.found:
                self._index(path)

    @property
    def found(self) -> set[str]:
        """Names of the components that were found."""
        return {*self._folders, *self._tree}

    def folders(self, path: str) -> list[str]:
        """Names of the folders directly below `path`, sorted; none if `path` does not exist."""
        component, _, rest = path.partition("/")
        if component in self._folders:
            entries = _entries(self._folders[component] / rest)
            return [name for name, is_folder in entries if is_folder]
        node = self._node(path)
        if not isinstance(node, dict):
            return []
        return sorted(name for name, child in node.items() if isinstance(child, dict))

    def files(self, path: str) -> list[str]:
        """Names of the files directly in the folder `path`, sorted; none if there is no folder."""
        component, _, rest = path.partition("/")
        if component in self._folders:
            entries = _entries(self._folders[component] / rest)
            return [name for name, is_folder in entries if not is_folder]
        node = self._node(path)
        if not isinstance(node, dict):
            return []
        return sorted(name for name, child in node.items() if isinstance(child, tuple))

    def has_file(self, path: str) -> bool:
        """Whether there is a file of that path."""
        component, _, rest = path.partition("/")
        if component in self._folders:
            return (self._folders[component] / rest).is_file()
        return isinstance(self._node(path), tuple)

    def read(self, path: str) -> bytes:
        """Reads one whole file.

        Raises:
          UnreadableError: if it is missing, or its archive is damaged there.
        """
        component, _, rest = path.partition("/")
        try:
            if component in self._folders:
                file = self._folders[component]
                return (file / rest if rest else file).read_bytes()
            node = self._node(path)
            if not isinstance(node, tuple):
                raise UnreadableError("missing")
            archive, member = node
            return self._archives[archive].read(member)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UnreadableError("missing") from error
        except UnreadableError:
            raise
        # zipfile reports what it cannot decrypt or decompress by the last two.
        except (
            OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError
        ) as error:  # fmt: skip
            raise UnreadableError(f"unreadable: {error}") from error

    def _node(self, path: str) -> Any:
        node: Any = self._tree
        for part in path.split("/"):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def _search(self, folder: epath.Path, depth: int) -> list[epath.Path]:
        """Notes the components below a folder and returns the archives there."""
        archives = []
        for name, is_folder in _entries(folder):
            path = folder / name
            if name in self._components:
                if name in self._folders:
                    raise SourceError(
                        f"{name} lies in two places, {self._folders[name]} and "
                        f"{path}: give the folder above one of them"
                    )
                self._folders[name] = path
            elif not is_folder and name.endswith(ARCHIVE_SUFFIXES):
                archives.append(path)
            elif is_folder and depth > 0:
                archives += self._search(path, depth - 1)
        return archives

    def _index(self, path: epath.Path) -> None:
        """Adds the members of an archive to the tree of what can be read."""
        if is_remote(path):
            raise SourceError(
                f"{path} is an archive in a bucket, folders are needed there: unpack it, or give "
                "the path under which the bucket is mounted"
            )
        archive = _open_archive(path)
        number = len(self._archives)
        self._archives.append(archive)
        progress = tqdm.tqdm(desc=f"indexing {path.name}", unit=" files", leave=False, disable=None)
        try:
            with progress:
                for name, member in archive.members():
                    progress.update()
                    self._insert(name, (number, member))
        except SourceError:
            raise
        # OSError is also how indexed_gzip reports a wrong checksum.
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise SourceError(
                f"{path} is damaged or cut short ({error}): fetch it again"
            ) from error

    def _insert(self, name: str, entry: tuple[int, Any]) -> None:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        start = next((i for i, part in enumerate(parts) if part in self._components), None)
        # macOS adds a shadow of every file to the archives it makes.
        if start is None or "__MACOSX" in parts or parts[-1].startswith("._"):
            return
        *folders, file = parts[start:]
        if parts[start] in self._folders:
            return
        node = self._tree
        for folder in folders:
            node = node.setdefault(folder, {})
        # Within one archive a later member replaces an earlier one, as unpacking would.
        if file in node and node[file][0] != entry[0]:
            raise SourceError(
                f"{'/'.join(parts[start:])} lies in two archives, "
                f"{self._archives[node[file][0]].path} and {self._archives[entry[0]].path}: "
                "leave one of them"
            )
        node[file] = entry
