"""Finds out whether Sentinel-2 pixels carry the offset of 1000.

Products since processing baseline 04.00 (January 2022) add 1000 to all pixels. Old dates were
processed again, and Earth Engine also offers them without the offset, so that neither the date nor
the baseline decides. Band 10 does: it sees no ground, and its values are near 10 without the offset
and near 1010 with it. Where it cannot decide, the metadata does.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from data_prep import errors
from data_prep.report import Finding

OFFSET = 1000
# A low percentile, because clouds are bright in band 10, too.
_PERCENTILE = 1
# Below the first level there is no offset, between the other two there is one. Above the last all
# of the image is under high clouds.
_WITHOUT, _WITH, _CLOUDS = 500, 900, 1200


@dataclasses.dataclass(frozen=True)
class Offset:
    """An offset and where it is known from.

    Attributes:
      value: to be subtracted.
      evidence: how it is known.
      disagreement: what says otherwise; empty if nothing does.
    """

    value: int
    evidence: str
    disagreement: str = ""


def find(
    path: str, bands: Mapping[str, tuple[np.ndarray, np.ndarray]], metadata: Iterable[str]
) -> Offset:
    """Finds the offset of an image.

    Args:
      path: of the image, for errors.
      bands: values and valid pixels of each band, not scaled. uint8 is taken as free of an offset.
      metadata: texts that may say the processing baseline: names of products, JSON and XML files.

    Raises:
      errors.BadFileError: if neither the pixels nor the metadata tell.
    """
    if any(values.dtype == np.uint8 for values, _ in bands.values()):
        return Offset(0, "pixels are already scaled")
    stated = _first(map(_from_text, metadata))
    seen = _from_pixels(bands)
    if seen is None and stated is None:
        raise errors.BadFileError(
            path,
            "neither band 10 nor metadata tells whether pixels carry the offset of baseline 04.00: "
            "give --s2_offset=0 or --s2_offset=1000",
        )
    if seen is None:
        return stated
    if stated is not None and stated.value != seen.value:
        return dataclasses.replace(seen, disagreement=f"{stated.evidence} but {seen.evidence}")
    return seen


def from_l1c(
    l2a: Mapping[str, tuple[np.ndarray, np.ndarray]],
    l1c: Mapping[str, tuple[np.ndarray, np.ndarray]],
    l1c_offset: int,
) -> Offset | None:
    """Finds the offset of an L2A image by the L1C image of the same acquisition.

    The atmosphere changes the bands of short-wave infrared little, and dark pixels least: the two
    levels differ by much less than the offset there.

    Args:
      l2a: values and valid pixels of each band.
      l1c: of the same pixels.
      l1c_offset: of the L1C image.

    Returns:
      None if the difference is neither near 0 nor near the offset.
    """
    names = [name for name in ("B11", "B12") if name in l2a and name in l1c]
    differences = []
    for name in names:
        valid = l2a[name][1] & l1c[name][1]
        if valid.any():
            below = l1c[name][0][valid] - float(l1c_offset)
            dark = below <= np.percentile(below, 25)
            differences.append(np.median(l2a[name][0][valid][dark] - below[dark]))
    if not differences:
        return None
    difference = float(np.mean(differences))
    evidence = f"dark pixels of short-wave infrared {difference:+.0f} from those of L1C"
    if abs(difference) < 0.4 * OFFSET:
        return Offset(0, evidence)
    if abs(difference - OFFSET) < 0.4 * OFFSET:
        return Offset(OFFSET, evidence)
    return None


def findings(path: str, offset: Offset) -> tuple[Finding, ...]:
    """What to report of an offset that was found."""
    found = ()
    if offset.value:
        found = (Finding("offset subtracted", path, f"{offset.value}: {offset.evidence}"),)
    if offset.disagreement:
        found += (Finding("offset disagrees", path, offset.disagreement),)
    return found


def detect(
    path: str, bands: Mapping[str, tuple[np.ndarray, np.ndarray]], metadata: Iterable[str]
) -> tuple[int, tuple[Finding, ...]]:
    """The offset to subtract, and what to report; see `find`."""
    offset = find(path, bands, metadata)
    return offset.value, findings(path, offset)


def _first(found: Iterable[Offset | None]) -> Offset | None:
    return next((offset for offset in found if offset is not None), None)


def _from_pixels(bands: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Offset | None:
    """What band 10 says, or if it is missing, the darkest of the bands."""
    is_b10 = "B10" in bands
    names = ["B10"] if is_b10 else list(bands)
    levels = [
        float(np.percentile(values[valid], _PERCENTILE))
        for values, valid in (bands[name] for name in names)
        if valid.any()
    ]
    if not levels:
        return Offset(0, "no valid pixel")
    level = min(levels)
    evidence = f"{'band 10' if is_b10 else 'dark pixels'} near {level:.0f}"
    if level < _WITHOUT:
        return Offset(0, evidence)
    # Without band 10, the darkest pixels may also be bright ground.
    if _WITH <= level < _CLOUDS and is_b10:
        return Offset(OFFSET, evidence)
    return None


def _from_text(text: str) -> Offset | None:
    """What a product name (N0400), a JSON or an XML file says; None if nothing."""
    if match := re.search(r"(?:RADIO|BOA)_ADD_OFFSET\D[^>]*>\s*(-?\d+)", text):
        return Offset(-int(match[1]), f"ADD_OFFSET {match[1]}")
    if match := re.search(r'PROCESSING_BASELINE"?\s*[>:=]\s*"?(\d\d)\.?(\d\d)', text):
        baseline = match[1] + match[2]
    elif match := re.search(r"_N(\d{4})_", text):
        baseline = match[1]
    else:
        return None
    return Offset(OFFSET if baseline >= "0400" else 0, f"processing baseline {baseline}")
