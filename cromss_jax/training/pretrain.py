"""Pretraining, read from top to bottom: data, networks, loop, results."""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import logging
import time
from collections.abc import Callable, Iterable

import jax
import ml_collections
import numpy as np
from etils import epath
from flax import nnx

from cromss_jax import files, sensors
from cromss_jax.data import input_pipeline
from cromss_jax.method import losses, metrics, schedules, selection, smoothing
from cromss_jax.networks import decoders, fusion, resnet
from cromss_jax.results import report
from cromss_jax.training import checkpoint, pretrain_step, run, sharding
from cromss_jax.training.state import TrainState
from cromss_jax.weights.network import Network

_log = logging.getLogger(__name__)

_COUNTS = ("num_epochs", "batch_size", "log_every_steps", "eval_every_epochs", "num_pictures")
_COUNTS += ("checkpoint_every_epochs", "checkpoints_to_keep", "data.num_threads")
_SHARES = ("augmentation.flip_probability", "augmentation.rotation_probability")
_SHARES += ("data.validation_fraction", "loss.prior_weight", "loss.uniform_weight")
_SHARES += ("selection.final_keep_fraction",)

_CHOICES = {
    "modalities": sensors.MODALITIES,
    "s2_bands": sensors.S2_BANDS,
    "network.fusion": fusion.FUSIONS,
    "network.decoder": decoders.DECODERS,
    "network.depth": tuple(resnet.RESNETS),
    "network.dtype": ("float32", "bfloat16"),
    "loss.segmentation": losses.SEGMENTATION_LOSSES,
    "loss.consistency": losses.CONSISTENCY_LOSSES,
    "loss.prior": smoothing.PRIOR_KINDS,
    "selection.confidence": selection.PREDICTION_CONFIDENCES,
    "selection.ramp": schedules.RAMPS,
    "selection.scope": ("global", "per_device"),
    "optimizer.name": ("adam", "sgd"),
    "schedule.name": schedules.LEARNING_RATES,
}


def check_config(config: ml_collections.ConfigDict, tile_size: int) -> None:
    """Raises run.ConfigError for what would fail late or silently do something else."""
    run.check_fields(config, _COUNTS, _SHARES, _CHOICES)
    if (config.network.fusion == "none") != (len(config.modalities) == 1):
        raise run.ConfigError(
            f"config.network.fusion is {config.network.fusion!r} with the modalities "
            f"{', '.join(config.modalities)}; use 'none' for one modality, 'mid' or 'late' for two"
        )
    smoothed = config.loss.prior_weight + config.loss.uniform_weight
    if smoothed > 1 + 1e-9:  # but for rounding
        raise run.ConfigError(
            f"config.loss.prior_weight and config.loss.uniform_weight are {smoothed:g} together; "
            "make them at most 1: the rest is the labels' own"
        )
    run.check_sizes(config.data.crop_size, tile_size, decoders.STRIDES[config.network.decoder])
    if config.schedule.name == "plateau" and config.data.validation_fraction == 0:
        raise run.ConfigError(
            "the plateau schedule needs a validation loss but config.data.validation_fraction is "
            "0; hold back some locations or set config.schedule.name to 'constant'"
        )


