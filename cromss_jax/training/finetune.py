"""Fine-tuning on clean labels: one training run for each seed, then scores on the test split."""

import contextlib
import logging
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
from etils import epath

from cromss_jax import files, platforms
from cromss_jax.data import input_pipeline
from cromss_jax.method import metrics
from cromss_jax.networks import decoders
from cromss_jax.training import distributed, finetune_step, loop, run, scoring, sharding
from cromss_jax.weights.network import WeightsError

_log = logging.getLogger(__name__)


def finetune(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Trains once for each seed, scores, and writes the results; continues where it stopped.

    Other processes may train other seeds in the same folder at the same time.

    Raises:
      lock.LockedError: if another process trains one of the seeds there.
      input_pipeline.DataError, run.ConfigError, checkpoint.CheckpointError, WeightsError,
        loop.NonFiniteLossError: each with a sentence for the user.
      Preempted: after a signal; the state is saved.
    """
    task = scoring.prepare(config, workdir)
    config = task.config
    _check_config(config)
    dataset = input_pipeline.open_dataset(
        config.data.dir, config.data.name, config.data.train_split, config.data.max_bad_records
    )
    stride = decoders.STRIDES[config.network.decoder]
    dataset = dataset.padded_to(stride)
    run.check_sizes(config.data.crop_size, dataset.tile_size, stride)
    run.check_same_everywhere(data=str(dataset.identity))
    num_tiles = _num_tiles(config, len(dataset.source))
    forms = platforms.forms_for(task.mesh, can_pack=False)
    definition = task.definition
    if forms.fuses_norms:
        definition = finetune_step.network_definition(config, forms)
    frozen_step, trained_step = (
        sharding.jit_step(
            finetune_step.make_train_step(
                config, definition, num_tiles, train_encoder, task.mesh, forms
            ),
            task.mesh,
            deterministic=config.deterministic,
            donate_state=True,
        )
        for train_encoder in (False, True)
    )
    confusions = []
    with contextlib.ExitStack() as holding:
        for seed in config.seeds:  # all before the first is trained for hours
            holding.enter_context(distributed.only_writer(_folder(task, seed)))
        for index, seed in enumerate(config.seeds):
            training = _training(task, dataset, num_tiles, index, frozen_step, trained_step)
            state = loop.fit(training)
            folder = training.folder / "predictions" if config.save_predictions else None
            confusions.append(scoring.score(task, state, folder))
            _log.info("seed %d: mIoU %.1f %%", seed, 100 * metrics.scores(confusions[-1])["miou"])
        scoring.write_results(task, num_tiles, config.seeds, confusions)


def _check_config(config: ml_collections.FrozenConfigDict) -> None:
    """Raises run.ConfigError or WeightsError for what would fail hours later."""
    are_seeds = all(type(seed) is int and 0 <= seed < 1 << 63 for seed in config.seeds)
    if not config.seeds or not are_seeds or len(set(config.seeds)) < len(config.seeds):
        raise run.ConfigError(
            f"config.seeds is {config.seeds}; name at least one, from 0, none twice: (0, 1, 2)"
        )
    if not 0 < config.schedule.final_learning_rate <= config.optimizer.learning_rate:
        raise run.ConfigError(
            f"config.schedule.final_learning_rate is {config.schedule.final_learning_rate} and "
            f"config.optimizer.learning_rate is {config.optimizer.learning_rate}; make both "
            "positive, and the final one no larger than the other"
        )
    for seed in config.seeds:
        if config.init_from and not files.absolute(_init_path(config, seed)).exists():
            raise WeightsError(
                f"config.init_from: {_init_path(config, seed)} does not exist; name the folder of "
                "a run or of a checkpoint, or a file"
            )


def _folder(task: scoring.Task, seed: int) -> epath.Path:
    """Of the training run of a seed."""
    return task.folder / f"seed_{seed}"


def _init_path(config: ml_collections.FrozenConfigDict, seed: int) -> str:
    """Where the weights of a seed come from."""
    return config.init_from.replace("{seed}", str(seed))


def _num_tiles(config: ml_collections.FrozenConfigDict, available: int) -> int:
    """How many tiles are trained on.

    Raises:
      run.ConfigError: if there are fewer, or if a batch would hold a tile twice.
    """
    num_tiles = config.data.num_train_tiles or available
    if not config.batch_size <= num_tiles <= available:
        raise run.ConfigError(
            f"config.data.num_train_tiles is {config.data.num_train_tiles} and config.batch_size "
            f"{config.batch_size}, but there are {available} training tiles; use at most those, "
            "and a batch of at most the tiles in use"
        )
    return num_tiles


def _training(
    task: scoring.Task,
    dataset: input_pipeline.TileDataset,
    num_tiles: int,
    index: int,
    frozen_step: Callable,
    trained_step: Callable,
) -> loop.Training:
    """The training run of the seed at that index.

    Args:
      task: what all seeds share.
      dataset: the training split.
      num_tiles: how many of its tiles are used; the seed draws which.
      index: of the seed in `config.seeds`.
      frozen_step: jitted, leaves the encoder as it is.
      trained_step: jitted, trains the encoder, too.
    """
    config, seed = task.config, task.config.seeds[index]
    folder = _folder(task, seed)
    run.record_config(config, folder)
    # Every record is visited once an epoch.
    tiles = dataset.by_record
    chosen = np.sort(np.random.default_rng(seed).permutation(tiles.num_locations)[:num_tiles])
    order = input_pipeline.training_records(tiles, chosen, config.batch_size, seed)
    schedule = loop.Schedule(config, num_tiles)
    frozen_epochs = {"trained": 0, "frozen": config.num_epochs, "late": config.unfreeze_epoch}
    first_trained = schedule.last_step(frozen_epochs[config.encoder]) + 1

    return loop.Training(
        folder=folder,
        config=config,
        schedule=schedule,
        mesh=task.mesh,
        dataset=tiles,
        order=order,
        init=task.init,
        key=jax.random.key(seed),
        init_from=_init_path(config, seed),
        init_bands=run.init_bands(config),
        init_parts=("encoder",),
        train_steps={1: frozen_step} | {first_trained: trained_step},
        identity={**tiles.identity, "num_tiles": num_tiles},
        sample_name="tiles",
        prefix=f"seed {seed}, ",
    )
