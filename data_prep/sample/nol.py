"""Writes a procedural world in the tree of SSL4EO-S12 + NoL, with the truth beside the labels."""

import datetime
import functools
import os
import pathlib

import numpy as np
from affine import Affine

from cromss_jax.sensors import S1_BANDS, S2_BANDS_BY_RESOLUTION
from data_prep import parallel
from data_prep.reading import geotiff
from data_prep.sample import world
from data_prep.sample.output import new_directory

TABLE = "dw_complete_ids.csv"
SEASONS = 4
TILE_SIZE = 264


def granule_names(location: world.Location, season: int) -> tuple[str, str]:
    """Names of one season's S1 and S2 granules, in the form of the real ones.

    Examples: S1A_IW_GRDH_1SDV_20200607T010800_20200607T010825_032904_03CFBA_D457 and
    20200823T054639_20200823T055618_T43RCP.
    """
    start, sensed = location.s1_times[season], location.s2_times[season]
    end = start + datetime.timedelta(seconds=25)
    made = sensed + datetime.timedelta(minutes=9)
    # Sentinel-1A makes 175 orbits in 12 days.
    orbit = (start.toordinal() - datetime.date(2014, 4, 6).toordinal()) * 175 // 12
    product = (start.hour * 60 + start.minute) * 60 + start.second
    s1_granule = (
        f"S1A_IW_GRDH_1SDV_{start:%Y%m%dT%H%M%S}_{end:%Y%m%dT%H%M%S}"
        f"_{orbit:06d}_{8 * orbit:06X}_{product % 65536:04X}"
    )
    return s1_granule, f"{sensed:%Y%m%dT%H%M%S}_{made:%Y%m%dT%H%M%S}_{location.mgrs_tile}"


def _write(path: pathlib.Path, pixels: np.ndarray, location: world.Location, **options) -> None:
    """Writes one band that covers the location."""
    metres = 10 * location.truth.shape[-1] / pixels.shape[-1]
    easting, northing = location.origin
    transform = Affine(metres, 0, easting, 0, -metres, northing)
    geotiff.write(path, pixels[None], f"EPSG:{location.epsg}", transform, **options)


def write_nol(location: world.Location, location_id: str, output_dir: pathlib.Path) -> list[str]:
    """Writes one location's files in the tree of SSL4EO-S12 + NoL, `truth.tif` beside each label.

    Args:
      location: what to write.
      location_id: its folder's name, 7 digits.
      output_dir: root of the tree.

    Returns:
      The names of its S2 granules, a season each, in order of date.

    Raises:
      OSError: if a file cannot be written.
    """
    s2_granules = []
    for season in range(len(location.truth)):
        s1_granule, s2_granule = granule_names(location, season)
        s1_dir = output_dir / "s1" / location_id / s1_granule
        s2_dir = output_dir / "s2c" / location_id / s2_granule
        label_dir = output_dir / "dw_noisy_labels" / location_id / s2_granule
        for folder in (s1_dir, s2_dir, label_dir):
            folder.mkdir(parents=True)
        for i, band in enumerate(S1_BANDS):
            _write(s1_dir / f"{band}.tif", location.s1[season, ..., i], location)
        for resolution, bands in S2_BANDS_BY_RESOLUTION.items():
            for i, band in enumerate(bands):
                pixels = location.s2(resolution)[season, ..., i]
                _write(s2_dir / f"{band}.tif", pixels, location)
        # Maps compress to a tenth. Noisy images do not, and would take twice the time.
        for name, maps in (("label", location.labels), ("truth", location.truth)):
            _write(label_dir / f"{name}.tif", maps[season], location, compress="deflate")
        s2_granules.append(s2_granule)
    return s2_granules


def _make_and_write(
    index: int, *, seed: int, seasons: int, tile_size: int, output_dir: pathlib.Path
) -> tuple[list[str], int]:
    """Writes one location; returns its row of the table and how many of its labels are wrong."""
    location = world.make_location(seed, index, seasons, tile_size)
    granules = write_nol(location, f"{index:07d}", output_dir)
    return [str(index), *granules], int((location.labels != location.truth).sum())


def write_sample(
    output_dir: str | os.PathLike,
    locations: int,
    seasons: int = SEASONS,
    tile_size: int = TILE_SIZE,
    seed: int = 0,
    num_workers: int = 1,
) -> float:
    """Writes the sample. The table is written last: a tree without it was interrupted.

    Args:
      output_dir: a new or an empty directory.
      locations: how many.
      seasons: of each location.
      tile_size: pixels of 10 m along a side, a multiple of 6.
      seed: of the world; the first locations are the same for any number of locations.
      num_workers: processes; the files are the same for any number.

    Returns:
      The share of the labels that differ from the truth.

    Raises:
      FileExistsError: if `output_dir` holds anything.
      ValueError: if `make_location` cannot make such locations.
    """
    world.check_shape(seasons, tile_size)
    output_dir = new_directory(output_dir)
    make = functools.partial(
        _make_and_write, seed=seed, seasons=seasons, tile_size=tile_size, output_dir=output_dir
    )
    made = list(parallel.map_in_order(make, range(locations), num_workers))
    table = [["ids", *(f"sub{i + 1}" for i in range(seasons))], *(row for row, _ in made)]
    (output_dir / TABLE).write_text("".join(",".join(row) + "\n" for row in table))
    return sum(wrong for _, wrong in made) / (locations * seasons * tile_size**2)
