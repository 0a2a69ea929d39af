"""Where a location lies and when it is imaged: coordinates, climate, spectra and dates."""

import dataclasses
import datetime
import math

import numpy as np

from data_prep.sample.land import Land

# (west, east, south, north) degrees on land, for plausible coordinates, seasons and hemispheres.
_REGIONS = (
    (0, 30, 43, 57),
    (-115, -80, 33, 52),
    (-65, -48, -33, -8),
    (15, 35, -25, 10),
    (75, 85, 18, 28),
    (105, 118, 25, 40),
    (135, 148, -35, -22),
    (60, 110, 52, 62),
)

# Top-of-atmosphere reflectance * 10000 of pure covers in the order of S2_BANDS, set by eye after
# real L1C scenes. A pixel is a mixture of two of them.
_SPECTRA = {
    "clear water": (1300, 960, 680, 400, 340, 270, 250, 215, 200, 90, 10, 110, 70),
    "turbid water": (1450, 1190, 1080, 830, 820, 600, 600, 470, 450, 170, 10, 180, 120),
    "conifers": (1200, 860, 640, 400, 640, 1450, 1750, 1700, 1900, 620, 11, 800, 350),
    "broadleaf": (1230, 890, 760, 440, 850, 2250, 2850, 2800, 3100, 850, 11, 1300, 540),
    "leafless": (1270, 980, 830, 720, 960, 1350, 1520, 1480, 1700, 520, 11, 1450, 800),
    "meadow": (1320, 1080, 1150, 880, 1600, 2850, 3200, 3250, 3450, 950, 12, 2250, 1250),
    "dry grass": (1400, 1240, 1320, 1480, 1850, 2350, 2550, 2550, 2800, 800, 13, 2950, 1900),
    "marsh plants": (1270, 950, 800, 560, 850, 1700, 1980, 1930, 1980, 500, 11, 900, 420),
    "marsh dead": (1310, 1020, 900, 800, 980, 1250, 1380, 1350, 1400, 400, 11, 1150, 650),
    "green crop": (1250, 930, 950, 520, 1150, 3500, 4400, 4350, 4600, 1150, 12, 1700, 740),
    "ripe crop": (1490, 1390, 1540, 1880, 2250, 2650, 2850, 2850, 3100, 850, 14, 3400, 2350),
    "soil": (1370, 1200, 1170, 1300, 1480, 1640, 1800, 1800, 2000, 600, 13, 2500, 1950),
    "shrubs": (1330, 1080, 1030, 1050, 1300, 1750, 1950, 1950, 2200, 680, 13, 2300, 1400),
    "asphalt": (1500, 1350, 1270, 1260, 1340, 1430, 1500, 1510, 1580, 500, 13, 1560, 1300),
    "pale roof": (2150, 2250, 2250, 2400, 2480, 2560, 2620, 2660, 2720, 800, 15, 2600, 2250),
    "red roof": (1520, 1380, 1420, 1900, 2050, 2150, 2250, 2250, 2350, 680, 14, 2350, 2050),
    "sand": (2050, 2050, 2250, 2600, 2750, 2900, 3050, 3050, 3300, 900, 15, 3850, 3300),
    "rock": (1700, 1640, 1660, 1780, 1860, 1950, 2030, 2030, 2150, 620, 15, 2350, 2050),
    "snow": (7300, 7200, 6900, 7000, 6950, 6800, 6600, 6400, 6200, 3300, 45, 1050, 950),
    "cloud": (4400, 4250, 4100, 4200, 4300, 4500, 4650, 4700, 4750, 2400, 160, 3500, 2700),
}
# The index of each cover in `Geography.spectra`.
COVER = {name: i for i, name in enumerate(_SPECTRA)}
_SOILS = [COVER[name] for name in ("soil", "ripe crop", "sand", "rock", "shrubs", "dry grass")]


@dataclasses.dataclass(frozen=True)
class Geography:
    """Coordinates of a location, and how its surfaces differ from those of other locations."""

    longitude: float
    latitude: float
    spectra: np.ndarray  # [covers,13] float32, of the soils and plants here
    parcels: np.ndarray  # [3,parcels] float32 uniform draws: kind, brightness, delay of sowing
    turbidity: float
    conifers: float  # share of the stands
    gardens: float  # share of built pixels' surface
    dryness: float
    dry_time: float  # of the year, 0..1
    sowing_time: float  # of the year, 0..1, as on the northern hemisphere
    rock: bool  # bare ground is rock, not sand


