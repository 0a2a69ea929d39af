"""What training changes, and all that a checkpoint must hold of the device."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

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
