"""All files below a folder and in its archives, for data sets with telling file names."""

import os
import re

from etils import epath

from cromss_jax import files
from data_prep.finding import archive_index, archive_indexing, archives, sources

# Folders further down are not searched.
MAX_DEPTH = 8
# Locations of SSL4EO-S12: millions of files that are no tiles.
_NOT_TILES = re.compile(r"\d{7}")


class _Everything:
    """Selects all files of an archive. Their paths begin with the name of the archive."""

    key = "everything"

    def path(self, archive: archives.ArchivePath, member: str) -> str | None:
        """The path of a member; None for files that operating systems add."""
        parts = archive_indexing.split_path(member)
        return None if archive_indexing.is_junk(parts) else "/".join([archive.name, *parts])


class FileTree:
    """Files by their path from a folder on. Picklable.

    The path of a file in an archive begins with the archive's name.

    Attributes:
      archives: those that were found.
    """

    def __init__(self, source_dir: str | os.PathLike):
        """Lists the files of a folder; those of archives follow with `index`.

        Args:
          source_dir: a folder, or the path of one archive.

        Raises:
          sources.SourceError: if there is no such folder or archive.
        """
        self._root = files.absolute(source_dir)
        self._index: archive_index.ArchiveIndex | None = None
        self._on_disk: list[str] = []
        self._folder_names: set[str] = set()
        found: list[epath.Path] = []
        if self._root.is_dir():
            self._walk(self._root, "", found, MAX_DEPTH)
        elif self._root.is_file() and archives.is_archive(self._root.name):
            found = sources.with_slices(self._root)
        else:
            raise sources.SourceError(
                f"{source_dir} is neither a folder nor an archive "
                f"({', '.join(archives.ARCHIVE_SUFFIXES)})"
            )
        grouped = sources.group_archives(found)
        # An archive beside the folder that it was extracted to is not read.
        self.archives = [
            path
            for path in grouped
            if os.fspath(path.parts[0].parent / path.stem) not in self._folder_names
        ]

    def __getstate__(self) -> dict:
        # Workers read files by path and need no list of them.
        return {"_root": self._root, "_index": self._index, "_on_disk": [], "archives": []}

    def index(self, index_path: epath.Path | None, only_zip: bool = False) -> None:
        """Indexes the archives.

        Args:
          index_path: the file that keeps the index; None for a temporary one.
          only_zip: whether to index zip files alone, which are indexed at once.

        Raises:
          sources.SourceError: if an archive is damaged.
        """
        wanted = [p for p in self.archives if not only_zip or p.name.lower().endswith(".zip")]
        if wanted:
            self._index = sources.open_index(wanted, _Everything(), index_path)

    def paths(self) -> list[str]:
        """The paths of all files, sorted."""
        indexed = self._index.all_files() if self._index else ()
        return sorted([*self._on_disk, *indexed])

    def read(self, path: str) -> bytes:
        """Reads one whole file.

        Raises:
          sources.UnreadableError: if it is missing, or its archive is damaged there.
        """
        if self._index is not None and self._index.has_file(path):
            return sources.read_from(None, self._index, path)
        return sources.read_from(self._root / path, None, path)

    def _walk(self, folder: epath.Path, prefix: str, found: list[epath.Path], depth: int) -> None:
        """Lists the files of a folder, and adds its archives to `found`."""
        for name, is_folder in sources.entries(folder):
            if is_folder:
                self._folder_names.add(os.fspath(folder / name))
                if depth > 0 and not _NOT_TILES.fullmatch(name):
                    self._walk(folder / name, f"{prefix}{name}/", found, depth - 1)
            elif archives.is_archive(name):
                found.append(folder / name)
            else:
                self._on_disk.append(prefix + name)
