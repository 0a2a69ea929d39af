"""What the process does with memory that it frees, and when Python collects garbage."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Has this process keep the memory that it frees, for its next allocation.

    Call it before there are other threads. XLA's CPU backend allocates a program's temporaries,
    gigabytes for a training step, at each call and frees them after it. By default glibc gives them
    back to the system, which must then clear every page again. Where the C library is another than
    glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        # Threads' own arenas are given back whatever the threshold.
        mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """Has Python not look for garbage meanwhile, for where a step is traced.

    Tracing makes a great many objects and keeps nearly all of them. Python looks through them again
    and again: 1.5 s of a second start of the sample.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
