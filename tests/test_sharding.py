"""The training step over eight devices: what it communicates, and that it computes the same."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cromss_jax import sharding, step
from tests import runs

B, S, T = 8, 2, 48


def make_records(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"s1": (T, T, 2), "s2_10m": (T, T, 4), "s2_20m": (T // 2, T // 2, 6)}
    shapes |= {"s2_60m": (T // 6, T // 6, 3)}
    records = {k: rng.integers(0, 256, (B, *s), dtype=np.uint8) for k, s in shapes.items()}
    parcels = rng.integers(0, 9, (B, S, T // 8, T // 8), dtype=np.uint8)
    records["labels"] = np.kron(parcels, np.ones((1, 1, 8, 8), np.uint8))
    records["season"] = rng.integers(0, S, B).astype(np.int32)
    return {**records, "is_real": np.ones(B, bool)}


def compile_step(config, num_devices: int):
    """The compiled training step, and a fresh state on its devices."""
    mesh = sharding.make_mesh(num_devices)
    definition = step.network_definition(config)
    num_scopes = 1 if config.selection.scope == "global" else num_devices
    jitted = sharding.jit_step(step.make_train_step(config, definition, 64, num_scopes), mesh)
    init = jax.jit(lambda k: step.init_state(config, k), out_shardings=sharding.replicated(mesh))
    state = init(jax.random.key(0))
    return jitted.lower(state, sharding.to_devices(make_records(0), mesh)).compile(), state, mesh


@pytest.fixture(scope="module")
def compiled():
    config = runs.tiny_config(
        "unused", **{"optimizer.name": "sgd", "optimizer.learning_rate": 0.01}
    )
    return {n: compile_step(config, n) for n in (1, 8)}


def test_no_pixel_is_gathered(compiled):
    text = compiled[8][0].as_text()
    assert "all-reduce" in text  # the gradients', the statistics', the thresholds'
    for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert not re.search(rf"= \S+ {collective}", text), collective


def test_one_and_eight_devices_agree(compiled):
    losses = {}
    for num_devices, (executable, state, mesh) in compiled.items():
        losses[num_devices] = []
        for number in range(20):
            state, report = executable(state, sharding.to_devices(make_records(number), mesh))
            losses[num_devices].append(float(report["loss"]))
    # What is promised; float32 sums in another order make the first step differ by about 1e-7.
    np.testing.assert_allclose(losses[1], losses[8], rtol=1e-5)
    assert losses[1][-1] != losses[1][0]
    assert jnp.isfinite(losses[1][-1])
