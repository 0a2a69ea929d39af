"""Schedules over the epochs: the selection ramp and the learning rate."""

import jax
import jax.numpy as jnp
import optax

RAMPS = ("exp", "linear", "none")
LEARNING_RATES = ("plateau", "exponential", "constant")


def ramp_up(epoch: jax.Array, ramp_epochs: int, kind: str) -> jax.Array:
    """The ramp r(t) in [0, 1], the strength of sample selection (paper, Section III-B).

    Args:
      epoch: scalar t, counted from 0.
      ramp_epochs: T. The ramp is 1 after epoch T, and always 1 if T is 0.
      kind: "exp" for exp(-5 (1 - t/T)^2), "linear" for t/T, "none" for 1.
    """
    if kind not in RAMPS:
        raise ValueError(f"unknown selection ramp {kind!r}: choose one of {RAMPS}")
    if kind == "none" or ramp_epochs == 0:
        return jnp.ones_like(epoch, dtype=jnp.float32)
    progress = jnp.minimum(epoch, ramp_epochs) / ramp_epochs
    return jnp.exp(-5.0 * (1.0 - progress) ** 2) if kind == "exp" else progress


def learning_rate(
    epoch: jax.Array, base: float, kind: str, decay: float, plateau_scale: jax.Array
) -> jax.Array:
    """Learning rate of an epoch.

    Args:
      epoch: scalar, counted from 0.
      base: the rate at epoch 0.
      kind: "plateau" multiplies by `plateau_scale`, "exponential" by decay^epoch, "constant" by 1.
      decay: factor per epoch of the exponential schedule.
      plateau_scale: scalar, the `scale` in the state of `plateau`.
    """
    if kind == "plateau":
        return base * plateau_scale
    if kind == "exponential":
        return base * decay**epoch
    if kind == "constant":
        return jnp.float32(base)
    raise ValueError(f"unknown learning-rate schedule {kind!r}: choose one of {LEARNING_RATES}")


def cosine(epoch: jax.Array, base: float, final: float, epochs: int) -> jax.Array:
    """Learning rate of an epoch: half a cosine from `base` down to `final`, then constant.

    Equals torch's CosineAnnealingLR up to its T_max; torch's rate rises again after that.

    Args:
      epoch: scalar, counted from 0.
      base: the rate at epoch 0, positive.
      final: the rate from epoch `epochs` on.
      epochs: number of epochs over which the rate falls.
    """
    return optax.cosine_decay_schedule(base, epochs, alpha=final / base)(epoch)


def plateau(factor: float, patience: int) -> optax.GradientTransformationExtraArgs:
    """Reduces the rate when the validation loss stops improving, at the same epochs as torch.

    torch.optim.lr_scheduler.ReduceLROnPlateau(mode="min", threshold=1e-4, threshold_mode="rel")
    reduces the rate when the number of bad epochs exceeds the patience; optax does so when the
    number reaches it. Hence the + 1. Call `update` once per validation; `state.scale` is the
    current factor.
    """
    return optax.contrib.reduce_on_plateau(
        factor=factor, patience=patience + 1, rtol=1e-4, atol=0.0, cooldown=0
    )
