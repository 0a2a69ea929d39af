"""Layers by hand, and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cromss_jax.costs import costs
from cromss_jax.errors import UserError
from cromss_jax.networks import fused, layers, resampling, resnet
from cromss_jax.training import sharding

pytestmark = pytest.mark.numeric

# XLA's cheapest code generation: the convolutions, which take the time, are library calls.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def jit(function, **options):
    return jax.jit(function, compiler_options=FAST_COMPILE, **options)


def test_batch_norm_by_hand():
    norm = layers.BatchNorm(1)
    y = norm(jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1), train=True)
    # Mean 2, biased variance 1, unbiased 2; a tenth of them enters the running 0 and 1.
    np.testing.assert_allclose(y.ravel(), np.array([-1, 1]) / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(norm.running_mean[...], [0.2], rtol=1e-6)
    np.testing.assert_allclose(norm.running_var[...], [1.1], rtol=1e-6)
    assert norm.num_batches_tracked[...] == 1
    y = norm(jnp.full((1, 1, 1, 1), 1.2), train=False)
    np.testing.assert_allclose(y.ravel(), [1 / np.sqrt(1.1 + 1e-5)], rtol=1e-6)


@pytest.mark.parametrize(
    ("mean", "tracked_mean", "tolerance"),
    # float32 rounds by 2^-24, of squares up to 26 times the variance around the tracked mean, or
    # 100^2 / 8^2 = 156 times where it is not yet known; a sum of 1024 at worst 1024 times as much.
    # bfloat16 would round the squares by 2^-8, 60 % of the variance.
    [(8, 0, 1e-5), (1000, 960, 1e-5), (100, 0, 1024 * 157 * 2**-24)],
)
@pytest.mark.parametrize("fused", [False, True])
def test_batch_norm_keeps_float32_statistics_of_bfloat16_values(
    mean, tracked_mean, tolerance, fused
):
    x = jnp.asarray(np.random.default_rng(0).normal(mean, 8, (4, 16, 16, 3)), jnp.bfloat16)
    norm = layers.BatchNorm(3)
    norm.fused = fused
    norm.running_mean.set_value(jnp.full(3, tracked_mean, jnp.float32))
    y = norm(x, train=True)
    exact = np.asarray(x, np.float64).reshape(-1, 3)
    assert y.dtype == jnp.bfloat16
    assert norm.running_var.dtype == jnp.float32
    expected = 0.9 * tracked_mean + 0.1 * exact.mean(0)
    np.testing.assert_allclose(norm.running_mean[...], expected, rtol=1e-6)
    var = 0.9 + 0.1 * exact.var(0, ddof=1)
    np.testing.assert_allclose(norm.running_var[...], var, rtol=tolerance)
    normalised = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    # Rounded to bfloat16's 8 bits, and divided by the root of a variance as far off as above.
    rtol = 2**-8 + tolerance / 2
    np.testing.assert_allclose(np.asarray(y, np.float64).reshape(-1, 3), normalised, rtol=rtol)


def _expanding(stride: int, dtype) -> tuple[layers.Conv, layers.BatchNorm, jax.Array]:
    """A 1x1 convolution from 8 to 24 channels and its BatchNorm, and activations to put in."""
    rng = np.random.default_rng(0)
    conv = layers.Conv(8, 24, 1, stride=stride, init=layers.TORCH_INIT)
    conv.weight.set_value(jnp.asarray(rng.normal(size=(1, 1, 8, 24)), dtype))
    norm = layers.BatchNorm(24)
    norm.weight.set_value(jnp.asarray(rng.uniform(0.5, 2, 24), dtype))
    norm.bias.set_value(jnp.asarray(rng.normal(size=24), dtype))
    return conv, norm, jnp.asarray(np.maximum(rng.normal(0.3, 1, (3, 8, 8, 8)), 0), dtype)


def _run(apply, conv, norm, x, fused=False):
    """Gradients by parameters and input, output, running statistics."""

    def loss(params, x):
        own = nnx.merge(definition, params, statistics, copy=True)
        y = apply(*own, x)
        wide = jnp.promote_types(y.dtype, jnp.float32)
        return jnp.vdot(y.astype(wide), slope.astype(wide)), (y, nnx.state(own, nnx.BatchStat))

    norm.fused = fused
    slope = np.random.default_rng(1).normal(size=(3, 8 // conv.stride, 8 // conv.stride, 24))
    definition, params, statistics = nnx.split(nnx.List([conv, norm]), nnx.Param, nnx.BatchStat)
    return jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)


def _in_two_steps(conv, norm, x):
    return norm(conv(x), train=True)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_product_normalised_at_once_is_that_of_two_steps(stride, fused):
    with jax.enable_x64(True):
        layer = _expanding(stride, jnp.float64)
        found = _run(layers.normalised_product, *layer, fused)
        expected = _run(_in_two_steps, *layer)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected
        )


@pytest.mark.parametrize("relu", [False, True])
def test_a_fused_batch_norm_is_the_one_that_jax_derives(relu):
    def apply(conv, norm, x):
        return norm(conv(x), train=True, relu=relu)

    with jax.enable_x64(True):
        layer = _expanding(1, jnp.float64)
        found, expected = _run(apply, *layer, fused=True), _run(apply, *layer)
        assert (expected[1][0] == 0).any() == relu
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected
        )


@pytest.mark.parametrize("apply", [layers.normalised_product, _in_two_steps])
def test_fused_gradients_are_as_right_in_bfloat16(apply):
    conv, norm, x = _expanding(1, jnp.float32)
    with jax.enable_x64(True):
        exact = _run(_in_two_steps, *_expanding(1, jnp.float64))

    def errors(fused):
        found = _run(apply, conv, norm, x.astype(jnp.bfloat16), fused)
        return [
            np.sqrt(np.mean((np.asarray(a, np.float64) - np.asarray(b)) ** 2))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
        ]

    # Both round input, kernel, products and results to 8 bits, in another order.
    for by_hand, derived in zip(errors(True), errors(False), strict=True):
        assert by_hand <= 1.2 * derived + 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_a_product_normalised_at_once_is_as_right_in_bfloat16(fused):
    conv, norm, x = _expanding(1, jnp.float32)
    norm.fused = fused
    rounded = x.astype(jnp.bfloat16)
    y = np.asarray(x, np.float64).reshape(-1, 8) @ np.asarray(conv.weight[0, 0], np.float64)
    weight, bias = np.asarray(norm.weight[...]), np.asarray(norm.bias[...])
    exact = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5) * weight + bias

    def error(y):
        return np.sqrt(np.mean((np.asarray(y, np.float64).reshape(-1, 24) - exact) ** 2))

    two_steps = error(norm(conv(rounded), train=True))
    at_once = error(layers.conv_bn((conv, norm), rounded, train=True))
    # Both round the input, a kernel, products and results; 0.4 % apart here.
    assert 0 < at_once < 1.05 * two_steps


def test_batch_norm_needs_two_values():
    with pytest.raises(UserError, match="larger batch or larger images"):
        layers.BatchNorm(1)(jnp.ones((1, 1, 1, 1)), train=True)


@pytest.mark.parametrize("fused", [False, True])
def test_batch_norm_statistics_are_those_of_the_sharded_batch(fused):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    x = np.random.default_rng(0).normal(np.arange(8)[:, None, None, None], 1, (8, 4, 4, 3))
    x = jax.device_put(jnp.asarray(x, jnp.float32), rows)
    norm = layers.BatchNorm(3)
    norm.fused = fused
    nnx.jit(lambda norm, x: norm(x, train=True))(norm, x)
    exact = np.asarray(x, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(norm.running_mean[...], 0.1 * exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(norm.running_var[...], 0.9 + 0.1 * exact.var(0, ddof=1), rtol=1e-6)


def test_devices_exchange_a_fused_batch_norms_sums_alone():
    mesh = sharding.make_mesh()
    vector = jax.ShapeDtypeStruct((3,), jnp.float32)
    x = jax.ShapeDtypeStruct((8, 4, 4, 3), jnp.bfloat16)

    def loss(x, *vectors):
        return fused.normalise(x, *vectors, True)[0].astype(jnp.float32).sum()

    whole, rows = sharding.replicated(mesh), sharding.batch_sharded(mesh)
    jitted = jit(jax.grad(loss), in_shardings=(rows, whole, whole, whole), out_shardings=rows)
    text = jitted.lower(x, vector, vector, vector).compile().as_text()
    found = costs.find_collectives(text)
    # Of each pass one, of the two sums of each channel.
    assert found == {"all-reduce": costs.Collective(2, 2 * 6 * 4)}


def test_upsample_repeats_each_pixel():
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(resampling.upsample(jnp.asarray(x)), x.repeat(2, 1).repeat(2, 2))


def test_max_pool_by_hand():
    x = -1.0 - jnp.arange(16.0).reshape(1, 4, 4, 1)
    # Windows around rows and columns 0 and 2; the padding never wins over negative values.
    np.testing.assert_array_equal(resampling.max_pool(x, 1)[0, :, :, 0], [[-1, -2], [-5, -6]])


def test_max_pool_is_torchs_where_pixels_tie(torch, parity):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (2, 8, 6, 5)).astype(np.float32)
    slope = rng.integers(-3, 4, (2, 4, 3, 5)).astype(np.float32)  # sums are exact in any order
    theirs = parity.to_torch_image(x).requires_grad_()
    out = torch.nn.functional.max_pool2d(theirs, 3, stride=2, padding=1)
    out.backward(parity.to_torch_image(slope))

    @jit
    def pool(x, slope):
        found, pull = jax.vjp(lambda x: resampling.max_pool(x, 5), x)
        return found, *pull(slope)

    found, gradient = pool(x, slope)
    np.testing.assert_array_equal(found, parity.from_torch_image(out.detach()))
    np.testing.assert_array_equal(gradient, parity.from_torch_image(theirs.grad))


@pytest.mark.parametrize(("platform", "barriers"), [("cpu", 2), ("tpu", 0)])
def test_a_cpu_writes_what_several_operations_read(platform, barriers):
    def chain(x):
        for _ in range(2):
            x = layers.materialised(jax.nn.relu(x * x - 1))
        return x.sum(0), x.T

    lowered = jax.jit(chain).trace(jnp.ones((8, 8))).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("optimization_barrier ") == barriers


def test_a_compiled_step_computes_each_residual_block_once():
    encoder = nnx.eval_shape(lambda: resnet.ResNetEncoder(18, 3))
    definition, state = nnx.split(encoder)
    cpu = sharding.make_mesh(1, jax.devices("cpu"))
    jitted = sharding.jit_step(lambda state, image: nnx.merge(definition, state)(image, False), cpu)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    # XLA must know the option by which it leaves these alone, and still do so.
    text = jitted.lower(state, image).compile(FAST_COMPILE).as_text()
    assert text.count(" opt-barrier(") == 8


def test_group_norm_is_torchs(torch):
    norm = layers.GroupNorm(2, 6)
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (2, 4, 5, 6)).astype(np.float32)
    weight, bias = rng.normal(size=(2, 6)).astype(np.float32)
    norm.weight.set_value(jnp.asarray(weight))
    norm.bias.set_value(jnp.asarray(bias))
    expected = torch.nn.functional.group_norm(
        torch.from_numpy(x.transpose(0, 3, 1, 2)), 2, torch.from_numpy(weight), torch.tensor(bias)
    )
    np.testing.assert_allclose(norm(x), expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("dilation", [1, 3])
def test_dilated_convolution_is_torchs(torch, depthwise, dilation):
    if depthwise:
        conv = layers.DepthwiseConv(6, 3, dilation=dilation, init=layers.TORCH_INIT)
    else:
        conv = layers.Conv(6, 12, 3, dilation=dilation, init=layers.TORCH_INIT)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 10, 6)).astype(np.float32)
    kernel = rng.normal(size=conv.weight.shape).astype(np.float32)
    conv.weight.set_value(jnp.asarray(kernel))
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)),
        torch.from_numpy(kernel.transpose(3, 2, 0, 1)),
        padding=dilation,
        dilation=dilation,
        groups=6 if depthwise else 1,
    )
    np.testing.assert_allclose(conv(x), expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_resize_by_hand():
    x = jnp.array([0.0, 3.0, 9.0]).reshape(1, 1, 3, 1)
    # Seven values on [0, 2] are thirds apart; one row stays what it is.
    expected = np.array([[0, 1, 2, 3, 5, 7, 9]])
    np.testing.assert_allclose(resampling.resize(x, 1, 7)[0, :, :, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(resampling.resize(x[:, :, 1:2], 2, 2).ravel(), [3, 3, 3, 3])


def test_average_pool_by_hand():
    x = jnp.arange(5.0).reshape(1, 5, 1, 1) + jnp.zeros((1, 5, 2, 1))
    # Two cells of five rows share the middle one, and each pixel is a cell of its own.
    np.testing.assert_allclose(
        resampling.average_pool(x, 2)[0, :, :, 0], [[1, 1], [3, 3]], rtol=1e-6
    )


@pytest.mark.parametrize("size", [(7, 12), (5, 4)])
def test_resize_and_average_pool_are_torchs(torch, size):
    x = np.random.default_rng(0).random((2, *size, 3), np.float32)
    image = torch.from_numpy(x.transpose(0, 3, 1, 2))
    for grid_size in (1, 2, 3, 6):
        expected = torch.nn.functional.adaptive_avg_pool2d(image, grid_size)
        found = resampling.average_pool(x, grid_size)
        np.testing.assert_allclose(found, expected.numpy().transpose(0, 2, 3, 1), atol=1e-6)
    expected = torch.nn.functional.interpolate(image, (20, 31), mode="bilinear", align_corners=True)
    found = resampling.resize(x, 20, 31)
    np.testing.assert_allclose(found, expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_dropout_zeroes_channels_or_values():
    x = jnp.full((40, 3, 4, 50), 2.0)
    key, other = jax.random.split(jax.random.key(0))
    drop_channels = jit(lambda key: layers.dropout(x, 0.2, key, whole_channels=True))
    channels = np.asarray(drop_channels(key))
    values = np.asarray(jit(lambda key: layers.dropout(x, 0.5, key, whole_channels=False))(key))
    # Whole channels of single samples; what stays is divided by the probability to stay.
    np.testing.assert_array_equal(channels, np.broadcast_to(channels[:, :1, :1], x.shape))
    np.testing.assert_allclose(np.unique(channels), [0, 2.5])
    np.testing.assert_array_equal(np.unique(values), [0, 4])
    # 2,000 channels and 24,000 values: five standard deviations of the share that is zeroed.
    assert abs((channels[:, 0, 0] == 0).mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 2_000)
    assert abs((values == 0).mean() - 0.5) < 5 * np.sqrt(0.25 / 24_000)
    np.testing.assert_array_equal(channels, drop_channels(key))
    assert not np.array_equal(channels, drop_channels(other))
    np.testing.assert_array_equal(layers.dropout(x, 0.2, None, whole_channels=True), x)
