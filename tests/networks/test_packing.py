"""Packed images: the same numbers as plain ones, in float64 but for the order of sums."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cromss_jax.networks import decoders, layers, packing, resampling, resnet
from cromss_jax.networks.convolution import convolve

pytestmark = pytest.mark.numeric

SIZE = 16
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def pack(x, cell):
    """By hand, from rows and columns in their natural order."""
    batch, height, width, channels = x.shape
    cells = x.reshape(batch, height // cell, cell, width // cell, cell, channels)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // cell, width // cell, -1)


@pytest.mark.parametrize(
    ("size", "cell", "stride", "upsampling"),
    [(3, 1, 1, 2), (3, 2, 1, 1), (3, 2, 1, 2), (3, 4, 1, 1), (7, 4, 2, 1), (1, 4, 1, 1)],
)
def test_packed_convolution(size, cell, stride, upsampling):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 16, 24, 5)), rng.normal(size=(size, size, 5, 3))

    @jax.jit
    def both(plain, packed, kernel):
        other = packing.pack_kernel(kernel, cell, stride=stride, upsampling=upsampling)
        return convolve(plain, kernel, stride), convolve(packed, other)

    upsampled = x.repeat(upsampling, 1).repeat(upsampling, 2)
    expected, found = both(upsampled, pack(x, cell), kernel)
    expected = pack(np.asarray(expected), cell * upsampling // stride)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_orders():
    x = np.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    rows = packing.order(8, 2)
    np.testing.assert_array_equal(rows, [0, 2, 4, 6, 1, 3, 5, 7])
    ordered = x[:, rows][:, :, rows]
    np.testing.assert_array_equal(packing.pack(jnp.asarray(ordered), 2), pack(x, 2))
    natural = packing.in_order(jnp.asarray(ordered[0]), 2)
    np.testing.assert_array_equal(natural, x[0])
    np.testing.assert_array_equal(packing.in_order(natural, 4), ordered[0])
    planes = packing.planes(jnp.asarray(ordered), 2)
    for index, (row, column) in enumerate(itertools.product(range(2), repeat=2)):
        expected = x[:, row::2, column::2].reshape(2, 16, 3)
        np.testing.assert_array_equal(planes[:, index], expected)
    np.testing.assert_array_equal(packing.unpack_planes(jnp.asarray(pack(x, 2)), 3), planes)


def test_packed_max_pool():
    rng = np.random.default_rng(0)
    x, slope = rng.normal(size=(2, 16, 24, 5)), rng.normal(size=(2, 8, 12, 5))

    @jax.jit
    def pooled(x):
        found, pull = jax.vjp(lambda x: resampling.max_pool(x, 5), x)
        return found, pull(slope)[0]

    (expected, expected_gradient), (found, gradient) = pooled(x), pooled(pack(x, 2))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(gradient, pack(np.asarray(expected_gradient), 2), atol=1e-12)


def test_gradient_of_equal_pixels_is_shared():
    x = jnp.ones((1, 2, 2, 4))  # 4 x 4 pixels of one channel
    gradient = jax.grad(lambda x: resampling.max_pool(x, 1).sum())(x)
    # Windows see pixels 0 and 1, then 1 to 3: along both axes.
    shares = np.array([1 / 2, 1 / 2 + 1 / 3, 1 / 3, 1 / 3])
    expected = np.outer(shares, shares)
    np.testing.assert_allclose(gradient, pack(expected[None, ..., None], 2), atol=1e-12)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="30 pixels: packing needs a multiple of 4"):
        packing.order(30, 4)
    with pytest.raises(ValueError, match="7 pixels reaches beyond the neighbouring cells of 2"):
        packing.pack_kernel(jnp.ones((7, 7, 1, 1)), 2, stride=2)
    with pytest.raises(ValueError, match="cells of 4 x 4 pixels: max pooling needs cells of 2 x 2"):
        resampling.max_pool(jnp.ones((1, 2, 2, 16)), 1)
    with pytest.raises(ValueError, match="12 channels: the layer needs 5, or 5 times a square"):
        packing.cell_size(jnp.ones((1, 2, 2, 12)), 5)
    dilated = layers.Conv(1, 1, 3, dilation=2, init=layers.TORCH_INIT)
    with pytest.raises(ValueError, match="the dilation is 2: use dilation 1"):
        dilated(jnp.ones((1, 2, 2, 4)))


def both_ways(make, plain, packed):
    """Gradients and BatchNorm statistics of a module, as it is and packed.

    `plain` and `packed` map the module to scalars; `make` returns it.
    """
    definition, params, statistics = nnx.split(make(), nnx.Param, nnx.BatchStat)
    rng = np.random.default_rng(0)
    # Kernels that keep the size of what they see, and scales and offsets around 1.
    params = jax.tree.map(
        lambda leaf: (
            rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:3]))
            if leaf.ndim == 4
            else rng.uniform(0.5, 1.5, leaf.shape)
        ),
        params,
    )

    def loss(params, function):
        network = nnx.merge(definition, params, statistics, copy=True)
        return function(network), nnx.state(network, nnx.BatchStat)

    jitted = jax.jit(
        jax.value_and_grad(loss, has_aux=True), static_argnums=1, compiler_options=FAST_COMPILE
    )
    return jitted(params, plain), jitted(params, packed)


def assert_equal(plain, packed):
    assert jax.tree.structure(plain) == jax.tree.structure(packed)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(packed), strict=True):
        # 4e-14 was measured.
        np.testing.assert_allclose(b, a, atol=1e-11 * np.abs(a).max())


@pytest.mark.slow
def test_encoders_beside_each_other():
    """Two encoders, whose first stages run as one, on packed images."""
    rng = np.random.default_rng(1)
    images = [rng.random((2, SIZE, 2 * SIZE, bands)) for bands in (2, 3)]

    def make():
        encoders = [resnet.ResNetEncoder(50, bands, num_features=2) for bands in (2, 3)]
        encoders[1].layer1[0].bn1.num_batches_tracked.set_value(jnp.int32(5))
        return nnx.List(encoders)

    slopes = [
        [rng.normal(size=(2, SIZE // stride, 2 * SIZE // stride, channels)) for _ in images]
        for stride, channels in zip((2, 4), make()[0].out_channels, strict=True)
    ]
    packed_slopes = [[pack(s, 2) for s in slopes[0]], *slopes[1:]]

    def weighed(features, slopes):
        pairs = zip(zip(*features, strict=True), slopes, strict=True)
        return sum(jnp.sum(f * s) for level, own in pairs for f, s in zip(level, own, strict=True))

    def plain(encoders):
        features = [e(x, True) for e, x in zip(encoders, images, strict=True)]
        return weighed(features, slopes)

    def packed(encoders):
        features = resnet.encode_together(encoders, [pack(x, 4) for x in images], True)
        return weighed(features, packed_slopes)

    assert_equal(*both_ways(make, plain, packed))


@pytest.mark.slow
def test_packed_decoder():
    rng = np.random.default_rng(2)
    channels = (6, 5, 4, 3, 2)
    features = [
        rng.normal(size=(2, 64 >> level, 32 >> level, count))
        for level, count in enumerate(channels, start=1)
    ]
    slope = rng.normal(size=(2, 64, 32, 9))

    def make():
        decoder = decoders.UNetDecoder(channels)
        return nnx.List([decoder, decoders.segmentation_head(decoder, 9)])

    def plain(modules):
        decoder, (head,) = modules
        return jnp.sum(head(decoder(features, True)) * slope)

    def packed(modules):
        decoder, (head,) = modules
        logits = head(decoder.packed([pack(features[0], 2), *features[1:]], True))
        planes = pack(slope, 4).reshape(2, -1, 16, 9).swapaxes(1, 2)
        return jnp.sum(packing.unpack_planes(logits, 9) * planes)

    assert_equal(*both_ways(make, plain, packed))
