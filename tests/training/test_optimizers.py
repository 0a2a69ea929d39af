"""Joined vectors: nothing is lost on the way there and back, and an optimizer steps them alike."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from cromss_jax.networks import layers
from cromss_jax.training import optimizers, pretrain_step
from tests import runs

pytestmark = pytest.mark.numeric


def params(key: int) -> nnx.State:
    """Of two convolutions, one with a bias, and a BatchNorm, at random."""
    network = nnx.List(
        [
            layers.Conv(3, 4, 3, init=layers.TORCH_INIT),
            layers.BatchNorm(4),
            layers.Conv(4, 2, 1, use_bias=True, init=layers.TORCH_INIT),
        ]
    )
    state = nnx.state(network, nnx.Param)
    arrays, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(key), len(arrays))
    return structure.unflatten(
        [jax.random.normal(k, x.shape) for k, x in zip(keys, arrays, strict=True)]
    )


def test_vectors_are_joined_in_their_order_and_come_back():
    state = params(0)
    joined = optimizers.join(state)
    norm, conv = state[1], state[2]
    expected = np.concatenate([norm["bias"][...], norm["weight"][...], conv["bias"][...]])
    np.testing.assert_array_equal(joined.vectors, expected)
    assert [x.shape for x in joined.others] == [(3, 3, 3, 4), (1, 1, 4, 2)]
    jax.tree.map(np.testing.assert_array_equal, optimizers.split(joined, like=state), state)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_an_optimizer_steps_joined_vectors_as_it_steps_single_ones(name):
    config = ml_collections.ConfigDict({"optimizer": {"name": name, "l2": 0.1, "momentum": 0.9}})
    optimizer = optimizers.make_optimizer(config)
    state, grads = params(0), params(1)
    _, before = optimizer.update(params(2), optimizer.init(state), state)
    expected = optimizer.update(grads, before, state)
    old, joined_grads, joined_state = optimizers.join((before, grads, state))
    updates, after = optimizer.update(joined_grads, old, joined_state)
    # Number by number, so not a bit differs.
    found = optimizers.split((updates, after), like=(state, before))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_forms_for_gpus_change_no_number():
    grads = params(0)
    jax.tree.map(np.testing.assert_array_equal, optimizers.from_memory(grads), grads)
    rows = optimizers.to_rows(grads)
    assert [x.shape for x in jax.tree.leaves(rows)] == [(27, 4), (4,), (4,), (2,), (1, 8)]
    jax.tree.map(np.testing.assert_array_equal, optimizers.from_rows(rows, like=grads), grads)
    before = {"count": jnp.int32(7), "mean": jnp.zeros(3), "other": jnp.int32(0)}
    after = {"count": jnp.int32(9), "mean": jnp.ones(3), "other": jnp.int32(1)}
    found = optimizers.count_together(before, after)
    jax.tree.map(np.testing.assert_array_equal, found, after)
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(after)]


def test_a_norm_by_rows_is_the_norm():
    # Sizes that rows of 256 numbers divide, and one that only rows of 4 do.
    rng = np.random.default_rng(0)
    tree = nnx.List([layers.Conv(64, 64, 3, init=layers.TORCH_INIT), layers.BatchNorm(4)])
    arrays, structure = jax.tree.flatten(nnx.state(tree, nnx.Param))
    arrays = [rng.normal(size=x.shape).astype(np.float32) for x in arrays]
    exact = np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in arrays))
    # Sums of positive numbers, in float32.
    np.testing.assert_allclose(optimizers.norm(structure.unflatten(arrays)), exact, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_state_keeps_its_structure(name):
    """What earlier checkpoints hold can be restored."""
    config = runs.tiny_config("none", **{"optimizer.name": name})

    def updated(key):
        state = pretrain_step.init_state(config, key)
        before = (state.params, state.opt_state)
        return before, optimizers.split(optimizers.join(before), like=before)

    before, after = jax.eval_shape(updated, jax.random.key(0))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert jax.tree.leaves(after) == jax.tree.leaves(before)
