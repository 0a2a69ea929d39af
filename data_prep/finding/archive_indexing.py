"""Makes the SQLite file that indexes the members of archives; see `archive_index`."""

import contextlib
import functools
import json
import os
import pathlib
import sqlite3
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import tqdm
from etils import epath

from cromss_jax import files
from data_prep.finding import archives

_SCHEMA = """
CREATE TABLE archives(
    number INTEGER PRIMARY KEY, key TEXT UNIQUE, name TEXT, kept INTEGER, left_out INTEGER,
    gzip BLOB);
CREATE TABLE left_out(archive INTEGER, name TEXT);
CREATE TABLE folders(id INTEGER PRIMARY KEY, parent INTEGER, name TEXT, UNIQUE(parent, name));
CREATE TABLE members(
    folder INTEGER, name TEXT, archive INTEGER, member TEXT, offset INTEGER, size INTEGER,
    PRIMARY KEY(folder, name)) WITHOUT ROWID;
INSERT INTO folders VALUES(0, NULL, '');
PRAGMA user_version = 1;
"""
_VERSION = 1
_BATCH = 50_000
# Names of files that were left out, of each archive, for the report.
_MAX_NAMES = 100


class Selection(Protocol):
    """Which members of archives are needed.

    Attributes:
      key: describes the selection; an index of another one is made again.
    """

    key: str

    def path(self, archive: archives.ArchivePath, member: str) -> str | None:
        """The path under which a member is read, or None if it is not needed."""


def is_junk(parts: Sequence[str]) -> bool:
    """Whether a path is of files that macOS, Windows or a NAS adds: no part of any data set."""
    return any(
        part in ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini") or part.startswith(".")
        for part in parts
    )


def split_path(member: str) -> list[str]:
    """The parts of a member's name, without "." and empty ones."""
    return [part for part in member.replace("\\", "/").split("/") if part not in ("", ".")]


