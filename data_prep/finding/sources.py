"""What `component_tree` and `file_tree` share: paths, folders, archives, errors.

Folders may be in a bucket (`gs://`), archives may not. Nothing is unpacked.
"""

import os
import pathlib
from collections.abc import Sequence

from etils import epath

from cromss_jax import files
from data_prep.finding import archive_index, archive_indexing, archives


class SourceError(FileNotFoundError):
    """The source directory does not contain what the data set needs."""


class UnreadableError(OSError):
    """A file of the source that is missing, or that cannot be read from its archive."""


def not_found(
    missing: Sequence[str],
    source_dir: str | os.PathLike,
    layout: str,
    unread: Sequence[str] = (),
) -> SourceError:
    """The error for an incomplete tree: what was looked for, where, and what is needed.

    Args:
      missing: the components, or folders of them, that were not found.
      source_dir: the folder that was searched.
      layout: one sentence on the tree that is needed, and one on how to make a sample of it.
      unread: files that were found there, but are of no use.
    """
    shown = [f"{path} ({why})" if (why := why_unread(path, "")) else path for path in unread]
    found = f"Found instead: {listed(shown)}. " if shown else ""
    return SourceError(
        f"{', '.join(missing)} not found in {source_dir}: looked for folders and for "
        f"{', '.join(archives.ARCHIVE_SUFFIXES)} archives there. {found}{layout}"
    )


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Some of the names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def why_unread(path: str, default: str) -> str:
    """The reason why a file was not read: the kind of archive that it is, or the default."""
    if archives.is_other_archive(path.rpartition("/")[2]):
        return "archives of this kind cannot be read in place: unpack it"
    if path.lower().endswith(".zarr.zip"):
        return "a Zarr store, as of SSL4EO-S12 v1.1 or TerraMesh: another data set"
    return default


def entries(folder: epath.Path) -> list[tuple[str, bool]]:
    """Names in a folder, sorted, and whether they are folders; none if there is no folder.

    Files that operating systems add are left out.
    """
    if files.in_bucket(folder):
        found = [(path.name, path.is_dir()) for path in folder.iterdir()]
    elif not folder.is_dir():
        return []
    else:
        with os.scandir(folder) as scanned:
            found = [(entry.name, entry.is_dir()) for entry in scanned]
    return sorted(entry for entry in found if not archive_indexing.is_junk([entry[0]]))


def group_archives(paths: Sequence[epath.Path]) -> list[archives.ArchivePath]:
    """Groups the slices of archives.

    Raises:
      SourceError: if a slice is missing, or an archive is in a bucket.
    """
    for path in paths:
        if files.in_bucket(path):
            raise SourceError(
                f"{path} is an archive in a bucket, and archives cannot be read there: unpack it, "
                "or give the path under which the bucket is mounted"
            )
    try:
        return archives.group_slices(pathlib.Path(os.fspath(path)) for path in paths)
    except archives.ArchiveError as error:
        raise SourceError(str(error)) from error


def open_index(
    paths: Sequence[archives.ArchivePath],
    selection: archive_indexing.Selection,
    index_path: epath.Path | None,
) -> archive_index.ArchiveIndex:
    """Indexes archives.

    Raises:
      SourceError: if one is damaged.
    """
    try:
        return archive_index.ArchiveIndex(paths, selection, index_path)
    except archives.ArchiveError as error:
        raise SourceError(str(error)) from error


def with_slices(path: epath.Path) -> list[epath.Path]:
    """An archive, or all slices of it if the path is one of them."""
    base = archives.base_name(path.name)
    if base == path.name:
        return [path]
    return [
        path.parent / name
        for name, is_folder in entries(path.parent)
        if not is_folder and archives.is_archive(name) and archives.base_name(name) == base
    ]


def read_from(
    file: epath.Path | None, index: archive_index.ArchiveIndex | None, path: str
) -> bytes:
    """Reads a file from disk, or where it is None, from the archives.

    Raises:
      UnreadableError: if it is missing, or its archive is damaged there.
    """
    try:
        if file and not files.in_bucket(file):  # there it would take another request
            archives.check_size(file.stat().length)
        data = file.read_bytes() if file else index.read(path) if index else None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnreadableError("missing") from error
    except OSError as error:
        raise UnreadableError(f"unreadable: {error}") from error
    if data is None:
        raise UnreadableError("missing")
    return data
