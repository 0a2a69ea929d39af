"""Finetuning on clean labels and scoring, read from top to bottom: data, network, loop, results."""

import contextlib
import dataclasses
import datetime
import json
import logging
import time
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
from etils import epath

from cromss_jax import files, sensors
from cromss_jax.data import input_pipeline
from cromss_jax.method import losses, metrics
from cromss_jax.networks import decoders, resnet
from cromss_jax.results import maps, report
from cromss_jax.training import checkpoint, finetune_step, run, sharding
from cromss_jax.training.state import TrainState
from cromss_jax.weights import files as weight_files
from cromss_jax.weights.layouts import to_layout
from cromss_jax.weights.network import Network, Weights, WeightsError

_log = logging.getLogger(__name__)

_COUNTS = ("num_epochs", "batch_size", "log_every_steps", "checkpoint_every_epochs")
_COUNTS += ("checkpoints_to_keep", "data.num_threads", "schedule.epochs")
_SHARES = ("augmentation.flip_probability", "augmentation.rotation_probability")
_CHOICES = {
    "modalities": sensors.MODALITIES,
    "s2_bands": sensors.S2_BANDS,
    "encoder": finetune_step.ENCODERS,
    "network.fusion": ("none",),
    "network.depth": tuple(resnet.RESNETS),
    "network.decoder": decoders.DECODERS,
    "network.dtype": ("float32", "bfloat16"),
    "loss.segmentation": losses.SEGMENTATION_LOSSES,
    "optimizer.name": ("adam", "sgd"),
}
# At most so many batches wait on the device while a test set is scored.
_WAITING = 2


@dataclasses.dataclass(frozen=True)
class Task:
    """What all seeds of a run share.

    Attributes:
      config: with the number of classes and their legend, which the data set tells.
      folder: of the run.
      test: the records that are scored.
      mesh: the devices.
      definition: of the network.
      init: from a key to a fresh state, compiled.
      eval_step: compiled.
    """

    config: ml_collections.FrozenConfigDict
    folder: epath.Path
    test: input_pipeline.TileDataset
    mesh: jax.sharding.Mesh
    definition: object
    init: Callable
    eval_step: Callable

    @property
    def network(self) -> Network:
        """What is trained."""
        return Network.of_config(self.config)


def prepare(config: ml_collections.ConfigDict, workdir: str) -> Task:
    """Checks a configuration and opens what it names.

    Raises:
      data.DataError, run.ConfigError: with a sentence for the user.
    """
    run.check_fields(config, _COUNTS, _SHARES, _CHOICES)
    if len(config.modalities) != 1:
        raise run.ConfigError(
            f"config.modalities is {config.modalities}; finetuning takes one, as in input=s2"
        )
    test = input_pipeline.open_dataset(config.data.dir, config.data.name, config.data.test_split)
    config = ml_collections.ConfigDict(config)
    with config.unlocked():
        config.network.num_classes = len(test.legend)
        config.legend = tuple(test.legend.items())
    config = ml_collections.FrozenConfigDict(config)
    mesh = run.make_mesh(config.num_devices, config.batch_size)
    run.check_same_everywhere(configuration=config.to_json(), test_data=str(test.identity))
    folder = files.absolute(workdir)
    definition = finetune_step.network_definition(config)
    replicated, cut = sharding.replicated(mesh), sharding.batch_sharded(mesh)
    init = jax.jit(lambda key: finetune_step.init_state(config, key), out_shardings=replicated)
    eval_step = jax.jit(
        finetune_step.make_eval_step(config, definition),
        in_shardings=(replicated, replicated, cut),
        out_shardings=(replicated, cut),
        donate_argnums=(1,),
        compiler_options=sharding.compiler_options(mesh),
    )
    return Task(config, folder, test, mesh, definition, init, eval_step)


def init_state(task: Task, seed: int) -> TrainState:
    """A fresh state, on all devices."""
    return task.init(jax.random.key(seed))


