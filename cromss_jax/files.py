"""Writing files that are never partial, and reading logs whose last line may be incomplete."""

import json
import os
import re
import uuid

from etils import epath


class PathError(OSError):
    """A path in storage that the program does not support."""


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a file is in a gs:// bucket, where writes are atomic and appending is impossible."""
    return os.fspath(path).startswith("gs://")


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path with `~` expanded; epath's would put buckets below the current folder.

    Raises:
      PathError: for an address of other storage than a gs:// bucket.
    """
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path))
    if scheme and not in_bucket(path):
        raise PathError(
            f"{path}: {scheme[0]} is not supported: use a local folder or gs://BUCKET/PATH"
        )
    path = epath.Path(path)
    return path if in_bucket(path) else path.expanduser().absolute()


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file completely or not at all, even if the process is killed."""
    if in_bucket(path):  # where every write is atomic
        path.write_bytes(content)
        return
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metrics(path: epath.PathLike) -> list[dict]:
    """The complete lines of a `metrics.jsonl`; an empty list if the file does not exist."""
    path = epath.Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
