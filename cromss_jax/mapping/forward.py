"""The network on a batch of windows, compiled for all devices.

Dimensions: B windows, H height, W width, K bands, C classes.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cromss_jax import platforms
from cromss_jax.networks import decoders
from cromss_jax.networks.fusion import LateFusion, SingleModality
from cromss_jax.sensors import MODALITIES
from cromss_jax.training import sharding

# The eight symmetries of a square: quarter turns, with and without a flip.
SYMMETRIES = tuple((turns, flip) for flip in (False, True) for turns in range(4))

Images = Mapping[str, jax.Array]


def make_forward(
    network: nnx.Module, stride: int, mesh: jax.sharding.Mesh, *, augment: bool
) -> Callable[[Mapping[str, np.ndarray]], Images]:
    """Makes the function from grey levels to class probabilities.

    The numbers are those of `Pretrained.preprocess` and `Pretrained.predict`.

    Args:
      network: in float32, as `Pretrained.network`; it maps images by modality to logits.
      stride: image sizes must be multiples of it; others are padded by reflection and cropped.
      mesh: the batch is divided over its devices.
      augment: whether probabilities are averaged over the eight flips and rotations of the input.

    Returns:
      A function from uint8 [B, H, W, K] by modality to float32 [B, H, W, C] by modality. It returns
      before the devices are finished. B must be a multiple of the number of devices.
    """
    definition, state = nnx.split(network)
    platform = mesh.devices.flat[0].platform
    replicated, cut = sharding.replicated(mesh), sharding.batch_sharded(mesh)
    state = jax.device_put(state, replicated)

    def probabilities(state: nnx.State, grey: Images) -> Images:
        images = {m: pixels.astype(jnp.float32) / 255.0 for m, pixels in grey.items()}
        padded = {m: decoders.pad_to_stride(image, stride) for m, image in images.items()}
        with platforms.known(platform):
            logits = _logits(nnx.merge(definition, state), padded)
        return {
            m: jax.nn.softmax(logits[m][:, : image.shape[1], : image.shape[2]])
            for m, image in images.items()
        }

    compiled = jax.jit(
        probabilities,
        in_shardings=(replicated, cut),
        out_shardings=cut,
        compiler_options=sharding.compiler_options(mesh),
    )

    def forward(grey: Mapping[str, np.ndarray]) -> Images:
        batch = sharding.to_devices(grey, mesh)
        return compiled(state, batch)

    def averaged(grey: Mapping[str, np.ndarray]) -> Images:
        batch = sharding.to_devices(grey, mesh)
        total = None
        for turns, flip in SYMMETRIES:
            seen = compiled(state, {m: _turn(x, turns, flip) for m, x in batch.items()})
            seen = {m: _turn_back(x, turns, flip) for m, x in seen.items()}
            total = seen if total is None else {m: total[m] + x for m, x in seen.items()}
        return {m: x / len(SYMMETRIES) for m, x in total.items()}

    return averaged if augment else forward


def _logits(network: nnx.Module, images: Images) -> Images:
    """Logits by modality, also of one modality of a network of two."""
    if len(images) == len(MODALITIES) or isinstance(network, SingleModality):
        return network(images, train=False)
    ((modality, image),) = images.items()
    if isinstance(network, LateFusion):
        own = network.model1 if modality == "s1" else network.model2
        return {modality: own(image, train=False)}
    encoder = network.encoder1 if modality == "s1" else network.encoder
    (features,) = network.encode([encoder], [image], train=False)
    return {modality: network.decode(features, train=False)}


def _turn(images: jax.Array, turns: int, flip: bool) -> jax.Array:
    """Quarter turns of [B, H, W, ...] after a flip of the columns."""
    flipped = images[:, :, ::-1] if flip else images
    return jnp.rot90(flipped, turns, axes=(1, 2))


def _turn_back(images: jax.Array, turns: int, flip: bool) -> jax.Array:
    """The inverse of `_turn`."""
    turned = jnp.rot90(images, -turns, axes=(1, 2))
    return turned[:, :, ::-1] if flip else turned
