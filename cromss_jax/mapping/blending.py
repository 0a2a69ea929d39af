"""Blends the predictions of windows, and makes the map's layers from them.

Dimensions: H height and W width of a part of the scene, C classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from cromss_jax import sensors
from cromss_jax.mapping.windows import Windows

LAYERS = ("classes", "probabilities", "confidence", "agreement")
NODATA = sensors.IGNORE_LABEL
_ROWS = 32


class Strips:
    """The sums of the windows of one row of windows and those before it.

    Memory: (4 C + 1) bytes x height of a window x width of the scene for each modality.
    """

    def __init__(self, windows: Windows, modalities: Sequence[str], num_classes: int):
        """Starts with no window."""
        self._windows = windows
        shape = windows.rows.size, windows.columns.length
        self._sums = {m: np.zeros((*shape, num_classes), np.float32) for m in modalities}
        self._valid = {m: np.zeros(shape, bool) for m in modalities}

    def add(
        self, index: int, valid: Mapping[str, np.ndarray], probs: Mapping[str, np.ndarray]
    ) -> None:
        """Adds a window of this row.

        Args:
          index: of the window.
          valid: [h, w] bool by modality.
          probs: [h, w, C] by modality; empty where no pixel is valid.
        """
        row, column = divmod(index, len(self._windows.columns.starts))
        start = self._windows.columns.starts[column]
        columns = slice(start, start + self._windows.columns.size)
        weights = self._windows.columns.weights[column] * self._windows.rows.weights[row][:, None]
        for modality, pixels in valid.items():
            self._valid[modality][:, columns] |= pixels
        for modality, own in probs.items():
            self._sums[modality][:, columns] += own * weights[..., None]

    def finish(self, row: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What no further window changes; then begins the next row of windows.

        Args:
          row: of windows, all of which were added.

        Returns:
          Probabilities [H, W, C] and valid pixels [H, W] by modality, of the rows of pixels from
          the start of this row of windows to that of the next.
        """
        height = self._windows.rows.ends[row] - self._windows.rows.starts[row]
        probs = {m: _take(sums, height) for m, sums in self._sums.items()}
        valid = {m: _take(mask, height) for m, mask in self._valid.items()}
        return probs, valid


def _take(strip: np.ndarray, height: int) -> np.ndarray:
    """Takes the upper rows off a strip, moves the others up, and clears what is left below."""
    taken = strip[:height].copy()
    strip[: len(strip) - height] = strip[height:].copy()
    strip[len(strip) - height :] = 0
    return taken


def combine(probs: Mapping[str, np.ndarray], valid: Mapping[str, np.ndarray]) -> np.ndarray:
    """The probabilities of both sensors as one.

    The geometric mean, normalised: the combination of two witnesses that are independent given the
    class, with each half as sure as it says, because they are not quite. Where one sensor has no
    data the other decides alone.

    Args:
      probs: [H, W, C] float32 by modality.
      valid: [H, W] bool by modality.

    Returns:
      [H, W, C] float32; 0 where no modality is valid.
    """
    logs = [
        np.log(np.maximum(p, 1e-12)) * valid[m][..., None].astype(np.float32)
        for m, p in probs.items()
    ]
    count = sum(v.astype(np.float32) for v in valid.values())[..., None]
    mean = np.exp(sum(logs) / np.maximum(count, 1))
    return np.where(count > 0, mean / mean.sum(axis=-1, keepdims=True), 0)


def layers(
    probs: Mapping[str, np.ndarray], valid: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The map's layers of a part of a scene, by the names of `LAYERS`.

    Args:
      probs: [H, W, C] float32 by modality, blended.
      valid: [H, W] bool by modality.

    Returns:
      uint8 [bands, H, W] each, 255 where there is no data: `classes`; `probabilities` of C bands in
      percent; `confidence`, the probability in percent of the class that is mapped; and, of two
      modalities, `agreement`, 1 where both alone would map the same class and 0 elsewhere.
    """
    height = len(next(iter(valid.values())))
    # Some rows at a time, so that what is computed on the way takes little memory.
    parts = []
    for start in range(0, height, _ROWS):
        rows = slice(start, start + _ROWS)
        parts.append(
            _layers({m: p[rows] for m, p in probs.items()}, {m: v[rows] for m, v in valid.items()})
        )
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def _layers(
    probs: Mapping[str, np.ndarray], valid: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """`layers` at once."""
    if len(probs) == 1:
        (combined,) = probs.values()
    else:
        combined = combine(probs, valid)
    covered = np.logical_or.reduce(list(valid.values()))
    percent = np.rint(100 * combined).astype(np.uint8)
    found = {
        "classes": combined.argmax(axis=-1).astype(np.uint8)[None],
        "probabilities": np.moveaxis(percent, -1, 0),
        "confidence": percent.max(axis=-1)[None],
    }
    found = {name: np.where(covered, layer, np.uint8(NODATA)) for name, layer in found.items()}
    if len(probs) == 2:
        first, second = (p.argmax(axis=-1) for p in probs.values())
        both = np.logical_and.reduce(list(valid.values()))
        found["agreement"] = np.where(both, first == second, NODATA).astype(np.uint8)[None]
    return found
