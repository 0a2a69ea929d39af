"""Keeping freed memory in the process, and pausing Python's garbage collection."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Keeps memory that this process frees for its next allocation.

    Call it before other threads start. XLA's CPU backend allocates a program's temporaries,
    gigabytes for a training step, at each call and frees them after it. By default glibc returns
    them to the system, which must clear every page again. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        # Threads' own arenas are given back whatever the threshold.
        mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pauses Python's garbage collection, for the time in which a step is traced.

    Tracing creates many objects and keeps nearly all of them. The collector would visit them again
    and again: 1.5 s of a second start of the sample.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
