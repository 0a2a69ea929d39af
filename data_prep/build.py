"""Builds a data set of ArrayRecord files from its GeoTIFFs.

python -m data_prep.build --dataset=ssl4eo_s12_nol --source_dir=DIR --data_dir=DIR
python -m data_prep.build --dataset=dfc2020 --source_dir=DIR --data_dir=DIR
python -m data_prep.build --dataset=dfc2020 --source_dir=DIR --data_dir=DIR --beam -- BEAM OPTIONS
"""

import concurrent.futures.process
import functools
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import tensorflow_datasets as tfds
from absl import app, flags, logging
from etils import epath

from cromss_jax import lock
from data_prep import cpus, errors, options
from data_prep.datasets import downstream, ssl4eo_s12_nol
from data_prep.finding import sources
from data_prep.reading import proj
from data_prep.writing import records
from data_prep.writing.builder import LocationBuilder

BUILDERS = {
    builder_class.name: builder_class
    for builder_class in (
        ssl4eo_s12_nol.Ssl4eoS12Nol,
        downstream.Ssl4eoS12Dw,
        downstream.Ssl4eoS12Osm,
        downstream.Dfc2020,
    )
}

_DATASET = flags.DEFINE_enum(
    "dataset", None, sorted(BUILDERS), "The data set to build.", required=True
)
_SOURCE_DIR = flags.DEFINE_string(
    "source_dir",
    None,
    "Folder with the source tree, extracted or as .zip, .tar or .tar.gz archives in any "
    "mixture, or the path of one such archive. Nothing is unpacked.",
    required=True,
)
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
_PATCH_SIZE = flags.DEFINE_integer(
    "patch_size",
    0,
    "Side of the patches that downstream tiles are cut into, without overlap; patches without "
    "labels are omitted. 0 does not cut tiles.",
    lower_bound=0,
)
_BEAM = flags.DEFINE_boolean(
    "beam",
    False,
    "Build in an Apache Beam pipeline. Its options follow after --, for instance "
    "-- --runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=8.",
)


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
    return options.Options(
        s2_offset=None if offset is None else int(offset),
        max_invalid=_MAX_INVALID.value,
        max_days=_MAX_DAYS.value,
        test_cities=tuple(_TEST_CITIES.value),
    )


def build(beam_args: Sequence[str] = ()) -> str:
    """Builds the data set that the flags describe, and returns a summary."""
    builder_class = BUILDERS[_DATASET.value]
    is_tiles = issubclass(builder_class, downstream.TileBuilder)
    if _PATCH_SIZE.value and not is_tiles:
        raise errors.BuildError(
            f"--patch_size={_PATCH_SIZE.value} is for downstream data sets, not for "
            f"{builder_class.name}: leave it out, training takes random crops"
        )
    build_options = _options()
    special = {"patch_size": _PATCH_SIZE.value} if is_tiles else {}
    write = _beam_writer(beam_args) if _BEAM.value else None
    data_dir = sources.absolute(_DATA_DIR.value)
    final_dir = data_dir / builder_class.name / str(builder_class.VERSION)
    if final_dir.exists():
        return _existing(final_dir, build_options.metadata() | special)
    start = time.monotonic()
    with lock.held(data_dir / f"{builder_class.name}.{lock.NAME}"):
        builder = builder_class(
            source_dir=_SOURCE_DIR.value,
            data_dir=data_dir,
            num_workers=_NUM_WORKERS.value,
            max_bad_locations=_MAX_BAD_LOCATIONS.value,
            options=build_options,
            **special,
        )
        builder.build(write)
    return f"{_summary(builder, final_dir, is_tiles)}, {time.monotonic() - start:.0f} s."


def _existing(final_dir: epath.Path, wanted: Mapping[str, object]) -> str:
    """A sentence on a data set that exists already.

    Raises:
      errors.BuildError: if it was built with other options.
    """
    info = tfds.builder_from_directory(final_dir).info
    for name, value in wanted.items():
        # Data sets of earlier versions do not say all options.
        found = info.metadata.get(name, value)
        if found != value and (flags.FLAGS[name].present or name == "patch_size"):
            raise errors.BuildError(
                f"{final_dir} was built with --{name}={found}: delete it, or choose another "
                "--data_dir"
            )
    return (
        f"{final_dir} exists, nothing was done: "
        f"{sum(split.num_examples for split in info.splits.values())} records. Delete it to "
        "build it again."
    )


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
    except (errors.BuildError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; nothing was written.")


if __name__ == "__main__":
    app.run(main)
