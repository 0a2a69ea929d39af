"""Builds a data set of ArrayRecord files from its GeoTIFFs.

python -m data_prep.build --dataset=ssl4eo_s12_nol --source_dir=DIR --data_dir=DIR
python -m data_prep.build --dataset=dfc2020 --source_dir=DIR --data_dir=DIR
python -m data_prep.build --dataset=scenes --table=scenes.csv --legend=worldcover --data_dir=DIR
python -m data_prep.build --dataset=dfc2020 --source_dir=DIR --data_dir=DIR --beam -- BEAM OPTIONS
"""

import concurrent.futures.process
import dataclasses
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import app, flags, logging
from etils import epath

from cromss_jax import files, lock, presets, sensors
from cromss_jax.errors import UserError
from cromss_jax.legend import Legend
from data_prep import cpus, errors, options
from data_prep.datasets import downstream, scenes, ssl4eo_s12_nol, terramesh
from data_prep.reading import bands, legends, proj
from data_prep.writing import cleaning, records
from data_prep.writing.builder import LocationBuilder

BUILDERS = {
    builder_class.name: builder_class
    for builder_class in (
        ssl4eo_s12_nol.Ssl4eoS12Nol,
        downstream.Ssl4eoS12Dw,
        downstream.Ssl4eoS12Osm,
        downstream.Dfc2020,
        downstream.Sen12Ms,
        scenes.Scenes,
        terramesh.Terramesh,
        terramesh.Ssl4eoS12V11,
    )
}

_DATASET = flags.DEFINE_enum(
    "dataset", None, sorted(BUILDERS), "The data set to build.", required=True
)
_SOURCE_DIR = flags.DEFINE_string(
    "source_dir",
    None,
    "Folder with the source tree, extracted or as .zip, .tar or .tar.gz archives in any "
    "mixture, or the path of one such archive. Nothing is unpacked. Not for scenes.",
)
_TABLE = flags.DEFINE_string(
    "table",
    None,
    "scenes only: a CSV file with the columns scene,date,s2,s1,labels[,truth][,mask], one row an "
    "acquisition; files are paths or patterns, relative to the table.",
)
_TILE_SIZE = flags.DEFINE_integer(
    "tile_size", scenes.Cutting.tile_size, "scenes only: pixels along a side.", lower_bound=32
)
_STRIDE = flags.DEFINE_integer(
    "stride", 0, "scenes only: pixels from a tile to the next; 0 for the tile size.", lower_bound=0
)
_GRID = flags.DEFINE_enum(
    "grid",
    scenes.Cutting.grid,
    ["s2", "labels"],
    "scenes only: tiles have the grid of Sentinel-2 at --resolution, or that of the label map.",
)
_RESOLUTION = flags.DEFINE_float(
    "resolution", scenes.Cutting.resolution, "scenes only: metres of a pixel.", lower_bound=0.1
)
_MIN_LABELLED = flags.DEFINE_float(
    "min_labelled",
    scenes.Cutting.min_labelled,
    "scenes only: seasons of tiles with a smaller share of labelled pixels are skipped.",
    lower_bound=0,
    upper_bound=1,
)
_TEST_FRACTION = flags.DEFINE_float(
    "test_fraction",
    scenes.Cutting.test_fraction,
    "scenes only: share of the tiles that is held back, by blocks, as the split test.",
    lower_bound=0,
    upper_bound=0.9,
)
_BLOCK_SIZE = flags.DEFINE_float(
    "block_size",
    scenes.Cutting.block_size,
    "Side in metres of the blocks of the earth that are held back as a whole; of scenes for the "
    "split test, too. 0 holds back locations singly, and of scenes blocks of 2 to 8 tiles.",
    0,
)
_BLOCK_GAP = flags.DEFINE_float(
    "block_gap",
    scenes.Cutting.block_gap,
    "scenes only: metres that tiles of the two splits are apart at least; those that touch always "
    "count as too close.",
    0,
)
_SPLIT_SEED = flags.DEFINE_integer("split_seed", 0, "scenes only: of the draw of blocks.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "The folder that data sets are written to.", required=True
)
_NUM_WORKERS = flags.DEFINE_integer(
    "num_workers",
    cpus.available(),
    "Number of processes that read; by default the processors that this process may use.",
    lower_bound=1,
)
_MAX_BAD_LOCATIONS = flags.DEFINE_integer(
    "max_bad_locations",
    0,
    "Number of locations that may be skipped because of missing, damaged or wrong files.",
    lower_bound=0,
)
_S2_OFFSET = flags.DEFINE_string(
    "s2_offset",
    "auto",
    "Subtracted from raw Sentinel-2 pixels. auto detects the offset of 1000 that products since "
    "processing baseline 04.00 have, for each image; a number is used for all images.",
)
_MAX_INVALID = flags.DEFINE_float(
    "max_invalid",
    options.DEFAULT.max_invalid,
    "Seasons and tiles with a larger share of invalid pixels (nodata) are skipped.",
    lower_bound=0,
    upper_bound=1,
)
_MAX_DAYS = flags.DEFINE_float(
    "max_days",
    options.DEFAULT.max_days,
    "Largest number of days between the Sentinel-1 and the Sentinel-2 image of a pair.",
    lower_bound=0,
)
_TEST_CITIES = flags.DEFINE_list(
    "test_cities",
    [],
    "Cities of the public bundle of DFC2020 that are the test split, separated by commas.",
)
_LEGEND = flags.DEFINE_string(
    "legend",
    None,
    "The classes of the label maps, and which of their values become them: "
    f"{', '.join(presets.LEGENDS)}; or a file: .csv (value,name,colour[,class]), a QGIS style "
    "(.qml), or a raster with a colour table and category names. By default the data set's own.",
)
_LABELS = flags.DEFINE_enum(
    "labels",
    options.DEFAULT.labels,
    ["dfc", "lc"],
    "Labels of dfc2020: dfc, those of the contest; lc, MODIS land cover, with dfc as truth.",
)
_MODALITIES = flags.DEFINE_list(
    "modalities", list(options.DEFAULT.modalities), "Imagery to read: s1, s2 or both."
)
_S2_LEVEL = flags.DEFINE_enum(
    "s2_level",
    options.DEFAULT.s2_level,
    list(sensors.S2_STATISTICS),
    "Processing level of the Sentinel-2 imagery, which decides its scaling. L2A has no B10.",
)
_S2_BANDS = flags.DEFINE_list(
    "s2_bands", [], "Sentinel-2 bands to read, such as B2,B3,B4,B8; by default all of the level."
)
_PATCH_SIZE = flags.DEFINE_integer(
    "patch_size",
    0,
    "Side of the patches that downstream tiles are cut into, without overlap; patches without "
    "labels are omitted. 0 does not cut tiles.",
    lower_bound=0,
)
_IGNORE_CLOUDS = flags.DEFINE_boolean(
    "ignore_clouds",
    False,
    "terramesh and ssl4eo_s12_v1_1 only: what their cloud_mask calls cloud or shadow has no label.",
)
_REPLACE_LABELS = flags.DEFINE_string(
    "replace_labels",
    None,
    "Folder of cromss_jax.audit: labels that it found wrong become the class that it suggests.",
)
_IGNORE_LABELS = flags.DEFINE_string(
    "ignore_labels", None, "The same, but these labels are ignored (255) instead."
)
_ABOVE = flags.DEFINE_float(
    "above",
    options.Cleaning.above,
    "Labels that are wrong with this probability or more are replaced or ignored.",
    lower_bound=0.01,
    upper_bound=1,
)
_BEAM = flags.DEFINE_boolean(
    "beam",
    False,
    "Build in an Apache Beam pipeline. Its options follow after --, for instance "
    "-- --runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=8.",
)


