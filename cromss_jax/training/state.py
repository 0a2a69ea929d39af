"""The training state, and starting it from existing weights."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from cromss_jax.weights import files as weight_files
from cromss_jax.weights import torch_keys
from cromss_jax.weights.network import PARTS, Network, Weights
from cromss_jax.weights.transfer import transfer

_log = logging.getLogger(__name__)

Maps = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything on the device that training changes and that a checkpoint stores.

    Attributes:
      step: int32, number of completed steps.
      params: parameters of the networks, float32.
      batch_stats: running statistics of the BatchNorms, float32.
      opt_state: state of the optimizer, such as Adam's moments.
      plateau: state of the plateau schedule; `plateau.scale` multiplies the learning rate.
      rng: data of the PRNG key for augmentation and dropout. It never changes; step t uses
        `fold_in(rng, t)`.
      first_bad_step: int32, the first step whose loss, gradients or new parameters were not
        finite; -1 if there is none.
    """

    step: jax.Array
    params: nnx.State
    batch_stats: nnx.State
    opt_state: optax.OptState
    plateau: optax.OptState
    rng: jax.Array
    first_bad_step: jax.Array


def first_bad_step(
    state: TrainState,
    loss: jax.Array,
    gradient_norm: jax.Array,
    params: optax.Params,
    norm: Callable[[optax.Params], jax.Array] = optax.tree.norm,
) -> jax.Array:
    """`TrainState.first_bad_step` after a step.

    Args:
      state: the state before the step.
      loss: scalar loss of the step.
      gradient_norm: scalar norm of the step's gradients.
      params: the parameters after the step.
      norm: a function for their norm.
    """
    is_bad = ~jnp.isfinite(loss + gradient_norm + norm(params))
    return jnp.where((state.first_bad_step < 0) & is_bad, state.step, state.first_bad_step)


def start_from(
    path: str,
    network: Network,
    state: TrainState,
    placement: jax.sharding.NamedSharding,
    parts: Sequence[str] = PARTS,
    bands: Mapping[str, tuple[str, ...]] | None = None,
    classes: Sequence[str] = (),
) -> TrainState:
    """Copies existing weights to the parts of a network that they fit, and logs which.

    Args:
      path: a run's folder, one of its checkpoints, or a file of weights.
      network: description of the network of `state`.
      state: the randomly initialised state.
      placement: sharding of the copied weights.
      parts: the `PARTS` that may be copied.
      bands: names of a file's bands by modality, if they are known.
      classes: names of the network's classes, if they are known.

    Returns:
      The state with the copied weights.

    Raises:
      WeightsError: if the weights cannot be read or do not fit.
    """
    groups = (state.params, state.batch_stats)
    initial = {k: v for group in groups for k, v in torch_keys.to_torch_state(group).items()}
    source = weight_files.load(path, bands)
    started, sentences = transfer(
        source, Weights(network, initial, card={"classes": list(classes)}), parts
    )
    _log.info("starting from %s, a %s", path, source.network)
    for sentence in (*source.notes, *sentences):
        _log.info("  %s", sentence)
    return put_weights(started, state, placement)


def put_weights(
    found: Weights, state: TrainState, placement: jax.sharding.NamedSharding
) -> TrainState:
    """Replaces the weights of a state by others of the same network."""
    params, batch_stats = (
        torch_keys.from_torch_state({k: found.arrays[k] for k in torch_keys.keys(group)}, group)
        for group in (state.params, state.batch_stats)
    )
    return dataclasses.replace(
        state,
        params=jax.device_put(params, placement),
        batch_stats=jax.device_put(batch_stats, placement),
    )
