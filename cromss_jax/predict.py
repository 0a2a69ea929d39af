"""Maps scenes: `python -m cromss_jax.predict --checkpoint=RUN --s2=SCENE --output=DIR`.

Writes `classes.tif`, what `--write` names beside it, and `summary.md`. Interrupted, the same
command goes on. With --table, each scene gets a folder of its own.
"""

import datetime
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence

from absl import app, flags

from cromss_jax import command_line, files, scenes
from cromss_jax.errors import UserError
from cromss_jax.mapping import blending, job
from data_prep.datasets import scene_table
from data_prep.reading import proj

_log = logging.getLogger("cromss_jax")

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a run or of a checkpoint, or a file of weights", required=True
)
_S2 = flags.DEFINE_string(
    "s2", None, "Sentinel-2 image: a file, a .SAFE product, or several files separated by ;"
)
_S1 = flags.DEFINE_string("s1", None, "Sentinel-1 image, brought onto the grid of --s2")
_TABLE = flags.DEFINE_string(
    "table", None, "Instead of --s2 and --s1: a CSV file with the columns scene,date,s2,s1"
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write to", required=True)
_WRITE = flags.DEFINE_list(
    "write",
    [],
    f"Layers beside classes: {', '.join(blending.LAYERS[1:])} (of S1 and S2 with each other)",
)
_WINDOW = flags.DEFINE_integer("window", 256, "Side of a window in pixels", lower_bound=32)
_OVERLAP = flags.DEFINE_integer(
    "overlap", 64, "Pixels that neighbouring windows share, at most half a window", lower_bound=0
)
_AUGMENT = flags.DEFINE_boolean(
    "augment", False, "Average over flips and rotations: eight times the work"
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 0, "Windows in a batch; 0: 4 a device on CPUs, 32 on others", lower_bound=0
)
_NUM_THREADS = flags.DEFINE_integer(
    "num_threads",
    job.NUM_THREADS,
    "Threads that read, each holding up to 200 MB",
    lower_bound=1,
)
_S2_OFFSET = flags.DEFINE_integer(
    "s2_offset", None, "Subtracted from raw Sentinel-2 pixels; found out where it is not given"
)
_BEAM = flags.DEFINE_boolean(
    "beam",
    False,
    "Map the scenes of --table in an Apache Beam pipeline. Its options follow after --, for "
    "instance -- --direct_running_mode=multi_processing --direct_num_workers=8",
)


class PredictError(UserError):
    """Flags that cannot be followed. The message is for the user."""


def _rows(table: str) -> dict[str, tuple[datetime.datetime, dict[str, tuple[pathlib.Path, ...]]]]:
    """Date and files of each row of a table, by the name of its folder: the scene's and the day.

    Raises:
      PredictError: for two rows of one name.
      errors.BuildError: if the table cannot be read.
    """
    given = {}
    for row in scene_table.read(table, required=("scene", "date")):
        name = f"{row.scene}_{row.date:%Y%m%d}"
        if name in given:
            raise PredictError(
                f"{table}: two rows would be mapped into the folder {name}, which the scene and "
                "the day name: give one of them another scene"
            )
        given[name] = row.date, dict(row.files)
    return given


def _tasks(chosen: job.Settings, output: pathlib.Path) -> list[scenes.Task]:
    """The scenes to map, with a folder each if there may be several."""
    if _TABLE.value:
        if _S2.value or _S1.value:
            raise PredictError("--table and --s2 or --s1 are given: give one or the other")
        given = _rows(_TABLE.value)
    else:
        named = {"s2": _S2.value, "s1": _S1.value}
        if not any(named.values()):
            raise PredictError("no image is given: name one by --s2, or many by --table")
        here = pathlib.Path.cwd()
        found = {
            m: scene_table.find_files(here, f"--{m}", text) for m, text in named.items() if text
        }
        given = {"": (scenes.NO_DATE, found)}
    return [
        scenes.Task(name, date, found, _S2_OFFSET.value, chosen, output / name)
        for name, (date, found) in given.items()
    ]


def _map_here(tasks: list[scenes.Task], compiled: pathlib.Path) -> None:
    """Maps scenes one after the other."""
    model = scenes.load(_CHECKPOINT.value, str(compiled))
    for task in tasks:
        scenes.map_task(task, model)
    # What was compiled, which an interrupted command takes up.
    shutil.rmtree(compiled, ignore_errors=True)


def _map_in_pipeline(
    tasks: list[scenes.Task], folder: pathlib.Path, arguments: Sequence[str]
) -> None:
    """Maps scenes by the workers of a Beam pipeline."""
    if not _TABLE.value:
        raise PredictError("--beam maps many scenes: list them in a --table")
    try:
        from cromss_jax import predict_beam
    except ModuleNotFoundError as error:
        raise PredictError(
            "--beam needs Apache Beam, which is not installed: pip install -e .[beam], in an "
            "environment of its own"
        ) from error
    try:
        checkpoint = os.fspath(files.absolute(_CHECKPOINT.value))
        predict_beam.map_all(tasks, checkpoint, folder, arguments)
    except predict_beam.PipelineError as error:
        raise PredictError(str(error)) from error


def main(arguments: list[str]) -> None:
    """Maps what the flags name; a sentence and exit code 1 for what the user can mend."""
    if len(arguments) > 1 and not _BEAM.value:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    command_line.log_progress()
    try:
        chosen = job.Settings(
            write=tuple(_WRITE.value),
            window=_WINDOW.value,
            overlap=_OVERLAP.value,
            augment=_AUGMENT.value,
            batch_size=_BATCH_SIZE.value,
            num_threads=_NUM_THREADS.value,
        )
        if files.in_bucket(_OUTPUT.value):
            raise PredictError(f"--output={_OUTPUT.value}: maps are written to local folders only")
        output = pathlib.Path(files.absolute(_OUTPUT.value))
        proj.check()
        tasks = _tasks(chosen, output)
        if _BEAM.value:
            _map_in_pipeline(tasks, output / "work", arguments[1:])
        else:
            _map_here(tasks, output / "work")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
