"""The networks against segmentation_models_pytorch's, and their layers by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cromss_jax import layers, models, torch_keys

NUM_CLASSES = 9
# XLA's cheapest code generation: the convolutions, which take the time, are library calls.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def parity():
    """`tests.torch_parity`, where PyTorch and smp are installed."""
    pytest.importorskip("segmentation_models_pytorch")
    from tests import torch_parity

    return torch_parity


@pytest.fixture(scope="module")
def torch():
    """PyTorch, on one thread: two spin for each other where a core is busy."""
    torch = pytest.importorskip("torch")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(num_threads)


def jit(function):
    return jax.jit(function, compiler_options=FAST_COMPILE)


def abstract_state(fusion, depth, num_channels, dtype=jnp.float32):
    """Graph and state of a network of shapes: nothing is drawn."""
    network = nnx.eval_shape(
        lambda: models.make_network(
            fusion, depth, num_channels, NUM_CLASSES, dtype, nnx.Rngs(params=0)
        )
    )
    return nnx.split(network)


@functools.cache
def initial_arrays(seed):
    """A freshly drawn ResNet-18 network of 2 and 3 bands, under smp's keys."""
    return torch_keys.to_torch_state(draw(jax.random.key(seed)))


@jit
def draw(key):
    return nnx.state(
        models.make_network(
            "mid", 18, {"s1": 2, "s2": 3}, NUM_CLASSES, jnp.float32, nnx.Rngs(params=key)
        )
    )


# Structure.


@pytest.mark.parametrize("depth", [18, 34, 50])
@pytest.mark.parametrize("fusion", ["mid", "late"])
def test_parameter_counts_are_smps(parity, torch, fusion, depth):
    num_channels = {"s1": 2, "s2": 13}
    _, state = abstract_state(fusion, depth, num_channels)
    count = sum(array.size for array in jax.tree.leaves(nnx.filter_state(state, nnx.Param)))
    with torch.device("meta"):
        theirs = parity.torch_network(fusion, depth, num_channels, NUM_CLASSES, seed=0)
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    if (fusion, depth) == ("mid", 50):
        # The published network's.
        assert count == 56_058_521


@pytest.mark.parametrize(
    ("fusion", "depth", "num_channels"),
    [
        ("mid", 18, {"s1": 2, "s2": 13}),
        ("late", 34, {"s1": 2, "s2": 12}),
        ("none", 50, {"s2": 9}),
        ("none", 18, {"s1": 2}),
    ],
)
def test_weights_move_both_ways_bit_equal(parity, torch, fusion, depth, num_channels):
    theirs = parity.torch_network(fusion, depth, num_channels, NUM_CLASSES, seed=1)
    parity.randomise_norms(theirs, seed=2)
    arrays = parity.torch_arrays(theirs)
    _, state = abstract_state(fusion, depth, num_channels)
    back = torch_keys.to_torch_state(torch_keys.from_torch_state(arrays, state))
    assert back.keys() == arrays.keys()
    for key, array in arrays.items():
        assert back[key].dtype == array.dtype, key
        np.testing.assert_array_equal(back[key], array, err_msg=key)
    other = parity.torch_network(fusion, depth, num_channels, NUM_CLASSES, seed=3)
    other.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()}, strict=True)


def test_loaded_arrays_are_copies():
    arrays = {"weight": np.ones(3, np.float32)}
    state = torch_keys.from_torch_state(arrays, nnx.State({"weight": nnx.Param(np.zeros(3))}))
    back = torch_keys.to_torch_state(state)
    arrays["weight"][:] = 2
    np.testing.assert_array_equal(state["weight"][...], 1)
    back["weight"][:] = 3
    np.testing.assert_array_equal(state["weight"][...], 1)


def test_loading_names_every_tensor_that_does_not_fit():
    _, state = abstract_state("none", 18, {"s2": 13})
    concrete = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    arrays = torch_keys.to_torch_state(concrete)
    del arrays["encoder.bn1.running_mean"]
    arrays["encoder.fc.weight"] = np.zeros((1000, 512), np.float32)
    arrays["encoder.conv1.weight"] = np.zeros((64, 12, 7, 7), np.float32)
    with pytest.raises(ValueError, match="in 3 tensors") as error:
        torch_keys.from_torch_state(arrays, state)
    message = str(error.value)
    assert "missing encoder.bn1.running_mean" in message
    assert "unexpected encoder.fc.weight" in message
    assert "encoder.conv1.weight has shape (64, 12, 7, 7), needs (64, 13, 7, 7)" in message


