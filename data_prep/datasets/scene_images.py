"""Reads the imagery of a window of a scene's grid.

Units and invalid pixels are decided on the pixels of the files, as for all data sets (`bands`);
after that they are brought onto the grid.

Kernels: bands of the grid's own pixels are copied. Sentinel-2 is interpolated cubically (a = -0.5),
as training does where a data set has bands at native size; where pixels become larger, the kernel
is widened and thereby averages. Sentinel-1 is interpolated bilinearly and in linear power: power is
what a coarser radar would have measured, while decibels would weaken bright scatterers, and weights
that are nowhere negative make no negative power around them.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from rasterio.enums import Resampling

from data_prep.datasets.scene_table import Acquisition, Group
from data_prep.reading import bands, geotiff, rasters, warping
from data_prep.reading.warping import Grid

DECIBELS, CENTIBELS, POWER = "dB", "dB * 100", "linear power"
SCALED, REFLECTANCE = "reflectance * 10000", "reflectance"


@dataclasses.dataclass(frozen=True)
class Units:
    """What the pixels of an acquisition mean.

    Attributes:
      s1: `DECIBELS`, `CENTIBELS` or `POWER`.
      s2: `SCALED` or `REFLECTANCE`.
      s2_offset: subtracted from Sentinel-2 (reflectance * 10000).
    """

    s1: str = DECIBELS
    s2: str = SCALED
    s2_offset: int = 0


@dataclasses.dataclass(frozen=True)
class Bands:
    """Bands on a grid.

    Attributes:
      names: [K].
      pixels: (K, H, W) float, dB or reflectance * 10000; 0 where invalid.
      valid: (K, H, W) bool.
    """

    names: tuple[str, ...]
    pixels: np.ndarray
    valid: np.ndarray

    def in_order(self, names: Sequence[str]) -> "Bands":
        """The given bands, in this order."""
        places = [self.names.index(name) for name in names]
        return Bands(tuple(names), self.pixels[places], self.valid[places])


def native_s2(group: Group, image: geotiff.Image, unit: str) -> bands.Values:
    """Sentinel-2 values of a file's pixels, reflectance * 10000 with its offset.

    Raises:
      errors.BadFileError: for a dtype that has no such values.
    """
    path = group[0].path
    if np.issubdtype(image.pixels.dtype, np.floating):
        factor = 10000 if unit == REFLECTANCE else 1
        # Sen2Cor makes slightly negative reflectance over water.
        valid = image.valid & (image.pixels * factor > -2000)
        zero = image.pixels == 0
        pixels = np.rint(np.maximum(np.where(valid, image.pixels, 0), 0) * factor)
        values = bands.Values(pixels, valid, zero, ())
    else:
        values = bands.s2_values(path, image)
    # See `read_s2` for bands that are alone on their grid.
    nodata = values.zero.all(axis=0)
    return dataclasses.replace(values, valid=values.valid & ~nodata)


def native_s1(image: geotiff.Image, unit: str) -> bands.Values:
    """Sentinel-1 values of a file's pixels, in dB."""
    zero = image.pixels == 0
    pixels = raw_s1(image)
    valid = image.valid & ~zero
    if unit == POWER:
        # The removal of thermal noise leaves power below 0.
        valid &= pixels > 0
        pixels = 10 * np.log10(np.where(valid, pixels, 1))
    elif unit == CENTIBELS:
        pixels = pixels / 100
    valid &= pixels > bands.MIN_DECIBELS
    return bands.Values(np.where(valid, pixels, 0), valid, zero, ())


def raw_s1(image: geotiff.Image) -> np.ndarray:
    """Sentinel-1 pixels with the scale and offset of their file's tags, float."""
    scales = np.reshape(image.scales, (-1, 1, 1))
    offsets = np.reshape(image.offsets, (-1, 1, 1))
    pixels = image.pixels.astype(np.result_type(image.pixels.dtype, np.float32), copy=False)
    if (scales == 1).all() and not offsets.any():
        return pixels
    return pixels * scales + offsets


