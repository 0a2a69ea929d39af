"""Microbatches and rematerialisation: what stays the same, and what BatchNorm changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cromss_jax.training import gradients, objective, pretrain_step, run, sharding
from tests import environment, runs
from tests.training.test_sharding import away_from_kinks

B, SIZE = 8, 32
EPOCH = 1  # the ramp is half way


def tiny_config():
    return runs.tiny_config("unused", "sample,modality=s2")


def make_batch(config, repeated: int) -> dict[str, jax.Array]:
    """Examples of which each comes `repeated` times in a row."""
    rng = np.random.default_rng(0)
    bands = {"s1": 2, "s2": len(config.s2_bands)}
    count = B // repeated
    batch = {m: rng.random((count, SIZE, SIZE, bands[m]), np.float32) for m in config.modalities}
    batch["labels"] = rng.integers(0, 9, (count, SIZE, SIZE), dtype=np.uint8)
    batch["labels"][:, :3] = 255
    batch["prior"] = rng.dirichlet(np.ones(9), (count, SIZE, SIZE)).astype(np.float32)
    return {name: jnp.repeat(x, repeated, axis=0) for name, x in batch.items()}


def start(config):
    """The networks, and their state away from the kinks of ReLUs, where rounding decides."""
    state = jax.jit(lambda key: pretrain_step.init_state(config, key))(jax.random.key(0))
    return pretrain_step.network_definition(config), away_from_kinks(state)


def compiled(config, batch, num_microbatches):
    """`gradients.value_and_grad` of the configuration's networks, and what it is called with."""
    definition, state = start(config)

    def apply(params, stats, images):
        network = nnx.merge(definition, params, stats, copy=True)
        return network(images, train=True), nnx.state(network, nnx.BatchStat)

    @jax.jit
    def compute(params, stats, batch):
        return gradients.value_and_grad(
            apply,
            lambda logits: objective.training_loss(config, logits, batch, jnp.float32(EPOCH)),
            params,
            stats,
            {m: batch[m] for m in config.modalities},
            num_microbatches,
        )

    arguments = (state.params, state.batch_stats, batch)
    # Compared with each other alone, which takes no program as users compile it.
    options = sharding.compiler_options(sharding.make_mesh(1)) | environment.QUICK_OPTIONS
    return compute.lower(*arguments).compile(compiler_options=options), arguments


@functools.cache
def program(num_microbatches):
    """One program for each number: shapes and configuration are the same in all tests."""
    config = tiny_config()
    compute, (params, stats, _) = compiled(config, make_batch(config, 1), num_microbatches)
    return lambda batch: compute(params, stats, batch)


def value_and_grad(batch, num_microbatches):
    """Loss, metrics, running statistics and gradient."""
    return program(num_microbatches)(batch)


def assert_close(found, expected, rtol):
    """Each leaf, relative to its own length."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(np.subtract(a, b, dtype=np.float64))
        assert error <= rtol * max(np.linalg.norm(b), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_of_equal_microbatches_nothing_but_the_running_statistics_differs(num_microbatches):
    """BatchNorm sees in each what it sees in all: loss, thresholds and gradient are the same."""
    batch = make_batch(tiny_config(), num_microbatches)
    loss, metrics, stats, grads = value_and_grad(batch, 1)
    found_loss, found_metrics, found_stats, found_grads = value_and_grad(batch, num_microbatches)
    assert 0 < metrics["selection_weight/s2"] < 1  # some labels lie below the thresholds
    # float32 rounds by 6e-8 in each of some 30 layers, and sums are in another order.
    np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(found_metrics[name], value, rtol=1e-4, err_msg=name)
    assert_close(found_grads, grads, 1e-3)
    # Updated once per microbatch: after n updates by a tenth, 0.9^n of the start is left.
    new, found = (
        nnx.to_pure_dict(s)["encoder"]["bn1"]["running_mean"] for s in (stats, found_stats)
    )
    np.testing.assert_allclose(found, new / 0.1 * (1 - 0.9**num_microbatches), rtol=1e-3)


@pytest.mark.slow
def test_the_loss_is_that_of_all_logits_each_normalised_in_its_microbatch():
    config = tiny_config()
    batch = make_batch(config, 1)
    loss, metrics, _, _ = value_and_grad(batch, 2)
    definition, state = start(config)

    @jax.jit
    def logits_of(images):
        network = nnx.merge(definition, state.params, state.batch_stats, copy=True)
        return network(images, train=True)

    parts = [logits_of({m: batch[m][k::2] for m in config.modalities}) for k in range(2)]
    logits = {m: np.zeros((B, SIZE, SIZE, 9), np.float32) for m in config.modalities}
    for k, part in enumerate(parts):
        for m in logits:
            logits[m][k::2] = part[m]
    loss_of = jax.jit(functools.partial(objective.training_loss, config))
    expected, expected_metrics = loss_of(logits, batch, jnp.float32(EPOCH))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    # The difference that BatchNorm makes: of the whole batch at once, logits are others.
    whole = logits_of({m: batch[m] for m in config.modalities})
    assert np.abs(whole["s2"] - logits["s2"]).max() > 1e-3


@pytest.mark.slow
def test_rematerialised_is_the_same_and_takes_less_memory():
    config = tiny_config()
    batch = make_batch(config, 1)
    stored, arguments = compiled(config, batch, 1)
    config.rematerialise = True
    recomputed, _ = compiled(config, batch, 1)
    expected, found = stored(*arguments), recomputed(*arguments)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert_close(found[2:], expected[2:], 1e-4)
    less, more = (x.memory_analysis().temp_size_in_bytes for x in (recomputed, stored))
    assert less < 0.8 * more


@pytest.mark.slow  # test_sharding looks at the step without microbatches
def test_microbatches_gather_nothing():
    """Each device keeps its samples."""
    config = runs.tiny_config("unused", "sample,modality=s2", microbatches=2, batch_size=16)
    mesh = sharding.make_mesh(8)
    definition = pretrain_step.network_definition(config)
    update = pretrain_step.make_update(config, definition, 64)
    state = jax.eval_shape(lambda: pretrain_step.init_state(config, jax.random.key(0)))
    batch = make_batch(config, 1)
    shapes = {k: jax.ShapeDtypeStruct((16, *v.shape[1:]), v.dtype) for k, v in batch.items()}
    lowered = sharding.jit_step(update, mesh).lower(state, shapes)
    text = lowered.compile(environment.QUICK_OPTIONS).as_text()
    assert "all-reduce" in text
    for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {collective}(" not in text, collective


def test_what_does_not_divide_is_refused():
    with pytest.raises(run.ConfigError, match="is 12, .* config.microbatches, 4, .* devices, 2;"):
        run.check_microbatches(12, 4, 2)
    run.check_microbatches(16, 4, 2)
