"""One writer at a time: a lock file in a folder, which says who holds it.

On a disk it is `flock` that excludes others: the system gives it up when its process ends, however
that ends, so a lock that is left over is known as such at once; shared file systems have it, too.
(The library `filelock` calls the same, but empties the file, and with it the name of the holder.)
A bucket has no locks: there the holder writes the file again every second, and who finds one waits
whether that happens.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from etils import epath

from cromss_jax import files

_log = logging.getLogger(__name__)

NAME = "lock.json"

_BEAT_SECONDS, _WATCH_SECONDS = 1.0, 3.0
# What file systems without locks say.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class LockedError(OSError):
    """Another process writes there. The message names it."""


@contextlib.contextmanager
def held(path: epath.Path) -> Iterator[None]:
    """Holds a lock file; its folder is created if needed.

    Raises:
      LockedError: at once if another process holds it (after 3 s in a bucket).
    """
    with _held_in_bucket(path) if files.in_bucket(path) else _held_on_disk(path):
        yield


def _description() -> dict[str, object]:
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started}


def _said(text: str) -> str:
    """The holder, from what a lock file contains."""
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not written its name yet"


def _locked(path: epath.Path, text: str) -> LockedError:
    return LockedError(
        f"{path.parent} is being written by {_said(text)}: wait until it has ended, end it, or use "
        "another folder"
    )


def _log_taken_over(path: epath.Path, text: str) -> None:
    _log.warning("%s was left over by %s, which has ended: taken over", path, _said(text))


@contextlib.contextmanager
def _held_on_disk(path: epath.Path) -> Iterator[None]:
    new_folders = [folder for folder in path.parents if not folder.exists()]
    name = os.fspath(path)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with os.fdopen(descriptor) as file:
                raise _locked(path, file.read()) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            _log.warning("%s cannot be locked (%s): let no other process write there", path, error)
        # Whoever held it may have removed it in between.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(name)):
                break
        os.close(descriptor)
    with os.fdopen(descriptor, "r+") as file:
        if left_over := file.read():
            _log_taken_over(path, left_over)
        file.seek(0)
        file.truncate()
        file.write(json.dumps(_description()) + "\n")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the folder may be gone, or the disk read-only
                os.unlink(name)
                for folder in new_folders:  # while they are empty
                    os.rmdir(folder)


@contextlib.contextmanager
def _held_in_bucket(path: epath.Path) -> Iterator[None]:
    def found() -> str:
        return path.read_text() if path.exists() else ""

    if left_over := found():
        waited_until = time.monotonic() + _WATCH_SECONDS
        while time.monotonic() < waited_until:
            time.sleep(0.2)
            if (now := found()) != left_over and now:
                raise _locked(path, now)
        _log_taken_over(path, left_over)
    own = _description() | {"id": uuid.uuid4().hex}

    def text(beats: int) -> str:
        # All of one length: gcsfs asks for the length first, and a text that has grown since comes
        # without its end.
        return json.dumps(own | {"beats": f"{beats:09}"})

    path.write_text(text(0))
    time.sleep(_BEAT_SECONDS)  # if two came at once, the later one has it
    if (now := found()) != text(0):
        raise _locked(path, now)
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while not ended.wait(_BEAT_SECONDS):
            number += 1
            try:
                path.write_text(text(number))
            except OSError as error:  # the next beat may succeed
                _log.warning("%s cannot be written: %s", path, error)

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        path.unlink(missing_ok=True)
