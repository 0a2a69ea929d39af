"""Label maps: from the values of a file to classes."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from cromss_jax import sensors
from data_prep import errors


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
          errors.BadFileError: if there are values that are neither.
        """
        labels = np.full(pixels.shape, sensors.IGNORE_LABEL, np.uint8)
        known = np.full(pixels.shape, self.ignored is None)
        for value in self.ignored or ():
            known |= pixels == value
        for value, label in self.classes.items():
            here = pixels == value
            labels[here] = label
            known |= here
        if not known.all():
            values = np.unique(pixels[~known])
            shown = ", ".join(map(str, values[:10])) + (", ..." if values.size > 10 else "")
            needed = sorted({*self.classes, *(self.ignored or ())})
            raise errors.BadFileError(path, f"labels {shown} are not {needed[0]}..{needed[-1]}")
        return labels
