"""What changes over the epochs: the selection ramp and the learning rate."""

import jax
import jax.numpy as jnp
import optax

RAMPS = ("exp", "linear", "none")
LEARNING_RATES = ("plateau", "exponential", "constant")


def ramp_up(epoch: jax.Array, ramp_epochs: int, kind: str) -> jax.Array:
    """r(t) in [0, 1]: how much of sample selection is in force (paper, Section III-B).

    Args:
      epoch: scalar, counted from 0.
      ramp_epochs: T; the ramp is 1 after it, and everywhere when it is 0.
      kind: "exp" for exp(-5 (1 - t/T)^2), "linear" for t/T, "none" for 1.
    """
    if kind not in RAMPS:
        raise ValueError(f"selection ramp {kind!r} is none of {RAMPS}")
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
      decay: factor an epoch of the exponential schedule.
      plateau_scale: scalar, the scale that `plateau` holds.
    """
    if kind == "plateau":
        return base * plateau_scale
    if kind == "exponential":
        return base * decay**epoch
    if kind == "constant":
        return jnp.float32(base)
    raise ValueError(f"learning-rate schedule {kind!r} is none of {LEARNING_RATES}")


def cosine(epoch: jax.Array, base: float, final: float, epochs: int) -> jax.Array:
    """Learning rate of an epoch, falling from `base` by half a cosine to `final`, where it stays.

    torch's CosineAnnealingLR up to its T_max, after which that one rises again.

    Args:
      epoch: scalar, counted from 0.
      base: positive.
      final: the rate from epoch `epochs` on.
      epochs: how long it falls.
    """
    return optax.cosine_decay_schedule(base, epochs, alpha=final / base)(epoch)


def plateau(factor: float, patience: int) -> optax.GradientTransformationExtraArgs:
    """Cuts the rate when the validation loss stops improving, counting as torch does.

    torch.optim.lr_scheduler.ReduceLROnPlateau(mode="min", threshold=1e-4, threshold_mode="rel")
    cuts when the number of bad epochs exceeds its patience, optax when it reaches it, hence +1.
    Call `update` once a validation; `state.scale` is the factor in force.
    """
    return optax.contrib.reduce_on_plateau(
        factor=factor, patience=patience + 1, rtol=1e-4, atol=0.0, cooldown=0
    )
