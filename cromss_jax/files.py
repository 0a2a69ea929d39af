"""Paths, files that are never partial, logs whose last line may be incomplete, errors in a line."""

import glob
import json
import os
import re
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

# What stands in local paths but would be read as something else, and what to do.
_CONFUSED = (
    (r"\\", "is taken for / by TensorStore: rename the folder or file"),
    (r"gs:/", "is taken for a bucket by Orbax: write gs://BUCKET/PATH, or rename the folder"),
    (r"^/(gs|s3|az|hf)(?=/|$)", "is taken for a bucket by epath: use a folder of another name"),
    (r"[\ud800-\udfff]", "is no character in UTF-8: rename the folder or file"),
)


class PathError(OSError):
    """A path in storage that the program does not support, or with a character that it cannot."""


class DamagedFileError(OSError):
    """A file of a run is not as the program writes it. The message names it."""


class _Path(type(epath.Path("/"))):
    """An epath whose `glob` takes the folder's own name literally, as pathlib's does.

    epath's reads it as a part of the pattern, so that in `br[1]` nothing is ever found. Orbax
    merges the files of a checkpoint by such a pattern: a checkpoint without them cannot be read.
    """

    def glob(self, pattern: str) -> Iterator["_Path"]:
        """Yields what matches in this folder."""
        for found in epath.Path(glob.escape(os.fspath(self))).glob(pattern):
            yield type(self)(found)


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a file is in a gs:// bucket, where writes are atomic and appending is impossible."""
    return os.fspath(path).startswith("gs://")


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path with `~` expanded; epath's would put buckets below the current folder.

    Every path that a user gives comes through here.

    Raises:
      PathError: for an address of other storage than a gs:// bucket, and for a path that Orbax,
        TensorStore or epath would take for another one.
    """
    text = os.fspath(path)
    if not text:
        raise PathError("a path is empty: name a folder or file, or . for the current folder")
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text)
    if scheme and not in_bucket(text):
        raise PathError(
            f"{path}: {scheme[0]} is not supported: use a local folder or gs://BUCKET/PATH"
        )
    if not in_bucket(text):
        text = os.path.expanduser(text)
        if text.startswith("~"):
            user = text.partition("/")[0]
            raise PathError(f"{path}: there is no user {user[1:]}; write ./{user} for a folder")
        text = os.path.join(os.getcwd(), text)
        for pattern, problem in _CONFUSED:
            if found := re.search(pattern, text):
                raise PathError(f"{path}: {found[0]} in a path {problem}")
    return _Path(text)


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


def first_line(error: Exception) -> str:
    """What a library says of an error, in a line: its first, or the error's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
      ValueError: if it is none, or is nested deeper than any of ours.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_metrics(path: epath.PathLike) -> list[dict]:
    """The complete lines of a `metrics.jsonl`; an empty list if the file does not exist.

    Raises:
      DamagedFileError: naming the first line that is none of ours.
    """
    path = epath.Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):  # a killed run's last one
            break
        try:
            entry = parse_json(line)
            is_ours = isinstance(entry["step"], int) and isinstance(entry["split"], str)
        except (ValueError, KeyError, TypeError):
            is_ours = False
        if not is_ours:
            raise DamagedFileError(
                f"line {number} of {path} is damaged: remove that line, or restore the file"
            )
        entries.append(entry)
    return entries
