"""Finds the folders and files that a data set's layout begins with, in folders and archives.

A data set has a few *components*, such as `s1`, `s2c` or `dw_complete_ids.csv`. A file is addressed
by its path from the component on; the folders above it, on disk or in an archive, do not matter.
Folders are listed when they are read: data sets of this kind have millions of files.
"""

import hashlib
import os
import re
from collections.abc import Collection, Mapping, Sequence

from etils import epath

from cromss_jax import files
from data_prep.finding import archive_index, archive_indexing, archives, sources

# How many folders there may be between the source directory and a component or an archive.
SEARCH_DEPTH = 2
# The folder of a location of SSL4EO-S12.
_LOCATION = re.compile(r"\d{7}")


class _Components:
    """Selects the files of components, and of them only those of the listed locations."""

    def __init__(self, names: Mapping[str, str], location_ids: Collection[str] | None):
        self._names = names
        self._ids = None if location_ids is None else frozenset(location_ids)
        ids = "all" if self._ids is None else sorted(self._ids)
        self.key = (
            f"{sorted(names.items())} of {hashlib.sha256(str(ids).encode()).hexdigest()[:16]}"
        )

    def path(self, archive: archives.ArchivePath, member: str) -> str | None:
        """The path from the component on."""
        parts = archive_indexing.split_path(member)
        if archive_indexing.is_junk(parts):
            return None
        for start, part in enumerate(parts):
            component = self._names.get(part.lower())
            rest = parts[start + 1 :]
            if component is None and _LOCATION.fullmatch(part):
                # `s1.tar.gz` may begin with locations.
                component = self._names.get(archive.stem.lower())
                rest = parts[start:]
            if component is not None:
                if self._ids is not None and rest and rest[0] not in self._ids:
                    return None
                return "/".join([component, *rest])
        return None


class ComponentTree:
    """The files of one data set, by their path from the component on. Picklable.

    Attributes:
      unread: files and folders beside the components that are no part of the data set.
    """

    def __init__(
        self, source_dir: str | os.PathLike, components: Mapping[str, Sequence[str]] | Sequence[str]
    ):
        """Looks for the components, and for archives that may hold missing ones.

        A component that exists as a folder or file is read from there. Archives are read for the
        other components only, after a call of `index`.

        Args:
          source_dir: a folder with components and archives in any mixture, up to
            `SEARCH_DEPTH` folders down, or the path of one archive.
          components: names of the folders and files that the data set's layout begins with, in
            any case; or for each of them the names that it may have.

        Raises:
          sources.SourceError: if `source_dir` does not exist, or a component is found twice.
        """
        if not isinstance(components, Mapping):
            components = {name: (name,) for name in components}
        self._names = {name.lower(): key for key, names in components.items() for name in names}
        self._components = tuple(components)
        self._folders: dict[str, epath.Path] = {}
        self._index: archive_index.ArchiveIndex | None = None
        self.unread: list[str] = []
        source_dir = files.absolute(source_dir)
        if source_dir.is_dir():
            self._archives = sources.group_archives(self._search(source_dir, SEARCH_DEPTH))
        elif source_dir.is_file() and archives.is_archive(source_dir.name):
            self._archives = sources.group_archives(sources.with_slices(source_dir))
        else:
            raise sources.SourceError(
                f"{source_dir} is neither a folder nor an archive "
                f"({', '.join(archives.ARCHIVE_SUFFIXES)})"
            )

    def index(
        self,
        index_path: epath.Path | None = None,
        location_ids: Collection[str] | None = None,
        only_zip: bool = False,
    ) -> None:
        """Indexes the archives that may hold missing components.

        Args:
          index_path: the file that keeps the index; None for a temporary one.
          location_ids: the folders of components that are needed; None for all.
          only_zip: whether to index zip files alone, which are indexed at once.

        Raises:
          sources.SourceError: if an archive is damaged, or a file is in two archives.
        """
        self._index = None
        if len(self._folders) == len(self._components):
            return
        # `s1.tar.gz` beside the extracted folder `s1` need not be indexed.
        wanted = [
            path
            for path in self._archives
            if self._names.get(path.stem.lower()) not in self._folders
            and (not only_zip or path.name.lower().endswith(".zip"))
        ]
        if wanted:
            missing = {k: v for k, v in self._names.items() if v not in self._folders}
            self._index = sources.open_index(wanted, _Components(missing, location_ids), index_path)

    @property
    def found(self) -> set[str]:
        """Names of the components that were found."""
        if self._index is None:
            return set(self._folders)
        return {*self._folders, *self._index.folders(""), *self._index.files("")}

    def left_out(self) -> list[tuple[str, int, list[str]]]:
        """For each archive: its name, how many files are not needed, and the names of some."""
        return self._index.left_out() if self._index else []

    def folders(self, path: str) -> list[str]:
        """Names of the folders directly below `path`, sorted; none if `path` does not exist."""
        if (folder := self._on_disk(path)) is not None:
            return [name for name, is_folder in sources.entries(folder) if is_folder]
        return self._index.folders(path) if self._index else []

    def files(self, path: str) -> list[str]:
        """Names of the files directly in the folder `path`, sorted; none if there is no folder."""
        if (folder := self._on_disk(path)) is not None:
            return [name for name, is_folder in sources.entries(folder) if not is_folder]
        return self._index.files(path) if self._index else []

    def has_file(self, path: str) -> bool:
        """Whether there is a file of that path."""
        if (file := self._on_disk(path)) is not None:
            return file.is_file()
        return self._index is not None and self._index.has_file(path)

    def read(self, path: str) -> bytes:
        """Reads one whole file.

        Raises:
          sources.UnreadableError: if it is missing, or its archive is damaged there.
        """
        return sources.read_from(self._on_disk(path), self._index, path)

    def _on_disk(self, path: str) -> epath.Path | None:
        """Where a file or folder of an extracted component is; None for other components."""
        component, _, rest = path.partition("/")
        folder = self._folders.get(component)
        return folder if folder is None or not rest else folder / rest

    def _search(self, folder: epath.Path, depth: int) -> list[epath.Path]:
        """Finds the components below a folder, and returns the archives there."""
        found = []
        for name, is_folder in sources.entries(folder):
            path = folder / name
            component = self._names.get(name.lower())
            if component is not None and not (is_folder and _holds_archives(path)):
                if component in self._folders:
                    raise sources.SourceError(
                        f"{component} was found twice, as {self._folders[component]} and as "
                        f"{path}: give the folder above one of them"
                    )
                self._folders[component] = path
            elif not is_folder and archives.is_archive(name):
                found.append(path)
            elif is_folder and depth > 0 and not _LOCATION.fullmatch(name):
                found += self._search(path, depth - 1)
            else:
                self.unread.append(os.fspath(path))
        return found


def _holds_archives(folder: epath.Path) -> bool:
    """Whether a folder is that of archives alone, such as `s1_grd/s1_grd.tar.gz.partaa`."""
    found = sources.entries(folder)
    if any(is_folder for _, is_folder in found):
        return False
    return any(archives.is_archive(name) for name, _ in found)