def score(task: Task, state: TrainState, maps_folder: epath.Path | None) -> np.ndarray:
    """The confusion matrix [C, C] int64 of the whole test set; predictions into a folder."""
    config = task.config
    replicated = sharding.replicated(task.mesh)
    counts = jax.device_put(metrics.no_counts(config.network.num_classes), replicated)
    tiles = task.test.by_record
    batches = input_pipeline.validation_records(
        tiles, np.arange(tiles.num_locations), config.batch_size
    )
    own = sharding.process_rows(task.mesh, config.batch_size)
    waiting = []
    for batch in batches:
        rows = batch[own]
        records = input_pipeline.read_batch(tiles, config.modalities, rows)
        counts, predictions = task.eval_step(state, counts, sharding.to_devices(records, task.mesh))
        waiting.append(predictions)
        if len(waiting) > _WAITING:
            sharding.wait(waiting.pop(0))
        if maps_folder:
            _write_maps(task, maps_folder, rows, predictions)
    return metrics.counted(jax.device_get(counts))


def _write_maps(task: Task, folder: epath.Path, rows: np.ndarray, predictions: jax.Array) -> None:
    """Writes this process's rows of a batch's predictions, padding left out."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = sorted(predictions.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    classes = np.concatenate([np.asarray(shard.data) for shard in shards])
    for index, tile in zip(rows.tolist(), classes, strict=True):
        if index < 0:
            continue
        record = task.test.source[index]
        maps.write_map(
            folder / f"{record['location_id'].decode()}.tif",
            tile[: int(record["height"]), : int(record["width"])],
            record["crs"].decode(),
            record["transform"],
            task.test.legend,
        )


def finetune(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Trains once for each seed, scores, and writes the results; continues where it stopped.

    Raises:
      data.DataError, run.ConfigError, run.NonFiniteLossError, checkpoint.CheckpointError,
        weights.WeightsError: each with a sentence for the user.
      run.Preempted: after SIGTERM, everything saved.
    """
    task = prepare(config, workdir)
    config = task.config
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise run.ConfigError(
            f"config.seeds is {config.seeds}; name at least one, from 0, none twice: (0, 1, 2)"
        )
    if not 0 < config.schedule.final_learning_rate <= config.optimizer.learning_rate:
        raise run.ConfigError(
            f"config.schedule.final_learning_rate is {config.schedule.final_learning_rate}, to "
            f"which config.optimizer.learning_rate, {config.optimizer.learning_rate}, can't fall; "
            "both are above 0, the final one the smaller"
        )
    for seed in config.seeds:  # all of them now, not hours later
        if config.init_from and not files.absolute(_init_path(config, seed)).exists():
            raise WeightsError(
                f"config.init_from: {_init_path(config, seed)} is not there; name a run's folder, "
                "a checkpoint or a file"
            )
    dataset = input_pipeline.open_dataset(
        config.data.dir, config.data.name, config.data.train_split
    )
    run.check_sizes(
        config.data.crop_size, dataset.tile_size, decoders.STRIDES[config.network.decoder]
    )
    run.check_same_everywhere(data=str(dataset.identity))
    num_tiles = config.data.num_train_tiles or len(dataset.source)
    if not config.batch_size <= num_tiles <= len(dataset.source):
        raise run.ConfigError(
            f"config.data.num_train_tiles is {config.data.num_train_tiles} and config.batch_size "
            f"{config.batch_size}, but there are {len(dataset.source)} training tiles; use at "
            "most those, and a batch at most the tiles in use"
        )
    train_steps = {
        train_encoder: sharding.jit_step(
            finetune_step.make_train_step(
                config, task.definition, num_tiles, train_encoder, task.mesh
            ),
            task.mesh,
            donate_state=True,
        )
        for train_encoder in (False, True)
    }
    confusions = []
    with run.Preemption() as preemption:
        for index, seed in enumerate(config.seeds):
            state = _train(task, dataset, num_tiles, train_steps, preemption, index)
            folder = task.folder / f"seed_{seed}" / "predictions"
            confusions.append(score(task, state, folder if config.save_predictions else None))
            _log.info("seed %d: mIoU %.1f %%", seed, 100 * metrics.scores(confusions[-1])["miou"])
    _write_results(task, num_tiles, config.seeds, confusions)


