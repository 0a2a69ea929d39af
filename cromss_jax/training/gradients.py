"""Gradients of a loss over a batch, computed at once or in microbatches."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cromss_jax.training.state import Maps, Metrics

# (params, batch_stats, images) -> (logits, batch_stats), in training.
Apply = Callable[[nnx.State, nnx.State, Maps], tuple[Maps, nnx.State]]
# logits -> (loss, metrics).
Loss = Callable[[Maps], tuple[jax.Array, Metrics]]


def value_and_grad(
    apply: Apply,
    loss: Loss,
    params: nnx.State,
    batch_stats: nnx.State,
    images: Maps,
    num_microbatches: int = 1,
) -> tuple[jax.Array, Metrics, nnx.State, nnx.State]:
    """The loss of a batch and its gradient.

    With microbatches the memory for activations is that of one of them, and a second forward pass
    is computed (GradCache: Gao et al., "Scaling deep contrastive learning batch size under memory
    limited setup", 2021). First all logits are computed without gradients. Then the loss of the
    whole batch gives the gradient with respect to the logits. Then each microbatch is computed
    again and this gradient is propagated through it. So the loss, its normalisers and the class
    thresholds are those of the whole batch. BatchNorm normalises each microbatch by its own
    statistics, and its running statistics are updated once per microbatch.

    Args:
      apply: the network.
      loss: of the logits of the whole batch, [B, H, W, C] by modality.
      params: parameters.
      batch_stats: running statistics.
      images: [B, H, W, K] by modality; B is divisible by the number of microbatches, and a
        microbatch by the number of devices.
      num_microbatches: into how many microbatches the batch is split.

    Returns:
      The loss, the metrics, the new running statistics, and the gradient with respect to `params`.
    """
    if num_microbatches == 1:

        def whole(params: nnx.State) -> tuple[jax.Array, tuple[Metrics, nnx.State]]:
            logits, new_stats = apply(params, batch_stats, images)
            value, metrics = loss(logits)
            return value, (metrics, new_stats)

        (value, (metrics, new_stats)), grads = jax.value_and_grad(whole, has_aux=True)(params)
        return value, metrics, new_stats, grads

    parts = _split(images, num_microbatches)
    logits = jax.lax.map(lambda part: apply(params, batch_stats, part)[0], parts)
    (value, metrics), logit_grads = jax.value_and_grad(loss, has_aux=True)(_join(logits))

    def accumulate(carry: tuple, part: tuple[Maps, Maps]) -> tuple[tuple, None]:
        grads, stats = carry
        images, output_grads = part
        _, propagate, stats = jax.vjp(lambda p: apply(p, stats, images), params, has_aux=True)
        (own,) = propagate(output_grads)
        return (jax.tree.map(jnp.add, grads, own), stats), None

    start = (jax.tree.map(jnp.zeros_like, params), batch_stats)
    (grads, new_stats), _ = jax.lax.scan(
        accumulate, start, (parts, _split(logit_grads, num_microbatches))
    )
    return value, metrics, new_stats, grads


def _split(batch: Mapping[str, jax.Array], count: int) -> Any:
    """[B, ...] to microbatches [n, B / n, ...]; sample i goes to microbatch i mod n.

    Neighbours lie on the same device, so that each device keeps its samples.
    """
    return {
        name: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        for name, x in batch.items()
    }


def _join(parts: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Undoes `_split`."""
    return {name: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) for name, x in parts.items()}
