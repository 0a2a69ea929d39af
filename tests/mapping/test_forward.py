"""The compiled network: the numbers of `Pretrained`, one modality of two, flips and rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cromss_jax import sensors
from cromss_jax.mapping import forward
from cromss_jax.training import sharding
from tests.mapping.weights import random_network

CHANNELS = {"s1": 2, "s2": 3}
FUSIONS = ("mid", pytest.param("late", marks=pytest.mark.slow))


def network(fusion: str, modalities=sensors.MODALITIES) -> nnx.Module:
    channels = {m: CHANNELS[m] for m in modalities}
    return random_network(fusion, channels, 4)


def images(count: int = 8, height: int = 32, width: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        m: rng.integers(0, 256, (count, height, width, k), np.uint8) for m, k in CHANNELS.items()
    }


@pytest.mark.parametrize("fusion", FUSIONS)
def test_numbers_are_the_networks_on_several_devices(fusion):
    model, grey = network(fusion), images(height=40, width=33)
    padded = {
        m: jnp.pad(x / jnp.float32(255), ((0, 0), (0, 24), (0, 31), (0, 0)), mode="reflect")
        for m, x in grey.items()
    }
    logits = nnx.jit(lambda network, images: network(images, train=False))(model, padded)
    run = forward.make_forward(model, 32, sharding.make_mesh(4), augment=False)
    found = run(grey)
    for modality in grey:
        assert len(found[modality].sharding.device_set) == 4
        expected = jax.nn.softmax(logits[modality])[:, :40, :33]
        # Float32 sums in another order.
        np.testing.assert_allclose(found[modality], expected, atol=2e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_sensor_of_two(fusion):
    model, grey = network(fusion), images()
    run = forward.make_forward(model, 32, sharding.make_mesh(1), augment=False)
    both = run(grey)
    for modality, image in grey.items():
        alone = run({modality: image})
        assert set(alone) == {modality}
        np.testing.assert_allclose(alone[modality], both[modality], atol=2e-6)


def test_the_average_over_symmetries_turns_with_the_image():
    model = network("none", ("s2",))
    run = forward.make_forward(model, 32, sharding.make_mesh(1), augment=True)
    grey = images(count=1)["s2"]
    found = np.asarray(run({"s2": grey})["s2"])
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    for turned in (lambda x: x[:, :, ::-1], lambda x: np.rot90(x, 1, (1, 2))):
        again = run({"s2": np.ascontiguousarray(turned(grey))})["s2"]
        np.testing.assert_allclose(again, turned(found), atol=2e-6)
    plain = forward.make_forward(model, 32, sharding.make_mesh(1), augment=False)
    assert np.abs(np.asarray(plain({"s2": grey})["s2"]) - found).max() > 1e-4
    # Eight different views, of which each undoes itself.
    views = [forward._turn(jnp.asarray(grey), *s) for s in forward.SYMMETRIES]
    assert len({np.asarray(view).tobytes() for view in views}) == 8
    for view, symmetry in zip(views, forward.SYMMETRIES, strict=True):
        np.testing.assert_array_equal(forward._turn_back(view, *symmetry), grey)
