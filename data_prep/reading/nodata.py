"""Invalid pixels of a season: which they are at 10 m, how many, and what becomes of its labels."""

from collections.abc import Mapping

import numpy as np

from cromss_jax import sensors
from data_prep.report import Finding


def mark_zeros(
    zero: Mapping[str, np.ndarray], valid: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Marks pixels invalid that are 0 in all Sentinel-2 bands of one resolution.

    Args:
      zero: (H, W) bool of each Sentinel-2 band, see `bands.Values`.
      valid: (H, W) bool of each band.

    Returns:
      What `valid` is then.
    """
    marked = dict(valid)
    for group in sensors.S2_BANDS_BY_RESOLUTION.values():
        names = [name for name in group if name in zero]
        if not names:
            continue
        everywhere = np.logical_and.reduce([zero[name] for name in names])
        if everywhere.any():
            marked |= {name: marked[name] & ~everywhere for name in names}
        # A band that is 0 everywhere was never filled.
        empty = [name for name in names if zero[name].all()]
        marked |= {name: np.zeros_like(marked[name]) for name in empty}
    return marked


def at_10_metres(valid: np.ndarray, side: int) -> np.ndarray:
    """Repeats the pixels of a coarser mask (H, W) so that it has `side` pixels."""
    factor = side // valid.shape[0]
    return valid if factor == 1 else valid.repeat(factor, axis=0).repeat(factor, axis=1)


def findings(folder: str, kind: str, valid: np.ndarray) -> tuple[Finding, ...]:
    """Reports the share of invalid pixels of a mask (H, W), if there are any."""
    share = 1 - float(valid.mean())
    return (Finding(kind, folder, f"{share:.1%} of the pixels", share),) if share else ()


def ignore(labels: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Labels (H, W) with 255 where the imagery is invalid."""
    if valid.all():
        return labels
    return np.where(valid, labels, np.uint8(sensors.IGNORE_LABEL))
