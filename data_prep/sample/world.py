"""A procedural world: land with its true classes, both sensors' images of it, and noisy labels.

Every location is one coherent scene of an archetype (farmland, forest, river, settlement, coast,
mountains, shrubland, wetland) in several seasons. Arrays only: numpy and scipy, no files.
"""

import dataclasses
import datetime

import numpy as np

from cromss_jax.errors import UserError
from cromss_jax.sensors import S2_BANDS_BY_RESOLUTION
from data_prep.sample.archetypes import ARCHETYPES
from data_prep.sample.geography import (
    Geography,
    acquisition_times,
    draw_geography,
    draw_season,
    utm,
)
from data_prep.sample.imagery import s1_image, s2_scene, sense_s2
from data_prep.sample.label_noise import NOISE_KINDS, noisy_labels
from data_prep.sample.land import Land, true_map

__all__ = [
    "ARCHETYPES",
    "MAX_SEASONS",
    "NOISE_KINDS",
    "Location",
    "check_shape",
    "make_location",
]

# With more, Sentinel-1 and -2 dates would no longer be in the same order.
MAX_SEASONS = 52
_WRONG_SEASON_SHARE = 0.3  # of the locations have one season that is largely wrong


@dataclasses.dataclass(frozen=True)
class Location:
    """One location, imaged by both sensors in S seasons on a grid of T x T pixels of 10 m.

    Attributes:
      archetype: a name of `ARCHETYPES`.
      truth: [S,T,T] uint8, the true class 0..8, under clouds too.
      labels: [S,T,T] uint8, the noisy label 0..8, or 255 where a cloud hides the land.
      noise_kind: [S,T,T] uint8, index into `NOISE_KINDS`, 0 exactly where the label is right.
      s1: [S,T,T,2] float32, VV and VH in dB.
      s2_10m: [S,T,T,4] uint16, L1C reflectance * 10000, in the band order of
        `sensors.S2_BANDS_BY_RESOLUTION[10]`.
      s2_20m: [S,T/2,T/2,6] uint16, likewise at 20 m.
      s2_60m: [S,T/6,T/6,3] uint16, likewise at 60 m.
      s1_times: S acquisition times (UTC), in order of date.
      s2_times: S acquisition times (UTC), in order of date.
      epsg: the EPSG code of its UTM zone.
      origin: easting and northing in metres of the upper left corner of all grids.
      mgrs_tile: the Sentinel-2 tile that covers it, such as "T32UPU".
      longitude: in degrees east.
      latitude: in degrees north.
    """

    archetype: str
    truth: np.ndarray
    labels: np.ndarray
    noise_kind: np.ndarray
    s1: np.ndarray
    s2_10m: np.ndarray
    s2_20m: np.ndarray
    s2_60m: np.ndarray
    s1_times: tuple[datetime.datetime, ...]
    s2_times: tuple[datetime.datetime, ...]
    epsg: int
    origin: tuple[int, int]
    mgrs_tile: str
    longitude: float
    latitude: float

    def s2(self, resolution: int) -> np.ndarray:
        """The bands of one resolution, 10, 20 or 60 m: [S,H,W,bands] uint16."""
        return {10: self.s2_10m, 20: self.s2_20m, 60: self.s2_60m}[resolution]


def check_shape(seasons: int, tile_size: int) -> None:
    """Raises UserError if a location cannot have this number of seasons or pixels a side."""
    if tile_size < 6 or tile_size % 6:
        raise UserError(
            f"tile_size is {tile_size}: bands at 10, 20 and 60 m need a positive multiple of 6, "
            "such as 264"
        )
    if not 1 <= seasons <= MAX_SEASONS:
        raise UserError(f"seasons is {seasons}: must be from 1 to {MAX_SEASONS}")


def _image_season(
    rng: np.random.Generator, geography: Geography, land: Land, time: datetime.datetime, wrong: bool
) -> dict[str, np.ndarray]:
    """The arrays of one season, by the names of `Location`'s attributes."""
    season = draw_season(rng, geography, time)
    truth = true_map(rng, land, season.warmth, season.snow)
    scene, cloud = s2_scene(rng, geography, land, season, truth)
    labels, noise_kind = noisy_labels(rng, truth, land.parcel, cloud, wrong)
    s1 = s1_image(rng, geography, land, season, truth)
    s2 = {f"s2_{metres}m": sense_s2(rng, scene, metres) for metres in S2_BANDS_BY_RESOLUTION}
    return {"truth": truth, "labels": labels, "noise_kind": noise_kind, "s1": s1, **s2}


def make_location(seed: int, index: int, seasons: int = 4, tile_size: int = 264) -> Location:
    """Makes one location of the procedural world.

    Depends on its arguments alone. Eight consecutive locations have the eight archetypes, in an
    order that the seed shuffles again for every eight.

    Args:
      seed: of the world, 0 or more.
      index: of the location in that world, 0 or more.
      seasons: how many, 1 to `MAX_SEASONS`, spread over a year.
      tile_size: width and height in pixels of 10 m, a multiple of 6.

    Returns:
      The location's images, true classes, noisy labels and georeference.

    Raises:
      UserError: if `tile_size` does not fit the 20 m and 60 m bands, or `seasons` is out of
        range.
    """
    check_shape(seasons, tile_size)
    group, index_in_group = divmod(index, len(ARCHETYPES))
    order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, group)))
    archetype = order.permutation(list(ARCHETYPES))[index_in_group].item()

    root = np.random.SeedSequence(seed, spawn_key=(1, index))
    land_rng, *season_rngs = map(np.random.default_rng, root.spawn(1 + seasons))
    land = ARCHETYPES[archetype](land_rng, tile_size)
    geography = draw_geography(land_rng, land)
    s1_times, s2_times = acquisition_times(land_rng, seasons, geography.longitude)
    wrong_season = -1
    if land_rng.random() < _WRONG_SEASON_SHARE:
        wrong_season = land_rng.integers(seasons)

    images = [
        _image_season(rng, geography, land, time, s == wrong_season)
        for s, (rng, time) in enumerate(zip(season_rngs, s2_times, strict=True))
    ]
    epsg, origin, mgrs_tile = utm(geography.longitude, geography.latitude)
    return Location(
        archetype=archetype,
        **{name: np.stack([season[name] for season in images]) for name in images[0]},
        s1_times=s1_times,
        s2_times=s2_times,
        epsg=epsg,
        origin=origin,
        mgrs_tile=mgrs_tile,
        longitude=geography.longitude,
        latitude=geography.latitude,
    )
