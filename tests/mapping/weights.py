"""Random weights of small networks on disk, with the card of a run."""

import pathlib

import jax.numpy as jnp
from etils import epath
from flax import nnx

from cromss_jax import presets, sensors
from cromss_jax.legend import Legend
from cromss_jax.networks.fusion import make_network
from cromss_jax.weights import folders, torch_keys
from cromss_jax.weights.network import Network, Weights

BANDS = {"s1": sensors.S1_BANDS, "s2": sensors.S2_BANDS}


def write_weights(
    folder: pathlib.Path, fusion: str, classes: Legend = presets.DYNAMIC_WORLD
) -> None:
    """Writes a ResNet-10 U-Net of both sensors."""
    count = len(classes)
    network = make_network(fusion, 10, {"s1": 2, "s2": 13}, count, jnp.float32, nnx.Rngs(0))
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
