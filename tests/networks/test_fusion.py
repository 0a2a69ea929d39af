"""The networks against segmentation_models_pytorch's, and their layers by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cromss_jax.networks import decoders
from cromss_jax.networks import fusion as networks
from cromss_jax.weights import torch_keys

pytestmark = pytest.mark.numeric

NUM_CLASSES = 9
OTHER_DECODERS = ("pspnet", "deeplabv3plus", "fpn")
# XLA's cheapest code generation: the convolutions, which take the time, are library calls.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def jit(function, **options):
    return jax.jit(function, compiler_options=FAST_COMPILE, **options)


def abstract_state(fusion, depth, num_channels, dtype=jnp.float32, decoder="unet"):
    """Graph and state of a network of shapes: nothing is drawn."""
    network = nnx.eval_shape(
        lambda: networks.make_network(
            fusion, depth, num_channels, NUM_CLASSES, dtype, nnx.Rngs(params=0), decoder
        )
    )
    return nnx.split(network)


@functools.cache
def initial_arrays(seed, fusion="mid", decoder="unet", depth=18):
    """A freshly initialised network of 2 and 3 bands, or of 3, under smp's keys."""
    return torch_keys.to_torch_state(draw(jax.random.key(seed), fusion, decoder, depth))


@functools.partial(jax.jit, static_argnums=(1, 2, 3), compiler_options=FAST_COMPILE)
def draw(key, fusion, decoder, depth):
    num_channels = {"s1": 2, "s2": 3} if fusion == "mid" else {"s2": 3}
    rngs = nnx.Rngs(params=key)
    return nnx.state(
        networks.make_network(fusion, depth, num_channels, NUM_CLASSES, jnp.float32, rngs, decoder)
    )


# Structure.


@pytest.mark.parametrize("depth", [18, 34, 50])
@pytest.mark.parametrize(
    ("fusion", "decoder"),
    [("mid", "unet"), ("late", "unet"), *(("none", decoder) for decoder in OTHER_DECODERS)],
)
def test_parameter_counts_are_smps(parity, torch, fusion, depth, decoder):
    num_channels = {"s2": 13} if fusion == "none" else {"s1": 2, "s2": 13}
    _, state = abstract_state(fusion, depth, num_channels, decoder=decoder)
    count = sum(array.size for array in jax.tree.leaves(nnx.filter_state(state, nnx.Param)))
    with torch.device("meta"):
        theirs = parity.torch_network(fusion, depth, num_channels, NUM_CLASSES, 0, decoder)
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    if (fusion, depth, decoder) == ("mid", 50, "unet"):
        # The published network's.
        assert count == 56_058_521


@pytest.mark.parametrize(
    ("fusion", "depth", "num_channels", "decoder"),
    [
        ("mid", 18, {"s1": 2, "s2": 13}, "unet"),
        pytest.param("late", 34, {"s1": 2, "s2": 12}, "unet", marks=pytest.mark.slow),
        pytest.param("none", 50, {"s2": 9}, "unet", marks=pytest.mark.slow),
        ("none", 18, {"s1": 2}, "unet"),
        pytest.param("mid", 18, {"s1": 2, "s2": 13}, "pspnet", marks=pytest.mark.slow),
        pytest.param("none", 50, {"s2": 13}, "deeplabv3plus", marks=pytest.mark.slow),
        ("late", 18, {"s1": 2, "s2": 3}, "fpn"),
    ],
)
def test_weights_move_both_ways_bit_equal(parity, torch, fusion, depth, num_channels, decoder):
    theirs = parity.torch_network(fusion, depth, num_channels, NUM_CLASSES, 1, decoder)
    parity.randomise_norms(theirs, seed=2)
    arrays = parity.torch_arrays(theirs)
    _, state = abstract_state(fusion, depth, num_channels, decoder=decoder)
    back = torch_keys.to_torch_state(torch_keys.from_torch_state(arrays, state))
    assert back.keys() == arrays.keys()
    for key, array in arrays.items():
        assert back[key].dtype == array.dtype, key
        np.testing.assert_array_equal(back[key], array, err_msg=key)
    with torch.device("meta"):
        other = parity.torch_network(fusion, depth, num_channels, NUM_CLASSES, 3, decoder)
    tensors = {k: torch.from_numpy(v) for k, v in back.items()}
    other.load_state_dict(tensors, strict=True, assign=True)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fusion", "depth", "num_channels", "decoder"),
    [
        # Mid fusion of U-Nets: ten whole steps in test_oracle. ResNet-34 and 50 and all numbers of
        # bands: tests.bench.parity.
        ("late", 18, {"s1": 2, "s2": 9}, "unet"),
        ("mid", 18, {"s1": 2, "s2": 13}, "pspnet"),
        ("mid", 18, {"s1": 2, "s2": 3}, "deeplabv3plus"),
        ("mid", 18, {"s1": 2, "s2": 13}, "fpn"),
    ],
)
def test_logits_statistics_and_gradients_are_smps(
    parity, torch, fusion, depth, num_channels, decoder
):
    """A part of the matrix that tests/bench/parity.py goes through."""
    errors = parity.errors(fusion, depth, num_channels, FAST_COMPILE, decoder)
    for name, tolerance in parity.TOLERANCES.items():
        assert errors[name] <= tolerance, (name, errors)


