"""Optimizers, and a network's many vectors as one, which is what they are applied to."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam or SGD without the learning rate, which the step applies. L2 joins the gradient."""
    l2 = optax.add_decayed_weights(config.optimizer.l2)
    if config.optimizer.name == "adam":
        return optax.chain(l2, optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8))
    if config.optimizer.name == "sgd":
        return optax.chain(l2, optax.trace(decay=config.optimizer.momentum))
    raise ValueError(f"optimizer {config.optimizer.name!r} must be 'adam' or 'sgd'")


class Joined(NamedTuple):
    """A network's arrays, for what is done to each number of them by itself.

    Two thirds of the arrays are vectors, of biases and BatchNorms, and 1 % of the numbers. One by
    one they would have an optimizer's two dozen operations each, which take a second to trace and
    another to read where they were compiled before.

    Attributes:
      vectors: all vectors, one after another.
      others: the other arrays.
    """

    vectors: jax.Array
    others: list[jax.Array]


def _is_network(tree: Any) -> bool:
    return isinstance(tree, nnx.State)


def join(tree: Any) -> Any:
    """`tree` with a `Joined` in place of every `nnx.State`: parameters, gradients or moments."""

    def joined(part: Any) -> Any:
        if not _is_network(part):
            return part
        arrays = jax.tree.leaves(part)
        vectors = jnp.concatenate([x for x in arrays if x.ndim == 1])
        return Joined(vectors, [x for x in arrays if x.ndim != 1])

    return jax.tree.map(joined, tree, is_leaf=_is_network)


def split(tree: Any, like: Any) -> Any:
    """Undoes `join`: `tree` as `like` was before it."""

    def parted(part: Any, joined: Any) -> Any:
        if not _is_network(part):
            return joined
        arrays, structure = jax.tree.flatten(part)
        ends = list(itertools.accumulate(x.size for x in arrays if x.ndim == 1))
        vectors, others = iter(jnp.split(joined.vectors, ends[:-1])), iter(joined.others)
        return structure.unflatten([next(vectors if x.ndim == 1 else others) for x in arrays])

    return jax.tree.map(parted, like, tree, is_leaf=_is_network)
