"""The compiled steps of pretraining: training, validation, pictures.

All steps are pure functions of (state, records). `objective.training_loss` is the loss that they
minimise. Dimensions: B batch, H height, W width, C classes.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from cromss_jax import platforms, sensors
from cromss_jax.data import preprocess
from cromss_jax.method import losses, metrics, schedules
from cromss_jax.networks import fusion
from cromss_jax.training import gradients, objective, optimizers, sharding
from cromss_jax.training.state import Maps, Metrics, TrainState, first_bad_step


def make_plateau(config: ml_collections.ConfigDict) -> optax.GradientTransformationExtraArgs:
    """The plateau schedule of the configuration."""
    return schedules.plateau(config.schedule.factor, config.schedule.patience)


def make_network(
    config: ml_collections.ConfigDict, rngs: nnx.Rngs, forms: platforms.Forms = platforms.CPU
) -> nnx.Module:
    """The networks of the configuration."""
    num_channels = {"s1": len(sensors.S1_BANDS), "s2": len(config.s2_bands)}
    return fusion.make_network(
        config.network.fusion,
        config.network.depth,
        {modality: num_channels[modality] for modality in config.modalities},
        objective.num_classes(config),
        jnp.dtype(config.network.dtype),
        rngs,
        decoder=config.network.get("decoder", "unet"),
        packed=forms.packs,
        rematerialise=config.get("rematerialise", False),
        fused_norms=forms.fuses_norms,
    )


def init_state(config: ml_collections.ConfigDict, key: jax.Array) -> TrainState:
    """The initial state. Call it under `jax.jit`, or under `jax.eval_shape` for the shapes."""
    init_key, augmentation_key = jax.random.split(key)
    network = make_network(config, nnx.Rngs(init_key))
    params, batch_stats = nnx.state(network, nnx.Param), nnx.state(network, nnx.BatchStat)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizers.make_optimizer(config).init(params),
        plateau=make_plateau(config).init(params),
        rng=jax.random.key_data(augmentation_key),
        first_bad_step=jnp.int32(-1),
    )


def network_definition(
    config: ml_collections.ConfigDict, forms: platforms.Forms = platforms.CPU
) -> nnx.GraphDef:
    """The networks without arrays, for `nnx.merge`, in the forms of a step."""
    return nnx.graphdef(nnx.eval_shape(lambda: make_network(config, nnx.Rngs(0), forms)))


def draw_geometry(
    config: ml_collections.ConfigDict, state: TrainState, tile_size: int
) -> preprocess.Geometry:
    """Random crops, flips and rotations of the B samples for the step `state.step`."""
    return preprocess.random_geometry(
        jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step),
        config.batch_size,
        tile_size - config.data.crop_size,
        **config.augmentation,
    )


def make_train_step(
    config: ml_collections.ConfigDict,
    definition: nnx.GraphDef,
    num_locations: int,
    num_scopes: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    forms: platforms.Forms = platforms.CPU,
) -> Callable[[TrainState, Maps], tuple[TrainState, Metrics]]:
    """Builds the training step, which is the same for all epochs.

    Args:
      config: the configuration.
      definition: the networks, from `network_definition`, in the step's forms.
      num_locations: number of training locations, which is the number of samples in an epoch.
      num_scopes: as for `objective.training_loss`; 1 is the global batch.
      mesh: devices over which the batch is sharded.
      forms: forms of the step.

    Returns:
      A function (state, records) -> (state, metrics), to be jitted with its state donated.
      `records` is a batch of records as in `preprocess`, of `config.batch_size` samples.
    """
    update = make_update(config, definition, num_locations, num_scopes, forms)

    def train_step(state: TrainState, records: Maps) -> tuple[TrainState, Metrics]:
        geometry = draw_geometry(config, state, records["labels"].shape[-1])
        kind = objective.prior_kind(config)
        batch = make_examples(config, records, geometry, kind, mesh, forms)
        return update(state, batch)

    return train_step


def make_update(
    config: ml_collections.ConfigDict,
    definition: nnx.GraphDef,
    num_locations: int,
    num_scopes: int = 1,
    forms: platforms.Forms = platforms.CPU,
) -> Callable[[TrainState, Maps], tuple[TrainState, Metrics]]:
    """Builds the training step without preprocessing; for the arguments see `make_train_step`.

    Returns:
      A function (state, examples) -> (state, metrics), with examples from `preprocess.examples`.
    """
    optimizer = optimizers.make_optimizer(config)

    def update(state: TrainState, batch: Maps) -> tuple[TrainState, Metrics]:
        # A batch can span two epochs; it belongs to the epoch of its first sample.
        epoch = state.step * config.batch_size // num_locations

        def apply(params: nnx.State, stats: nnx.State, images: Maps) -> tuple[Maps, nnx.State]:
            network = nnx.merge(definition, params, stats, copy=True)
            return network(images, train=True), nnx.state(network, nnx.BatchStat)

        loss, report, batch_stats, grads = gradients.value_and_grad(
            apply,
            lambda logits: objective.training_loss(
                config, logits, batch, epoch, num_scopes, forms.searches_together
            ),
            state.params,
            state.batch_stats,
            {m: batch[m] for m in config.modalities},
            config.get("microbatches", 1),
        )
        rate = schedules.learning_rate(
            epoch,
            config.optimizer.learning_rate,
            config.schedule.name,
            config.schedule.decay,
            state.plateau.scale,
        )
        before = (state.params, state.opt_state)
        with jax.named_scope("optimizer"):
            params, opt_state = before
            if forms.joins_vectors:
                (params, opt_state), grads = optimizers.join((before, grads))
                norm_of = optax.tree.norm
            else:
                (params, opt_state), grads = optimizers.to_rows((before, grads))
                grads, norm_of = optimizers.from_memory(grads), optimizers.norm
                batch_stats = optimizers.count_together(state.batch_stats, batch_stats)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            norm = norm_of(grads)
            bad_step = first_bad_step(state, loss, norm, params, norm_of)
        restore = optimizers.split if forms.joins_vectors else optimizers.from_rows
        params, opt_state = restore((params, opt_state), like=before)
        report |= {"gradient_norm": norm, "learning_rate": rate}
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            first_bad_step=bad_step,
        )
        return new_state, report

    return update


def make_examples(
    config: ml_collections.ConfigDict,
    records: Maps,
    geometry: preprocess.Geometry,
    kind: str | None,
    mesh: jax.sharding.Mesh | None = None,
    forms: platforms.Forms = platforms.CPU,
) -> dict[str, jax.Array]:
    """`preprocess.examples` with the settings of the configuration.

    Args:
      config: the configuration.
      records: records of B samples.
      geometry: crops, flips and rotations of these samples.
      kind: kind of the prior; None for no prior.
      mesh: devices over which the samples are sharded; each device then makes its own examples.
        Without it, a sharded batch is gathered for the rotation.
      forms: forms of the step; packed networks need packed images.
    """
    make = functools.partial(
        preprocess.examples,
        modalities=config.modalities,
        s2_bands=config.s2_bands,
        crop_size=config.data.crop_size,
        num_classes=objective.num_classes(config),
        prior_kind=kind,
        cell=fusion.PACKED_CELL if forms.packs else 1,
        gathers=forms.gathers,
        dtype=jnp.dtype(config.network.dtype),
        bands=objective.stored_bands(config),
    )
    if mesh is not None:
        # `shard_map`, because the number of rotated samples differs between devices.
        rows = sharding.batch_sharded(mesh).spec
        make = jax.shard_map(make, mesh=mesh, in_specs=rows, out_specs=rows)
    return make(records, geometry)


def predict(
    config: ml_collections.ConfigDict, definition: nnx.GraphDef, state: TrainState, batch: Maps
) -> dict[str, jax.Array]:
    """Log-probabilities [B, H, W, C] by modality; BatchNorm uses its running statistics."""
    network = nnx.merge(definition, state.params, state.batch_stats)
    logits = network({m: batch[m] for m in config.modalities}, train=False)
    return {m: jax.nn.log_softmax(x) for m, x in logits.items()}


def make_eval_step(
    config: ml_collections.ConfigDict, definition: nnx.GraphDef
) -> Callable[[TrainState, Maps], Metrics]:
    """Builds the validation step: (state, records) -> metrics of the batch, to be jitted.

    The loss includes consistency, but neither smoothing nor selection. Padding rows, where
    `records["is_real"]` is false, are not counted. The step returns `loss` (mean over the batch),
    `num_samples` and `confusion/<modality>` against the noisy labels. If the records have truth, it
    also returns `confusion_truth/<modality>`, `confusion_truth/labels` (of the noisy labels) and
    `confidence/<modality>` (from `metrics.confidence_counts`).
    """

    def eval_step(state: TrainState, records: Maps) -> Metrics:
        margin = records["labels"].shape[-1] - config.data.crop_size
        is_real = records["is_real"]
        geometry = preprocess.centre_geometry(is_real.shape[0], margin)
        batch = make_examples(config, records, geometry, None)
        labels, num_classes = batch["labels"], objective.num_classes(config)
        log_probs = predict(config, definition, state, batch)

        weights = is_real.astype(jnp.float32).reshape(-1, 1, 1) * jnp.ones(labels.shape)
        valid = jnp.where(labels < num_classes, weights, 0.0)
        targets = objective.smoothed_targets(config, batch)
        parts = {
            f"segmentation/{m}": losses.segmentation_loss(
                x, targets, valid, config.loss.segmentation
            )
            for m, x in log_probs.items()
        }
        parts |= objective.consistency_losses(config, log_probs, dict.fromkeys(log_probs, weights))
        sums = {"loss": objective.total_loss(config, parts), "num_samples": jnp.sum(is_real)}

        predictions = {m: jnp.argmax(x, axis=-1) for m, x in log_probs.items()}
        for m, prediction in predictions.items():
            sums[f"confusion/{m}"] = metrics.confusion_matrix(labels, prediction, num_classes)
        if "truth" not in batch:
            return sums
        truth = batch["truth"]
        known = (truth < num_classes) & (labels < num_classes)
        sums["confusion_truth/labels"] = metrics.confusion_matrix(
            jnp.where(known, truth, sensors.IGNORE_LABEL), labels, num_classes
        )
        confidences = objective.label_confidences(log_probs, labels)
        for m, prediction in predictions.items():
            sums[f"confusion_truth/{m}"] = metrics.confusion_matrix(
                jnp.where(known, truth, sensors.IGNORE_LABEL), prediction, num_classes
            )
            sums[f"confidence/{m}"] = metrics.confidence_counts(
                confidences[m], known & (labels == truth), known & (labels != truth)
            )
        return sums

    return eval_step


def make_picture_step(
    config: ml_collections.ConfigDict, definition: nnx.GraphDef, num_locations: int
) -> Callable[[TrainState, Maps], dict[str, jax.Array]]:
    """Builds the step that computes the maps for pictures of a batch, to be jitted.

    The step returns maps of the first `config.num_pictures` samples, [n, H, W], and imagery
    [n, H, W, K]: `s1`, `s2`, `labels`, `prior` (its most probable class), `truth` if known, and by
    modality `prediction/`, `label_confidence/`, `selection_weights/`.
    """

    def picture_step(state: TrainState, records: Maps) -> dict[str, jax.Array]:
        margin = records["labels"].shape[-1] - config.data.crop_size
        geometry = preprocess.centre_geometry(records["labels"].shape[0], margin)
        batch = make_examples(config, records, geometry, config.loss.prior)
        log_probs = predict(config, definition, state, batch)
        epoch = state.step * config.batch_size // num_locations
        ramp = schedules.ramp_up(epoch, config.selection.ramp_epochs, config.selection.ramp)
        confidences = objective.label_confidences(log_probs, batch["labels"])
        weights = objective.selection_weights(config, confidences, batch["labels"], ramp, 1)
        shown = {**batch, "prior": jnp.argmax(batch["prior"], axis=-1)}
        for m, x in log_probs.items():
            shown[f"prediction/{m}"] = jnp.argmax(x, axis=-1)
            shown[f"label_confidence/{m}"] = confidences[m]
            shown[f"selection_weights/{m}"] = weights[m]
        return {name: values[: config.num_pictures] for name, values in shown.items()}

    return picture_step
