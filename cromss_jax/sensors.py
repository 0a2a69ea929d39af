"""Constants of the sensors and the land-cover classes: bands, statistics, names, colours.

Band statistics are those of SSL4EO-S12 (L1C for Sentinel-2, dB for Sentinel-1), as in the published
code.
"""

from collections.abc import Mapping

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

# The band subsets of published weights, by number of bands.
S2_BAND_SUBSETS: Mapping[int, tuple[str, ...]] = {
    3: ("B4", "B3", "B2"),
    9: ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B11", "B12"),
    12: tuple(band for band in S2_BANDS if band != "B10"),
    13: S2_BANDS,
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
BAND_STATISTICS: Mapping[str, tuple[float, float]] = {
    band: (mean, std)
    for band, mean, std in zip(S1_BANDS + S2_BANDS, S1_MEAN + S2_MEAN, S1_STD + S2_STD, strict=True)
}

# Class names in label order, each with its usual colour "#rrggbb".
Legend = Mapping[str, str]

DYNAMIC_WORLD: Legend = {
    "water": "#419bdf",
    "trees": "#397d49",
    "grass": "#88b053",
    "flooded vegetation": "#7a87c6",
    "crops": "#e49635",
    "shrub & scrub": "#dfc35a",
    "built area": "#c4281b",
    "bare ground": "#a59b8f",
    "snow & ice": "#b39fe1",
}
# Each class has the colour of the most similar CORINE class.
OSM: Legend = {
    "urban": "#e6004d",
    "arable land": "#ffffa8",
    "forest": "#80ff00",
    "industrial": "#cc4df2",
    "artificial vegetation": "#ffa6ff",
    "dump site": "#a64d00",
    "pasture": "#e6e64d",
    "permanent crops": "#f2a64d",
    "water": "#00ccf2",
    "open space": "#e6e6e6",
    "shrub": "#a6ff80",
    "wetland": "#a6a6ff",
    "coastal": "#4d4dff",
}
# The data set's own names and colours (simplified IGBP), in the order of Dynamic World.
DFC2020: Legend = {
    "water": "#1c0dff",
    "forest": "#009900",
    "grassland": "#b6ff05",
    "wetlands": "#27ff87",
    "croplands": "#c24f44",
    "shrubland": "#c6b044",
    "urban/built-up": "#a5a5a5",
    "barren": "#f9ffa4",
}

# The classes of the pretraining labels.
CLASS_NAMES = tuple(DYNAMIC_WORLD)
CLASS_COLOURS = tuple(DYNAMIC_WORLD.values())
NUM_CLASSES = len(CLASS_NAMES)
IGNORE_LABEL = 255


def scale_to_uint8(values: np.ndarray, band: str) -> np.ndarray:
    """Maps raw values of one band to 0..255 over mean ± 2 standard deviations.

    `(x - (mean - 2 std)) / (4 std) * 255`, clipped to 0..255 and truncated, as the published
    code prepares its downstream data. The network's input is the result divided by 255.

    Args:
      values: any shape; S1 in dB, S2 L1C as reflectance * 10000.
      band: a name of `S1_BANDS` or `S2_BANDS`.

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
    mean, std = BAND_STATISTICS[band]
    low = mean - 2 * std
    scaled = (values - low) / (4 * std) * 255
    return np.clip(scaled, 0, 255).astype(np.uint8)


def values_of_uint8(pixels: np.ndarray, band: str) -> np.ndarray:
    """Inverse of `scale_to_uint8`, up to clipping and truncation.

    Args:
      pixels: any shape, 0..255.
      band: a name of `S1_BANDS` or `S2_BANDS`.

    Returns:
      float64 of the same shape; S1 in dB, S2 as reflectance * 10000.
    """
    mean, std = BAND_STATISTICS[band]
    return mean - 2 * std + pixels / 255 * (4 * std)