@pytest.mark.parametrize(
    ("depth", "modality", "num_channels", "decoder"),
    [
        (34, "s1", 2, "unet"),
        pytest.param(50, "s2", 13, "deeplabv3plus", marks=pytest.mark.slow),
        (18, "s2", 13, "fpn"),
    ],
)
def test_logits_of_a_single_modality_are_smps(
    parity, torch, depth, modality, num_channels, decoder
):
    num_channels = {modality: num_channels}
    theirs = parity.torch_network("none", depth, num_channels, NUM_CLASSES, 4, decoder)
    parity.randomise_norms(theirs, seed=5)
    graphdef, state = abstract_state("none", depth, num_channels, decoder=decoder)
    state = torch_keys.from_torch_state(parity.torch_arrays(theirs), state)
    image = np.random.default_rng(6).random((2, 64, 96, num_channels[modality]), np.float32)
    logits = jit(lambda state: nnx.merge(graphdef, state)({modality: image}, train=False))(state)
    with torch.no_grad():
        expected = {modality: theirs.eval()(parity.to_torch_image(image))}
    assert parity.logit_error(logits, expected) <= parity.TOLERANCES["eval_logits"]


def test_distant_surroundings_are_smps(parity, torch):
    """ASPP looks 12, 24 and 36 pixels far, out of the small images of the other tests."""
    theirs = parity.torch_network("none", 18, {"s2": 3}, NUM_CLASSES, 4, "deeplabv3plus").decoder
    parity.randomise_norms(theirs, seed=5)
    channels = (64, 64, 128, 256, 512)
    decoder = nnx.eval_shape(lambda: decoders.DeepLabV3PlusDecoder(channels))
    graphdef, state = nnx.split(decoder)
    state = torch_keys.from_torch_state(parity.torch_arrays(theirs), state)
    rng = np.random.default_rng(6)
    fine, deepest = (
        rng.normal(size=(1, *size, channels[level])).astype(np.float32)
        for size, level in (((160, 56), 1), ((40, 14), 4))
    )
    features = [None, fine, None, None, deepest]
    found = jit(lambda state: nnx.merge(graphdef, state)(features, train=False))(state)
    torch_fine, torch_deepest = map(parity.to_torch_image, (fine, deepest))
    with torch.no_grad():
        expected = theirs.eval()([None, None, torch_fine, None, None, torch_deepest])
    error = parity.scaled_error(found, parity.from_torch_image(expected))
    assert error <= parity.TOLERANCES["eval_logits"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fusion", "decoder"), [("mid", "unet"), *(("none", name) for name in OTHER_DECODERS)]
)
def test_initial_values_are_distributed_as_smps(parity, fusion, decoder):
    num_channels = {"s1": 2, "s2": 3} if fusion == "mid" else {"s2": 3}
    ours = initial_arrays(8, fusion, decoder)
    num_theirs = 4
    theirs = [
        parity.torch_arrays(
            parity.torch_network(fusion, 18, num_channels, NUM_CLASSES, seed, decoder)
        )
        for seed in range(num_theirs)
    ]
    # All kernels and, in DeepLabV3+ alone, the head's bias.
    drawn = [key for key, array in theirs[0].items() if np.ptp(array) > 0]
    assert {key for key, array in ours.items() if array.ndim == 4} <= set(drawn)
    for key in ours.keys() - set(drawn):
        np.testing.assert_array_equal(ours[key], theirs[0][key], err_msg=key)
    for key in drawn:
        reference = np.stack([arrays[key] for arrays in theirs])
        size, std = ours[key].size, reference.std()
        # sqrt(3) for a uniform one, more or less by the few values of a bias; above 3 for a normal.
        is_uniform = np.abs(reference).max() < 2.2 * std
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
    first, other = (initial_arrays(seed, depth=10) for seed in (0, 1))
    again = torch_keys.to_torch_state(draw(jax.random.key(0), "mid", "unet", 10))
    key = "encoder.layer3.0.conv2.weight"
    np.testing.assert_array_equal(first[key], again[key])
    assert not np.array_equal(first[key], other[key])
    # Two kernels of one shape are drawn apart.
    assert not np.array_equal(first[key], first["encoder1.layer3.0.conv2.weight"])


# Keys of dropout, dtypes.


