"""The training state: everything on the device that training changes and a checkpoint stores."""

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
    state: TrainState, loss: jax.Array, gradient_norm: jax.Array, params: optax.Params
) -> jax.Array:
    """`TrainState.first_bad_step` after a step.

    Args:
      state: the state before the step.
      loss: scalar loss of the step.
      gradient_norm: scalar norm of the step's gradients.
      params: the parameters after the step.
    """
    is_bad = ~jnp.isfinite(loss + gradient_norm + optax.tree.norm(params))
    return jnp.where((state.first_bad_step < 0) & is_bad, state.step, state.first_bad_step)
