"""Reads image files, checks their bands, and scales them to uint8.

Files that are uint8 are already scaled. Others are scaled by `sensors.scale_to_uint8`.
"""

import numpy as np

from cromss_jax import sensors
from data_prep import errors, geotiff, sources


def read_band(source: sources.Source, path: str) -> geotiff.Band:
    """Reads a file of one band.

    Raises:
      errors.BadFileError: if it is missing, damaged, or has more than one band.
    """
    try:
        return geotiff.read_band(source.read(path))
    except (sources.UnreadableError, geotiff.GeotiffError) as error:
        raise errors.BadFileError(path, str(error)) from error


def read_bands(source: sources.Source, path: str) -> geotiff.Bands:
    """Reads a file of any number of bands.

    Raises:
      errors.BadFileError: if it is missing or damaged.
    """
    try:
        return geotiff.read_bands(source.read(path))
    except (sources.UnreadableError, geotiff.GeotiffError) as error:
        raise errors.BadFileError(path, str(error)) from error


def check_size(path: str, pixels: np.ndarray, size: tuple[int, int]) -> None:
    """Refuses a band (H, W) that does not have the given height and width.

    Raises:
      errors.BadFileError: naming both sizes.
    """
    if pixels.shape != size:
        found, needed = ("x".join(map(str, shape)) for shape in (pixels.shape, size))
        raise errors.BadFileError(path, f"{found} pixels, {needed} needed")


def scale_s1(path: str, band: str, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Checks and scales a Sentinel-1 band.

    Args:
      path: of its file, for errors.
      band: a name of `sensors.S1_BANDS`.
      pixels: (H, W), dB as float32 or float64, or already scaled uint8.
      size: the height and width that it must have.

    Returns:
      (H, W) uint8.

    Raises:
      errors.BadFileError: for another size or dtype, NaN, or values that look like linear power.
    """
    check_size(path, pixels, size)
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype not in (np.float32, np.float64):
        raise errors.BadFileError(path, f"dtype {pixels.dtype}, needs float dB or scaled uint8")
    try:
        scaled = sensors.scale_to_uint8(pixels, band)
    except ValueError as error:
        raise errors.BadFileError(path, str(error)) from error
    # Backscatter in dB is negative nearly everywhere, linear power never.
    if pixels.min() >= 0:
        raise errors.BadFileError(path, "no pixel below 0: looks like linear power, dB needed")
    return scaled


def scale_s2(
    path: str, band: str, pixels: np.ndarray, size: tuple[int, int], offset: int
) -> np.ndarray:
    """Checks and scales a Sentinel-2 band.

    Args:
      path: of its file, for errors.
      band: a name of `sensors.S2_BANDS`.
      pixels: (H, W), reflectance * 10000 as uint16, or already scaled uint8.
      size: the height and width that it must have.
      offset: subtracted from raw pixels (floor 0) before scaling: 1000 for products of processing
        baseline 04.00 and later, which add it.

    Returns:
      (H, W) uint8.

    Raises:
      errors.BadFileError: for another size or dtype.
    """
    check_size(path, pixels, size)
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype != np.uint16:
        raise errors.BadFileError(path, f"dtype {pixels.dtype}, needs uint16 or scaled uint8")
    return sensors.scale_to_uint8(np.maximum(pixels.astype(np.int32) - offset, 0), band)