def test_a_frozen_encoder_keeps_its_statistics_and_the_key_decides_what_is_dropped():
    graphdef, state = abstract_state("none", 18, {"s2": 3}, decoder="pspnet")
    before = initial_arrays(8, "none", "pspnet")
    state = torch_keys.from_torch_state(before, state)
    image = np.random.default_rng(0).random((2, 24, 32, 3), np.float32)

    @jit
    def run(state, key):
        network = nnx.merge(graphdef, state)
        logits = network({"s2": image}, train=True, train_encoder=False, dropout_key=key)
        return logits["s2"], nnx.state(network, nnx.BatchStat)

    logits, statistics = run(state, jax.random.key(0))
    for key, array in torch_keys.to_torch_state(statistics).items():
        assert np.array_equal(array, before[key]) == key.startswith("encoder."), key
    np.testing.assert_array_equal(logits, run(state, jax.random.key(0))[0])
    assert not np.array_equal(logits, run(state, jax.random.key(1))[0])


def test_modalities_drop_apart_and_only_in_training():
    """Where four levels of ones are summed, one sees which channels are left."""
    channels = (64, 64, 128, 256, 512)
    features = [
        np.zeros((2, 32 >> level, 32 >> level, c), np.float32)
        for level, c in enumerate(channels, 1)
    ]

    @jit
    def run(key):
        decoder = decoders.FPNDecoder(channels)
        for block in decoder.seg_blocks:
            block.block[-1].block[1].bias.set_value(jnp.ones(128))
        keys = [networks._modality_key(key, modality) for modality in ("s1", "s2")]
        trained = [decoder(features, True, key) for key in keys]
        return *trained, decoder(features, False, keys[0]), decoder(features, True, None)

    s1, s2, evaluated, without_key = run(jax.random.key(0))
    assert not np.array_equal(s1, s2)
    for dropped in (s1, s2):
        np.testing.assert_allclose(np.unique(dropped), [0, 5], rtol=1e-6)
    np.testing.assert_allclose(evaluated, 4, rtol=1e-6)
    np.testing.assert_array_equal(evaluated, without_key)
    assert networks._modality_key(None, "s1") is None


@pytest.mark.slow
def test_bfloat16_keeps_parameters_statistics_and_logits_float32():
    arrays = initial_arrays(0, "none", depth=10)
    image = {"s2": np.random.default_rng(0).random((2, 32, 64, 3), np.float32)}

    def logits_and_state(dtype):
        graphdef, state = abstract_state("none", 10, {"s2": 3}, dtype)

        @jit
        def run(state):
            network = nnx.merge(graphdef, state)
            return network(image, train=False)["s2"], nnx.state(network)

        return run(torch_keys.from_torch_state(arrays, state))

    expected, _ = logits_and_state(jnp.float32)
    logits, state = logits_and_state(jnp.bfloat16)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert dtypes == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    assert logits.dtype == jnp.float32
    # bfloat16 rounds by up to 2^-9 = 0.2 %, some 20 times; float32 in disguise would be exact.
    error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
    assert 1e-3 < error < 0.05


# Errors.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fusion": "early"}, "unknown fusion 'early': choose one of .*mid"),
        ({"decoder": "psp"}, "unknown decoder 'psp': choose one of .*pspnet.*fpn"),
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
        networks.make_network(**(arguments | change))


@pytest.mark.parametrize(
    ("decoder", "shape", "match"),
    [
        ("unet", (1, 33, 64, 13), "33 x 64 pixels.*divisible by 32, pad it to 64 x 64"),
        ("unet", (1, 64, 250, 13), "64 x 250 pixels.*pad it to 64 x 256"),
        ("unet", (1, 64, 64, 12), r"needs \[B, H, W, 13\]"),
        ("pspnet", (1, 36, 64, 13), "36 x 64 pixels.*divisible by 8, pad it to 40 x 64"),
        ("deeplabv3plus", (1, 48, 40, 13), "48 x 40 pixels.*divisible by 16, pad it to 48 x 48"),
        ("fpn", (1, 48, 64, 13), "48 x 64 pixels.*divisible by 32, pad it to 64 x 64"),
    ],
)
def test_unsuitable_images_are_refused(decoder, shape, match):
    with pytest.raises(ValueError, match=match):
        logits_shape(decoder, shape)


@pytest.mark.parametrize("decoder", decoders.DECODERS)
def test_suitable_images_are_those_that_suit_smp(parity, torch, decoder):
    stride = decoders.STRIDES[decoder]
    with torch.device("meta"):
        theirs = parity.torch_network("none", 18, {"s2": 13}, 9, 0, decoder)
    assert theirs.encoder.output_stride == stride
    assert networks.STRIDE % stride == 0
    height, width = 2 * stride, 3 * stride
    assert logits_shape(decoder, (1, height, width, 13)) == (1, height, width, 9)


def logits_shape(decoder, shape):
    def run():
        rngs = nnx.Rngs(0)
        network = networks.make_network("none", 18, {"s2": 13}, 9, jnp.float32, rngs, decoder)
        return network({"s2": jnp.zeros(shape)}, train=False)["s2"]

    return jax.eval_shape(run).shape