_SCENES_FLAGS = (
    "table", "tile_size", "stride", "grid", "resolution", "min_labelled",
    "test_fraction", "block_gap", "split_seed",
)  # fmt: skip


def _options() -> options.Options:
    """The options that all data sets share, by the flags.

    Raises:
      errors.BuildError: if a flag has a wrong value.
    """
    offset = None if _S2_OFFSET.value == "auto" else _S2_OFFSET.value
    if offset is not None and not (offset.isdecimal() and int(offset) <= 10000):
        raise errors.BuildError(
            f"--s2_offset={offset} is neither auto nor a whole number from 0 to 10000"
        )
    modalities = set(_MODALITIES.value)
    # B02 is B2.
    s2_bands = {bands.band_name(name) or name for name in _S2_BANDS.value}
    known = list(sensors.S2_STATISTICS[_S2_LEVEL.value])
    for name, given, choice in (
        ("modalities", modalities, sensors.MODALITIES),
        ("s2_bands", s2_bands, known),
    ):
        if not given <= set(choice):
            raise errors.BuildError(
                f"--{name} names {', '.join(sorted(given - set(choice)))}: choose from "
                f"{', '.join(choice)}" + (f" of {_S2_LEVEL.value}" if choice is known else "")
            )
    if not modalities:
        raise errors.BuildError("--modalities is empty: choose s1, s2 or both")
    return options.Options(
        cleaning=_cleaning(),
        modalities=tuple(m for m in sensors.MODALITIES if m in modalities),
        s2_level=_S2_LEVEL.value,
        s2_bands=tuple(band for band in known if band in s2_bands),
        legend=_LEGEND.value and legends.read_legend(_LEGEND.value),
        labels=_LABELS.value,
        block_size=_BLOCK_SIZE.value,
        s2_offset=None if offset is None else int(offset),
        max_invalid=_MAX_INVALID.value,
        max_days=_MAX_DAYS.value,
        test_cities=tuple(_TEST_CITIES.value),
    )


