"""Pretraining: what its configurations may say, its data, networks and results."""

import logging
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
from flax import nnx

from cromss_jax import files, platforms, sensors
from cromss_jax.data import input_pipeline, validation_split
from cromss_jax.method import losses, schedules, selection, smoothing
from cromss_jax.networks import decoders, fusion, resnet
from cromss_jax.training import loop, pretrain_step, run, sharding, validation
from cromss_jax.training.state import TrainState
from cromss_jax.weights.network import PARTS

_log = logging.getLogger(__name__)

_RANGES = {
    "at least 1": (
        "num_epochs",
        "batch_size",
        "microbatches",
        "log_every_steps",
        "eval_every_epochs",
        "checkpoint_every_epochs",
        "checkpoints_to_keep",
        "num_pictures",
        "data.num_threads",
    ),
    "at least 0": (
        "data.max_bad_records",
        "loss.consistency_weight",
        "selection.ramp_epochs",
        "optimizer.l2",
        "schedule.patience",
    ),
    "from 0 to 1": (
        "augmentation.flip_probability",
        "augmentation.rotation_probability",
        "data.validation_fraction",
        "loss.prior_weight",
        "loss.uniform_weight",
        "selection.final_keep_fraction",
    ),
    "from 0 to 180": ("augmentation.max_angle",),
    "from 0 to 2^63 - 1": ("seed",),
    "above 0": ("optimizer.learning_rate",),
    "from 0 to below 1": ("optimizer.momentum",),
    "above 0 and below 1": ("schedule.factor",),
    "above 0 and at most 1": ("schedule.decay",),
}

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


def check_fields(config: ml_collections.ConfigDict) -> None:
    """Raises run.ConfigError for single fields that are wrong, before anything looks them up."""
    run.check_fields(config, _RANGES, _CHOICES)


def check_config(config: ml_collections.ConfigDict, tile_size: int) -> None:
    """Raises run.ConfigError for what would fail late or silently do something else.

    Args:
      config: whose fields are right by themselves, see `check_fields`.
      tile_size: of the data set, padded as `pretrain` does.
    """
    run.init_bands(config)
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
    """Number of parts of the batch that have class thresholds of their own."""
    return 1 if config.selection.scope == "global" else mesh.size


def jit_train_step(
    config: ml_collections.ConfigDict,
    definition: nnx.GraphDef,
    num_locations: int,
    mesh: jax.sharding.Mesh,
) -> Callable:
    """`pretrain_step.make_train_step`, jitted for a mesh: batch sharded, state donated.

    `definition` is that of the networks in their forms for CPUs; they train in the forms for the
    mesh's devices (`platforms`).
    """
    forms = platforms.forms_for(mesh, can_pack=config.network.decoder == "unet")
    if forms.packs or forms.fuses_norms:
        definition = pretrain_step.network_definition(config, forms)
    scopes = count_scopes(config, mesh)
    train_step = pretrain_step.make_train_step(
        config, definition, num_locations, scopes, mesh, forms
    )
    return sharding.jit_step(
        train_step, mesh, deterministic=config.deterministic, donate_state=True
    )


def pretrain(
    config: ml_collections.ConfigDict, workdir: str, excluded: np.ndarray | None = None
) -> TrainState:
    """Pretrains, from the newest checkpoint of `workdir` if there is one, and writes the results.

    Args:
      config: the configuration.
      workdir: folder of the run.
      excluded: [n] int, indices of locations that the run must not see, nor be validated on.

    Returns:
      The final state.

    Raises:
      input_pipeline.DataError, run.ConfigError, checkpoint.CheckpointError, WeightsError,
        loop.NonFiniteLossError: each with a sentence for the user.
      Preempted: after a signal; the state is saved.
    """
    config = ml_collections.FrozenConfigDict(config)
    folder = files.absolute(workdir)
    check_fields(config)

    # ---------------------------------------------------------------- data
    dataset = input_pipeline.open_dataset(
        config.data.dir, config.data.name, max_bad_records=config.data.max_bad_records
    ).padded_to(decoders.STRIDES[config.network.decoder])
    mesh = run.make_mesh(config.num_devices, config.batch_size)
    check_config(config, dataset.tile_size)
    config = run.describe_data(config, dataset)
    locations, held_back = validation_split.split_locations(
        dataset.num_locations, config.data.validation_fraction, config.seed, dataset.blocks
    )
    if excluded is not None:
        locations = np.setdiff1d(locations, excluded)
        held_back = np.setdiff1d(held_back, excluded)
        if not len(locations) or (config.schedule.name == "plateau" and not len(held_back)):
            raise run.ConfigError(
                f"without the {len(excluded)} locations that this run must not see, "
                f"{len(locations)} are left to train on and {len(held_back)} to validate on; use "
                "fewer folds, a larger config.data.validation_fraction, or another schedule than "
                "plateau"
            )
    run.check_microbatches(config.batch_size, config.microbatches, mesh.size)
    run.check_same_everywhere(configuration=config.to_json(), data=str(dataset.identity))
    run.record_config(config, folder)
    order = input_pipeline.training_records(dataset, locations, config.batch_size, config.seed)

    # ---------------------------------------------------------------- state and steps
    definition = pretrain_step.network_definition(config)
    replicated = sharding.replicated(mesh)
    init = jax.jit(lambda key: pretrain_step.init_state(config, key), out_shardings=replicated)
    validator = None
    if len(held_back):
        _log.info("%d locations held back for validation", len(held_back))
        validator = validation.Validator(
            config, definition, dataset, held_back, len(locations), mesh, folder
        )

    # ---------------------------------------------------------------- loop
    training = loop.Training(
        folder=folder,
        config=config,
        schedule=loop.Schedule(config, len(locations), validates=validator is not None),
        mesh=mesh,
        dataset=dataset,
        order=order,
        init=init,
        key=jax.random.key(config.seed),
        init_from=config.init_from,
        init_bands=run.init_bands(config),
        init_parts=PARTS,
        train_steps={1: jit_train_step(config, definition, len(locations), mesh)},
        identity={**dataset.identity, "scopes": count_scopes(config, mesh)},
        validate=validator and validator.validate,
    )
    state = loop.fit(training)

    # ---------------------------------------------------------------- results
    if validator:
        # A run that was complete already took no step, and validated nothing.
        evaluation = validator.latest or validator.evaluate(state)
        if jax.process_index() == 0:
            _log.info(
                "results\n\n%s", validation.write_results(evaluation, dataset.legend.names, folder)
            )
    return state