# Numbers.


@pytest.mark.parametrize(
    ("fusion", "depth", "num_channels"),
    [
        ("mid", 18, {"s1": 2, "s2": 13}),
        ("late", 18, {"s1": 2, "s2": 9}),
        ("mid", 50, {"s1": 2, "s2": 12}),
        ("late", 34, {"s1": 2, "s2": 3}),
    ],
)
def test_logits_statistics_and_gradients_are_smps(parity, torch, fusion, depth, num_channels):
    """A part of the matrix that tests/bench/parity.py goes through."""
    errors = parity.errors(fusion, depth, num_channels, FAST_COMPILE)
    for name, tolerance in parity.TOLERANCES.items():
        assert errors[name] <= tolerance, (name, errors)


def test_logits_of_a_single_modality_are_smps(parity, torch):
    theirs = parity.torch_network("none", 34, {"s1": 2}, NUM_CLASSES, seed=4)
    parity.randomise_norms(theirs, seed=5)
    graphdef, state = abstract_state("none", 34, {"s1": 2})
    state = torch_keys.from_torch_state(parity.torch_arrays(theirs), state)
    image = {"s1": np.random.default_rng(6).random((2, 64, 96, 2), np.float32)}
    logits = jit(lambda state: nnx.merge(graphdef, state)(image, train=False))(state)
    with torch.no_grad():
        expected = theirs.eval()({"s1": parity.to_torch_image(image["s1"])})
    assert parity.logit_error(logits, expected) <= parity.TOLERANCES["eval_logits"]


def test_initial_values_are_distributed_as_smps(parity):
    num_channels = {"s1": 2, "s2": 3}
    ours = initial_arrays(seed=8)
    num_theirs = 4
    theirs = [
        parity.torch_arrays(parity.torch_network("mid", 18, num_channels, NUM_CLASSES, seed))
        for seed in range(num_theirs)
    ]
    kernels = [key for key, array in ours.items() if array.ndim == 4]
    for key in ours.keys() - set(kernels):
        np.testing.assert_array_equal(ours[key], theirs[0][key], err_msg=key)
    for key in kernels:
        reference = np.stack([arrays[key] for arrays in theirs])
        size, std = ours[key].size, reference.std()
        is_uniform = np.abs(reference).max() < 1.75 * std  # sqrt(3) for a uniform one
        # Five standard errors of the difference between one network and the mean of four. That
        # of a standard deviation is std sqrt((kurtosis - 1) / (4 n)), kurtosis 1.8 or 3.
        tolerance = 5 * std * np.sqrt((1 + 1 / num_theirs) / size)
        assert abs(ours[key].mean() - reference.mean()) < tolerance, key
        kurtosis = 1.8 if is_uniform else 3
        assert abs(ours[key].std() - std) < tolerance * np.sqrt((kurtosis - 1) / 4), key
        # The largest of n uniform values falls short of the bound by bound / n on average, by
        # 20 times as much once in e^20 draws; n normal values go beyond 3 std, for our n.
        largest = np.abs(ours[key]).max()
        if is_uniform:
            bound = np.abs(reference).max()
            assert abs(largest - bound) < 20 * bound / size, key
        else:
            assert 3 * std < largest < 7 * std, key


def test_seeds_decide_the_kernels():
    first, other = initial_arrays(seed=0), initial_arrays(seed=1)
    again = torch_keys.to_torch_state(draw(jax.random.key(0)))
    key = "encoder.layer2.0.conv2.weight"
    np.testing.assert_array_equal(first[key], again[key])
    assert not np.array_equal(first[key], other[key])
    # Two kernels of one shape are drawn apart.
    assert not np.array_equal(first[key], first["encoder.layer2.1.conv2.weight"])


# Layers.


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


