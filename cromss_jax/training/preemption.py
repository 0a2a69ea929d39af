"""Noticing that a run is to stop: it leaves at once where nothing is lost, or saves first.

Python runs handlers of signals in the main thread alone, and not while that compiles, for minutes.
So they do nothing: a thread of this module reads from a socket which signals came.
"""

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

# SIGTERM comes from schedulers and clouds, SIGUSR1 and SIGUSR2 from SLURM's --signal, SIGINT from
# Ctrl-C, SIGHUP when a terminal is closed.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)

# The exit status after a second Ctrl-C, as shells have it.
_AT_ONCE_STATUS = 128 + signal.SIGINT

# No system's `struct sigaction` is larger.
_ACTION_BYTES = 1024

# JAX's handling of SIGTERM, with several processes.
_jax_action: ctypes.Array | None = None

_changing = threading.Lock()
_deferred = False
_told = threading.Event()
_polls = itertools.count()


class Preempted(Exception):
    """The run was interrupted by a signal; it is saved, and the same command continues."""


def watch(status: Callable[[], int]) -> None:
    """Notices `SIGNALS` from now on; a second SIGINT ends at once.

    Args:
      status: gives the exit status after a signal.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.detach())
    for number in SIGNALS:
        # A shell ignores SIGINT for what it starts in the background, `nohup` SIGHUP.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _do_nothing)
    threading.Thread(target=_wait, args=(reading, status), daemon=True).start()


def share_with_jax() -> None:
    """Takes SIGTERM back from JAX. Call it when JAX has started several processes.

    JAX's handler tells the other processes. It then gets the signals that `reached` is about.
    """
    global _jax_action
    if signal.getsignal(signal.SIGTERM) is _do_nothing:  # `watch` was called
        _jax_action = _swap_action(None)
        signal.signal(signal.SIGTERM, _do_nothing)


def _do_nothing(*_) -> None:
    pass


def _swap_action(new: ctypes.Array | None) -> ctypes.Array:
    """What the system does at SIGTERM, replaced unless `new` is None."""
    old = ctypes.create_string_buffer(_ACTION_BYTES)
    ctypes.CDLL(None).sigaction(int(signal.SIGTERM), new, old)
    return old


def _wait(signals: socket.socket, status: Callable[[], int]) -> None:
    """Acts on each signal that comes."""
    interrupts = 0
    while True:
        (number,) = signals.recv(1)
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            _leave("interrupted twice: ended at once", _AT_ONCE_STATUS)
        with _changing:
            if not _deferred:
                _leave("interrupted: nothing to save, the same command continues", status())
            _told.set()
        if _jax_action is not None:
            own = _swap_action(_jax_action)
            signal.raise_signal(signal.SIGTERM)
            _swap_action(own)


def _leave(sentence: str, status: int) -> None:
    """Ends the process whatever its other threads do; files are written whole or not at all."""
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(sentence, file=sys.stderr, flush=True)
    os._exit(status)


def _num_processes() -> int:
    """How many there are; imports nothing, as libraries may be about to be imported."""
    jax = sys.modules.get("jax")
    known = jax is not None and hasattr(jax, "distributed") and jax.distributed.is_initialized()
    return jax.process_count() if known else 1


@contextlib.contextmanager
def deferred(wanted: bool = True) -> Iterator[None]:
    """Inside, signals make `reached` true, and the caller saves. Outside they end the process.

    Args:
      wanted: False for a part within, in which they end the process as all is saved.

    Raises:
      Preempted: if a signal was deferred, where it is deferred no longer.
    """
    previous = _defer(wanted)
    try:
        yield
    except BaseException:
        _defer(previous, raises=False)
        raise
    _defer(previous)


def _defer(wanted: bool, raises: bool = True) -> bool:
    """Sets whether signals are deferred; returns whether they were."""
    global _deferred
    with _changing:
        previous, _deferred = _deferred, wanted
        # Several processes leave together, where all of them ask `reached`.
        if raises and not wanted and _told.is_set() and _num_processes() == 1:
            raise Preempted("interrupted: all is saved, the same command continues")
    return previous


def reached() -> bool:
    """Whether to save and leave. With several processes all of them must ask equally often."""
    if _num_processes() == 1:
        return _told.is_set()
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_polls))


def check() -> None:
    """Raises Preempted if `reached`."""
    if reached():
        raise Preempted("interrupted: the same command continues")
