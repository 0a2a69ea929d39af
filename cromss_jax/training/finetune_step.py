"""The compiled steps of finetuning a network on clean labels: training and scoring.

All steps are pure functions of (state, records), with the same state as in `pretrain_step`.
Dimensions: B batch, T tile size, H = W crop size, K bands, C classes.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from cromss_jax import platforms, sensors
from cromss_jax.data import preprocess
from cromss_jax.method import losses, metrics, schedules
from cromss_jax.networks import decoders, fusion
from cromss_jax.training import objective, optimizers, pretrain_step
from cromss_jax.training.state import Maps, Metrics, TrainState, first_bad_step

ENCODERS = ("frozen", "trained", "late")
# Stages of the encoder from the last to the first, for the layer-wise decay of the learning rate.
_ENCODER_STAGES = ("layer4", "layer3", "layer2", "layer1", "stem")


def make_network(
    config: ml_collections.ConfigDict, rngs: nnx.Rngs, forms: platforms.Forms = platforms.CPU
) -> nnx.Module:
    """The network of the configuration, with one encoder and one decoder."""
    (modality,) = config.modalities
    bands = sensors.S1_BANDS if modality == "s1" else config.s2_bands
    return fusion.make_network(
        "none",
        config.network.depth,
        {modality: len(bands)},
        config.network.num_classes,
        jnp.dtype(config.network.dtype),
        rngs,
        decoder=config.network.decoder,
        fused_norms=forms.fuses_norms,
    )


def network_definition(
    config: ml_collections.ConfigDict, forms: platforms.Forms = platforms.CPU
) -> nnx.GraphDef:
    """The network without arrays, for `nnx.merge`, in the forms of a step."""
    return nnx.graphdef(nnx.eval_shape(lambda: make_network(config, nnx.Rngs(0), forms)))


def split_encoder(params: nnx.State) -> dict[str, nnx.State]:
    """Splits parameters into those of the "encoder" and those of the "decoder" and head."""
    encoder, decoder = nnx.split_state(params, lambda path, _: path[0] == "encoder", ...)
    return {"encoder": encoder, "decoder": decoder}


def init_state(config: ml_collections.ConfigDict, key: jax.Array) -> TrainState:
    """The initial state. Call it under `jax.jit`, or under `jax.eval_shape` for the shapes.

    Encoder and decoder have separate optimizer states, because Adam must count the encoder's steps
    from the epoch in which it is unfrozen.
    """
    init_key, draw_key = jax.random.split(key)
    network = make_network(config, nnx.Rngs(init_key))
    params, batch_stats = nnx.state(network, nnx.Param), nnx.state(network, nnx.BatchStat)
    optimizer = optimizers.make_optimizer(config)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats=batch_stats,
        opt_state={part: optimizer.init(x) for part, x in split_encoder(params).items()},
        plateau=optax.EmptyState(),
        rng=jax.random.key_data(draw_key),
        first_bad_step=jnp.int32(-1),
    )


def rate_factors(params: nnx.State, layer_decay: float) -> nnx.State:
    """Factors of the learning rate for each parameter, floats in a state like `params`.

    The factor is 1 for decoder and head. In the encoder it is `layer_decay` for the last stage, its
    square for the stage before, up to the fifth power for the stem (as in BEiT, Bao et al. 2022).
    """

    def factor(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        if path[0] != "encoder":
            return variable.replace(1.0)
        stage = path[1] if path[1] in _ENCODER_STAGES else "stem"
        return variable.replace(layer_decay ** (1 + _ENCODER_STAGES.index(stage)))

    flat = nnx.to_flat_state(params)
    return nnx.from_flat_state([(path, factor(path, variable)) for path, variable in flat])


def make_train_step(
    config: ml_collections.ConfigDict,
    definition: nnx.GraphDef,
    num_tiles: int,
    train_encoder: bool,
    mesh: jax.sharding.Mesh | None = None,
    forms: platforms.Forms = platforms.CPU,
) -> Callable[[TrainState, Maps], tuple[TrainState, Metrics]]:
    """Builds the training step.

    Args:
      config: the configuration.
      definition: the network, from `network_definition`, in the step's forms.
      num_tiles: number of training records, which is the number of samples in an epoch.
      train_encoder: if false, the encoder's parameters and BatchNorm statistics do not change.
      mesh: devices over which the batch is sharded.
      forms: forms of the step; the network is never packed.

    Returns:
      A function (state, records) -> (state, metrics), to be jitted with its state donated.
    """
    update = make_update(config, definition, num_tiles, train_encoder)

    def train_step(state: TrainState, records: Maps) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        geometry_key, dropout_key = jax.random.split(key)
        margin = records["labels"].shape[-1] - config.data.crop_size
        geometry = preprocess.random_geometry(
            geometry_key, config.batch_size, margin, **config.augmentation
        )
        batch = pretrain_step.make_examples(config, records, geometry, None, mesh, forms)
        return update(state, batch, dropout_key)

    return train_step


def make_update(
    config: ml_collections.ConfigDict,
    definition: nnx.GraphDef,
    num_tiles: int,
    train_encoder: bool,
) -> Callable[[TrainState, Maps, jax.Array], tuple[TrainState, Metrics]]:
    """Builds the training step without preprocessing; for the arguments see `make_train_step`.

    Returns:
      A function (state, examples, dropout key) -> (state, metrics), with examples from
      `preprocess.examples`.
    """
    optimizer = optimizers.make_optimizer(config)
    (modality,) = config.modalities
    trained_parts = ("encoder", "decoder") if train_encoder else ("decoder",)
    num_classes = config.network.num_classes

    def update(
        state: TrainState, batch: Maps, dropout_key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        epoch = state.step * config.batch_size // num_tiles
        labels = batch["labels"]
        valid = (labels < num_classes).astype(jnp.float32)
        targets = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
        parts = split_encoder(state.params)

        def loss_of(trained: dict[str, nnx.State]) -> tuple[jax.Array, tuple]:
            params = nnx.merge_state(*{**parts, **trained}.values())
            network = nnx.merge(definition, params, state.batch_stats, copy=True)
            logits = network(
                {modality: batch[modality]},
                train=True,
                train_encoder=train_encoder,
                dropout_key=dropout_key,
            )[modality]
            loss = losses.segmentation_loss(
                jax.nn.log_softmax(logits), targets, valid, config.loss.segmentation
            )
            return loss, (logits, nnx.state(network, nnx.BatchStat))

        trained = {part: parts[part] for part in trained_parts}
        (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
        rate = schedules.cosine(
            epoch,
            config.optimizer.learning_rate,
            config.schedule.final_learning_rate,
            config.schedule.epochs,
        )
        opt_state = dict(state.opt_state)
        for part in trained_parts:
            updates, opt_state[part] = optimizer.update(grads[part], opt_state[part], parts[part])
            parts[part] = jax.tree.map(
                lambda p, u, f: p - rate * f * u,
                parts[part],
                updates,
                rate_factors(parts[part], config.optimizer.layer_decay),
            )
        params = nnx.merge_state(*parts.values())

        norm = optax.tree.norm(grads)
        hits = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        report = {
            "loss": loss,
            "accuracy": losses.weighted_mean(hits, valid),
            "gradient_norm": norm,
            "learning_rate": rate,
        }
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            first_bad_step=first_bad_step(state, loss, norm, params),
        )
        return new_state, report

    return update


def make_eval_step(
    config: ml_collections.ConfigDict, definition: nnx.GraphDef
) -> Callable[[TrainState, jax.Array, Maps], tuple[jax.Array, jax.Array]]:
    """Builds the scoring step, to be jitted with its counts donated.

    The step is a function (state, counts, records) -> (counts, predictions). It adds the batch's
    confusion matrix to the counts (`metrics.add_counts`). Predictions are the most probable
    classes [B, T, T] uint8 of the whole tiles. Padding rows are not counted. If a tile's size does
    not suit the network, it is padded by reflection at its border.
    """
    (modality,) = config.modalities
    stride = decoders.STRIDES[config.network.decoder]

    def eval_step(
        state: TrainState, counts: jax.Array, records: Maps
    ) -> tuple[jax.Array, jax.Array]:
        labels = preprocess.drawn_labels(records)
        bands = objective.stored_bands(config)
        image = preprocess.stack_bands(records, modality, config.s2_bands, bands=bands) / 255.0
        size = labels.shape[-1]
        image = decoders.pad_to_stride(image, stride)
        network = nnx.merge(definition, state.params, state.batch_stats)
        logits = network({modality: image}, train=False)[modality][:, :size, :size]
        predictions = jnp.argmax(logits, axis=-1)
        confusion = metrics.confusion_matrix(labels, predictions, config.network.num_classes)
        return metrics.add_counts(counts, confusion), predictions.astype(jnp.uint8)

    return eval_step
