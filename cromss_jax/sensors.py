"""Bands of the sensors, and how the records of a data set hold them.

A data set says its own bands and scaling (`Band`). The statistics here are presets: those of
SSL4EO-S12 (dB for Sentinel-1; L1C and L2A for Sentinel-2), as in the published code.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

MODALITIES = ("s1", "s2")

S1_BANDS = ("VV", "VH")
S2_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")

# Bands by native ground sampling distance in metres. Each group has the order of S2_BANDS.
S2_BANDS_BY_RESOLUTION: Mapping[int, tuple[str, ...]] = {
    10: ("B2", "B3", "B4", "B8"),
    20: ("B5", "B6", "B7", "B8A", "B11", "B12"),
    60: ("B1", "B9", "B10"),
}

# The band subsets of published weights, by number of bands. 12 are all of L2A.
S2_BAND_SUBSETS: Mapping[int, tuple[str, ...]] = {
    3: ("B4", "B3", "B2"),
    9: ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B11", "B12"),
    12: tuple(band for band in S2_BANDS if band != "B10"),
    13: S2_BANDS,
}

# Those that configurations offer: also all bands at 10 and 20 m.
S2_BAND_CHOICES: Mapping[int, tuple[str, ...]] = {
    **S2_BAND_SUBSETS,
    10: ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12"),
}

# Mean and standard deviation over SSL4EO-S12: S1 in dB, S2 L1C in reflectance * 10000.
S1_MEAN = (-12.54847273, -20.19237134)
S1_STD = (5.25697717, 5.91150917)
S2_MEAN = (
    1605.57504906, 1390.78157673, 1314.8729939, 1363.52445545, 1549.44374991, 2091.74883118,
    2371.7172463, 2299.90463006, 2560.29504086, 830.06605044, 22.10351321, 2177.07172323,
    1524.06546312,
)  # fmt: skip
S2_STD = (
    786.78685367, 850.34818441, 875.06484736, 1138.84957046, 1122.17775652, 1161.59187054,
    1274.39184232, 1248.42891965, 1345.52684884, 577.31607053, 51.15431158, 1336.09932639,
    1136.53823676,
)  # fmt: skip
# L2A without the offset of baseline 04.00, B10 left out.
_S2_L2A_MEAN = (
    752.40087073, 884.29673756, 1144.16202635, 1297.47289228, 1624.90992062, 2194.6423161,
    2422.21248945, 2517.76053101, 2581.64687018, 2645.51888987, 2368.51236873, 1805.06846033,
)  # fmt: skip
_S2_L2A_STD = (
    1108.02887453, 1155.15170768, 1183.6292542, 1368.11351514, 1370.265037, 1355.55390699,
    1416.51487101, 1474.78900051, 1439.3086061, 1582.28010962, 1455.52084939, 1343.48379601,
)  # fmt: skip
BAND_STATISTICS: Mapping[str, tuple[float, float]] = {
    band: (mean, std)
    for band, mean, std in zip(S1_BANDS + S2_BANDS, S1_MEAN + S2_MEAN, S1_STD + S2_STD, strict=True)
}

# Of Sentinel-2 by processing level. L2A has no B10.
S2_STATISTICS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "L1C": {band: BAND_STATISTICS[band] for band in S2_BANDS},
    "L2A": {
        band: (mean, std)
        for band, mean, std in zip(S2_BAND_SUBSETS[12], _S2_L2A_MEAN, _S2_L2A_STD, strict=True)
    },
}

# The label of pixels without a class.
IGNORE_LABEL = 255


@dataclasses.dataclass(frozen=True)
class Band:
    """A band as the records of a data set hold it.

    Raw values x are stored as uint8, `floor(clip((x - low) / (high - low) * 255, 0, 255))`, `low`
    being mean - 2 std and `high` mean + 2 std.

    Attributes:
      name: of `S1_BANDS` or `S2_BANDS`.
      array: the array of a record that holds it: "s1", "s2", or "s2_20m" for bands at 20 m that are
        stored at their native size.
      mean: of raw values; makes `low` and `high` with `std`.
      std: standard deviation of raw values.
      unit: of raw values, such as "dB".
    """

    name: str
    array: str
    mean: float
    std: float
    unit: str

    @property
    def modality(self) -> str:
        """Of `MODALITIES`."""
        return self.array.partition("_")[0]

    @property
    def metres(self) -> int:
        """Size of a pixel of the array."""
        return int(self.array.partition("_")[2].removesuffix("m") or 10)

    @property
    def low(self) -> float:
        """The raw value that becomes 0."""
        return self.mean - 2 * self.std

    @property
    def high(self) -> float:
        """The raw value that becomes 255."""
        return self.mean + 2 * self.std

    def to_row(self) -> tuple[str, str, float, float, str]:
        """The values of the attributes in order, for metadata and configurations."""
        return dataclasses.astuple(self)


def bands_of_rows(rows: Iterable[Sequence[Any]]) -> tuple[Band, ...]:
    """The bands that `Band.to_row` made rows of."""
    return tuple(Band(*row) for row in rows)


def preset_bands(
    modalities: Iterable[str] = MODALITIES,
    s2_bands: Iterable[str] = S2_BANDS,
    s2_level: str = "L1C",
    is_native: bool = False,
) -> tuple[Band, ...]:
    """Bands with the statistics of SSL4EO-S12, in the order of records.

    Args:
      modalities: those that the records have.
      s2_bands: the Sentinel-2 bands that they have, as far as the level has them, in any order.
      s2_level: "L1C" or "L2A".
      is_native: whether Sentinel-2 bands are stored at native size, an array for each, or all in
        one array at 10 m.
    """
    found = []
    if "s1" in modalities:
        found += [Band(name, "s1", *BAND_STATISTICS[name], "dB") for name in S1_BANDS]
    if "s2" in modalities:
        groups = S2_BANDS_BY_RESOLUTION if is_native else {0: S2_BANDS}
        found += [
            Band(
                name,
                f"s2_{metres}m" if metres else "s2",
                *S2_STATISTICS[s2_level][name],
                f"reflectance * 10000 ({s2_level})",
            )
            for metres, names in groups.items()
            for name in names
            if name in set(s2_bands) & S2_STATISTICS[s2_level].keys()
        ]
    return tuple(found)


def arrays_of(bands: Iterable[Band]) -> dict[str, tuple[str, ...]]:
    """Names of the bands in each array of a record, in order."""
    arrays: dict[str, tuple[str, ...]] = {}
    for band in bands:
        arrays[band.array] = (*arrays.get(band.array, ()), band.name)
    return arrays


def scale_to_uint8(
    values: np.ndarray,
    band: str,
    statistics: Mapping[str, tuple[float, float]] = BAND_STATISTICS,
) -> np.ndarray:
    """Maps raw values of one band to 0..255 over mean ± 2 standard deviations.

    `(x - (mean - 2 std)) / (4 std) * 255`, clipped to 0..255 and truncated, as the published
    code prepares its downstream data. The network's input is the result divided by 255.

    Args:
      values: any shape; S1 in dB, S2 as reflectance * 10000.
      band: a name of `S1_BANDS` or `S2_BANDS`.
      statistics: mean and standard deviation by band.

    Returns:
      uint8, of the shape of `values`.

    Raises:
      ValueError: if `values` holds NaN or infinity.
    """
    if not np.isfinite(values).all():
        count = int(np.size(values) - np.isfinite(values).sum())
        raise ValueError(
            f"band {band} has {count} pixels that are NaN or infinite: replace or remove them"
        )
    mean, std = statistics[band]
    low = mean - 2 * std
    scaled = (values - low) / (4 * std) * 255
    return np.clip(scaled, 0, 255).astype(np.uint8)


def values_of_uint8(
    pixels: np.ndarray,
    band: str,
    statistics: Mapping[str, tuple[float, float]] = BAND_STATISTICS,
) -> np.ndarray:
    """Inverse of `scale_to_uint8`, up to clipping and truncation.

    Args:
      pixels: any shape, 0..255.
      band: a name of `S1_BANDS` or `S2_BANDS`.
      statistics: mean and standard deviation by band.

    Returns:
      float64 of the same shape; S1 in dB, S2 as reflectance * 10000.
    """
    mean, std = statistics[band]
    return mean - 2 * std + pixels / 255 * (4 * std)
