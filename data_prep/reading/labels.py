"""Label maps: from the values of a file to classes, on the grid of the imagery."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from cromss_jax import sensors
from data_prep import errors
from data_prep.reading import geotiff, nodata
from data_prep.report import Finding

# Pixels by which a label map may be larger or smaller than the imagery, as some of NoL are.
MARGIN = 2


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """The classes of the values of a label file.

    Attributes:
      classes: the class of each value that has one.
      ignored: values without a class; None means all other values.
    """

    classes: Mapping[int, int]
    ignored: tuple[int, ...] | None

    def apply(self, path: str, pixels: np.ndarray) -> np.ndarray:
        """Values (H, W) of any dtype to classes, uint8, 255 where ignored.

        Raises:
          errors.BadFileError: if there are values that are neither, or fractions.
        """
        if np.issubdtype(pixels.dtype, np.floating):
            check_whole(path, pixels)
        labels = np.full(pixels.shape, sensors.IGNORE_LABEL, np.uint8)
        known = np.full(pixels.shape, self.ignored is None)
        for value in self.ignored or ():
            known |= pixels == value
        for value, label in self.classes.items():
            here = pixels == value
            labels[here] = label
            known |= here
        if not known.all():
            needed = _ranges(sorted({*self.classes, *(self.ignored or ())}))
            shown = values_text(pixels[~known])
            raise errors.BadFileError(path, f"labels {shown} are not {needed}")
        return labels


# Labels that are classes of Dynamic World already.
DYNAMIC_WORLD = LabelMap(
    {value: value for value in range(sensors.NUM_CLASSES)}, ignored=(sensors.IGNORE_LABEL,)
)


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


def _ranges(values: Sequence[int]) -> str:
    """Sorted values as text: 0..8, 255."""
    starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1] + 1]
    ends = [*(start - 1 for start in starts[1:]), len(values) - 1]
    return ", ".join(
        str(values[start]) if start == end else f"{values[start]}..{values[end]}"
        for start, end in zip(starts, ends, strict=True)
    )


def values_text(values: np.ndarray) -> str:
    """Some of the different values."""
    values = np.unique(values)
    return ", ".join(map(str, values[:10])) + (", ..." if values.size > 10 else "")


def read_labels(
    path: str, image: geotiff.Image, label_map: LabelMap, size: tuple[int, int]
) -> tuple[np.ndarray, tuple[Finding, ...]]:
    """Labels on the grid of the imagery.

    Args:
      path: of the label file.
      image: of one band.
      label_map: from values to classes.
      size: height and width of the imagery.

    Returns:
      Labels (H, W) uint8, 255 where ignored or invalid, and findings.

    Raises:
      errors.BadFileError: if the size differs by more than `MARGIN`, or labels are wrong.
    """
    found = (Finding("turned", path, "rows from south to north"),) if image.is_turned else ()
    valid = np.ones(image.size, bool) if image.valid is None else image.valid[0]
    # Of the first known value, which is replaced below.
    known = next(iter(label_map.classes))
    labels = label_map.apply(path, np.where(valid, image.pixels[0], image.pixels.dtype.type(known)))
    labels = nodata.ignore(labels, valid)
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
