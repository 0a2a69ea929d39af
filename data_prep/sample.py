"""Writes places of a procedural world as GeoTIFFs in the tree of a real data set.

python -m data_prep.sample --output_dir=DIR --locations=64 --seasons=4 --tile_size=264 --seed=0

SSL4EO-S12 + NoL for pretraining, noisy labels with the truth beside them; or, with
`--format=dw|osm|dfc2020`, a downstream data set with clean labels: one date a place, the first
half of the places the training split. Places follow from the seed: give a downstream sample
another one than the sample pretrained on, or its tiles show the very same places.
"""

import datetime
import functools
import os
import pathlib
import sys
import time

import numpy as np
from absl import app, flags
from affine import Affine

from cromss_jax.sensors import S1_BANDS, S2_BANDS_BY_RESOLUTION
from data_prep import geotiff, parallel, sample_downstream, world

TABLE = "dw_complete_ids.csv"
NOL = "nol"
NOL_SEASONS = 4
NOL_TILE_SIZE = 264

_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Where the tree goes: a new or an empty directory.", required=True
)
_FORMAT = flags.DEFINE_enum(
    "format", NOL, [NOL, *sample_downstream.FORMATS], "Which data set's tree."
)
_LOCATIONS = flags.DEFINE_integer("locations", 64, "How many locations.", lower_bound=1)
_SEASONS = flags.DEFINE_integer(
    "seasons",
    None,
    f"Seasons of each location; nol only, {NOL_SEASONS} if not given.",
    lower_bound=1,
    upper_bound=world.MAX_SEASONS,
)
_TILE_SIZE = flags.DEFINE_integer(
    "tile_size",
    None,
    "Pixels of 10 m along a side, for nol a multiple of 6; as in the real data set if not given.",
    lower_bound=6,
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the whole world.", lower_bound=0)
_NUM_WORKERS = flags.DEFINE_integer(
    "num_workers", os.cpu_count(), "Processes that make locations.", lower_bound=1
)


def granule_names(location: world.Location, season: int) -> tuple[str, str]:
    """Names of one season's S1 and S2 granules, formed as the real ones are.

    Such as S1A_IW_GRDH_1SDV_20200607T010800_20200607T010825_032904_03CFBA_D457 and
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
    """Writes one band over the whole of the location."""
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
        # Maps shrink to a tenth; noisy images would not, and take twice the time.
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
    seasons: int = NOL_SEASONS,
    tile_size: int = NOL_TILE_SIZE,
    seed: int = 0,
    num_workers: int = 1,
) -> float:
    """Writes the sample. The table comes last: a tree without it was interrupted.

    Args:
      output_dir: a new or an empty directory.
      locations: how many.
      seasons: of each location.
      tile_size: pixels of 10 m along a side, a multiple of 6.
      seed: of the whole world; the first locations are the same however many there are.
      num_workers: processes; the files are the same whatever their number.

    Returns:
      The share of the labels that differ from the truth.

    Raises:
      FileExistsError: if `output_dir` holds anything.
      ValueError: if `make_location` cannot make such locations.
    """
    world.check_shape(seasons, tile_size)
    output_dir = _new_directory(output_dir)
    make = functools.partial(
        _make_and_write, seed=seed, seasons=seasons, tile_size=tile_size, output_dir=output_dir
    )
    made = list(parallel.map_in_order(make, range(locations), num_workers))
    table = [["ids", *(f"sub{i + 1}" for i in range(seasons))], *(row for row, _ in made)]
    (output_dir / TABLE).write_text("".join(",".join(row) + "\n" for row in table))
    return sum(wrong for _, wrong in made) / (locations * seasons * tile_size**2)


def write_downstream_sample(
    output_dir: str | os.PathLike,
    format_name: str,
    locations: int,
    tile_size: int | None = None,
    seed: int = 0,
    num_workers: int = 1,
) -> None:
    """Writes a sample of a downstream data set, with clean labels.

    Args:
      output_dir: a new or an empty directory.
      format_name: a name of `sample_downstream.FORMATS`.
      locations: how many, 2 or more, a tile each; the first half is the training split.
      tile_size: pixels of 10 m along a side; None takes the real data set's.
      seed: of the whole world; places differ from those of other seeds.
      num_workers: processes; the files are the same whatever their number.

    Raises:
      FileExistsError: if `output_dir` holds anything.
      ValueError: if there are too few locations for two splits.
    """
    if locations < 2:
        raise ValueError(
            f"--locations={locations} leaves no tile for the test split, needs 2 or more: "
            "give more locations"
        )
    make = functools.partial(
        sample_downstream.make_and_write,
        format_name=format_name,
        locations=locations,
        seed=seed,
        tile_size=tile_size or sample_downstream.FORMATS[format_name].tile_size,
        output_dir=_new_directory(output_dir),
    )
    for _ in parallel.map_in_order(make, range(locations), num_workers):
        pass


def _new_directory(output_dir: str | os.PathLike) -> pathlib.Path:
    """Makes the directory, or raises FileExistsError if it holds anything."""
    output_dir = pathlib.Path(output_dir).expanduser().absolute()
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(
            f"{output_dir} is not empty: delete it, or choose another --output_dir"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    return output_dir


def _run_nol() -> str:
    """Writes what the flags say as SSL4EO-S12 + NoL, and returns a summary."""
    seasons = _SEASONS.value or NOL_SEASONS
    tile_size = _TILE_SIZE.value or NOL_TILE_SIZE
    wrong = write_sample(
        _OUTPUT_DIR.value,
        _LOCATIONS.value,
        seasons,
        tile_size,
        _SEED.value,
        _NUM_WORKERS.value,
    )
    return (
        f"{_LOCATIONS.value} locations x {seasons} seasons of {tile_size} x {tile_size} pixels in "
        f"{_OUTPUT_DIR.value}, {wrong:.1%} of the labels wrong"
    )


def _run_downstream() -> str:
    """Writes what the flags say as a downstream data set, and returns a summary."""
    if _SEASONS.value is not None:
        raise ValueError(
            f"--seasons={_SEASONS.value} is for --format={NOL}, tiles of --format={_FORMAT.value} "
            "have one date: leave it out"
        )
    tile_size = _TILE_SIZE.value or sample_downstream.FORMATS[_FORMAT.value].tile_size
    write_downstream_sample(
        _OUTPUT_DIR.value,
        _FORMAT.value,
        _LOCATIONS.value,
        tile_size,
        _SEED.value,
        _NUM_WORKERS.value,
    )
    num_training = sample_downstream.num_training(_LOCATIONS.value)
    return (
        f"{_LOCATIONS.value} tiles ({num_training} to train on, "
        f"{_LOCATIONS.value - num_training} to test on) of {tile_size} x {tile_size} pixels in "
        f"{_OUTPUT_DIR.value}, labels clean"
    )


def main(argv: list[str]) -> None:
    """Runs the command; what the user can mend is told in one sentence."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    start = time.monotonic()
    try:
        summary = _run_nol() if _FORMAT.value == NOL else _run_downstream()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"Interrupted: {_OUTPUT_DIR.value} is incomplete, delete it.")
    print(f"{summary}, {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    app.run(main)
