"""Optimizers. A network's vectors are joined into one, so that an update has few operations."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam or SGD. L2 is added to the gradient; the step applies the learning rate."""
    l2 = optax.add_decayed_weights(config.optimizer.l2)
    if config.optimizer.name == "adam":
        return optax.chain(l2, optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8))
    if config.optimizer.name == "sgd":
        return optax.chain(l2, optax.trace(decay=config.optimizer.momentum))
    raise ValueError(f"unknown optimizer {config.optimizer.name!r}: choose 'adam' or 'sgd'")


class Joined(NamedTuple):
    """A network's arrays with all vectors joined, for element-wise operations and norms.

    Two thirds of the arrays are vectors of biases and BatchNorms, with 0.2 % of the numbers. Adam
    and the norms need 30 operations per array. With joined vectors, only a third of these
    operations must be traced, compiled and read from the compilation cache.

    Attributes:
      vectors: all vectors concatenated; there must be at least one, and all must have one dtype.
      others: the other arrays.
    """

    vectors: jax.Array
    others: list[jax.Array]


def _is_state(tree: Any) -> bool:
    return isinstance(tree, nnx.State)


def join(tree: Any) -> Any:
    """Replaces every `nnx.State` in a tree (parameters, gradients, moments) by a `Joined`."""

    def join_state(part: Any) -> Any:
        if not _is_state(part):
            return part
        arrays = jax.tree.leaves(part)
        vectors = jnp.concatenate([x for x in arrays if x.ndim == 1])
        return Joined(vectors, [x for x in arrays if x.ndim != 1])

    return jax.tree.map(join_state, tree, is_leaf=_is_state)


def split(tree: Any, like: Any) -> Any:
    """Reverses `join`.

    Args:
      tree: a joined tree.
      like: a tree before `join`, which has the structure and shapes of the result.
    """

    def split_state(part: Any, joined: Any) -> Any:
        if not _is_state(part):
            return joined
        arrays, structure = jax.tree.flatten(part)
        ends = list(itertools.accumulate(x.size for x in arrays if x.ndim == 1))
        vectors, others = iter(jnp.split(joined.vectors, ends[:-1])), iter(joined.others)
        return structure.unflatten([next(vectors if x.ndim == 1 else others) for x in arrays])

    return jax.tree.map(split_state, like, tree, is_leaf=_is_state)


# A GPU runs the update of an array as one kernel. XLA adds the sums of its rows' squares to that
# kernel if the rows are so short that an array of usual size has more of them than a GPU has cores.
_ROW = 256


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, math.gcd(x.size, _ROW))


def to_rows(tree: Any) -> Any:
    """Reshapes a tree's arrays but vectors and scalars to rows."""
    return jax.tree.map(lambda x: _rows(x) if x.ndim > 1 else x, tree)


def from_rows(tree: Any, like: Any) -> Any:
    """Reverses `to_rows`; `like` is the tree before it."""
    return jax.tree.map(lambda x, before: x.reshape(before.shape), tree, like)


def _from_one(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The same arrays, of one dtype, read from their concatenation.

    XLA merges the kernels of arrays of one shape if they read one array.
    """
    joined = jnp.concatenate([x.ravel() for x in arrays])
    # Without the barrier XLA would read the original arrays.
    joined = jax.lax.optimization_barrier(joined)
    ends = list(itertools.accumulate(x.size for x in arrays))
    parts = jnp.split(joined, ends[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, arrays, strict=True)]


def from_memory(grads: Any) -> Any:
    """Returns gradients unchanged, written to memory, their vectors as parts of a single one."""
    arrays, structure = jax.tree.flatten(grads)
    vectors = iter(_from_one([x for x in arrays if x.ndim == 1]))
    # Without the barrier XLA would transpose a convolution's gradient in the kernel of its update,
    # and run that twice, once for the norm of the new parameters.
    others = iter(jax.lax.optimization_barrier([x for x in arrays if x.ndim != 1]))
    return structure.unflatten([next(vectors if x.ndim == 1 else others) for x in arrays])


def count_together(before: Any, after: Any) -> Any:
    """Returns a tree's values `after` unchanged, its integer scalars from those of `before`."""
    old, new = jax.tree.leaves(before), jax.tree.leaves(after)
    is_count = [x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer) for x in new]
    counts = iter(_from_one([x for x, counted in zip(old, is_count, strict=True) if counted]))
    leaves = [
        next(counts) + (b - a) if counted else b
        for a, b, counted in zip(old, new, is_count, strict=True)
    ]
    return jax.tree.structure(after).unflatten(leaves)


def norm(tree: Any) -> jax.Array:
    """The square root of the sum of all squares of rows and vectors, as `optax.tree.norm`.

    The sums of all rows are added in one operation, not in one for each array.
    """
    sums = [jnp.square(_rows(x)).sum(1) for x in jax.tree.leaves(join(tree))]
    # Without the barrier XLA would sum each array by itself.
    return jnp.sqrt(jax.lax.optimization_barrier(jnp.concatenate(sums)).sum())
