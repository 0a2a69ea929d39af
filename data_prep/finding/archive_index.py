"""The index of the files in a data set's archives, kept in an SQLite file beside the data set.

Making it reads every archive once, which takes hours for a terabyte of tar.gz. It holds only the
files that the data set needs, and a later build uses it again while the archives are unchanged.
Worker processes query the file; nothing of it is copied to them.
"""

import json
import os
import sqlite3
import tempfile
import urllib.parse
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Sequence

from etils import epath

from cromss_jax import files
from data_prep.finding import archive_indexing, archives


class ArchiveIndex:
    """The files in archives, by path. Picklable: workers open the index file."""

    def __init__(
        self,
        paths: Sequence[archives.ArchivePath],
        selection: archive_indexing.Selection,
        index_path: epath.Path | None,
    ):
        """Indexes archives, or finds them indexed.

        Args:
          paths: the archives.
          selection: which of their files are needed.
          index_path: the file that keeps the index; None for a temporary one.

        Raises:
          archives.ArchiveError: if an archive is damaged, or two of them hold the same file.
        """
        self._paths = tuple(paths)
        if index_path is None:
            folder = tempfile.TemporaryDirectory(prefix="archive_index")
            # Removed with this object, but not with the copies of it in worker processes.
            weakref.finalize(self, folder.cleanup)
            index_path = epath.Path(folder.name) / "index.sqlite"
        self._index_path = os.fspath(index_path)
        with archive_indexing.local_copy(index_path) as local:
            archive_indexing.update(local, self._paths, selection)
        self._open_files()

    def __getstate__(self) -> tuple:
        return self._paths, self._index_path

    def __setstate__(self, state: tuple) -> None:
        self._paths, self._index_path = state
        self._open_files()

    def _open_files(self) -> None:
        """Opens the index; archives follow when they are read."""
        local = self._index_path
        if files.in_bucket(local):
            folder = tempfile.TemporaryDirectory(prefix="archive_index")
            weakref.finalize(self, folder.cleanup)
            local = os.path.join(folder.name, "index.sqlite")
            epath.Path(self._index_path).copy(local)
        uri = f"file:{urllib.parse.quote(local)}?mode=ro&immutable=1"
        self._connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
        weakref.finalize(self, self._connection.close)
        self._opened: dict[int, archives.Archive] = {}

    def folders(self, path: str) -> list[str]:
        """Names of the folders directly below `path`, sorted; none if `path` does not exist."""
        folder = self._folder(path)
        rows = self._query("SELECT name FROM folders WHERE parent = ?", folder)
        return sorted(name for (name,) in rows)

    def files(self, path: str) -> list[str]:
        """Names of the files directly in the folder `path`, sorted; none if there is no folder."""
        folder = self._folder(path)
        rows = self._query("SELECT name FROM members WHERE folder = ?", folder)
        return sorted(name for (name,) in rows)

    def has_file(self, path: str) -> bool:
        """Whether there is a file of that path."""
        return self._find(path) is not None

    def has_folder(self, path: str) -> bool:
        """Whether there is a folder of that path."""
        return self._folder(path) is not None

    def all_files(self) -> Iterator[str]:
        """Yields the paths of all files."""
        folders = {0: ""}
        for number, parent, name in self._query("SELECT * FROM folders WHERE id > 0 ORDER BY id"):
            folders[number] = f"{folders[parent]}{name}/"
        for folder, name in self._query("SELECT folder, name FROM members"):
            yield folders[folder] + name

    def left_out(self) -> list[tuple[str, int, list[str]]]:
        """For each archive: its name, how many files were not selected, and the names of some."""
        found = []
        for number, name, count in self._query("SELECT number, name, left_out FROM archives"):
            names = self._query("SELECT name FROM left_out WHERE archive = ?", number)
            found.append((name, count, [name for (name,) in names]))
        return found

    def read(self, path: str) -> bytes | None:
        """Reads one whole file; None if there is none.

        Raises:
          OSError: if it cannot be read.
        """
        found = self._find(path)
        if found is None:
            return None
        number, member, offset, size = found
        try:
            return self._open(number).read(member if offset is None else (offset, size))
        # zipfile raises the last two for members that it cannot decrypt or decompress.
        except (
            EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError
        ) as error:  # fmt: skip
            raise OSError(str(error)) from error

    def _open(self, number: int) -> archives.Archive:
        if number not in self._opened:
            ((key, gzip),) = self._query("SELECT key, gzip FROM archives WHERE number = ?", number)
            parts = [part for part, *_ in json.loads(key)["parts"]]
            path = next(p for p in self._paths if [os.fspath(part) for part in p.parts] == parts)
            self._opened[number] = archives.open_archive(path, gzip)
        return self._opened[number]

    def _query(self, statement: str, *values: object) -> list[tuple]:
        return self._connection.execute(statement, values).fetchall()

    def _folder(self, path: str) -> int | None:
        folder = 0
        for part in path.split("/") if path else ():
            rows = self._query("SELECT id FROM folders WHERE parent = ? AND name = ?", folder, part)
            if not rows:
                return None
            folder = rows[0][0]
        return folder

    def _find(self, path: str) -> tuple | None:
        folder, _, name = path.rpartition("/")
        rows = self._query(
            "SELECT archive, member, offset, size FROM members WHERE folder = ? AND name = ?",
            self._folder(folder),
            name,
        )
        return rows[0] if rows else None
