"""Reads the label maps of a window of a scene's grid."""

from collections.abc import Sequence

import numpy as np
from rasterio.enums import Resampling

from cromss_jax.legend import IGNORE_LABEL, Legend
from data_prep.reading import labels, rasters, warping
from data_prep.reading.rasters import Layer
from data_prep.reading.warping import Grid


def read(layers: Sequence[Layer], grid: Grid, legend: Legend) -> tuple[np.ndarray, np.ndarray]:
    """Labels on a grid, by the nearest pixel.

    Values become classes before they are moved, so that no value arises which no file has.

    Args:
      layers: label maps. Where several overlap, the first that has a class counts.
      grid: the wanted one.
      legend: from values to classes.

    Returns:
      (H, W) uint8, 255 without a class; and (H, W) bool, where a map has a pixel that it does not
      mark as nodata.

    Raises:
      errors.BadFileError: if a map has values that the legend does not know, or fractions.
    """
    found = np.full((grid.height, grid.width), IGNORE_LABEL, np.uint8)
    covered = np.zeros(found.shape, bool)
    for layer in layers:
        window = warping.source_window(layer, grid)
        if window is None:
            continue
        image = rasters.read([layer], window)
        values, valid = image.pixels[0], image.valid[0]
        classes = np.full(valid.shape, IGNORE_LABEL, np.uint8)
        classes[valid] = labels.classes(layer.path, values[valid], legend)
        # In one pass, as most of the time goes into coordinates.
        pair = np.stack([classes, np.where(valid, 0, IGNORE_LABEL).astype(np.uint8)])
        place = image.crs, image.transform, grid
        moved, outside = warping.warp(pair, *place, Resampling.nearest, IGNORE_LABEL)
        found = np.where(found == IGNORE_LABEL, moved, found)
        covered |= outside == 0
    return found, covered