def _cleaning() -> options.Cleaning | None:
    """Which labels are changed.

    Raises:
      errors.BuildError: if the flags contradict each other, or the audit is not finished.
    """
    given = {"replace": _REPLACE_LABELS.value, "ignore": _IGNORE_LABELS.value}
    chosen = [how for how, folder in given.items() if folder is not None]
    if len(chosen) > 1:
        raise errors.BuildError(
            "--replace_labels and --ignore_labels are given: choose one of them"
        )
    if not chosen:
        if _ABOVE.present:
            raise errors.BuildError(
                f"--above={_ABOVE.value:g} is for --replace_labels or --ignore_labels: add one of "
                "them with the folder of an audit"
            )
        return None
    found = options.Cleaning(os.fspath(files.absolute(given[chosen[0]])), _ABOVE.value, chosen[0])
    cleaning.check(found)
    return found


def build(beam_args: Sequence[str] = ()) -> str:
    """Builds the data set that the flags describe, and returns a summary."""
    builder_class = BUILDERS[_DATASET.value]
    is_tiles = issubclass(builder_class, downstream.TileBuilder)
    if _PATCH_SIZE.value and not is_tiles:
        raise errors.BuildError(
            f"--patch_size={_PATCH_SIZE.value} is for downstream data sets, not for "
            f"{builder_class.name}: leave it out, training takes random crops"
        )
    if _LABELS.value != "dfc" and builder_class is not downstream.Dfc2020:
        raise errors.BuildError(
            f"--labels={_LABELS.value} is for --dataset=dfc2020, not for {builder_class.name}: "
            "leave it out"
        )
    build_options = _options()
    special = {"patch_size": _PATCH_SIZE.value} if is_tiles else {}
    if issubclass(builder_class, terramesh.ZarrBuilder):
        special["ignore_clouds"] = _IGNORE_CLOUDS.value
    elif _IGNORE_CLOUDS.value:
        raise errors.BuildError(
            f"--ignore_clouds is for terramesh and ssl4eo_s12_v1_1, not for {builder_class.name}: "
            "leave it out"
        )
    source = _scenes_source() if builder_class is scenes.Scenes else _tree_source()
    cutting = dataclasses.asdict(source["cutting"]) if builder_class is scenes.Scenes else {}
    write = _beam_writer(beam_args) if _BEAM.value else None
    data_dir = files.absolute(_DATA_DIR.value)
    final_dir = data_dir / builder_class.name / str(builder_class.VERSION)
    if final_dir.exists():
        return _existing(final_dir, build_options, special | cutting)
    start = time.monotonic()
    with lock.held(data_dir / f"{builder_class.name}.{lock.NAME}"):
        builder = builder_class(
            data_dir=data_dir,
            **source,
            num_workers=_NUM_WORKERS.value,
            max_bad_locations=_MAX_BAD_LOCATIONS.value,
            options=build_options,
            **special,
        )
        builder.build(write)
    return f"{_summary(builder, final_dir, is_tiles)}, {time.monotonic() - start:.0f} s."


def _tree_source() -> dict[str, Any]:
    """The builder's arguments on a tree of files.

    Raises:
      errors.BuildError: if flags are missing, or are for scenes.
    """
    given = [name for name in _SCENES_FLAGS if flags.FLAGS[name].present]
    if given:
        raise errors.BuildError(
            f"--{given[0]} is for --dataset=scenes, not for {_DATASET.value}: leave it out"
        )
    if _SOURCE_DIR.value is None:
        raise errors.BuildError(f"--dataset={_DATASET.value} needs --source_dir, its tree of files")
    return {"source_dir": _SOURCE_DIR.value}


def _scenes_source() -> dict[str, Any]:
    """The builder's arguments on scenes.

    Raises:
      errors.BuildError: if flags are missing, or are for trees.
    """
    if _TABLE.value is None or _LEGEND.value is None or _SOURCE_DIR.value is not None:
        raise errors.BuildError(
            "--dataset=scenes needs --table, a CSV file with a row for each acquisition, and "
            "--legend, what the values of the label maps mean; --source_dir is for other data sets"
        )
    if _STRIDE.value > _TILE_SIZE.value:
        raise errors.BuildError(
            f"--stride={_STRIDE.value} would leave gaps between tiles of --tile_size="
            f"{_TILE_SIZE.value}: choose no more than the tile size"
        )
    cutting = scenes.Cutting(
        tile_size=_TILE_SIZE.value,
        stride=_STRIDE.value or _TILE_SIZE.value,
        grid=_GRID.value,
        resolution=_RESOLUTION.value,
        min_labelled=_MIN_LABELLED.value,
        test_fraction=_TEST_FRACTION.value,
        block_size=_BLOCK_SIZE.value,
        block_gap=_BLOCK_GAP.value,
        split_seed=_SPLIT_SEED.value,
    )
    return {
        "table": _TABLE.value,
        "cutting": cutting,
    }