def count_scopes(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> int:
    """Into how many parts, each with class thresholds of its own, the batch is cut."""
    return 1 if config.selection.scope == "global" else mesh.size


def jit_train_step(
    config: ml_collections.ConfigDict,
    definition: nnx.GraphDef,
    num_locations: int,
    mesh: jax.sharding.Mesh,
) -> Callable:
    """`step.make_train_step` as the mesh runs it: jitted, cut over its devices, state donated.

    On TPUs a U-Net, of whose plain networks `definition` is, trains packed (`models.make_network`);
    elsewhere that costs more than it saves.
    """
    cell = 1
    if mesh.devices.flat[0].platform == "tpu" and config.network.decoder == "unet":
        definition, cell = pretrain_step.network_definition(config, packed=True), fusion.PACKED_CELL
    scopes = count_scopes(config, mesh)
    train_step = pretrain_step.make_train_step(
        config, definition, num_locations, scopes, mesh, cell
    )
    return sharding.jit_step(train_step, mesh, donate_state=True)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores on the held-back locations.

    Attributes:
      loss: validation loss, averaged over samples.
      confusions: [C, C] int64 by "<modality>" (against the noisy labels), "truth/<modality>" and
        "truth/labels" (the noisy labels themselves).
      aurocs: of label confidence, by modality; empty without truth.
    """

    loss: float
    confusions: dict[str, np.ndarray]
    aurocs: dict[str, float]

    def scalars(self) -> dict[str, float]:
        """Every score by name, classes included."""
        values = {"loss": self.loss}
        values |= {f"label_confidence_auroc/{m}": v for m, v in self.aurocs.items()}
        for name, confusion in self.confusions.items():
            for key, score in metrics.scores(confusion).items():
                if np.ndim(score) == 0:
                    values[f"{name}/{key}"] = score
                    continue
                for class_name, value in zip(sensors.CLASS_NAMES, score, strict=True):
                    values[f"{name}/{key}/{class_name}"] = value
        return values


def evaluate(
    eval_step: Callable,
    state: TrainState,
    batches: Iterable[dict],
    mesh: jax.sharding.Mesh,
) -> Evaluation:
    """Scores the state on batches of host arrays, without waiting between them."""
    sums = []
    for batch in batches:
        sums.append(eval_step(state, sharding.to_devices(batch, mesh)))
        if len(sums) > 2:  # waiting batches must not fill the device's memory
            sharding.wait(sums[-3]["loss"])
    sums = jax.device_get(sums)
    samples = np.array([s["num_samples"] for s in sums], np.float64)
    total = {
        name: np.sum([np.asarray(s[name], np.int64) for s in sums], axis=0)
        for name in sums[0]
        if "/" in name
    }
    confusions = {
        name.replace("confusion_truth/", "truth/").replace("confusion/", ""): value
        for name, value in total.items()
        if name.startswith("confusion")
    }
    aurocs = {
        name.removeprefix("confidence/"): metrics.auroc(value)
        for name, value in total.items()
        if name.startswith("confidence/")
    }
    loss = float(np.average([s["loss"] for s in sums], weights=samples))
    return Evaluation(loss, confusions, aurocs)


def write_results(evaluation: Evaluation, workdir: epath.Path) -> str:
    """Writes `results.md` and returns its text."""
    scores = {}
    for name, confusion in evaluation.confusions.items():
        reference, _, subject = name.rpartition("/")
        subject = "noisy labels" if subject == "labels" else subject.upper()
        scores[f"{subject} against {reference or 'noisy labels'}"] = [metrics.scores(confusion)]
    table = report.scores_table(scores, sensors.CLASS_NAMES)
    table += "\nIn percent; the classes' columns are IoU. Held-back locations, all seasons.\n"
    for modality, value in evaluation.aurocs.items():
        table += (
            f"Label confidence tells wrong labels from right ones ({modality.upper()}): "
            f"AUROC {value:.3f}.\n"
        )
    files.write_whole(workdir / "results.md", table.encode())
    return table


def train(config: ml_collections.ConfigDict, workdir: str) -> TrainState:
    """Pretrains, from the newest checkpoint of `workdir` if there is one.

    Returns:
      The final state.

    Raises:
      data.DataError, run.ConfigError, checkpoint.CheckpointError, weights.WeightsError,
        run.NonFiniteLossError: each with a sentence for the user.
      run.Preempted: after SIGTERM, everything saved.
    """
    config = ml_collections.FrozenConfigDict(config)
    folder = files.absolute(workdir)
    is_writer = jax.process_index() == 0

    # ---------------------------------------------------------------- data
    dataset = input_pipeline.open_dataset(config.data.dir, config.data.name)
    mesh = run.make_mesh(config.num_devices, config.batch_size)
    check_config(config, dataset.tile_size)
    train_locations, held_back = input_pipeline.split_locations(
        dataset.num_locations, config.data.validation_fraction, config.seed
    )
    run.check_same_everywhere(configuration=config.to_json(), data=str(dataset.identity))
    run.record_config(config, folder)
    rows = sharding.process_rows(mesh, config.batch_size)
    records = input_pipeline.training_records(
        dataset, train_locations, config.batch_size, config.seed
    )
    batches = input_pipeline.training_batches(
        dataset,
        config.modalities,
        records,
        rows=rows,
        num_threads=config.data.num_threads,
    )
    validation = input_pipeline.validation_records(dataset, held_back, config.batch_size)

    def read(batch: np.ndarray) -> dict:
        return input_pipeline.read_batch(dataset, config.modalities, batch[rows])

    def picture_batch():
        seasons = np.arange(len(held_back)) % dataset.season_counts[held_back]
        return read(np.resize(dataset.starts[held_back] + seasons, config.batch_size))

    def batch_shapes() -> dict[str, jax.ShapeDtypeStruct]:
        """Of a global batch."""
        record = input_pipeline.read_batch(dataset, config.modalities, records[0][:1])
        return {
            name: jax.ShapeDtypeStruct((config.batch_size, *value.shape[1:]), value.dtype)
            for name, value in record.items()
        }

    # ---------------------------------------------------------------- when to do what
    num_locations = len(train_locations)

    def last_step(epoch: int) -> int:
        """Number of steps after which `epoch` epochs of samples have been taken."""
        return -(-epoch * num_locations // config.batch_size)

    def steps_at(every: int) -> set[int]:
        epochs = {*range(every, config.num_epochs + 1, every), config.num_epochs}
        return {last_step(epoch) for epoch in epochs}

    num_steps = last_step(config.num_epochs)
    checkpoints = checkpoint.Checkpoints(str(folder / "checkpoints"), config.checkpoints_to_keep)
    done = checkpoints.latest_step or 0
    run.check_progress(done, num_steps, folder)
    eval_steps = steps_at(config.eval_every_epochs) if len(held_back) else set()
    checkpoint_steps = steps_at(config.checkpoint_every_epochs)

    # ---------------------------------------------------------------- state and steps
    replicated = sharding.replicated(mesh)
    definition = pretrain_step.network_definition(config)
    init = jax.jit(lambda key: pretrain_step.init_state(config, key), out_shardings=replicated)
    train_step = jit_train_step(config, definition, num_locations, mesh)
    eval_step = sharding.jit_step(pretrain_step.make_eval_step(config, definition), mesh)
    picture_step = sharding.jit_step(
        pretrain_step.make_picture_step(config, definition, num_locations), mesh
    )
    plateau = pretrain_step.make_plateau(config)
    # What a continued run must find again.
    identity = {**dataset.identity, "scopes": count_scopes(config, mesh)}

    @jax.jit
    def update_plateau(state: TrainState, loss: jax.Array) -> TrainState:
        _, new = plateau.update({}, state.plateau, value=loss)
        return dataclasses.replace(state, plateau=new)

    key = jax.random.key(config.seed)
    if checkpoints.latest_step is None:
        state = init(key)
        if config.init_from:
            network = Network.of_config(config)
            state = run.start_from(config.init_from, network, state, replicated)
    else:
        with run.garbage_kept():
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
                jax.eval_shape(init, key),
            )
            # A run that is complete takes no step.
            lowered = train_step.lower(abstract, batch_shapes()) if done < num_steps else None
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            # It takes seconds to read even what was compiled before: the state is read meanwhile.
            compiling = thread.submit(lowered.compile) if lowered else None
            state, host_state = checkpoints.restore(abstract)
        if compiling:
            train_step = compiling.result()
        if host_state["data"] != identity:
            raise run.ConfigError(
                f"the run in {folder} was on other data, or on another number of devices with "
                "config.selection.scope per_device: use those again, or another --workdir"
            )
        batches.set_state(host_state["iterator"])
        _log.info("continuing from %s at step %d", folder / "checkpoints", done)

    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    _log.info(
        "%d locations to train on, %d held back; %d epochs of %.1f steps of %d samples on %d "
        "devices; %s parameters",
        num_locations,
        len(held_back),
        config.num_epochs,
        num_locations / config.batch_size,
        config.batch_size,
        mesh.size,
        f"{num_params:,}",
    )

    def stop_if_bad(state: TrainState) -> None:
        run.stop_if_bad(state, dataset, records, checkpoints.latest_step, "locations")

    # ---------------------------------------------------------------- loop
    log = report.MetricLog(str(folder), done) if is_writer else None
    pending, started, start_step = [], 0.0, done + 1
    step_metrics, waited = None, 0.0
    evaluation = None
    # Whatever happens, what is being saved is saved to the end. And nothing goes to the device
    # unless it is said to.
    with (
        checkpoints,
        contextlib.closing(log) if log else contextlib.nullcontext(),
        run.Preemption() as preemption,
        jax.transfer_guard_host_to_device("disallow"),
    ):
        for number in range(done + 1, num_steps + 1):
            asked = time.perf_counter()
            batch = sharding.to_devices(next(batches), mesh)
            # If the devices are done by now, they waited for this batch, at most since it was
            # asked for; if not, they had work until here.
            if step_metrics is not None and step_metrics["loss"].is_ready():
                waited += time.perf_counter() - asked
            state, step_metrics = train_step(state, batch)
            pending.append(step_metrics)
            # Lets the device be two steps behind, so that waiting batches don't fill its memory.
            if len(pending) > 2:
                sharding.wait(pending[-3]["loss"])

            if number % config.log_every_steps == 0 or number in eval_steps | checkpoint_steps:
                means = {
                    name: float(np.mean([float(m[name]) for m in jax.device_get(pending)]))
                    for name in pending[0]
                }
                stop_if_bad(state)
                pending = []
                elapsed = time.perf_counter() - started
                speed = "speed not known yet"
                if number > start_step:
                    seconds = elapsed / (number - start_step)
                    left = datetime.timedelta(seconds=round((num_steps - number) * seconds))
                    speed = f"{config.batch_size / seconds:.1f} samples/s, {left} left"
                    means["samples_per_second"] = config.batch_size / seconds
                    means["wait_for_data"] = waited / elapsed
                _log.info(
                    "step %d/%d, epoch %.1f, loss %.4f, %s",
                    number,
                    num_steps,
                    number * config.batch_size / num_locations,
                    means["loss"],
                    speed,
                )
                if log:
                    log.scalars(number, "train", means)

            if number == start_step:
                sharding.wait(step_metrics["loss"])
                # Seconds of importing that nobody need wait for before the first step.
                from cromss_jax.results import pictures

                if log:
                    log.open_board()
                # Compiled by now: speed is measured from here.
                started, waited = time.perf_counter(), 0.0

            if number in eval_steps:
                evaluation = evaluate(eval_step, state, map(read, validation), mesh)
                state = update_plateau(
                    state, jax.device_put(np.float32(evaluation.loss), replicated)
                )
                # By all processes, as their devices compute it together.
                shown = jax.device_get(
                    picture_step(state, sharding.to_devices(picture_batch(), mesh))
                )
                if log:
                    log.scalars(number, "validation", evaluation.scalars())
                    picture = pictures.draw_samples(shown, tuple(config.s2_bands))
                    log.picture(number, "samples", picture)
                    pictures.save_picture(folder / "samples.png", picture)
                _log.info("step %d, validation loss %.4f", number, evaluation.loss)

            # After the validation, whose result the plateau schedule keeps in the state. The
            # iterator stands behind this step's batch.
            leave = preemption.reached(number)
            if number in checkpoint_steps or leave:
                stop_if_bad(state)
                host_state = {"iterator": batches.get_state(), "data": identity}
                checkpoints.save(number, state, host_state)
            if leave and number < num_steps:
                raise run.Preempted(
                    f"told to stop: saved step {number}; the same command continues"
                )
        if evaluation is None and len(held_back):  # the run was already complete
            evaluation = evaluate(eval_step, state, map(read, validation), mesh)
        if evaluation is not None and is_writer:
            _log.info("results\n\n%s", write_results(evaluation, folder))
    return state
