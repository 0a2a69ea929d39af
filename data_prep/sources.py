"""Finds the files of a dataset in folders, zip, tar or tar.gz, and reads them without unpacking.

A data set has a few *components*: the folders and files that its layout begins with, such as `s1`,
`s2c` or `dw_complete_ids.csv`. A file is addressed by its path from the component on; the folders
above it, on disk or in an archive, do not matter. Folders may be in a bucket (`gs://`), archives
may not.
"""

import os
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import tqdm
from etils import epath

from data_prep import archives

# How many folders there may be between the source directory and a component or an archive.
SEARCH_DEPTH = 2


class SourceError(FileNotFoundError):
    """The source directory does not contain what the data set needs."""


def not_found(missing: Sequence[str], source_dir: str | os.PathLike, layout: str) -> SourceError:
    """The error for an incomplete tree: what was looked for, where, and what is needed.

    Args:
      missing: the components, or folders of them, that were not found.
      source_dir: the folder that was searched.
      layout: one sentence on the tree that is needed, and one on how to make a sample of it.
    """
    return SourceError(
        f"{', '.join(missing)} not found in {source_dir}: looked for folders and for "
        f"{', '.join(archives.ARCHIVE_SUFFIXES)} archives there and up to "
        f"{SEARCH_DEPTH} folders below. {layout}"
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
    """A file of the source that is missing, or that cannot be read from its archive."""


class Source:
    """The files of one dataset, by their path from the component on. Picklable."""

    def __init__(self, source_dir: str | os.PathLike, components: Sequence[str]):
        """Looks for the components, and indexes the archives that may hold missing ones.

        A component that exists as a folder or file is read from there. Archives are read for the
        other components only.

        Args:
          source_dir: a folder with components and archives in any mixture, up to
            `SEARCH_DEPTH` folders down, or the path of one archive.
          components: names of the folders and files that the dataset's layout begins with.

        Raises:
          SourceError: if `source_dir` does not exist, if a component is found twice, or if an
            archive is damaged.
        """
        self._components = tuple(components)
        self._folders: dict[str, epath.Path] = {}
        self._archives: list[archives.Archive] = []
        self._tree: dict[str, Any] = {}
        source_dir = absolute(source_dir)
        if source_dir.is_file() and source_dir.name.endswith(archives.ARCHIVE_SUFFIXES):
            archive_paths = [source_dir]
        elif source_dir.is_dir():
            archive_paths = self._search(source_dir, SEARCH_DEPTH)
        else:
            raise SourceError(
                f"{source_dir} is neither a folder nor an archive "
                f"({', '.join(archives.ARCHIVE_SUFFIXES)})"
            )
        for path in archive_paths:
            # `s1.tar.gz` beside the extracted folder `s1` need not be indexed.
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
        # The last two are raised by zipfile for members that it cannot decrypt or decompress.
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
        """Finds the components below a folder, and returns the archives there."""
        found = []
        for name, is_folder in _entries(folder):
            path = folder / name
            if name in self._components:
                if name in self._folders:
                    raise SourceError(
                        f"{name} was found twice, as {self._folders[name]} and as "
                        f"{path}: give the folder above one of them"
                    )
                self._folders[name] = path
            elif not is_folder and name.endswith(archives.ARCHIVE_SUFFIXES):
                found.append(path)
            elif is_folder and depth > 0:
                found += self._search(path, depth - 1)
        return found

    def _index(self, path: epath.Path) -> None:
        """Adds the members of an archive to the tree of what can be read."""
        if is_remote(path):
            raise SourceError(
                f"{path} is an archive in a bucket, and archives cannot be read there: unpack it, "
                "or give the path under which the bucket is mounted"
            )
        archive = archives.open_archive(path)
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
        # indexed_gzip raises OSError for a wrong checksum.
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise SourceError(
                f"{path} is damaged or cut short ({error}): fetch it again"
            ) from error

    def _insert(self, name: str, entry: tuple[int, Any]) -> None:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        start = next((i for i, part in enumerate(parts) if part in self._components), None)
        # macOS adds a second entry for every file to its archives.
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
                f"{'/'.join(parts[start:])} is in two archives, "
                f"{self._archives[node[file][0]].path} and {self._archives[entry[0]].path}: "
                "remove one of them"
            )
        node[file] = entry
