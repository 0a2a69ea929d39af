"""Sentinel-2 and Sentinel-1 images of a location in one season."""

import numpy as np
from scipy import ndimage, special

from cromss_jax.presets import DYNAMIC_WORLD
from cromss_jax.sensors import S2_BANDS, S2_BANDS_BY_RESOLUTION
from data_prep.sample.fields import gaussian_field
from data_prep.sample.geography import COVER, Geography, Season
from data_prep.sample.land import BARE, BUILT, CROPS, IS_OPEN, SNOW, TREES, WATER, Land

_HAZE = np.array([520, 430, 330, 260, 230, 190, 170, 150, 130, 30, 4, 50, 30], np.float32)

# By class, the two covers that its pixels are mixtures of; trees, crops, roofs and rock differ.
_MIXED_COVERS = [
    (COVER[first], COVER[second])
    for first, second in (
        ("clear water", "turbid water"),
        ("broadleaf", "leafless"),
        ("meadow", "dry grass"),
        ("marsh plants", "marsh dead"),
        ("green crop", "soil"),
        ("shrubs", "dry grass"),
        ("asphalt", "meadow"),
        ("sand", "soil"),
        ("snow", "rock"),
    )
]

# A crop's year: its cover at these fractions of a year after sowing.
_CROP_STAGES = (0.0, 0.22, 0.48, 0.62, 0.8, 1.0)
_CROP_COVERS = np.array(
    [COVER[n] for n in ("soil", "green crop", "green crop", "ripe crop", "soil", "soil")]
)

# By class: how much brightness varies from pixel to pixel, over patches, and between parcels.
_TEXTURE = np.array(
    [
        (0.02, 0.03, 0.0), (0.11, 0.06, 0.05), (0.04, 0.05, 0.05), (0.09, 0.08, 0.03),
        (0.03, 0.03, 0.05), (0.08, 0.08, 0.05), (0.16, 0.04, 0.04), (0.05, 0.06, 0.04),
        (0.03, 0.04, 0.0),
    ],
    np.float32,
).T  # fmt: skip

# By class, dB: mean VV, mean VH, and the spread between parcels and over patches.
_BACKSCATTER = np.array(
    [
        (-21.0, -27.0, 0.3), (-8.3, -13.8, 0.5), (-12.8, -19.3, 0.9), (-7.2, -16.8, 1.0),
        (-11.0, -17.3, 1.8), (-11.6, -16.9, 0.9), (-4.8, -12.0, 1.0), (-15.3, -22.2, 1.1),
        (-14.0, -20.5, 1.2),
    ],
    np.float32,
).T  # fmt: skip
_LOOKS = 4.5
_CLOUD_SHARE = 0.02  # of the seasons have a cloud


def _crop_covers(geography: Geography, season: Season) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each parcel as a field: the two covers that it mixes, and the share of the second."""
    kind, _, delay = geography.parcels
    # Spring crops, then later ones, then winter crops.
    offset = np.select([kind < 0.55, kind < 0.8], [0.0, 0.12], 0.55)
    age = (season.year - geography.sowing_time - offset - 0.08 * delay) % 1
    stages = np.array(_CROP_STAGES, np.float32)
    stage = np.searchsorted(stages, age, side="right").clip(1, len(stages) - 1) - 1
    share = (age - stages[stage]) / (stages[stage + 1] - stages[stage])
    return _CROP_COVERS[stage], _CROP_COVERS[stage + 1], share


def _mixture(
    rng: np.random.Generator,
    geography: Geography,
    land: Land,
    season: Season,
    truth: np.ndarray,
    patches: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two covers that each pixel [T,T] mixes, and the share of the second."""
    leafless = 1 - special.expit(8 * (season.warmth + 0.4))
    dry = geography.dryness + 0.3 * np.cos(2 * np.pi * (season.year - geography.dry_time))
    first, second = np.array(_MIXED_COVERS).T
    first[BARE] = COVER["rock" if geography.rock else "sand"]
    share = np.array(
        [
            geography.turbidity,
            leafless,
            dry,
            0.5 * leafless + 0.2,
            0,
            0.2,
            geography.gardens,
            0.1,
            0.1,
        ],
        np.float32,
    )
    a, b = first[truth], second[truth]
    w = share[truth] + 0.12 * patches

    kind = geography.parcels[0][land.parcel]
    stands = (truth == TREES) & (kind < geography.conifers)
    a[stands] = COVER["conifers"]
    w[stands] *= 0.15
    crops = truth == CROPS
    for mixed, of_parcel in zip((a, b, w), _crop_covers(geography, season), strict=True):
        mixed[crops] = of_parcel[land.parcel[crops]]
    # Houses of one block have similar roofs.
    roofs = 0.6 * gaussian_field(rng, len(truth), 0.9) + 2 * (kind - 0.5)
    houses = (truth == BUILT) & ~land.street
    a[houses & (roofs > -0.5)] = COVER["red roof"]
    a[houses & (roofs > 0.5)] = COVER["pale roof"]
    w[(truth == BUILT) & land.street] *= 0.3
    shallow = (truth == WATER) & (land.bank > -6)
    w[shallow] += 0.3
    return a, b, w.clip(0, 1)


