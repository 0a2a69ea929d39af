"""The unfinished map of a scene, kept in a folder from which an interrupted command goes on."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from cromss_jax import files, lock
from cromss_jax.errors import UserError

# What decides the map, as JSON.
_IDENTITY = "map.json"
# How many rows of windows are done.
_PROGRESS = "progress"


class WorkError(UserError):
    """A folder of an unfinished map that cannot be used. The message is for the user."""


def read_json(path: pathlib.Path) -> Any:
    """What a file of ours in the folder of a map holds.

    Raises:
      WorkError: if it is damaged.
    """
    try:
        return files.parse_json(path.read_bytes())
    except ValueError as error:
        raise WorkError(f"{path} is damaged ({error}): delete {path.parent}") from error


@contextlib.contextmanager
def opened(
    folder: pathlib.Path,
    identity: Mapping[str, Any],
    shape: tuple[int, int],
    num_bands: Mapping[str, int],
) -> Iterator["Work"]:
    """Begins a map, or goes on with one; no other process may until the context ends.

    Args:
      folder: new, or that of an interrupted command.
      identity: what decides the map, as JSON. Another map is not gone on with.
      shape: height and width of the scene.
      num_bands: number of bands by name of the layer.

    Raises:
      WorkError: if the folder is of another map.
      lock.LockedError: if another process writes it.
    """
    with lock.held(epath.Path(folder / lock.NAME)):
        described = folder / _IDENTITY
        wanted = json.loads(json.dumps(identity))
        if described.exists():
            found = read_json(described)
            differ = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
            if differ:
                raise WorkError(
                    f"{folder} holds the unfinished map of a command with another "
                    f"{', '.join(sorted(differ))}: give the same command, delete the folder, or "
                    "choose another --output"
                )
        else:
            (folder / _PROGRESS).unlink(missing_ok=True)  # of a folder that was deleted by halves
            files.write_whole(epath.Path(described), json.dumps(wanted).encode())
        yield Work(folder, shape, num_bands)


class Work:
    """Layers of a map on disk, uint8, band by band, filled from north to south.

    Attributes:
      folder: where they are.
      rows_done: how many rows of windows are in them for good.
    """

    def __init__(self, folder: pathlib.Path, shape: tuple[int, int], num_bands: Mapping[str, int]):
        """Makes the files that are missing; see `opened`."""
        self.folder = folder
        self._shape = shape
        self._num_bands = dict(num_bands)
        progress = folder / _PROGRESS
        sizes = {name: count * shape[0] * shape[1] for name, count in num_bands.items()}
        for name, size in sizes.items():
            path = self.path(name)
            if not path.exists() or path.stat().st_size != size:  # new, or lost
                # Before the file is there: what is not written yet must not count as done.
                progress.unlink(missing_ok=True)
        for name, size in sizes.items():
            # Without truncating: rows that are done stay.
            with self.path(name).open("ab") as file:
                file.truncate(size)
        self.rows_done = int(read_json(progress)) if progress.exists() else 0

    def path(self, layer: str) -> pathlib.Path:
        """The file of a layer."""
        return self.folder / f"{layer}.raw"

    def write(self, rows_done: int, start: int, layers: Mapping[str, np.ndarray]) -> None:
        """Writes rows of pixels, and only then says that they are done.

        Args:
          rows_done: how many rows of windows are done with these.
          start: the first row of pixels.
          layers: uint8 [bands, rows, width] by name; of more than were asked for, those are left
            out.
        """
        height, width = self._shape
        for name, count in self._num_bands.items():
            with self.path(name).open("r+b") as file:
                for band in range(count):
                    file.seek((band * height + start) * width)
                    file.write(np.ascontiguousarray(layers[name][band]).data)
                file.flush()
                os.fsync(file.fileno())
        files.write_whole(epath.Path(self.folder / _PROGRESS), str(rows_done).encode())
        self.rows_done = rows_done

    def read(self, layer: str, start: int, stop: int) -> np.ndarray:
        """Rows of the first band of a layer, uint8 [stop - start, width]."""
        _, width = self._shape
        count = (stop - start) * width
        found = np.fromfile(self.path(layer), np.uint8, count, offset=start * width)
        return found.reshape(stop - start, width)

    def keep_identity(self, path: pathlib.Path) -> None:
        """Writes what decides the map to a file that stays."""
        files.write_whole(epath.Path(path), (self.folder / _IDENTITY).read_bytes())

    def remove(self) -> None:
        """Deletes the folder; the progress first, in case this is interrupted."""
        (self.folder / _PROGRESS).unlink(missing_ok=True)
        shutil.rmtree(self.folder)
