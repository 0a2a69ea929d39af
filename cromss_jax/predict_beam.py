"""Maps many scenes in an Apache Beam pipeline: each by one worker, as `predict` maps it."""

import functools
import os
import pathlib
import shutil
import threading
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options import pipeline_options
from apache_beam.runners.portability import fn_api_runner
from etils import epath

from cromss_jax import files, scenes
from cromss_jax.errors import UserError

# A process maps one scene at a time, whatever its number of threads.
_mapping = threading.Lock()


class PipelineError(UserError):
    """Scenes that were not mapped. The message is for the user."""


_load = functools.lru_cache(maxsize=1)(scenes.load)


def _map(task: scenes.Task, checkpoint: str, folder: str) -> None:
    """Maps a scene, or writes down why it cannot be mapped: other scenes go on."""
    with _mapping:
        model = _load(checkpoint, folder)  # without it none can be mapped
        try:
            scenes.map_task(task, model)
        except (UserError, OSError) as error:
            _note(folder, task, str(error))


def _note(folder: str, task: scenes.Task, sentence: str) -> None:
    files.write_whole(epath.Path(folder) / f"{task.name}.problem", sentence.encode())


def map_all(
    tasks: Sequence[scenes.Task], checkpoint: str, folder: pathlib.Path, arguments: Sequence[str]
) -> None:
    """Maps all scenes.

    Args:
      tasks: the scenes. All workers must see the same files under the same paths.
      checkpoint: of the network.
      folder: for what is kept until the end, on a disk that all workers see.
      arguments: options of the pipeline.

    Raises:
      PipelineError: if scenes could not be mapped; the others are.
    """
    options = pipeline_options.PipelineOptions(list(arguments))
    options.get_all_options(display_warnings=True)
    runner = options.view_as(pipeline_options.StandardOptions).runner
    if runner in (None, "DirectRunner"):
        # DirectRunner would download the Prism runner, which starts no processes.
        runner = fn_api_runner.FnApiRunner()
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("*.problem"):
        left_over.unlink()
    try:
        with beam.Pipeline(runner, options) as pipeline:
            scattered = pipeline | beam.Create(list(tasks)) | beam.Reshuffle()
            scattered | beam.Map(_map, checkpoint, os.fspath(folder))
    # Each runner raises its own errors.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PipelineError(
            f"the Beam pipeline failed: {reason[-1]}; the same command goes on"
        ) from error
    problems = [path.read_text() for path in sorted(folder.glob("*.problem"))]
    missing = [task.name for task in tasks if not task.is_done]
    if problems:
        raise PipelineError(
            f"{len(problems)} of {len(tasks)} scenes could not be mapped: {'; '.join(problems)}"
        )
    if missing:
        raise PipelineError(
            f"the Beam pipeline ended without mapping {', '.join(missing)}: remove options that "
            "end the command before the job, and do not cancel the job"
        )
    shutil.rmtree(folder, ignore_errors=True)