@dataclasses.dataclass(frozen=True)
class Season:
    """One time of the year at a location."""

    year: float  # time of the year as on the northern hemisphere, of period 1
    warmth: float  # -1 winter .. 1 summer, near 0 all year in the tropics
    snow: bool  # covers flat land too


def draw_geography(rng: np.random.Generator, land: Land) -> Geography:
    """Draws coordinates and surface properties for a land."""
    west, east, south, north = _REGIONS[rng.integers(len(_REGIONS))]
    spectra = np.array(list(_SPECTRA.values()), np.float32)
    spectra *= rng.normal(1, 0.03, spectra.shape).astype(np.float32)
    spectra[_SOILS] *= np.float32(rng.uniform(0.88, 1.14))
    return Geography(
        longitude=rng.uniform(west, east),
        latitude=rng.uniform(south, north),
        spectra=spectra,
        parcels=rng.random((land.parcel.max() + 1, 3), dtype=np.float32).T,
        turbidity=rng.uniform(0, 0.7),
        conifers=rng.uniform(0, 1),
        gardens=rng.uniform(0.05, 0.35),
        dryness=rng.uniform(0.05, 0.5),
        dry_time=rng.random(),
        sowing_time=rng.uniform(0.12, 0.25),
        rock=bool(land.height.any()) or rng.random() < 0.3,
    )


def draw_season(rng: np.random.Generator, geography: Geography, time: datetime.datetime) -> Season:
    """The season of a location at a date; snow falls in some cold seasons only."""
    year = time.timetuple().tm_yday / 366 + (0.5 if geography.latitude < 0 else 0)
    warmth = np.cos(2 * np.pi * (year - 0.55)) * min(abs(geography.latitude) / 45, 1.2)
    return Season(year, warmth, bool(warmth < -0.55 and rng.random() < 0.6))


def acquisition_times(
    rng: np.random.Generator, seasons: int, longitude: float
) -> tuple[tuple[datetime.datetime, ...], tuple[datetime.datetime, ...]]:
    """UTC times of the seasons' S1 and S2 acquisitions, spread over a year, a few days apart."""
    start = datetime.datetime(2020, 1, 1) + datetime.timedelta(days=rng.uniform(0, 60))
    gap = 365 / seasons
    # Days between the sensors' passes, so few that a season's images stay together.
    most_days_off = max(1, min(5, int(gap / 8)))
    s1_times, s2_times = [], []
    # A single season lies anywhere in the year; several stay apart.
    spread = 0.5 if seasons == 1 else 0.15
    for season in range(seasons):
        day = start + datetime.timedelta(days=int(gap * (season + rng.uniform(-spread, spread))))
        midnight = day.replace(hour=0, minute=0, second=0, microsecond=0)
        # Sentinel-2 passes at half past ten local solar time, Sentinel-1 at six.
        s2_hour = 10.5 - longitude / 15 + rng.uniform(-0.2, 0.2)
        s1_hour = 6.0 - longitude / 15 + rng.uniform(-0.2, 0.2)
        days_off = int(rng.choice([-1, 1]) * rng.integers(1, most_days_off + 1))
        s2_times.append(midnight + datetime.timedelta(hours=s2_hour))
        s1_times.append(midnight + datetime.timedelta(days=days_off, hours=s1_hour))
    return tuple(s1_times), tuple(s2_times)


def utm(longitude: float, latitude: float) -> tuple[int, tuple[int, int], str]:
    """EPSG code, easting and northing to within a kilometre on the 60 m grid, and MGRS tile."""
    zone = int((longitude + 180) // 6) + 1
    phi = math.radians(latitude)
    meridian = 111132.95 * latitude - 16038.5 * math.sin(2 * phi) + 16.8 * math.sin(4 * phi)
    easting = 500000 + (longitude - (6 * zone - 183)) * 111320 * math.cos(phi) * 0.9996
    northing = 0.9996 * meridian + (0 if latitude >= 0 else 10_000_000)
    easting, northing = int(easting) // 60 * 60, int(northing) // 60 * 60
    band = "CDEFGHJKLMNPQRSTUVWX"[int((latitude + 80) // 8)]
    column = ("ABCDEFGH", "JKLMNPQR", "STUVWXYZ")[(zone - 1) % 3][easting // 100_000 - 1]
    row = "ABCDEFGHJKLMNPQRSTUV"[(northing // 100_000 + (5 if zone % 2 == 0 else 0)) % 20]
    epsg = (32600 if latitude >= 0 else 32700) + zone
    return epsg, (easting, northing), f"T{zone:02d}{band}{column}{row}"