@contextlib.contextmanager
def local_copy(path: epath.Path) -> Iterator[pathlib.Path]:
    """A local file for an index that may be in a bucket, copied there when it was changed."""
    if not files.in_bucket(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield pathlib.Path(os.fspath(path))
        return
    with tempfile.TemporaryDirectory() as folder:
        local = pathlib.Path(folder) / "index.sqlite"
        if path.exists():
            path.copy(local)
        yield local
        path.parent.mkdir(parents=True, exist_ok=True)
        epath.Path(local).copy(path, overwrite=True)


def update(
    index_path: pathlib.Path, paths: Sequence[archives.ArchivePath], selection: Selection
) -> None:
    """Brings an index file up to date."""
    try:
        with contextlib.closing(sqlite3.connect(index_path)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise sqlite3.DatabaseError(f"has version {version}")
            if version == 0:
                connection.executescript(_SCHEMA)
            wanted = {_key(path, selection): path for path in paths}
            known = connection.execute("SELECT number, key FROM archives").fetchall()
            for number, key in known:
                if key not in wanted:
                    with connection:
                        _forget(connection, number)
            for key in wanted.keys() - {key for _, key in known}:
                with connection:
                    _add(connection, key, wanted[key], selection)
    except sqlite3.Error as error:
        raise archives.ArchiveError(
            f"the index of archives {index_path} cannot be used ({error}): another build may be "
            "writing it; otherwise delete it"
        ) from error


def _key(path: archives.ArchivePath, selection: Selection) -> str:
    """Describes an archive as it is on disk, and what is selected of it."""
    parts = []
    for part in path.parts:
        status = part.stat()
        parts.append((os.fspath(part), status.st_size, status.st_mtime_ns))
    return json.dumps({"parts": parts, "selection": selection.key})


def _forget(connection: sqlite3.Connection, number: int) -> None:
    """Removes an archive that is gone or has changed."""
    connection.execute("DELETE FROM members WHERE archive = ?", (number,))
    connection.execute("DELETE FROM left_out WHERE archive = ?", (number,))
    connection.execute("DELETE FROM archives WHERE number = ?", (number,))
    # Folders of no other archive, from the deepest up.
    empty = (
        "DELETE FROM folders WHERE id > 0 AND id NOT IN (SELECT folder FROM members) "
        "AND id NOT IN (SELECT parent FROM folders WHERE parent IS NOT NULL)"
    )
    while connection.execute(empty).rowcount:
        pass


def _add(
    connection: sqlite3.Connection, key: str, path: archives.ArchivePath, selection: Selection
) -> None:
    """Adds the members of an archive that are selected."""
    number = connection.execute("SELECT 1 + ifnull(max(number), 0) FROM archives").fetchone()[0]
    kept, left_out = 0, 0
    folders = _Folders(connection)
    progress = tqdm.tqdm(desc=f"indexing {path.name}", unit=" files", leave=False, disable=None)
    rows = []
    try:
        archive = archives.open_archive(path)
        with progress:
            for member, address in archive.members():
                progress.update()
                selected = selection.path(path, member)
                if selected is None:
                    if not is_junk(split_path(member)):
                        left_out += 1
                        if left_out <= _MAX_NAMES:
                            connection.execute(
                                "INSERT INTO left_out VALUES(?, ?)", (number, member)
                            )
                    continue
                kept += 1
                folder, _, name = selected.rpartition("/")
                text, numbers = (
                    (address, (None, None)) if isinstance(address, str) else (None, address)
                )
                rows.append((folders.number(folder), name, number, text, *numbers))
                if len(rows) == _BATCH:
                    _insert(connection, rows)
                    rows = []
        _insert(connection, rows)
        gzip = archive.gzip_index() if isinstance(archive, archives.TarGz) else None
    # indexed_gzip raises OSError for a wrong checksum.
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error) as error:
        raise archives.ArchiveError(
            f"{path.parts[0]} is damaged or cut short ({error}): fetch it again"
        ) from error
    row = (number, key, path.name, kept, left_out, gzip)
    connection.execute("INSERT INTO archives VALUES(?, ?, ?, ?, ?, ?)", row)
    _check_clashes(connection, path)


class _Folders:
    """Numbers of folders by path, added as needed."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection
        self._number = functools.lru_cache(maxsize=10_000)(self._look_up)

    def number(self, path: str) -> int:
        """The number of a folder."""
        return self._number(path) if path else 0

    def _look_up(self, path: str) -> int:
        parent, _, name = path.rpartition("/")
        row = (self.number(parent), name)
        found = self._connection.execute(
            "SELECT id FROM folders WHERE parent = ? AND name = ?", row
        ).fetchone()
        if found is None:
            statement = "INSERT INTO folders(parent, name) VALUES(?, ?)"
            return self._connection.execute(statement, row).lastrowid
        return found[0]


def _insert(connection: sqlite3.Connection, rows: Sequence[tuple]) -> None:
    # Within one archive a later member replaces an earlier one, as unpacking would. A file of two
    # archives is marked by a negative number.
    connection.executemany(
        "INSERT INTO members VALUES(?, ?, ?, ?, ?, ?) ON CONFLICT(folder, name) DO UPDATE SET "
        "archive = iif(archive = excluded.archive, archive, -abs(archive)), "
        "member = excluded.member, offset = excluded.offset, size = excluded.size",
        rows,
    )


def _check_clashes(connection: sqlite3.Connection, path: archives.ArchivePath) -> None:
    """Refuses a file that is in two archives."""
    clash = connection.execute(
        "SELECT folder, members.name, archives.name FROM members "
        "JOIN archives ON archives.number = -archive WHERE archive < 0 LIMIT 1"
    ).fetchone()
    if clash is not None:
        folder, name, other = clash
        while folder:
            folder, part = connection.execute(
                "SELECT parent, name FROM folders WHERE id = ?", (folder,)
            ).fetchone()
            name = f"{part}/{name}"
        raise archives.ArchiveError(
            f"{name} is in two archives, {other} and {path.name}: remove one of them"
        )
