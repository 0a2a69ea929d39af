"""What training changes and a checkpoint holds of the device, and the weights it starts from."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

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
    """Everything that training changes, and all that a checkpoint must hold of the device.

    Attributes:
      step: int32, steps done.
      params: parameters of the networks, float32.
      batch_stats: running statistics of the BatchNorms, float32.
      opt_state: moments of the optimizer.
      plateau: state of the plateau schedule; `plateau.scale` multiplies the learning rate.
      rng: key that the augmentation's draws are made from, never advanced: step t folds t in.
      first_bad_step: int32, the first step whose loss, gradient or outcome was not finite; or -1.
    """

    step: jax.Array
    params: nnx.State
    batch_stats: nnx.State
    opt_state: optax.OptState
    plateau: optax.OptState
    rng: jax.Array
    first_bad_step: jax.Array


def first_bad_step(
    state: TrainState, loss: jax.Array, gradient_norm: jax.Array, params: optax.Params
) -> jax.Array:
    """`TrainState.first_bad_step` after a step of that loss and gradient that leads to `params`."""
    is_bad = ~jnp.isfinite(loss + gradient_norm + optax.tree.norm(params))
    return jnp.where((state.first_bad_step < 0) & is_bad, state.step, state.first_bad_step)


def start_from(
    path: str,
    network: Network,
    state: TrainState,
    placement: jax.sharding.NamedSharding,
    parts: Sequence[str] = PARTS,
) -> TrainState:
    """Takes over weights for a network's parts, and says which.

    Args:
      path: a run's folder, one of its checkpoints, or a file.
      network: what `state` is of.
      state: freshly drawn.
      placement: where the weights go.
      parts: which of `weights.PARTS` may be taken.

    Raises:
      weights.WeightsError: if they cannot be read or don't fit.
    """
    groups = (state.params, state.batch_stats)
    initial = {k: v for group in groups for k, v in torch_keys.to_torch_state(group).items()}
    source = weight_files.load(path)
    started, sentences = transfer(source, Weights(network, initial), parts)
    _log.info("starting from %s, a %s", path, source.network)
    for sentence in (*source.notes, *sentences):
        _log.info("  %s", sentence)
    return put_weights(started, state, placement)


def put_weights(
    found: Weights, state: TrainState, placement: jax.sharding.NamedSharding
) -> TrainState:
    """The state with other weights, of the same network."""
    params, batch_stats = (
        torch_keys.from_torch_state({k: found.arrays[k] for k in torch_keys.keys(group)}, group)
        for group in (state.params, state.batch_stats)
    )
    return dataclasses.replace(
        state,
        params=jax.device_put(params, placement),
        batch_stats=jax.device_put(batch_stats, placement),
    )