def _shade(land: Land) -> np.ndarray:
    """Sunlight [T,T] on slopes relative to flat land, the sun in the south-east."""
    dy, dx = np.gradient(14 * land.height)
    return np.clip(1 - 1.2 * dx - 1.2 * dy, 0.45, 1.4)


def s2_scene(
    rng: np.random.Generator, geography: Geography, land: Land, season: Season, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The reflectance that Sentinel-2 images, before the noise and resolution of its sensor.

    Returns:
      L1C reflectance * 10000 [13,T,T] float32 in the order of `S2_BANDS`, all at 10 m, and the
      mask [T,T] of clouds that hide the land.
    """
    size = len(truth)
    fine, patches = gaussian_field(rng, size, 0.8), gaussian_field(rng, size, 8)
    first, second, share = _mixture(rng, geography, land, season, truth, patches)
    spectra = geography.spectra.T
    # `take` gathers several times as fast as an index does.
    scene = spectra.take(first, axis=1)
    scene += (spectra.take(second, axis=1) - scene) * share

    texture = _TEXTURE.take(truth, axis=1)
    brightness = 3.4 * (geography.parcels[1][land.parcel] - 0.5)  # variance about 1
    gain = 1 + texture[0] * fine + texture[1] * patches + texture[2] * brightness
    sunlight = np.float32(1 + 0.05 * season.warmth + rng.normal(0, 0.03))
    scene *= (gain * sunlight * _shade(land)).clip(0.3)
    scene *= rng.normal(1, 0.015, (len(S2_BANDS), 1, 1)).astype(np.float32)
    scene[S2_BANDS.index("B9")] *= rng.uniform(0.6, 1.2)  # water vapour
    scene[S2_BANDS.index("B10")] += rng.uniform(-5, 20)  # cirrus
    haze = rng.exponential(0.2) * (1 + 0.3 * gaussian_field(rng, size, 80))
    scene += haze.clip(0) * _HAZE[:, None, None]

    cloud = np.zeros(truth.shape, np.float32)
    if rng.random() < _CLOUD_SHARE:
        cloud = (1.5 * (gaussian_field(rng, size, 30, 1.0) - rng.uniform(0.3, 1))).clip(0, 1)
        scene += (spectra[:, COVER["cloud"], None, None] - scene) * cloud
    return scene, cloud > 0.3


def sense_s2(rng: np.random.Generator, scene: np.ndarray, resolution: int) -> np.ndarray:
    """The bands of one resolution of a scene [13,T,T], as products hold them.

    Args:
      rng: of the sensor's noise.
      scene: as of `s2_scene`.
      resolution: 10, 20 or 60 metres; bands at 10 m are blurred, others averaged.

    Returns:
      [H,W,bands] uint16, L1C reflectance * 10000, in the order of `S2_BANDS_BY_RESOLUTION`.
    """
    factor = resolution // 10
    seen = scene[[S2_BANDS.index(name) for name in S2_BANDS_BY_RESOLUTION[resolution]]]
    if factor == 1:
        seen = ndimage.gaussian_filter(seen, (0, 0.5, 0.5), truncate=3)
    else:
        # The mean of blocks, many times as fast as a reshape to blocks and `mean`.
        seen = sum(seen[..., i::factor] for i in range(factor))
        seen = sum(seen[:, i::factor] for i in range(factor)) / factor**2
    noise = rng.standard_normal(seen.shape, dtype=np.float32)
    seen += noise * (3 + 0.012 * seen)
    return np.moveaxis(seen.clip(1, 20000).round().astype(np.uint16), 0, -1)


def s1_image(
    rng: np.random.Generator, geography: Geography, land: Land, season: Season, truth: np.ndarray
) -> np.ndarray:
    """Backscatter [T,T,2] float32 in dB, VV and VH, with speckle."""
    size = len(truth)
    of_truth = _BACKSCATTER.take(truth, axis=1)
    mean, spread = of_truth[:2], of_truth[2]
    patches = gaussian_field(rng, size, 10)
    # Fields that are dark in Sentinel-2 need not be dark in Sentinel-1: use another random value.
    brightness = 3.4 * (geography.parcels[2][land.parcel] - 0.5)
    mean += spread * (0.4 * patches + 0.9 * brightness)
    wind = rng.uniform(0, 5) * (1 + 0.2 * patches)
    mean += np.where(truth == WATER, wind, 0) * np.array([1, 0.5], np.float32)[:, None, None]
    # Moist soil is brighter under thin cover, leafless trees are darker in VH, wet snow absorbs.
    shift = np.zeros((2, len(DYNAMIC_WORLD)))
    shift[:, IS_OPEN] = rng.normal(0, 0.8)
    shift[1, TREES] = -0.8 * (season.warmth < -0.4)
    shift[:, SNOW] = -2.5 * (season.warmth > -0.5)
    mean += shift.take(truth, axis=1)
    # Walls that face the radar are bright, the streets between them dark.
    walls = 2.6 * gaussian_field(rng, size, 0.8) - 4 * land.street
    mean += np.where(truth == BUILT, walls, 0)
    mean += 6 * (_shade(land) - 1)
    power = ndimage.gaussian_filter(10 ** (mean / 10), (0, 0.6, 0.6), truncate=3)
    speckle = rng.standard_gamma(_LOOKS, (size, size, 2), dtype=np.float32) / np.float32(_LOOKS)
    return 10 * np.log10((np.moveaxis(power, 0, -1) * speckle).clip(1e-4))
