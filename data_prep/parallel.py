"""Runs a reading function over many items in several processes, results in order."""

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Items that a worker gets at a time: neighbours in an archive are then read together.
ITEMS_PER_TASK = 4

_function: Callable[[Any], Any] | None = None


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    # Ctrl-C reaches every process of the terminal; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this worker when its parent is killed; otherwise it would wait for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Defers Ctrl-C and SIGTERM: the pool would wait for ever for a worker that is half started."""
    received = []
    handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in received:
        signal.raise_signal(number)


def _run_task(items: list[Any]) -> list[Any]:
    return [_function(item) for item in items]


def map_in_order(
    function: Callable[[Any], Any], items: Iterable[Any], num_workers: int
) -> Iterator[Any]:
    """Yields `function(item)` for every item, in the order of the items.

    Args:
      function: picklable; sent to each worker once.
      items: picklable; read as needed, so that few are in memory at any time.
      num_workers: processes. With 1 the calling process does the work itself; with more the
        caller must be the main thread.

    Raises:
      concurrent.futures.process.BrokenProcessPool: if a worker dies.
      Exception: whatever `function` raises.
    """
    if num_workers <= 1:
        yield from map(function, items)
        return
    tasks = iter(lambda: list(itertools.islice(items, ITEMS_PER_TASK)), [])
    items = iter(items)
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    pool = concurrent.futures.ProcessPoolExecutor(
        num_workers,
        # Does not copy the threads and the memory of the parent.
        mp_context=multiprocessing.get_context("forkserver"),
        initializer=_start_worker,
        initargs=(function,),
    )
    try:
        # Two tasks more than workers keep every worker busy while the oldest result is used.
        for task in tasks:
            with _signals_deferred():
                pending.append(pool.submit(_run_task, task))
            if len(pending) > num_workers + 2:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
