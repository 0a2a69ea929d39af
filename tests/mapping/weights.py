"""Random weights of small networks on disk, with the card of a run."""

import pathlib

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from cromss_jax import presets, sensors
from cromss_jax.legend import Legend
from cromss_jax.networks.fusion import make_network
from cromss_jax.weights import folders, torch_keys
from cromss_jax.weights.network import Network, Weights

BANDS = {"s1": sensors.S1_BANDS, "s2": sensors.S2_BANDS}


def random_network(fusion: str, num_channels: dict[str, int], num_classes: int) -> nnx.Module:
    """A ResNet-10 U-Net, initialised in one program, not array by array."""

    @jax.jit
    def make(key):
        rngs = nnx.Rngs(key)
        return nnx.split(make_network(fusion, 10, num_channels, num_classes, jnp.float32, rngs))

    return nnx.merge(*make(jax.random.key(0)))


def write_weights(
    folder: pathlib.Path, fusion: str, classes: Legend = presets.DYNAMIC_WORLD
) -> None:
    """Writes a ResNet-10 U-Net of both sensors."""
    count = len(classes)
    network = random_network(fusion, {"s1": 2, "s2": 13}, count)
    card = {
        "input": {
            "by_band": {
                band.name: {"low": band.low, "high": band.high, "unit": band.unit}
                for band in sensors.preset_bands()
            }
        },
        "classes": list(classes.names),
        "colours": list(classes.colours),
    }
    arrays = torch_keys.to_torch_state(nnx.state(network))
    found = Weights(Network(fusion, 10, BANDS, count), arrays, card=card)
    folders.write_folder(epath.Path(folder), found)
