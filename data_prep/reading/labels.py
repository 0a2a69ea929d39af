"""Label maps: from the values of a file to classes, on the grid of the imagery."""

import numpy as np

from cromss_jax import sensors
from cromss_jax.legend import Legend
from data_prep import errors
from data_prep.reading import geotiff, nodata
from data_prep.report import Finding

# Pixels by which a label map may be larger or smaller than the imagery, as some of NoL are.
MARGIN = 2


def classes(path: str, pixels: np.ndarray, legend: Legend) -> np.ndarray:
    """Values of any shape and dtype to labels, uint8, 255 where ignored.

    Raises:
      errors.BadFileError: if there are values that the legend does not have, or fractions.
    """
    if np.issubdtype(pixels.dtype, np.floating):
        check_whole(path, pixels)
    labels, unknown = legend.classes_of(pixels)
    if unknown.size:
        raise errors.BadFileError(
            path,
            f"labels {values_text(unknown)} are not {legend.values_text()}: give the --legend of "
            "this map, with every value, those to ignore without a class",
        )
    return labels


def check_whole(path: str, pixels: np.ndarray) -> None:
    """Refuses labels that are no whole numbers.

    Raises:
      errors.BadFileError: naming some of them.
    """
    fractions = pixels[~(pixels == np.floor(pixels))]
    if fractions.size:
        raise errors.BadFileError(
            path,
            f"labels {values_text(fractions)} are no whole numbers: resample label maps with the "
            "nearest neighbour",
        )


def values_text(values: np.ndarray) -> str:
    """Some of the different values."""
    values = np.unique(values)
    return ", ".join(map(str, values[:10])) + (", ..." if values.size > 10 else "")


def read_labels(
    path: str, image: geotiff.Image, legend: Legend, size: tuple[int, int]
) -> tuple[np.ndarray, tuple[Finding, ...]]:
    """Labels on the grid of the imagery.

    Args:
      path: of the label file.
      image: of one band.
      legend: of its values.
      size: height and width of the imagery.

    Returns:
      Labels (H, W) uint8, 255 where ignored or invalid, and findings.

    Raises:
      errors.BadFileError: if the size differs by more than `MARGIN`, or labels are wrong.
    """
    found = (Finding("turned", path, "rows from south to north"),) if image.is_turned else ()
    valid = np.ones(image.size, bool) if image.valid is None else image.valid[0]
    labels = np.full(valid.shape, sensors.IGNORE_LABEL, np.uint8)
    labels[valid] = classes(path, image.pixels[0][valid], legend)
    found += nodata.findings(path, "labels invalid", valid)
    if image.size == size:
        return labels, found
    shown, needed = ("x".join(map(str, shape)) for shape in (image.size, size))
    off = max(abs(a - b) for a, b in zip(image.size, size, strict=True))
    if off > MARGIN:
        raise errors.BadFileError(
            path, f"{shown} pixels, {needed} needed, at most {MARGIN} more or fewer are accepted"
        )
    height, width = size
    labels = labels[:height, :width]
    padding = ((0, height - labels.shape[0]), (0, width - labels.shape[1]))
    labels = np.pad(labels, padding, constant_values=sensors.IGNORE_LABEL)
    return labels, (*found, Finding("labels resized", path, f"{shown} to {needed}"))
