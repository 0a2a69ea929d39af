"""Writes the files of a dataset in an Apache Beam pipeline, on this machine or on many.

An element of the pipeline is the number of a file, which one worker reads and writes whole: no
runner and no number of workers changes a bit of it. What the numbers stand for lies in a folder
beside the files; the index of a terabyte of archives would not fit into the description of a job.
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

from data_prep import records

# One file at a time in a process: threads would share the position in an archive.
_writing = threading.Lock()


@functools.lru_cache(maxsize=1)
def _load_plan(path: epath.Path) -> records.Plan:
    return pickle.loads(path.read_bytes())


def _outcomes_path(work_dir: epath.Path, number: int) -> epath.Path:
    return work_dir / f"outcomes-{number}"


def _stop_path(work_dir: epath.Path) -> epath.Path:
    """Of a file that is there once too many locations are bad."""
    return work_dir / "stop"


def _write_shard(number: int, work_dir: str) -> None:
    """Writes one file and what became of its locations, each under its name when it is whole.

    Runners repeat what failed or was slow, even while it still runs: all attempts write the same.
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
            num_bad = sum(isinstance(outcome, records.BadFileError) for outcome in outcomes)
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
    """The options of a pipeline as Beam's own commands take them; warns of unknown ones.

    Raises:
      SystemExit: if one has a wrong value.
    """
    options = pipeline_options.PipelineOptions(list(args))
    options.get_all_options(display_warnings=True)
    return options


def write(
    plan: records.Plan, options: pipeline_options.PipelineOptions
) -> Iterator[tuple[records.Shard, records.Location, records.Outcome]]:
    """Does in a pipeline what `records.write_here` does.

    Args:
      plan: of the dataset. All workers see the same files under the same paths.
      options: of the pipeline.

    Yields:
      See `records.write_here`, once all is written. If one file alone has more bad locations than
      are allowed, those of files that nobody had begun are left out.

    Raises:
      records.BuildError: if the pipeline does not write all files.
    """
    runner = options.view_as(pipeline_options.StandardOptions).runner
    if runner in (None, "DirectRunner"):
        # It would fetch the Prism runner from the network, which starts no processes.
        runner = fn_api_runner.FnApiRunner()
    work_dir = plan.shards[0].path.parent / "beam"
    work_dir.mkdir()
    (work_dir / "plan").write_bytes(pickle.dumps(plan))
    try:
        with beam.Pipeline(runner, options) as pipeline:
            numbers = pipeline | beam.Create(range(len(plan.shards))) | beam.Reshuffle()
            numbers | beam.Map(_write_shard, str(work_dir))
    # Each runner has errors of its own.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise records.BuildError(
            f"the Beam pipeline failed, nothing was written: {reason[-1]}"
        ) from error
    is_stopped = _stop_path(work_dir).exists()
    for number, shard in enumerate(plan.shards):
        path = _outcomes_path(work_dir, number)
        if path.exists():
            # Fewer where there were too many bad ones.
            outcomes = pickle.loads(path.read_bytes())
            for location, outcome in zip(shard.locations, outcomes, strict=False):
                yield shard, location, outcome
        elif not is_stopped:
            raise records.BuildError(
                f"the Beam pipeline ended without writing {shard.path.name}; nothing was written: "
                "leave out what keeps the command from waiting for the job, and do not cancel it"
            )
    work_dir.rmtree()
