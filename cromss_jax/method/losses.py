"""Segmentation and consistency losses (paper, Section III).

Arrays and scalars only. Dimensions: B batch, H height, W width, C classes. The per-pixel losses are
unweighted; `weighted_mean` applies the weights, which are 0 at ignored pixels. Soft dice is not a
mean over pixels, so it takes the weights itself.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

SEGMENTATION_LOSSES = ("cross_entropy", "dice", "focal")
CONSISTENCY_LOSSES = ("ce", "kl", "mse", "none")


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns sum(w v) / sum(w), or 0 if all weights are 0. Both inputs are [B, H, W] float32."""
    total = jnp.sum(weights)
    return jnp.sum(weights * values) / jnp.where(total > 0, total, 1.0)


def argmax(values: jax.Array) -> jax.Array:
    """The class of the largest value, [B, H, W, C] -> [B, H, W] int32; of equal values the first.

    `jnp.argmax` reduces (value, index) pairs, for which XLA puts the classes into a TPU's rows of
    128 values. Two plain reductions avoid that.
    """
    num_classes = values.shape[-1]
    largest = jnp.max(values, axis=-1, keepdims=True)
    classes = jnp.arange(num_classes, dtype=jnp.int32).reshape(1, 1, 1, -1)
    return jnp.min(jnp.where(values == largest, classes, num_classes - 1), axis=-1)


def cross_entropy(log_probs: jax.Array, targets: jax.Array) -> jax.Array:
    """Per-pixel cross entropy against soft targets, [B, H, W, C] x 2 -> [B, H, W]."""
    return -jnp.sum(targets * log_probs, axis=-1)


def focal(log_probs: jax.Array, targets: jax.Array, gamma: float = 2.0) -> jax.Array:
    """Per-pixel focal loss against soft targets: cross entropy damped by (1 - Q)^gamma."""
    return -jnp.sum(targets * (1.0 - jnp.exp(log_probs)) ** gamma * log_probs, axis=-1)


def soft_dice(log_probs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean over classes of 1 - 2 sum(w Q y') / max(sum(w (Q + y')), 1e-7).

    The sums run over batch and pixels. A class absent from the targets contributes 0 but still
    counts in the mean, as in the published code.

    Args:
      log_probs: [B, H, W, C] float32.
      targets: [B, H, W, C] float32, zero vectors at ignored pixels.
      weights: [B, H, W] float32, 0 at ignored pixels.

    Returns:
      Scalar in [0, 1].
    """
    weighted_probs = weights[..., None] * jnp.exp(log_probs)
    pixels = (0, 1, 2)
    overlap = jnp.sum(weighted_probs * targets, axis=pixels)
    total = jnp.sum(weighted_probs + weights[..., None] * targets, axis=pixels)
    loss = 1.0 - 2.0 * overlap / jnp.maximum(total, 1e-7)
    present = jnp.sum(targets, axis=pixels) > 0
    return jnp.mean(jnp.where(present, loss, 0.0))


def segmentation_loss(
    log_probs: jax.Array, targets: jax.Array, weights: jax.Array, kinds: Sequence[str]
) -> jax.Array:
    """Sum of the named losses of one modality.

    Args:
      log_probs: [B, H, W, C] float32, log-softmax of the logits.
      targets: [B, H, W, C] float32, smoothed labels, zero vectors at ignored pixels.
      weights: [B, H, W] float32, selection weights, 0 at ignored pixels.
      kinds: names from `SEGMENTATION_LOSSES`.

    Returns:
      Scalar float32.
    """
    total = jnp.float32(0.0)
    for kind in kinds:
        if kind == "cross_entropy":
            total += weighted_mean(cross_entropy(log_probs, targets), weights)
        elif kind == "dice":
            total += soft_dice(log_probs, targets, weights)
        elif kind == "focal":
            total += weighted_mean(focal(log_probs, targets), weights)
        else:
            raise ValueError(
                f"unknown segmentation loss {kind!r}: choose from {SEGMENTATION_LOSSES}"
            )
    return total


def consistency_loss(
    teacher: jax.Array, student: jax.Array, weights: jax.Array, kind: str
) -> jax.Array:
    """Distance of the student's prediction from the teacher's; no gradient reaches the teacher.

    Args:
      teacher: [B, H, W, C] float32 log-probabilities of the teaching modality.
      student: [B, H, W, C] float32 log-probabilities of the other modality.
      weights: [B, H, W] float32, the TEACHER's consistency weights.
      kind: "ce", "kl" or "mse" (summed over classes), or "none".

    Returns:
      Scalar float32.
    """
    teacher = jax.lax.stop_gradient(teacher)
    if kind == "ce":
        values = cross_entropy(student, jnp.exp(teacher))
    elif kind == "kl":
        values = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    elif kind == "mse":
        values = jnp.sum((jnp.exp(teacher) - jnp.exp(student)) ** 2, axis=-1)
    elif kind == "none":
        return jnp.float32(0.0)
    else:
        raise ValueError(f"unknown consistency loss {kind!r}: choose one of {CONSISTENCY_LOSSES}")
    return weighted_mean(values, weights)