def test_batch_norm_keeps_float32_statistics_of_offset_bfloat16_values():
    x = jnp.asarray(np.random.default_rng(0).normal(1000, 8, (4, 16, 16, 3)), jnp.bfloat16)
    norm = layers.BatchNorm(3)
    y = norm(x, train=True)
    exact = np.asarray(x, np.float64).reshape(-1, 3)
    assert y.dtype == jnp.bfloat16
    assert norm.running_var.dtype == jnp.float32
    # float32 rounds by 6e-8; E[x^2] - E[x]^2 would lose 1000^2 / 8^2 = 15,625 times that.
    np.testing.assert_allclose(norm.running_mean[...], 0.1 * exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(norm.running_var[...], 0.9 + 0.1 * exact.var(0, ddof=1), rtol=1e-5)


def test_batch_norm_needs_two_values():
    with pytest.raises(ValueError, match="larger batch or larger images"):
        layers.BatchNorm(1)(jnp.ones((1, 1, 1, 1)), train=True)


def test_batch_norm_statistics_are_those_of_the_sharded_batch():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    x = np.random.default_rng(0).normal(np.arange(8)[:, None, None, None], 1, (8, 4, 4, 3))
    x = jax.device_put(jnp.asarray(x, jnp.float32), sharding)
    norm = layers.BatchNorm(3)
    nnx.jit(lambda norm, x: norm(x, train=True))(norm, x)
    exact = np.asarray(x, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(norm.running_mean[...], 0.1 * exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(norm.running_var[...], 0.9 + 0.1 * exact.var(0, ddof=1), rtol=1e-6)


def test_upsample_repeats_each_pixel():
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(layers.upsample(jnp.asarray(x)), x.repeat(2, 1).repeat(2, 2))


def test_max_pool_by_hand():
    x = -1.0 - jnp.arange(16.0).reshape(1, 4, 4, 1)
    # Windows around rows and columns 0 and 2; the padding never wins over negative values.
    np.testing.assert_array_equal(layers.max_pool(x)[0, :, :, 0], [[-1, -2], [-5, -6]])


def test_bfloat16_keeps_parameters_statistics_and_logits_float32():
    arrays = initial_arrays(seed=0)
    arrays = {key: array for key, array in arrays.items() if not key.startswith("encoder1.")}
    image = {"s2": np.random.default_rng(0).random((2, 32, 64, 3), np.float32)}

    def logits_and_state(dtype):
        graphdef, state = abstract_state("none", 18, {"s2": 3}, dtype)
        network = nnx.merge(graphdef, torch_keys.from_torch_state(arrays, state))
        return network(image, train=False)["s2"], nnx.state(network)

    expected, _ = jit(lambda: logits_and_state(jnp.float32))()
    logits, state = jit(lambda: logits_and_state(jnp.bfloat16))()
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert dtypes == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    assert logits.dtype == jnp.float32
    # bfloat16 rounds by up to 2^-9 = 0.2 %, some 40 times; float32 in disguise would be exact.
    error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
    assert 1e-3 < error < 0.05


# Errors.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fusion": "early"}, "unknown fusion 'early': choose one of .*mid"),
        ({"depth": 101}, "unknown ResNet depth 101: choose one of .*50"),
        ({"dtype": jnp.float16}, "dtype.*choose float32 or bfloat16"),
        ({"num_channels": {"s2": 13}}, "fusion 'mid' needs 2 of"),
        ({"fusion": "none"}, "fusion 'none' needs 1 of"),
    ],
)
def test_unknown_choices_are_named(change, match):
    arguments = {
        "fusion": "mid",
        "depth": 18,
        "num_channels": {"s1": 2, "s2": 13},
        "num_classes": 9,
        "dtype": jnp.float32,
        "rngs": nnx.Rngs(0),
    }
    with pytest.raises(ValueError, match=match):
        models.make_network(**(arguments | change))


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((1, 33, 64, 13), "33 x 64 pixels.*multiples of 32, pad it to 64 x 64"),
        ((1, 64, 250, 13), "64 x 250 pixels.*pad it to 64 x 256"),
        ((1, 64, 64, 12), r"needs \[B, H, W, 13\]"),
    ],
)
def test_unsuitable_images_are_refused(shape, match):
    def run():
        network = models.make_network("none", 18, {"s2": 13}, 9, jnp.float32, nnx.Rngs(0))
        return network({"s2": jnp.zeros(shape)}, train=False)

    with pytest.raises(ValueError, match=match):
        jax.eval_shape(run)