def _existing(
    final_dir: epath.Path, build_options: options.Options, special: Mapping[str, object]
) -> str:
    """A sentence on a data set that exists already.

    Raises:
      errors.BuildError: if it was built with other options.
    """
    info = tfds.builder_from_directory(final_dir).info
    wanted = build_options.choices() | special
    labels = info.metadata.get("labels", options.DEFAULT.labels)
    if labels != build_options.labels:
        raise errors.BuildError(
            f"{final_dir} was built with --labels={labels}: delete it, or choose another --data_dir"
        )
    # Data sets of earlier versions do not say their legend.
    legend = Legend.from_dict(info.metadata.get("legend", presets.DYNAMIC_WORLD.to_dict()))
    if build_options.legend not in (None, legend):
        raise errors.BuildError(
            f"{final_dir} was built with another legend than --legend={_LEGEND.value}: delete it, "
            "or choose another --data_dir"
        )
    changed = wanted.pop("cleaning", None)
    if info.metadata.get("cleaning") != changed:
        raise errors.BuildError(
            f"{final_dir} was built with other labels, {_cleaned_text(info.metadata)}: delete it, "
            "or choose another --data_dir"
        )
    chosen = info.metadata.get("chosen", {})
    for name, value in wanted.items():
        # Data sets of earlier versions do not say all options.
        found = chosen.get(name, info.metadata.get(name, value))
        if found != value and (flags.FLAGS[name].present or name == "patch_size"):
            raise errors.BuildError(
                f"{final_dir} was built with --{name}={_text(found)}: delete it, or choose another "
                "--data_dir"
            )
    return (
        f"{final_dir} exists, nothing was done: "
        f"{sum(split.num_examples for split in info.splits.values())} records. Delete it to "
        "build it again."
    )


def _cleaned_text(metadata: Mapping[str, Any]) -> str:
    """What was done to the labels of a data set."""
    if not (found := metadata.get("cleaning")):
        return "those of its sources"
    return f"--{found['how']}_labels={found['audit']} --above={found['above']:g}"


def _text(value: object) -> str:
    """The value of a flag."""
    return ",".join(value) if isinstance(value, list) else str(value)


def _summary(builder: LocationBuilder, final_dir: epath.Path, is_tiles: bool) -> str:
    """What was written and found, as text."""
    metadata = builder.info.metadata
    num_records = {name: split.num_examples for name, split in builder.info.splits.items()}
    report = builder.report
    summary = [
        f"{sum(map(len, metadata['season_counts'].values()))} "
        f"{'tiles' if is_tiles else 'locations'} written",
        f"{report.count} skipped" + (f" (see {report.path})" if report.count else ""),
        f"{sum(num_records.values())} records" + (f" ({_listed(num_records)})" if is_tiles else ""),
    ]
    if _PATCH_SIZE.value:
        summary.append(f"patches without labels omitted ({_listed(metadata['num_empty_patches'])})")
    if report.counts:
        summary.append(f"reported: {_listed(report.counts)} (see {report.summary_path})")
    summary.append(f"{builder.info.dataset_size} in {final_dir}")
    return ", ".join(summary)


def _beam_writer(beam_args: Sequence[str]) -> Callable[[records.Plan], Iterator]:
    """The function that writes the files in a Beam pipeline."""
    if _NUM_WORKERS.present:
        raise errors.BuildError(
            "--num_workers is for builds without --beam: give the runner its own option instead, "
            "such as -- --direct_num_workers=8"
        )
    try:
        from data_prep.writing import pipeline
    except ModuleNotFoundError as error:
        raise errors.BuildError(
            "--beam needs Apache Beam, which is not installed: pip install -e .[beam], in an "
            "environment of its own"
        ) from error
    return functools.partial(pipeline.write, options=pipeline.parse_options(beam_args))


def _listed(counts: Mapping[str, int]) -> str:
    """Names and their numbers, as text."""
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def main(argv: list[str]) -> None:
    """Runs the command. An error that the user can correct is printed as one sentence."""
    if len(argv) > 1 and not _BEAM.value:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    # As for Ctrl-C, the unfinished data set is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        proj.check()
        print(build(argv[1:]))
    except concurrent.futures.process.BrokenProcessPool:
        sys.exit("Error: a worker process died (out of memory?); nothing was written.")
    except (UserError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; nothing was written.")


if __name__ == "__main__":
    app.run(main)
