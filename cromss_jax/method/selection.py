"""Sample selection: how much to trust each noisy label (paper, Section III-B).

The weights carry no gradient: callers pass probabilities through `jax.lax.stop_gradient` first.
Dimensions: B batch, H height, W width, C classes.
"""

import math

import jax
import jax.numpy as jnp

from cromss_jax import platforms

PREDICTION_CONFIDENCES = ("entropy", "gini")

# Bits of one pixel count in `class_thresholds`. Three counts share an int32.
_COUNT_BITS = 10


def label_confidence(probs: jax.Array, labels: jax.Array) -> jax.Array:
    """Probability that the network assigns to the noisy label, P[y].

    Args:
      probs: [B, H, W, C] float32, softmax.
      labels: [B, H, W] integers; those outside 0..C-1 are ignored pixels.

    Returns:
      [B, H, W] float32 in [0, 1]; 0 at ignored pixels.
    """
    one_hot = jax.nn.one_hot(labels, probs.shape[-1], dtype=probs.dtype)
    return jnp.sum(probs * one_hot, axis=-1)


def prediction_confidence(log_probs: jax.Array, kind: str) -> jax.Array:
    """Confidence of the network in its own prediction.

    Args:
      log_probs: [B, H, W, C] float32, log-softmax. The published code takes the logarithm of a
        softmax instead, which gives NaN where the softmax saturates.
      kind: "entropy" for 1 - H(P) / log C, "gini" for the sum of squared probabilities.

    Returns:
      [B, H, W] float32 in [0, 1].
    """
    probs = jnp.exp(log_probs)
    if kind == "entropy":
        entropy = -jnp.sum(probs * log_probs, axis=-1)
        return jnp.clip(1.0 - entropy / jnp.log(probs.shape[-1]), 0.0, 1.0)
    if kind == "gini":
        return jnp.sum(probs**2, axis=-1)
    raise ValueError(
        f"unknown prediction confidence {kind!r}: choose one of {PREDICTION_CONFIDENCES}"
    )


def entangle(own: jax.Array, other: jax.Array) -> jax.Array:
    """Combines a modality's confidence with the other's: (c_d + c_1 c_2) / 2."""
    return (own + own * other) / 2


