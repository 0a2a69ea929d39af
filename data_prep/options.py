"""What a build accepts, by flags."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Options:
    """Limits and corrections that all data sets share.

    Attributes:
      s2_offset: subtracted from raw Sentinel-2 pixels (floor 0); None to detect it for each image.
      max_invalid: largest share of invalid pixels; a season or tile with more is skipped.
      max_days: largest number of days between the Sentinel-1 and the Sentinel-2 image of a pair.
      test_cities: cities whose tiles are the test split, for data sets without one.
    """

    s2_offset: int | None = None
    # A season that is mostly nodata teaches little, and costs as much as any other.
    max_invalid: float = 0.5
    # Seasons are 91 days apart: further away, images show another season.
    max_days: float = 60
    test_cities: tuple[str, ...] = ()

    def metadata(self) -> dict[str, Any]:
        """What the data set says about how it was built."""
        return {
            "s2_offset": "auto" if self.s2_offset is None else self.s2_offset,
            "max_invalid": self.max_invalid,
            "max_days": self.max_days,
        }


DEFAULT = Options()
