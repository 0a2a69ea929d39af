"""Scoring fine-tuned networks on a test split: confusion matrices, maps, tables."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping

import jax
import ml_collections
import numpy as np
from etils import epath

from cromss_jax import files, sensors
from cromss_jax.data import input_pipeline
from cromss_jax.method import losses, metrics
from cromss_jax.networks import decoders, resnet
from cromss_jax.results import report
from cromss_jax.training import finetune_step, objective, run, sharding
from cromss_jax.training.state import TrainState, put_weights
from cromss_jax.weights import files as weight_files
from cromss_jax.weights.layouts import to_layout
from cromss_jax.weights.network import Network, Weights, WeightsError

_log = logging.getLogger(__name__)

_RANGES = {
    "at least 1": (
        "num_epochs",
        "batch_size",
        "log_every_steps",
        "checkpoint_every_epochs",
        "checkpoints_to_keep",
        "data.num_threads",
        "schedule.epochs",
    ),
    "at least 0": (
        "data.num_train_tiles",
        "data.max_bad_records",
        "optimizer.l2",
        "unfreeze_epoch",
    ),
    "from 0 to 1": ("augmentation.flip_probability", "augmentation.rotation_probability"),
    "from 0 to 180": ("augmentation.max_angle",),
    "above 0": ("optimizer.learning_rate",),
    "from 0 to below 1": ("optimizer.momentum",),
    "above 0 and at most 1": ("optimizer.layer_decay",),
}
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
# How many batches may wait on the device while a test split is scored.
_WAITING = 2


@dataclasses.dataclass(frozen=True)
class Task:
    """What the seeds of a run share.

    Attributes:
      config: the configuration, with the number of classes and the legend of the data set.
      folder: of the run.
      test: the split that is scored.
      mesh: the devices.
      definition: the network without its arrays.
      init: jitted, from a key to a fresh state on all devices.
      eval_step: jitted, as of `finetune_step.make_eval_step`.
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
        """What kind of network is trained."""
        return Network.of_config(self.config)


def prepare(config: ml_collections.ConfigDict, workdir: str) -> Task:
    """Checks a configuration and opens what it names.

    Raises:
      input_pipeline.DataError, run.ConfigError: with a sentence for the user.
    """
    run.check_fields(config, _RANGES, _CHOICES)
    run.init_bands(config)
    if len(config.modalities) != 1:
        raise run.ConfigError(
            f"config.modalities is {config.modalities}; fine-tuning takes one, as in input=s2"
        )
    test = input_pipeline.open_dataset(
        config.data.dir, config.data.name, config.data.test_split, config.data.max_bad_records
    )
    config = run.describe_data(config, test)
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
        compiler_options=sharding.compiler_options(mesh, deterministic=config.deterministic),
    )
    return Task(config, folder, test, mesh, definition, init, eval_step)


def init_state(task: Task, seed: int) -> TrainState:
    """A fresh state, on all devices."""
    return task.init(jax.random.key(seed))


def score(task: Task, state: TrainState, maps_folder: epath.Path | None) -> np.ndarray:
    """Scores a state on the whole test split.

    Args:
      task: what to score on.
      state: of the network.
      maps_folder: where the predictions are written as GeoTIFFs; None writes none.

    Returns:
      The confusion matrix, [C, C] int64, rows are labels.
    """
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
            real = np.where(records["is_real"], rows, -1)
            _write_maps(task, maps_folder, real, predictions)
    return metrics.counted(jax.device_get(counts))


def _write_maps(task: Task, folder: epath.Path, rows: np.ndarray, predictions: jax.Array) -> None:
    """Writes this process's rows of a batch's predictions, padding left out."""
    from cromss_jax.results import maps  # late: GDAL, which only maps need

    folder.mkdir(parents=True, exist_ok=True)
    shards = sorted(predictions.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    classes = np.concatenate([np.asarray(shard.data) for shard in shards])
    for index, tile in zip(rows.tolist(), classes, strict=True):
        if index < 0:
            continue
        record = task.test.source[index]
        name, (height, width) = record["location_id"].decode(), tile.shape
        if task.test.season_counts.max() > 1:  # a record for each date of a location
            name += f"_{int(record['season'])}"
        maps.write_map(
            folder / f"{name}.tif",
            tile[: int(record.get("height", height)), : int(record.get("width", width))],
            record["crs"].decode(),
            record["transform"],
            task.test.legend,
        )


def _check_scaling(config: ml_collections.FrozenConfigDict, card: Mapping, modality: str) -> None:
    """Refuses weights whose card says that they take imagery scaled otherwise, as of L2A.

    Raises:
      WeightsError: naming a band.
    """
    taken = (card.get("input") or {}).get("by_band") or {}
    for band in objective.stored_bands(config) or sensors.preset_bands((modality,)):
        known = taken.get(band.name, {})
        limits = [known.get(name) for name in ("mean", "std")]
        if None not in limits and not np.allclose(limits, (band.mean, band.std)):
            raise WeightsError(
                f"{config.init_from} takes {band.name} scaled by mean {limits[0]:g} and standard "
                f"deviation {limits[1]:g}, {config.data.name} has {band.mean:g} and {band.std:g}: "
                "score on a data set of the same processing level, or fine-tune"
            )


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Scores the network that `config.init_from` holds, and writes the results.

    Raises:
      input_pipeline.DataError, run.ConfigError, WeightsError: each with a sentence for the user.
    """
    task = prepare(config, workdir)
    if not config.init_from:
        raise run.ConfigError("mode=evaluate scores a checkpoint: name it by --config.init_from")
    if (task.folder / "config.json").exists() or list(task.folder.glob("seed_*")):
        raise run.ConfigError(
            f"{task.folder} holds a training run, whose results these would replace; use another "
            "--workdir"
        )
    source = weight_files.load(config.init_from, run.init_bands(config))
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
    names, classes = task.test.legend.names, source.card.get("classes")
    if classes and tuple(classes) != names:
        raise WeightsError(
            f"the classes of {config.init_from} are {', '.join(classes)}; those of "
            f"{config.data.name} are {', '.join(names)}: score on a data set of the same legend, "
            "or fine-tune"
        )
    _check_scaling(task.config, source.card, modality)
    state = put_weights(
        Weights(network, arrays), init_state(task, 0), sharding.replicated(task.mesh)
    )
    folder = task.folder / "predictions" if config.save_predictions else None
    write_results(task, 0, (), [score(task, state, folder)])


def write_results(
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
        "classes": list(task.test.legend.names),
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
