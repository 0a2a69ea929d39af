"""The training loop that pretraining and fine-tuning share."""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import importlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import jax
import ml_collections
import numpy as np
from etils import epath

from cromss_jax.data import input_pipeline
from cromss_jax.errors import UserError
from cromss_jax.results import report
from cromss_jax.training import checkpoint, memory, preemption, run, sharding
from cromss_jax.training.preemption import Preempted
from cromss_jax.training.state import TrainState, start_from
from cromss_jax.weights.network import Network

_log = logging.getLogger(__name__)


class NonFiniteLossError(UserError):
    """The loss or its gradient became infinite or NaN."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When a run logs, validates and saves. Steps count from 1.

    Batches run across the border of epochs: an epoch ends with the step that takes its last
    sample.

    Attributes:
      config: the configuration; `batch_size`, `num_epochs` and `*_every_*` are read.
      samples_per_epoch: number of locations or tiles that an epoch visits.
      validates: whether there is anything to validate on.
    """

    config: ml_collections.FrozenConfigDict
    samples_per_epoch: int
    validates: bool = False

    def last_step(self, epoch: int) -> int:
        """Number of steps after which `epoch` epochs of samples have been taken."""
        return -(-epoch * self.samples_per_epoch // self.config.batch_size)

    def _steps_every(self, epochs: int) -> frozenset[int]:
        ends = {*range(epochs, self.config.num_epochs + 1, epochs), self.config.num_epochs}
        return frozenset(self.last_step(epoch) for epoch in ends)

    @functools.cached_property
    def num_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.last_step(self.config.num_epochs)

    @functools.cached_property
    def eval_steps(self) -> frozenset[int]:
        """Steps after which the state is validated."""
        return self._steps_every(self.config.eval_every_epochs) if self.validates else frozenset()

    @functools.cached_property
    def checkpoint_steps(self) -> frozenset[int]:
        """Steps after which the state is saved."""
        return self._steps_every(self.config.checkpoint_every_epochs)


@dataclasses.dataclass(frozen=True)
class Training:
    """What a run is, for `fit`.

    Attributes:
      folder: of checkpoints and logs.
      config: the configuration.
      schedule: when to do what.
      mesh: the devices.
      dataset: the records.
      order: which records make which global batch, [B] indices each.
      init: jitted, from a key to a randomly initialised state on all devices.
      key: for `init`.
      init_from: weights to start from: a run, a checkpoint or a file; "" for none.
      init_bands: names of the bands of a file there by modality, if the configuration gives them.
      init_parts: the `PARTS` of the network that are taken from there.
      train_steps: jitted steps (state, batch) -> (state, metrics), by the first step that each
        takes: {1: step} unless a later one takes over.
      identity: what a continued run must find again.
      validate: (step, state, log) -> state, called after the schedule's `eval_steps`.
      sample_name: what an epoch visits, in the plural, for messages.
      prefix: of the lines that are logged.
    """

    folder: epath.Path
    config: ml_collections.FrozenConfigDict
    schedule: Schedule
    mesh: jax.sharding.Mesh
    dataset: input_pipeline.TileDataset
    order: grain.MapDataset
    init: Callable[[jax.Array], TrainState]
    key: jax.Array
    init_from: str
    init_bands: Mapping[str, tuple[str, ...]] | None
    init_parts: Sequence[str]
    train_steps: Mapping[int, Callable]
    identity: Mapping
    validate: Callable[[int, TrainState, report.MetricLog | None], TrainState] | None = None
    sample_name: str = "locations"
    prefix: str = ""


def fit(training: Training) -> TrainState:
    """Trains from the newest checkpoint, or from the start where there is none.

    Returns:
      The final state, saved.

    Raises:
      run.ConfigError, checkpoint.CheckpointError, NonFiniteLossError: each with a sentence for
        the user.
      Preempted: after a signal; the state is saved.
    """
    config = training.config
    _log_size(training)
    checkpoints = checkpoint.Checkpoints(
        training.folder / "checkpoints", config.checkpoints_to_keep
    )
    # The context of `checkpoints` waits for what is being saved, whatever happens; signals are
    # deferred until then.
    with contextlib.ExitStack() as deferring, checkpoints:
        checkpoints.check_space(jax.eval_shape(training.init, training.key))
        batches = input_pipeline.training_batches(
            training.dataset,
            config.modalities,
            training.order,
            rows=sharding.process_rows(training.mesh, config.batch_size),
            num_threads=config.data.num_threads,
        )
        state, begun = _begin(training, checkpoints, batches)
        # Nothing is copied to the device unless the code says so.
        with (
            _open_log(training.folder, begun) as log,
            jax.transfer_guard_host_to_device("disallow"),
        ):
            if begun.validates:
                state = training.validate(begun.done, state, log)
            return _take_steps(
                training, _Saver(training, checkpoints, batches), state, begun, log, deferring
            )


@dataclasses.dataclass(frozen=True)
class _Begun:
    """Where a run begins.

    Attributes:
      done: number of steps done.
      validates: whether the state is still to be validated.
      train_steps: see `Training`; the first that is needed may be compiled.
    """

    done: int
    validates: bool
    train_steps: Mapping[int, Callable]


@dataclasses.dataclass(frozen=True)
class _Saver:
    """Saves what a run needs to continue."""

    training: Training
    checkpoints: checkpoint.Checkpoints
    batches: grain.DatasetIterator

    def save(self, number: int, state: TrainState, validates: bool) -> None:
        """Saves the state after a step; `validates` says whether it is still to be validated."""
        _stop_if_not_finite(self.training, state, self.checkpoints)
        host_state = {
            "iterator": self.batches.get_state(),
            "data": self.training.identity,
            "validates": validates,
        }
        self.checkpoints.save(number, state, host_state)

    @contextlib.contextmanager
    def saved(self, number: int, state: TrainState, validates: bool) -> Iterator[None]:
        """Inside, a signal ends the process at once: all is saved. For what compiles minutes."""
        self.save(number, state, validates)
        self.checkpoints.wait()
        with preemption.deferred(False):
            yield


def _take_steps(
    training: Training,
    saver: _Saver,
    state: TrainState,
    begun: _Begun,
    log: report.MetricLog | None,
    deferring: contextlib.ExitStack,
) -> TrainState:
    """The loop: takes the steps that are left."""
    config, schedule = training.config, training.schedule
    meter = _Meter(config.batch_size)
    first = begun.done + 1
    compiled, validated = None, begun.validates
    # The order within a step matters. Batch and step come first. The log comes before the
    # validation, so that the time of the validation is not in the speed that it shows at this
    # step. The checkpoint comes before the validation, too, which may be interrupted: a continued
    # run begins with it. The iterator stands behind this step's batch, so that a continued run
    # takes the next one.
    for number in range(first, schedule.num_steps + 1):
        train_step = begun.train_steps[max(n for n in begun.train_steps if n <= number)]
        compiles = number > first and train_step is not compiled
        with saver.saved(number - 1, state, False) if compiles else contextlib.nullcontext():
            with meter.taking_batch():
                batch = sharding.to_devices(next(saver.batches), training.mesh)
            state, metrics = train_step(state, batch)
        compiled = train_step
        if number == first:  # from here on there is something to save
            deferring.enter_context(preemption.deferred())
        meter.add(metrics)

        saves = number in schedule.checkpoint_steps
        validates = number in schedule.eval_steps
        if number % config.log_every_steps == 0 or saves or validates:
            means = meter.means()
            _stop_if_not_finite(training, state, saver.checkpoints)
            _log_step(training, number, means, log)
        if number == first:
            # Compiled by now. What only results need is imported from here on, as it takes
            # seconds; the speed is measured after that.
            sharding.wait(metrics["loss"])
            importlib.import_module("cromss_jax.results.pictures")
            if log:
                log.open_board()
            meter.start_clock()

        leaves = preemption.reached()
        if saves or leaves:
            saver.save(number, state, validates)
        if leaves:
            raise Preempted(f"interrupted: saved step {number}; the same command continues")
        if validates:
            state = _validate(training, saver, number, state, log, compiles=not validated)
            validated = True
    return state


def _validate(
    training: Training,
    saver: _Saver,
    number: int,
    state: TrainState,
    log: report.MetricLog | None,
    compiles: bool,
) -> TrainState:
    """Validates; if it is interrupted, the state of before is saved."""
    try:
        with saver.saved(number, state, True) if compiles else contextlib.nullcontext():
            return training.validate(number, state, log)
    except Preempted as interruption:
        saver.save(number, state, True)
        raise Preempted(
            f"interrupted: saved step {number}; the same command continues with its validation"
        ) from interruption


def _log_size(training: Training) -> None:
    """Says how long the run is, on how many devices, and how large the network."""
    config, num_samples = training.config, training.schedule.samples_per_epoch
    params = jax.eval_shape(training.init, training.key).params
    _log.info(
        "%s%d %s to train on; %d epochs of %.1f steps of %d samples on %d devices; %s parameters",
        training.prefix,
        num_samples,
        training.sample_name,
        config.num_epochs,
        num_samples / config.batch_size,
        config.batch_size,
        training.mesh.size,
        f"{sum(x.size for x in jax.tree.leaves(params)):,}",
    )


class _Meter:
    """Collects the metrics of steps, the speed, and how long the devices waited for data."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._pending: list[dict[str, jax.Array]] = []  # of the steps since the last means
        self._newest: dict[str, jax.Array] | None = None
        self._started, self._waited, self._num_steps = 0.0, 0.0, 0

    def start_clock(self) -> None:
        """Measures speed and waiting from now on."""
        self._started, self._waited, self._num_steps = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def taking_batch(self) -> Iterator[None]:
        """Counts the time that a batch takes as waiting if the devices had nothing to do.

        If they have finished the last step by its end, they waited for the batch, at most since
        it was asked for. If not, they had work all the while.
        """
        asked = time.perf_counter()
        yield
        if self._newest is not None and self._newest["loss"].is_ready():
            self._waited += time.perf_counter() - asked

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Notes a step. Lets the devices be two steps behind the host.

        So that waiting batches do not fill the devices' memory.
        """
        self._newest = metrics
        self._pending.append(metrics)
        self._num_steps += 1
        if len(self._pending) > 2:
            sharding.wait(self._pending[-3]["loss"])

    def means(self) -> dict[str, float]:
        """Means over the steps since the last call, and the speed once the clock runs."""
        found = jax.device_get(self._pending)
        means = {name: float(np.mean([float(m[name]) for m in found])) for name in found[0]}
        self._pending = []
        if self._started and self._num_steps:
            elapsed = time.perf_counter() - self._started
            means["samples_per_second"] = self._num_steps * self._batch_size / elapsed
            means["wait_for_data"] = self._waited / elapsed
        return means


def _begin(
    training: Training, checkpoints: checkpoint.Checkpoints, batches: grain.DatasetIterator
) -> tuple[TrainState, _Begun]:
    """The state to continue from, and where that is.

    Moves `batches` to where the state is.

    Raises:
      run.ConfigError: if the folder holds a longer run, or one on other data.
    """
    done, train_steps = checkpoints.latest_step, dict(training.train_steps)
    run.check_progress(done or 0, training.schedule.num_steps, training.folder)
    if done is None:
        state = training.init(training.key)
        if training.init_from:
            network = Network.of_config(training.config)
            replicated = sharding.replicated(training.mesh)
            state = start_from(
                training.init_from,
                network,
                state,
                replicated,
                training.init_parts,
                training.init_bands,
                training.dataset.legend.names,
            )
        return state, _Begun(0, False, train_steps)
    # A run that is complete takes no step.
    first = max(n for n in train_steps if n <= done + 1)
    compiles = done < training.schedule.num_steps
    replicated = sharding.replicated(training.mesh)
    with memory.garbage_collection_paused():
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
            jax.eval_shape(training.init, training.key),
        )
        lowered = train_steps[first].lower(abstract, _batch_shapes(training)) if compiles else None
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        # Even a program from the compilation cache takes seconds to load: the state is restored
        # meanwhile.
        compiling = thread.submit(lowered.compile) if compiles else None
        # An older one where the arrays of this one are damaged.
        done, state, host_state = checkpoints.restore(abstract)
    if compiling:
        train_steps[first] = compiling.result()
    _check_same_data(training, host_state["data"])
    batches.set_state(host_state["iterator"])
    _log.info("continuing from %s at step %d", training.folder / "checkpoints", done)
    # A run may now have another last step, which alone would have been validated.
    validates = host_state.get("validates", False) and done in training.schedule.eval_steps
    return state, _Begun(done, validates, train_steps)


