"""Reads image files, finds their invalid pixels, checks their values, and scales them to uint8.

Files that are uint8 are already scaled. Others are scaled by `sensors.scale_to_uint8`.

Invalid pixels are those that the file marks (nodata tag, mask, alpha band), NaN and infinity. In
files that are not uint8, these are invalid, too:
- Sentinel-1: exactly 0, and values of `MIN_DECIBELS` or less, such as -9999.
- Sentinel-2: saturated values (65535, in int16 32767), negative values, and 0 in all bands of one
  resolution. 0 is the nodata value of Sentinel-2 products, without a tag. In a single band, it may
  be a dark pixel from which the offset was subtracted.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from cromss_jax import sensors
from data_prep import errors
from data_prep.finding.sources import UnreadableError
from data_prep.reading import geotiff
from data_prep.report import Finding

# The mean of a band over SSL4EO-S12, scaled to uint8. Invalid pixels get it: the network is then
# shown an average pixel, and no edge to the darkest or brightest value. It is 127.5, which is
# truncated.
NEUTRAL = 127
# The noise floor of Sentinel-1 is above -40 dB.
MIN_DECIBELS = -100.0
# Medians over the valid pixels of an image. Land cover is darker than -1 dB, also in cities, and
# linear power is positive. dB * 100 has a median near -1200.
MAX_MEDIAN_DECIBELS = -1.0
MIN_MEDIAN_DECIBELS = -60.0


class Reader(Protocol):
    """A tree that files are read from: a `ComponentTree` or a `FileTree`."""

    def read(self, path: str) -> bytes:
        """Reads one whole file."""


def read_band(source: Reader, path: str) -> geotiff.Image:
    """Reads a file of one band.

    Raises:
      errors.BadFileError: if it is missing, damaged, or has more than one band.
    """
    return _read(source, path, geotiff.read_band)


def read_bands(source: Reader, path: str) -> geotiff.Image:
    """Reads a file of any number of bands.

    Raises:
      errors.BadFileError: if it is missing or damaged.
    """
    return _read(source, path, geotiff.read_bands)


def _read(source: Reader, path: str, read: Callable[[bytes], geotiff.Image]) -> geotiff.Image:
    try:
        return read(source.read(path))
    except (UnreadableError, geotiff.GeotiffError) as error:
        raise errors.BadFileError(path, str(error)) from error


def check_size(path: str, image: geotiff.Image, size: tuple[int, int]) -> None:
    """Refuses an image that does not have the given height and width.

    Raises:
      errors.BadFileError: naming both sizes.
    """
    if image.size != size:
        found, needed = ("x".join(map(str, shape)) for shape in (image.size, size))
        raise errors.BadFileError(path, f"{found} pixels, {needed} needed")


@dataclasses.dataclass(frozen=True)
class Values:
    """Bands with physical values.

    Attributes:
      pixels: (K, H, W), uint8 if already scaled; otherwise dB, or reflectance * 10000.
      valid: (K, H, W) bool.
      zero: (K, H, W) bool, where the file holds 0; False if already scaled.
      findings: about the file.
    """

    pixels: np.ndarray
    valid: np.ndarray
    zero: np.ndarray
    findings: tuple[Finding, ...]


def s1_values(path: str, image: geotiff.Image) -> Values:
    """Sentinel-1 values in dB.

    Args:
      path: of the file, for errors.
      image: float dB, uint8 that is already scaled, or integers with a scale tag that makes them
        dB.

    Raises:
      errors.BadFileError: for another dtype, and for values that are not dB.
    """
    valid = np.ones(image.pixels.shape, bool) if image.valid is None else image.valid
    findings = _turned(path, image)
    if image.pixels.dtype == np.uint8 and not _has_scale(image):
        return Values(image.pixels, valid, np.zeros(valid.shape, bool), findings)
    pixels, zero = image.pixels, image.pixels == 0
    valid = valid & ~zero
    if _has_scale(image):
        pixels = _apply_scale(image)
        findings += (Finding("scale applied", path, _scale_text(image)),)
    # Of dB * 100, too, these values alone are nodata.
    valid = valid & (pixels > 100 * MIN_DECIBELS + 1)
    for band in range(len(pixels)):
        _check_decibels(path, pixels[band][valid[band]], pixels.dtype)
    if not _is_float(pixels):
        raise errors.BadFileError(
            path, f"dtype {pixels.dtype}, but float dB or scaled uint8 is needed"
        )
    valid = valid & (pixels > MIN_DECIBELS)
    return Values(np.where(valid, pixels, 0), valid, zero, findings)


def _check_decibels(path: str, values: np.ndarray, dtype: np.dtype) -> None:
    """Refuses values, all valid, that are not dB.

    Raises:
      errors.BadFileError: naming the conversion.
    """
    if not values.size:
        return
    median = float(np.median(values))
    if median < MIN_MEDIAN_DECIBELS:
        raise errors.BadFileError(
            path,
            f"{dtype} with median {median:.0f}: looks like dB * 100, dB is needed: divide by 100 "
            "and store float32, or set the scale tag to 0.01",
        )
    if median > MAX_MEDIAN_DECIBELS and _is_float(values):
        share = float((values > 0).mean())
        raise errors.BadFileError(
            path,
            f"median {median:.3g}, {share:.0%} of the pixels above 0: looks like linear power, dB "
            "is needed: convert with 10 * log10(x)",
        )


def s2_values(path: str, image: geotiff.Image) -> Values:
    """Sentinel-2 values, reflectance * 10000, without correction of an offset.

    Args:
      path: of the file, for errors.
      image: uint16 or int16, or uint8 that is already scaled.

    Returns:
      Values. Zeros are valid here; see `nodata.mark_zeros`.

    Raises:
      errors.BadFileError: for another dtype.
    """
    valid = np.ones(image.pixels.shape, bool) if image.valid is None else image.valid
    findings = _turned(path, image)
    pixels = image.pixels
    if pixels.dtype == np.uint8 and not _has_scale(image):
        return Values(pixels, valid, np.zeros(pixels.shape, bool), findings)
    # Of uint8, only files with a scale tag get here.
    if pixels.dtype not in (np.uint16, np.int16, np.uint8):
        raise errors.BadFileError(
            path,
            f"dtype {pixels.dtype}, but reflectance * 10000 as uint16 or int16, or scaled "
            "uint8 is needed",
        )
    valid = valid & (pixels >= 0) & (pixels != np.iinfo(pixels.dtype).max)
    zero = pixels == 0
    if _has_scale(image):
        pixels = _apply_scale(image)
        # A scale of 0.0001 gives reflectance.
        pixels = np.rint(pixels * 10000 if max(image.scales) < 0.01 else pixels)
        findings += (Finding("scale applied", path, _scale_text(image)),)
    return Values(pixels.astype(np.int32), valid, zero, findings)


def scale(
    name: str,
    values: np.ndarray,
    valid: np.ndarray,
    statistics: Mapping[str, tuple[float, float]] = sensors.BAND_STATISTICS,
) -> np.ndarray:
    """Scales one band to uint8; invalid pixels become `NEUTRAL`.

    Args:
      name: a name of `sensors.S1_BANDS` or `sensors.S2_BANDS`.
      values: (H, W), of `Values.pixels`.
      valid: (H, W) bool.
      statistics: mean and standard deviation by band.

    Returns:
      (H, W) uint8.
    """
    if values.dtype == np.uint8:
        scaled = values
    else:
        scaled = sensors.scale_to_uint8(values, name, statistics)
    return scaled if valid.all() else np.where(valid, scaled, np.uint8(NEUTRAL))


def scale_s2(
    name: str,
    values: np.ndarray,
    valid: np.ndarray,
    offset: int,
    statistics: Mapping[str, tuple[float, float]] = sensors.BAND_STATISTICS,
) -> np.ndarray:
    """Subtracts the offset from values that are not scaled (floor 0), and scales; see `scale`."""
    if values.dtype != np.uint8 and offset:
        values = np.maximum(values - offset, 0)
    return scale(name, values, valid, statistics)


def pick_bands(
    path: str, image: geotiff.Image, names: Sequence[str], product: Sequence[str] = ()
) -> tuple[geotiff.Image, tuple[Finding, ...]]:
    """The bands of a file in the usual order, by their descriptions if it has any.

    Earth Engine exports VV, VH and angle, other software VH before VV.

    Args:
      path: of the file, for errors.
      image: all its bands.
      names: those that are needed.
      product: the bands of a whole product in order, for files without descriptions.

    Raises:
      errors.BadFileError: if their number is wrong, and descriptions do not tell which are needed.
    """
    found = [band_name(description) for description in image.descriptions]
    if set(names) <= set(found):
        indexes = [found.index(name) for name in names]
        if indexes == list(range(len(found))):
            return image, ()
        detail = f"bands are {', '.join(image.descriptions)}"
        return image.bands(indexes), (Finding("bands reordered", path, detail),)
    strangers = [name for name in found if name in product and name not in names]
    if len(image.pixels) == len(names) and not strangers:
        return image, ()
    if len(image.pixels) == len(product) and not strangers:
        return image.bands([product.index(name) for name in names]), ()
    reason = f"has {len(image.pixels)} bands, {len(names)} are needed"
    if len(image.pixels) == len(names):
        reason = f"has the bands {', '.join(found)}, needed are {', '.join(names)}"
    if len(image.pixels) == 12 and len(names) == 13:
        reason += (
            ": B10 is missing, as in L2A products, whose values differ; of L2A, give --s2_level=L2A"
        )
    elif len(image.pixels) < len(names) and "B2" in names:
        reason += ": name those that it has by --s2_bands"
    raise errors.BadFileError(path, reason)


def band_name(description: str) -> str:
    """The name of a band in its description: B02 is B2, Sigma0_VV_db is VV; empty if none."""
    match = re.search(r"(?<![A-Z0-9])(VV|VH|B)(?:0?([1-9]\d?A?))?(?![A-Z0-9])", description.upper())
    if match is None:
        return ""
    return match[1] + (match[2] or "")


def _turned(path: str, image: geotiff.Image) -> tuple[Finding, ...]:
    detail = "rows from south to north, or columns from east to west"
    return (Finding("turned", path, detail),) if image.is_turned else ()


def _is_float(pixels: np.ndarray) -> bool:
    return np.issubdtype(pixels.dtype, np.floating)


def _has_scale(image: geotiff.Image) -> bool:
    return any(scale != 1 for scale in image.scales) or any(offset for offset in image.offsets)


def _apply_scale(image: geotiff.Image) -> np.ndarray:
    scales = np.reshape(image.scales, (-1, 1, 1))
    return image.pixels * scales + np.reshape(image.offsets, (-1, 1, 1))


def _scale_text(image: geotiff.Image) -> str:
    return f"value = pixel * {image.scales[0]:g} + {image.offsets[0]:g}"
