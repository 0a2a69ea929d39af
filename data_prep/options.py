"""What a build accepts, by flags."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from cromss_jax import sensors
from cromss_jax.legend import Legend


@dataclasses.dataclass(frozen=True)
class Cleaning:
    """Which labels an audit changes.

    Attributes:
      audit: folder of `cromss_jax.audit`.
      above: labels that are wrong with this probability or more are changed.
      how: "replace" by the class that is suggested, or "ignore".
    """

    audit: str
    above: float = 0.9
    how: str = "replace"

    @property
    def past(self) -> str:
        """What has been done."""
        return f"{self.how}d"


@dataclasses.dataclass(frozen=True)
class Options:
    """Limits and corrections that all data sets share.

    Attributes:
      s2_offset: subtracted from raw Sentinel-2 pixels (floor 0); None to detect it for each image.
      max_invalid: largest share of invalid pixels; a season or tile with more is skipped.
      max_days: largest number of days between the Sentinel-1 and the Sentinel-2 image of a pair.
      test_cities: cities whose tiles are the test split, for data sets without one.
      modalities: the imagery to read, of `sensors.MODALITIES`.
      s2_level: processing level of the Sentinel-2 imagery, "L1C" or "L2A".
      s2_bands: its bands in the order of `sensors.S2_BANDS`; empty for all of the level.
      legend: of the labels; None for the data set's own.
      block_size: side in metres of the blocks of the earth that are held back as a whole for
        validation; 0 to hold back locations singly. Scenes have their own, see `scenes.Cutting`.
      labels: which labels DFC2020 is built with: "dfc", or "lc" (MODIS) with "dfc" as truth.
      cleaning: labels to change; None for none.
    """

    s2_offset: int | None = None
    # A season that is mostly nodata teaches little, and costs as much as any other.
    max_invalid: float = 0.5
    # Seasons are 91 days apart: further away, images show another season.
    max_days: float = 60
    test_cities: tuple[str, ...] = ()
    modalities: tuple[str, ...] = sensors.MODALITIES
    s2_level: str = "L1C"
    s2_bands: tuple[str, ...] = ()
    legend: Legend | None = None
    block_size: float = 0.0
    labels: str = "dfc"
    cleaning: Cleaning | None = None

    @property
    def bands(self) -> dict[str, tuple[str, ...]]:
        """Names of the bands to read by modality."""
        s2 = tuple(self.s2_bands or sensors.S2_STATISTICS[self.s2_level])
        names = {"s1": sensors.S1_BANDS, "s2": s2}
        return {modality: names[modality] for modality in self.modalities}

    def described_bands(self, is_native: bool) -> tuple[sensors.Band, ...]:
        """The bands with their scaling, for metadata; see `sensors.preset_bands`."""
        s2_bands = self.bands.get("s2", ())
        return sensors.preset_bands(self.modalities, s2_bands, self.s2_level, is_native)

    def metadata(
        self, legend: Legend, band_list: Sequence[sensors.Band], origin: str
    ) -> dict[str, Any]:
        """What the data set says about itself and how it was built.

        Args:
          legend: of its labels.
          band_list: of its imagery.
          origin: what it was built from.
        """
        return {
            "legend": legend.to_dict(),
            "bands": [list(band.to_row()) for band in band_list],
            "origin": origin,
            **self.choices(),
        }

    def choices(self) -> dict[str, Any]:
        """What was chosen by flags."""
        return {
            "s2_offset": "auto" if self.s2_offset is None else self.s2_offset,
            "max_invalid": self.max_invalid,
            "max_days": self.max_days,
            "modalities": list(self.modalities),
            "s2_level": self.s2_level,
            "s2_bands": list(self.bands.get("s2", ())),
            "block_size": self.block_size,
            "test_cities": list(self.test_cities),
            **({"cleaning": dataclasses.asdict(self.cleaning)} if self.cleaning else {}),
        }


DEFAULT = Options()