def _check_same_data(training: Training, saved: Mapping) -> None:
    """Raises run.ConfigError unless the data is that of the saved identity."""
    if {**saved, "records": None} != {**training.identity, "records": None}:
        raise run.ConfigError(
            f"the run in {training.folder} used other data, or another number of devices with "
            "config.selection.scope per_device; use the same again, or another --workdir"
        )
    same_records = training.dataset.has_records_of(saved.get("records"))
    if same_records is None:
        _log.warning(
            "unverified data: the run in %s was saved by a version that kept no digest of the "
            "records; tile size and seasons are the same",
            training.folder,
        )
    elif not same_records:
        data = training.config.data
        raise run.ConfigError(
            f"the records of {data.name} in {data.dir} are not those that the run in "
            f"{training.folder} began with; restore these, or use another --workdir"
        )


def _batch_shapes(training: Training) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a global batch."""
    config = training.config
    record = input_pipeline.read_batch(training.dataset, config.modalities, training.order[0][:1])
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *value.shape[1:]), value.dtype)
        for name, value in record.items()
    }


@contextlib.contextmanager
def _open_log(folder: epath.Path, begun: _Begun):
    """The run's log, which process 0 writes; None on the others."""
    if jax.process_index() > 0:
        yield None
        return
    log = report.MetricLog(str(folder), begun.done, validated=not begun.validates)
    with contextlib.closing(log):
        yield log


