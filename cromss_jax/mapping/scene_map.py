"""Maps a whole scene: threads read windows, devices predict them, rows are written when whole.

Memory does not grow with the number of rows of the scene: some batches of windows and one strip of
windows are held (`blending.Strips`).
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
import tqdm

from cromss_jax.mapping import blending
from cromss_jax.mapping.windows import Windows
from cromss_jax.mapping.work import Work

_log = logging.getLogger(__name__)
# How many batches may wait on the device.
_WAITING = 2
# How many windows of a row are read at once.
_RUN = 8


@dataclasses.dataclass(frozen=True)
class Pixels:
    """A window of a scene, by modality.

    Attributes:
      grey: uint8 [h, w, K], the network's bands in its order, scaled.
      valid: bool [h, w].
    """

    grey: Mapping[str, np.ndarray]
    valid: Mapping[str, np.ndarray]

    @property
    def is_void(self) -> bool:
        """Whether there is no valid pixel."""
        return not any(mask.any() for mask in self.valid.values())

    def columns(self, start: int, stop: int) -> "Pixels":
        """Some of the columns."""
        return Pixels(
            {m: pixels[:, start:stop] for m, pixels in self.grey.items()},
            {m: mask[:, start:stop] for m, mask in self.valid.items()},
        )


class Scene(Protocol):
    """What is mapped; `read` is called by several threads at once."""

    height: int
    width: int
    modalities: tuple[str, ...]

    def read(self, row: int, column: int, height: int, width: int) -> Pixels:
        """The pixels of a window."""


Forward = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
# From probabilities and valid pixels by modality to layers, as `blending.layers`.
MakeLayers = Callable[
    [Mapping[str, np.ndarray], Mapping[str, np.ndarray]], Mapping[str, np.ndarray]
]


def map_scene(
    scene: Scene,
    windows: Windows,
    forward: Forward,
    work: Work,
    *,
    num_classes: int,
    batch_size: int,
    num_threads: int,
    make_layers: MakeLayers = blending.layers,
) -> None:
    """Maps what is missing of a scene.

    A batch holds windows that follow each other, counted from the first of the scene, whether or
    not the command was interrupted: so the numbers are the same.

    Args:
      scene: to read from.
      windows: of the scene.
      forward: see `forward.make_forward`; called with `batch_size` windows.
      work: where finished rows go.
      num_classes: C.
      batch_size: windows in a batch.
      num_threads: that read.
      make_layers: makes what is written of finished rows.
    """
    rows = windows.rows
    if work.rows_done == len(rows.starts):
        return
    per_row = len(windows.columns.starts)
    # The first row of windows that reaches into the rows of pixels that are missing.
    start = rows.starts[work.rows_done]
    first_row = next(i for i, s in enumerate(rows.starts) if s + rows.size > start)
    if work.rows_done:
        _log.info("going on after %d of %d rows of windows", work.rows_done, len(rows.starts))
    strips = blending.Strips(windows, scene.modalities, num_classes)
    first = first_row * per_row
    # A line of a log each half minute where nobody looks at a terminal.
    often = 1 if sys.stderr.isatty() else 30
    progress = tqdm.tqdm(
        total=len(windows), initial=first, unit=" windows", mininterval=often, maxinterval=often
    )
    with progress, concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        batches = _batches(scene, windows, pool, first // batch_size, batch_size, num_threads)
        for index, pixels, probs in _predicted(batches, forward, batch_size):
            if index < first:
                continue
            strips.add(index, pixels.valid, probs)
            progress.update()
            row, column = divmod(index, per_row)
            if column + 1 == per_row:
                finished = strips.finish(row)
                if row >= work.rows_done:
                    work.write(row + 1, rows.starts[row], make_layers(*finished))


def _batches(
    scene: Scene,
    windows: Windows,
    pool: concurrent.futures.Executor,
    first_batch: int,
    batch_size: int,
    num_threads: int,
) -> Iterator[list[tuple[int, Pixels]]]:
    """Reads windows ahead and yields them in batches, with their indices."""
    per_row = len(windows.columns.starts)

    def read(run: range) -> list[tuple[int, Pixels]]:
        """Windows of one row, whose pixels are read at once: they share some."""
        height, width = windows.shape
        row, left = windows.place(run[0])
        _, right = windows.place(run[-1])
        pixels = scene.read(row, left, height, right + width - left)
        starts = [windows.place(i)[1] - left for i in run]
        return [
            (i, pixels.columns(start, start + width)) for i, start in zip(run, starts, strict=True)
        ]

    first = first_batch * batch_size
    # The same runs from wherever it starts.
    runs = (
        range(max(row + column, first), row + min(column + _RUN, per_row))
        for row in range(first - first % per_row, len(windows), per_row)
        for column in range(0, per_row, _RUN)
        if row + min(column + _RUN, per_row) > first
    )
    ahead = collections.deque(
        pool.submit(read, run) for run in itertools.islice(runs, num_threads + 1)
    )
    batch: list[tuple[int, Pixels]] = []
    try:
        while ahead:
            for window in ahead.popleft().result():
                batch.append(window)
                if len(batch) == batch_size:
                    yield batch
                    batch = []
            ahead.extend(pool.submit(read, run) for run in itertools.islice(runs, 1))
        if batch:
            yield batch
    finally:
        for future in ahead:
            future.cancel()


def _predicted(
    batches: Iterator[list[tuple[int, Pixels]]], forward: Forward, batch_size: int
) -> Iterator[tuple[int, Pixels, dict[str, np.ndarray]]]:
    """Yields windows with their probabilities, while the device works on the next batches."""
    waiting: collections.deque = collections.deque()
    for batch in itertools.chain(batches, [None] * _WAITING):
        if batch is not None:
            is_void = all(pixels.is_void for _, pixels in batch)
            waiting.append((batch, {} if is_void else forward(_stack(batch, batch_size))))
        if batch is None or len(waiting) > _WAITING:
            if not waiting:
                return
            done, probs = waiting.popleft()
            probs = {m: np.asarray(x) for m, x in probs.items()}
            for i, (index, pixels) in enumerate(done):
                yield index, pixels, {m: x[i] for m, x in probs.items()}


def _stack(batch: list[tuple[int, Pixels]], batch_size: int) -> dict[str, np.ndarray]:
    """The grey levels of a batch [B, h, w, K]; a short one is filled up with its last window."""
    images = [pixels.grey for _, pixels in batch]
    images += images[-1:] * (batch_size - len(images))
    return {m: np.stack([image[m] for image in images]) for m in images[0]}
