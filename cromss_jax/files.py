"""Files that are whole or not there, and logs whose last line a kill may have cut."""

import json
import os
import re
import uuid

from etils import epath


class PathError(OSError):
    """A path of storage that the program cannot use."""


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a file lies in a bucket, where files appear whole and nothing can be appended."""
    return os.fspath(path).startswith("gs://")


def absolute(path: epath.PathLike) -> epath.Path:
    """The full path, `~` expanded; epath's own would put a bucket below the current folder.

    Raises:
      PathError: for an address of anything but a gs:// bucket.
    """
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path))
    if scheme and not in_bucket(path):
        raise PathError(
            f"{path}: {scheme[0]} is not supported; name a local folder, or one in a bucket as "
            "gs://BUCKET/PATH"
        )
    path = epath.Path(path)
    return path if in_bucket(path) else path.expanduser().absolute()


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file whole or not at all, whenever the process is killed."""
    if in_bucket(path):  # as every file there is
        path.write_bytes(content)
        return
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metrics(path: epath.PathLike) -> list[dict]:
    """The whole lines of a `metrics.jsonl`, none if it isn't there."""
    path = epath.Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
