"""Builds a dataset of ArrayRecord files from its GeoTIFFs.

python -m data_prep.build --dataset=ssl4eo_s12_nol --source_dir=DIR --data_dir=DIR
"""

import concurrent.futures.process
import os
import pathlib
import signal
import sys
import time

import tensorflow_datasets as tfds
from absl import app, flags, logging

from data_prep import records, sources, ssl4eo_s12_nol

BUILDERS = {"ssl4eo_s12_nol": ssl4eo_s12_nol.Ssl4eoS12Nol}

_DATASET = flags.DEFINE_enum("dataset", None, sorted(BUILDERS), "Which dataset.", required=True)
_SOURCE_DIR = flags.DEFINE_string(
    "source_dir",
    None,
    "Folder holding the source tree, extracted or as .zip, .tar or .tar.gz archives in any "
    "mixture, or one such archive. Nothing is unpacked.",
    required=True,
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where datasets are written.", required=True)
_NUM_WORKERS = flags.DEFINE_integer(
    "num_workers", os.cpu_count(), "Processes that read.", lower_bound=1
)
_MAX_BAD_LOCATIONS = flags.DEFINE_integer(
    "max_bad_locations",
    0,
    "How many locations may be set aside for missing, damaged or wrong files.",
    lower_bound=0,
)
_S2_OFFSET = flags.DEFINE_integer(
    "s2_offset",
    0,
    "Subtracted from raw Sentinel-2 pixels: 1000 for products since processing baseline 04.00.",
    lower_bound=0,
    upper_bound=10000,
)


def build() -> str:
    """Builds what the flags say, and returns a summary."""
    builder_class = BUILDERS[_DATASET.value]
    data_dir = pathlib.Path(_DATA_DIR.value).expanduser().absolute()
    final_dir = data_dir / builder_class.name / str(builder_class.VERSION)
    if final_dir.exists():
        info = tfds.builder_from_directory(final_dir).info
        if info.metadata["s2_offset"] != _S2_OFFSET.value:
            raise records.BuildError(
                f"{final_dir} was built with --s2_offset={info.metadata['s2_offset']}: delete it, "
                "or choose another --data_dir"
            )
        return (
            f"{final_dir} is there already, nothing was done: "
            f"{sum(split.num_examples for split in info.splits.values())} records. Delete it to "
            "build it anew."
        )
    start = time.monotonic()
    builder = builder_class(
        source_dir=_SOURCE_DIR.value,
        data_dir=data_dir,
        num_workers=_NUM_WORKERS.value,
        max_bad_locations=_MAX_BAD_LOCATIONS.value,
        s2_offset=_S2_OFFSET.value,
    )
    builder.build()
    set_aside = builder.bad_locations.count
    return (
        f"{sum(map(len, builder.info.metadata['season_counts'].values()))} locations written, {set_aside} set aside"
        + (f" (see {builder.bad_locations.path})" if set_aside else "")
        + f", {sum(split.num_examples for split in builder.info.splits.values())} records, "
        f"{builder.info.dataset_size} in {final_dir}, {time.monotonic() - start:.0f} s."
    )


def main(argv: list[str]) -> None:
    """Runs the command; what the user can mend is told in one sentence."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    # Ends like Ctrl-C does, so that the unfinished dataset is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        print(build())
    except concurrent.futures.process.BrokenProcessPool:
        sys.exit("Error: a worker process died (out of memory?); nothing was written.")
    except (records.BuildError, sources.SourceError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; nothing was written.")


if __name__ == "__main__":
    app.run(main)