def class_thresholds(
    confidence: jax.Array, labels: jax.Array, counts_to_keep: jax.Array
) -> jax.Array:
    """The k_c-th largest confidence among the pixels labelled c, exact and without sorting.

    Non-negative floats have the same order as their bits read as integers. So the threshold is the
    largest integer for which at least k_c pixels lie at or above it. The search starts at the
    highest bits and finds two bits per round. For a sharded batch, a round costs one all-reduce of
    3 C integers; a sort would gather every pixel.

    Args:
      confidence: [B, H, W] float32 in [0, 1].
      labels: [B, H, W] integers; those outside 0..C-1 belong to no class.
      counts_to_keep: [C] int32, k_c, no larger than the number of pixels labelled c.

    Returns:
      [C] float32. Undefined for classes with k_c = 0.
    """
    num_classes = counts_to_keep.shape[0]
    # Rows of 128 pixels fit a TPU. A column count must fit `_COUNT_BITS`, which limits the height.
    num_pixels = math.prod(confidence.shape[1:])
    width = math.gcd(num_pixels, 128)
    height = max(h for h in range(1, 1 << _COUNT_BITS) if num_pixels // width % h == 0)
    confidence, labels = (x.reshape(-1, height, width) for x in (confidence, labels))
    bits = jax.lax.bitcast_convert_type(confidence.astype(jnp.float32), jnp.int32)[None]
    # Classes come first: a CPU counts along rows of pixels four times as fast as along 9 classes.
    classes = jnp.arange(num_classes, dtype=labels.dtype).reshape(-1, 1, 1, 1)
    member = labels[None] == classes
    offsets = [i * _COUNT_BITS for i in range(3)]

    def compared_again(found: jax.Array) -> jax.Array:
        # A GPU reads one byte per pixel and round instead of C. The barrier makes the labels depend
        # on the round; otherwise XLA compares them once for all rounds.
        return jax.lax.optimization_barrier((labels, found))[0][None] == classes

    def one_round(round_index: jax.Array, found: jax.Array) -> jax.Array:
        # 1.0 is 0x3f800000, so the highest bit of a confidence is bit 29.
        shift = 28 - 2 * round_index
        candidates = [found + (digit << shift) for digit in (1, 2, 3)]
        # Three counts are packed into one integer, so a single sum counts all three candidates.
        above = sum(
            (bits >= candidate.reshape(-1, 1, 1, 1)).astype(jnp.int32) << offset
            for candidate, offset in zip(candidates, offsets, strict=True)
        )
        is_member = platforms.choose(found, gpu=compared_again, default=lambda found: member)
        columns = jnp.sum(jnp.where(is_member, above, 0), axis=2)
        mask = (1 << _COUNT_BITS) - 1
        counts = jnp.stack([(columns >> offset) & mask for offset in offsets]).sum(axis=(2, 3))
        digit = jnp.sum(counts >= counts_to_keep[None], axis=0, dtype=jnp.int32)
        return found + (digit << shift)

    found = jax.lax.fori_loop(0, 15, one_round, jnp.zeros_like(counts_to_keep))
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def selection_weights(
    confidence: jax.Array,
    labels: jax.Array,
    keep_fraction: jax.Array,
    *,
    num_classes: int,
    num_scopes: int = 1,
) -> jax.Array:
    """Weights of the segmentation loss: 1 for each class's most confident pixels, less for others.

    Args:
      confidence: [B, H, W] float32 in [0, 1], the entangled label confidence.
      labels: [B, H, W] noisy labels; pixels with labels outside 0..C-1 are ignored: weight 0.
      keep_fraction: scalar in [0, 1], the fraction of each class that keeps full weight.
      num_classes: C.
      num_scopes: number of equal parts of the batch that have their own thresholds. 1 is the
        global batch; the number of devices reproduces the published code under DDP.

    Returns:
      [B, H, W] float32 in [0, 1]: clip(confidence / threshold of the pixel's class, 0, 1).
    """
    if num_scopes > 1:
        split = (num_scopes, confidence.shape[0] // num_scopes, *confidence.shape[1:])
        weights = jax.vmap(
            lambda c, y: selection_weights(c, y, keep_fraction, num_classes=num_classes)
        )(confidence.reshape(split), labels.reshape(split))
        return weights.reshape(confidence.shape)

    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    counts = jnp.sum(one_hot, axis=(0, 1, 2), dtype=jnp.int32)
    counts_to_keep = jnp.floor(keep_fraction * counts).astype(jnp.int32)
    thresholds = class_thresholds(confidence, labels, counts_to_keep)

    threshold = jnp.sum(one_hot * thresholds.reshape(1, 1, 1, -1), axis=-1)
    kept_any = jnp.sum(one_hot * (counts_to_keep > 0).reshape(1, 1, 1, -1), axis=-1) > 0
    ratio = jnp.where(threshold > 0, confidence / jnp.where(threshold > 0, threshold, 1.0), 1.0)
    weights = jnp.where(kept_any, jnp.clip(ratio, 0.0, 1.0), 0.0)
    weights = jnp.where(keep_fraction <= 0, confidence, weights)
    valid_mask = jnp.sum(one_hot, axis=-1) > 0
    return jnp.where(valid_mask, weights, 0.0)


def keep_fraction(ramp: jax.Array, final_keep_fraction: float) -> jax.Array:
    """Fraction of each class that keeps full weight: falls from 1 to `final_keep_fraction`."""
    return 1.0 - ramp * (1.0 - final_keep_fraction)


def consistency_weights(confidence: jax.Array, ramp: jax.Array) -> jax.Array:
    """Weights of the consistency loss, (1 - r) + r confidence: 1 at first, later the confidence.

    Args:
      confidence: [B, H, W] float32 in [0, 1], the entangled prediction confidence.
      ramp: scalar r in [0, 1], which is 1 after the end of the ramp.

    Returns:
      [B, H, W] float32 in [0, 1].
    """
    return (1.0 - ramp) + ramp * confidence
