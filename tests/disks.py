"""Disks of a few megabytes, for tests and benches of what happens when they are full."""

import contextlib
import pathlib
import subprocess
from collections.abc import Iterator


class NoMountError(Exception):
    """This user may not mount disks."""


@contextlib.contextmanager
def small(folder: pathlib.Path, size: str, options: str = "") -> Iterator[pathlib.Path]:
    """Mounts a disk in memory at a folder, which is made.

    Args:
      folder: where.
      size: as in "3m".
      options: further ones of mount.

    Raises:
      NoMountError: if that is not allowed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = ",".join(filter(None, [f"size={size}", options]))
    line = ["mount", "-t", "tmpfs", "-o", chosen, "tmpfs", str(folder)]
    try:
        subprocess.run(line, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoMountError(f"cannot mount a disk here: {error}") from error
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