def read_s2(acquisition: Acquisition, grid: Grid, units: Units) -> Bands:
    """Sentinel-2 on a grid, reflectance * 10000 with its offset.

    Raises:
      errors.BadFileError: if a file cannot be used.
    """
    read = [
        _on_grid(group, grid, Resampling.cubic, lambda g, image: native_s2(g, image, units.s2))
        for group in acquisition.s2
    ]
    several = [part.valid.any(axis=0) for part in read if len(part.names) > 1]
    seen = np.logical_or.reduce(several) if several else np.False_
    for i, (group, part) in enumerate(zip(acquisition.s2, read, strict=True)):
        if len(group) == 1 and (seen & ~part.valid[0]).any():
            # 0 in all bands is nodata, in one band also a dark pixel.
            dark = seen & ~part.valid[0] & _where(group, grid, lambda image: image.pixels == 0)
            read[i] = dataclasses.replace(part, valid=part.valid | dark)
    return _joined(read).in_order(acquisition.s2_bands)


def read_s1(acquisition: Acquisition, grid: Grid, units: Units) -> Bands:
    """Sentinel-1 on a grid, dB.

    Raises:
      errors.BadFileError: if a file cannot be used.
    """
    read = [
        _on_grid(
            group,
            grid,
            Resampling.bilinear,
            lambda _, image: native_s1(image, units.s1),
            is_decibels=True,
        )
        for group in acquisition.s1
    ]
    joined = _joined(read)
    return joined.in_order([name for name in ("VV", "VH") if name in joined.names])


def _joined(parts: Sequence[Bands]) -> Bands:
    return Bands(
        tuple(name for part in parts for name in part.names),
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.valid for part in parts]),
    )


def _on_grid(
    group: Group,
    grid: Grid,
    kernel: Resampling,
    native: Callable[[Group, geotiff.Image], bands.Values],
    is_decibels: bool = False,
) -> Bands:
    """The bands of a group on a grid."""
    names = tuple(layer.name for layer in group)
    window = warping.source_window(group[0], grid)
    if window is None:
        shape = (len(group), grid.height, grid.width)
        return Bands(names, np.zeros(shape, np.float32), np.zeros(shape, bool))
    image = rasters.read(group, window)
    values = native(group, image)
    pixels, valid = values.pixels, values.valid
    place = image.crs, image.transform, grid
    if warping.offset(*place) is not None:
        pixels = warping.warp(pixels, *place, kernel, 0)
        valid = warping.warp(valid.astype(np.uint8), *place, Resampling.nearest, 0) > 0
        return Bands(names, pixels, valid)
    pixels = 10 ** (pixels / 10) if is_decibels else pixels
    if valid.all() and warping.is_inside(group[0], window):
        pixels = warping.warp(pixels.astype(np.float32), *place, kernel, None)
        valid = np.ones(pixels.shape, bool)
    else:
        pixels = np.where(valid, pixels, np.nan).astype(np.float32)
        pixels = warping.warp(pixels, *place, kernel, np.nan)
        # Kernels reach a pixel or two into nodata.
        valid = warping.warp(valid.astype(np.uint8), *place, Resampling.nearest, 0) > 0
        valid &= np.isfinite(pixels)
        pixels = np.where(valid, pixels, 1)
    if is_decibels:
        pixels = 10 * np.log10(pixels)
    return Bands(names, np.where(valid, pixels, 0), valid)


def read_mask(layers: Sequence[rasters.Layer], grid: Grid) -> np.ndarray:
    """Where the masks of an acquisition, (H, W) bool, say that pixels are to be ignored."""
    masked = np.zeros((grid.height, grid.width), bool)
    for layer in layers:
        masked |= _where([layer], grid, lambda image: image.pixels != 0)
    return masked


def _where(
    group: Sequence[rasters.Layer], grid: Grid, condition: Callable[[geotiff.Image], np.ndarray]
) -> np.ndarray:
    """Where a condition holds for the nearest valid pixel of one band, (H, W) bool."""
    window = warping.source_window(group[0], grid)
    if window is None:
        return np.zeros((grid.height, grid.width), bool)
    image = rasters.read(group, window)
    holds = (condition(image) & image.valid).astype(np.uint8)
    return warping.warp(holds, image.crs, image.transform, grid, Resampling.nearest, 0)[0] > 0
