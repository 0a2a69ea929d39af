"""Writes locations of a procedural world as GeoTIFFs in the tree of a real data set.

python -m data_prep.sample --output_dir=DIR --locations=64 --seasons=4 --tile_size=264 --seed=0

`--format=nol` writes SSL4EO-S12 + NoL for pretraining: noisy labels, with the truth beside them.
`--format=dw|osm|dfc2020` writes a downstream data set with clean labels: one date a location, the
first half of the locations in the training split. The seed decides the locations: give a downstream
sample another seed than the pretraining sample, otherwise both show the same locations.
"""

import sys
import time

from absl import app, flags

from cromss_jax.errors import UserError
from data_prep import cpus
from data_prep.sample import downstream, nol, world

_NOL = "nol"

_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "The directory to write the tree to, new or empty.", required=True
)
_FORMAT = flags.DEFINE_enum(
    "format", _NOL, [_NOL, *downstream.FORMATS], "The data set whose tree is written."
)
_LOCATIONS = flags.DEFINE_integer("locations", 64, "Number of locations.", lower_bound=1)
_LABELS = flags.DEFINE_enum(
    "labels",
    "dfc",
    ["dfc", "lc"],
    "Labels of dfc2020: dfc, those of the contest; lc, also land cover at 500 m, as of MODIS.",
)
_SEASONS = flags.DEFINE_integer(
    "seasons",
    None,
    f"Seasons of each location, for nol only; {nol.SEASONS} by default.",
    lower_bound=1,
    upper_bound=world.MAX_SEASONS,
)
_TILE_SIZE = flags.DEFINE_integer(
    "tile_size",
    None,
    "Pixels of 10 m along a side, for nol a multiple of 6; by default as in the real data set.",
    lower_bound=6,
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the world.", lower_bound=0)
_NUM_WORKERS = flags.DEFINE_integer(
    "num_workers", cpus.available(), "Processes that make locations.", lower_bound=1
)


def _run_nol() -> str:
    """Writes SSL4EO-S12 + NoL as the flags say, and returns a summary."""
    if _LABELS.value == "lc":
        raise UserError(f"--labels=lc is for --format=dfc2020, not for {_NOL}")
    seasons = _SEASONS.value or nol.SEASONS
    tile_size = _TILE_SIZE.value or nol.TILE_SIZE
    wrong = nol.write_sample(
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
    """Writes a downstream data set as the flags say, and returns a summary."""
    if _SEASONS.value is not None:
        raise UserError(
            f"--seasons={_SEASONS.value} is for --format={_NOL}: tiles of --format={_FORMAT.value} "
            "have one date, leave --seasons out"
        )
    coarse = _LABELS.value == "lc"
    if coarse and _FORMAT.value != "dfc2020":
        raise UserError(f"--labels=lc is for --format=dfc2020, not for {_FORMAT.value}")
    tile_size = _TILE_SIZE.value or downstream.FORMATS[_FORMAT.value].tile_size
    downstream.write_sample(
        _OUTPUT_DIR.value,
        _FORMAT.value,
        _LOCATIONS.value,
        tile_size,
        _SEED.value,
        _NUM_WORKERS.value,
        coarse,
    )
    num_training = downstream.num_training(_LOCATIONS.value)
    return (
        f"{_LOCATIONS.value} tiles ({num_training} to train on, "
        f"{_LOCATIONS.value - num_training} to test on) of {tile_size} x {tile_size} pixels in "
        f"{_OUTPUT_DIR.value}, labels {'coarse, truth beside them' if coarse else 'clean'}"
    )


def main(argv: list[str]) -> None:
    """Runs the command. An error that the user can correct is printed as one sentence."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    start = time.monotonic()
    try:
        summary = _run_nol() if _FORMAT.value == _NOL else _run_downstream()
    except (UserError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"Interrupted: {_OUTPUT_DIR.value} is incomplete, delete it.")
    print(f"{summary}, {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    app.run(main)
