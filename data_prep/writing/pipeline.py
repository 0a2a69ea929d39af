"""Writes the files of a data set in an Apache Beam pipeline, on one machine or on many.

An element of the pipeline is the number of a file, which one worker writes completely. Therefore
the files are the same for every runner and number of workers. The plan is stored in a folder beside
the files: the index of a terabyte of archives would not fit into the description of a job.
"""

import functools
import pickle
import threading
import uuid
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.options import pipeline_options
from apache_beam.runners.portability import fn_api_runner
from etils import epath

from data_prep import errors
from data_prep.writing import records

# A process writes one file at a time: its threads would share the position in an archive.
_writing = threading.Lock()


@functools.lru_cache(maxsize=1)
def _load_plan(path: epath.Path) -> records.Plan:
    return pickle.loads(path.read_bytes())


def _outcomes_path(work_dir: epath.Path, number: int) -> epath.Path:
    return work_dir / f"outcomes-{number}"


def _stop_path(work_dir: epath.Path) -> epath.Path:
    """The file that exists once too many locations were skipped."""
    return work_dir / "stop"


def _write_shard(number: int, work_dir: str) -> None:
    """Writes one file and the results of its locations, each renamed when it is complete.

    Runners repeat elements that failed or are slow, even while they still run: all attempts write
    the same.
    """
    folder = epath.Path(work_dir)
    with _writing:
        if _stop_path(folder).exists():
            return
        plan = _load_plan(folder / "plan")
        shard = plan.shards[number]
        unfinished = folder / uuid.uuid4().hex
        results = (records.attempt(plan.read, location) for location in shard.locations)
        outcomes = []
        for outcome in records.write_shard(unfinished, results, plan.features):
            outcomes.append(outcome)
            num_bad = sum(isinstance(outcome, errors.BadFileError) for outcome in outcomes)
            if num_bad > plan.max_bad_locations:
                break
        else:
            unfinished.replace(shard.path)
            num_bad = 0
        unfinished = folder / uuid.uuid4().hex
        unfinished.write_bytes(pickle.dumps(outcomes))
        unfinished.replace(_outcomes_path(folder, number))
        if num_bad:
            _stop_path(folder).write_bytes(b"")


def parse_options(args: Sequence[str]) -> pipeline_options.PipelineOptions:
    """Parses pipeline options as Beam does, and warns of unknown ones.

    Raises:
      SystemExit: if one has a wrong value.
    """
    options = pipeline_options.PipelineOptions(list(args))
    options.get_all_options(display_warnings=True)
    return options


def write(
    plan: records.Plan, options: pipeline_options.PipelineOptions
) -> Iterator[tuple[records.Shard, records.Location, records.Outcome]]:
    """Does the same as `records.write_here`, in a pipeline.

    Args:
      plan: of the data set. All workers must see the same files under the same paths.
      options: of the pipeline.

    Yields:
      See `records.write_here`, after all files are written. If one file alone has more skipped
      locations than are allowed, locations of files that were not started are omitted.

    Raises:
      errors.BuildError: if the pipeline does not write all files.
    """
    runner = options.view_as(pipeline_options.StandardOptions).runner
    if runner in (None, "DirectRunner"):
        # DirectRunner would download the Prism runner, which starts no processes.
        runner = fn_api_runner.FnApiRunner()
    work_dir = plan.shards[0].path.parent / "beam"
    work_dir.mkdir()
    (work_dir / "plan").write_bytes(pickle.dumps(plan))
    try:
        with beam.Pipeline(runner, options) as pipeline:
            numbers = pipeline | beam.Create(range(len(plan.shards))) | beam.Reshuffle()
            numbers | beam.Map(_write_shard, str(work_dir))
    # Each runner raises its own errors.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise errors.BuildError(
            f"the Beam pipeline failed, nothing was written: {reason[-1]}"
        ) from error
    is_stopped = _stop_path(work_dir).exists()
    for number, shard in enumerate(plan.shards):
        path = _outcomes_path(work_dir, number)
        if path.exists():
            # There are fewer results where too many locations were skipped.
            outcomes = pickle.loads(path.read_bytes())
            for location, outcome in zip(shard.locations, outcomes, strict=False):
                yield shard, location, outcome
        elif not is_stopped:
            raise errors.BuildError(
                f"the Beam pipeline ended without writing {shard.path.name}; nothing was written: "
                "remove options that end the command before the job, and do not cancel the job"
            )
    work_dir.rmtree()