def _log_step(
    training: Training, number: int, means: dict[str, float], log: report.MetricLog | None
) -> None:
    """Writes the means of the last steps, with the time that is left."""
    schedule, batch_size = training.schedule, training.config.batch_size
    speed = "speed not known yet"
    if "samples_per_second" in means:
        per_second = means["samples_per_second"]
        seconds = (schedule.num_steps - number) * batch_size / per_second
        left = datetime.timedelta(seconds=round(seconds))
        speed = f"{per_second:.1f} samples/s, {left} left"
    _log.info(
        "%sstep %d/%d, epoch %.1f, loss %.4f, %s",
        training.prefix,
        number,
        schedule.num_steps,
        number * batch_size / schedule.samples_per_epoch,
        means["loss"],
        speed,
    )
    if log:
        log.scalars(number, "train", means)


def _stop_if_not_finite(
    training: Training, state: TrainState, checkpoints: checkpoint.Checkpoints
) -> None:
    """Raises NonFiniteLossError, naming the batch, if a loss or gradient was not finite."""
    first_bad = int(jax.device_get(state.first_bad_step))
    if first_bad < 0:
        return
    records = (training.dataset.source[int(index)] for index in training.order[first_bad])
    ids = ", ".join(record["location_id"].decode() for record in records)
    raise NonFiniteLossError(
        f"the loss or its gradient was not finite at step {first_bad}, on the batch of "
        f"{training.sample_name} {ids}; checkpoints (newest: step {checkpoints.latest_step}) are "
        f"from before that: look at those {training.sample_name}, or lower "
        "config.optimizer.learning_rate"
    )