def _init_path(config: ml_collections.FrozenConfigDict, seed: int) -> str:
    """Where the weights of a seed come from."""
    return config.init_from.replace("{seed}", str(seed))


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Scores the network that `config.init_from` holds, and writes the results.

    Raises:
      data.DataError, run.ConfigError, weights.WeightsError: each with a sentence for the user.
    """
    task = prepare(config, workdir)
    if not config.init_from:
        raise run.ConfigError("mode=evaluate scores a checkpoint: name it by --config.init_from")
    if (task.folder / "config.json").exists() or list(task.folder.glob("seed_*")):
        raise run.ConfigError(
            f"{task.folder} holds a training run, whose results these would replace; use another "
            "--workdir"
        )
    source = weight_files.load(config.init_from)
    for note in source.notes:
        _log.info("%s: %s", config.init_from, note)
    (modality,) = config.modalities
    if modality not in source.network.bands:
        raise WeightsError(
            f"{config.init_from} is a {source.network}; choose its input by input=s1 or input=s2"
        )
    network, arrays = to_layout(source, "unet", modality)
    if network != task.network:
        raise WeightsError(
            f"{config.init_from} is a {network}; the configuration describes a {task.network}"
        )
    state = run.put_weights(
        Weights(network, arrays), init_state(task, 0), sharding.replicated(task.mesh)
    )
    folder = task.folder / "predictions" if config.save_predictions else None
    _write_results(task, 0, (), [score(task, state, folder)])


def _train(
    task: Task,
    dataset: input_pipeline.TileDataset,
    num_tiles: int,
    train_steps: dict[bool, Callable],
    preemption: run.Preemption,
    index: int,
) -> TrainState:
    """Training with the seed of that index, from its newest checkpoint if there is one."""
    config = task.config
    seed = config.seeds[index]
    folder = task.folder / f"seed_{seed}"
    is_writer = jax.process_index() == 0
    run.record_config(config, folder)

    # ---------------------------------------------------------------- data and state
    # Every record is visited once an epoch; of fewer, the seed draws which.
    tiles = dataset.by_record
    order = np.random.default_rng(seed).permutation(tiles.num_locations)
    chosen = np.sort(order[:num_tiles])
    records = input_pipeline.training_records(tiles, chosen, config.batch_size, seed)
    batches = input_pipeline.training_batches(
        tiles,
        config.modalities,
        records,
        rows=sharding.process_rows(task.mesh, config.batch_size),
        num_threads=config.data.num_threads,
    )
    checkpoints = checkpoint.Checkpoints(str(folder / "checkpoints"), config.checkpoints_to_keep)
    replicated = sharding.replicated(task.mesh)
    identity = {**tiles.identity, "num_tiles": num_tiles}
    state, done = init_state(task, seed), 0
    if checkpoints.latest_step is not None:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state
        )
        state, host_state = checkpoints.restore(abstract)
        if host_state["data"] != identity:
            raise run.ConfigError(
                f"the run in {folder} was on other data: use that again, or another --workdir"
            )
        batches.set_state(host_state["iterator"])
        done = checkpoints.latest_step
        _log.info("continuing from %s at step %d", folder / "checkpoints", done)
    elif config.init_from:
        path = _init_path(config, seed)
        state = run.start_from(path, task.network, state, replicated, ("encoder",))

    # ---------------------------------------------------------------- loop
    def last_step(epoch: int) -> int:
        return -(-epoch * num_tiles // config.batch_size)

    unfreeze_epoch = {"trained": 0, "frozen": config.num_epochs, "late": config.unfreeze_epoch}
    first_trained = last_step(unfreeze_epoch[config.encoder])
    num_steps = last_step(config.num_epochs)
    run.check_progress(done, num_steps, folder)
    every = config.checkpoint_every_epochs
    checkpoint_steps = {last_step(epoch) for epoch in range(every, config.num_epochs, every)}
    checkpoint_steps.add(num_steps)
    log = report.MetricLog(str(folder), done) if is_writer else None
    pending, started, start_step = [], time.perf_counter(), done
    with (
        checkpoints,
        contextlib.closing(log) if log else contextlib.nullcontext(),
        jax.transfer_guard_host_to_device("disallow"),
    ):
        for number in range(done + 1, num_steps + 1):
            train_step = train_steps[number > first_trained]
            state, step_metrics = train_step(state, sharding.to_devices(next(batches), task.mesh))
            pending.append(step_metrics)
            if len(pending) > 2:  # waiting batches must not fill the device's memory
                sharding.wait(pending[-3]["loss"])
            if number % config.log_every_steps == 0 or number in checkpoint_steps:
                means = {
                    name: float(np.mean([float(m[name]) for m in jax.device_get(pending)]))
                    for name in pending[0]
                }
                pending = []
                run.stop_if_bad(state, tiles, records, checkpoints.latest_step, "tiles")
                seconds = (time.perf_counter() - started) / (number - start_step)
                _log.info(
                    "seed %d, step %d/%d, loss %.4f, %s left",
                    seed,
                    number,
                    num_steps,
                    means["loss"],
                    datetime.timedelta(seconds=round((num_steps - number) * seconds)),
                )
                if log:
                    log.scalars(number, "train", means)
            # Counted over all seeds: the processes agree on a step by its number.
            leave = preemption.reached(index * num_steps + number)
            if number in checkpoint_steps or leave:
                run.stop_if_bad(state, tiles, records, checkpoints.latest_step, "tiles")
                checkpoints.save(number, state, {"iterator": batches.get_state(), "data": identity})
            if leave:
                raise run.Preempted(
                    f"told to stop: saved step {number}; the same command continues"
                )
    return state


def _write_results(
    task: Task, num_tiles: int, seeds: tuple[int, ...], confusions: list[np.ndarray]
) -> None:
    """Writes `results.json`, `results.md` and `confusion.png`, and logs the table."""
    if jax.process_index() > 0:
        return
    task.folder.mkdir(parents=True, exist_ok=True)
    config = task.config
    results = {
        "dataset": config.data.name,
        "input": config.modalities[0],
        "weights": config.weights_name or config.init_from or "random",
        "encoder": config.encoder if seeds else "as given",
        "decoder": config.network.decoder,
        "resnet": config.network.depth,
        "num_bands": len(config.s2_bands) if config.modalities == ("s2",) else 2,
        "num_train_tiles": num_tiles,
        "seeds": list(seeds),
        "classes": list(task.test.legend),
        "confusions": [confusion.tolist() for confusion in confusions],
    }
    files.write_whole(task.folder / "results.json", (json.dumps(results) + "\n").encode())
    scores = [metrics.scores(confusion) for confusion in confusions]
    rows = {f"seed {seed}": [row] for seed, row in zip(seeds, scores, strict=False)}
    if len(scores) > 1:
        rows["mean ± standard deviation"] = scores
    name = f"{results['weights']}, encoder {results['encoder']}"
    table = report.scores_table(rows or {name: scores}, results["classes"])
    caption = (
        f"{results['dataset']}, {results['input'].upper()}, {config.network.decoder}, weights "
        f"{name}. In percent; the classes' columns are IoU. {len(task.test.source)} test tiles."
    )
    files.write_whole(task.folder / "results.md", f"{table}\n{caption}\n".encode())
    from cromss_jax.results import pictures  # late: a second that training needs not wait

    picture = pictures.draw_confusion(sum(confusions), task.test.legend)
    pictures.save_picture(task.folder / "confusion.png", picture)
    _log.info("results\n\n%s\n%s\n", table, caption)
