"""The forms that run on GPUs give the numbers of those that run on CPUs; both run here."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cromss_jax import platforms, sensors
from cromss_jax.data import preprocess
from cromss_jax.method import smoothing
from cromss_jax.networks import convolution
from cromss_jax.training import pretrain_step
from tests import environment, runs
from tests.data.test_preprocess import SIZE, B, T, make_records
from tests.training.test_sharding import away_from_kinks


def choose_gpu(*operands, default, gpu=None, **_):
    return (gpu or default)(*operands)


def test_each_platform_gets_its_function():
    chosen = jax.jit(lambda x: platforms.choose(x, cpu=jnp.sin, gpu=jnp.cos, default=jnp.tan))
    traced = chosen.trace(1.0)
    for platform, operation in {
        "cpu": "sine",
        "cuda": "cosine",
        "rocm": "cosine",
        "tpu": "tan",
    }.items():
        assert f"stablehlo.{operation}" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_on_a_known_platform_its_form_alone_is_traced():
    def traced():
        # A new function each time, as JAX remembers what it traced.
        form = functools.partial(platforms.choose, cpu=jnp.sin, gpu=jnp.cos, default=jnp.tan)
        text = str(jax.make_jaxpr(lambda x: form(x))(1.0))
        return set(re.findall(r"\b(?:sin|cos|tan)\b", text))

    assert traced() == {"sin", "cos", "tan"}
    for platform, name in {"cpu": "sin", "gpu": "cos", "tpu": "tan"}.items():
        with platforms.known(platform):
            assert traced() == {name}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rotation_probability", [0.0, 0.7])
def test_gathered_examples_are_those_of_matrices(rotation_probability, dtype):
    geometry = preprocess.random_geometry(
        jax.random.key(3),
        B,
        T - SIZE,
        flip_probability=0.7,
        rotation_probability=rotation_probability,
        max_angle=90,
    )

    def make(*, gathers):
        examples = functools.partial(
            preprocess.examples,
            modalities=sensors.MODALITIES,
            s2_bands=sensors.S2_BANDS,
            crop_size=SIZE,
            num_classes=9,
            prior_kind="ts",
            dtype=dtype,
            gathers=gathers,
        )
        return jax.jit(examples)(make_records(), geometry)

    expected, found = make(gathers=False), make(gathers=True)
    assert expected.keys() == found.keys()
    for name in ("labels", "truth"):
        np.testing.assert_array_equal(found[name], expected[name])
    for name in ("s1", "s2", "prior"):
        assert found[name].dtype == dtype
        # In float32 coordinates differ by 4e-6 pixels, if at all; in bfloat16 a value near the
        # middle of two numbers of 8 bits is rounded the other way, once or, of the prior, twice.
        atol, rtol = (1e-5, 0) if dtype == jnp.float32 else (0, 2.02 * 2**-8)
        values, wanted = (x[name].astype(jnp.float32) for x in (found, expected))
        difference = np.abs(values - wanted)
        beyond = difference > atol + rtol * np.abs(wanted)
        # An upsampled grey level near a half is rounded the other way.
        assert beyond.mean() < (1e-3 if name == "s2" else 1e-9)
        assert difference.max(initial=0, where=beyond) < 1.01 / 255


@pytest.mark.parametrize("axis", [1, 2])
def test_filter_by_bfloat16_parts_is_as_exact_as_float32(axis):
    counts = np.random.default_rng(0).integers(0, 5, (2, 40, 40, 3))
    matrix = smoothing.gaussian_matrix(40)
    equation = {1: "ni,biwc->bnwc", 2: "ni,bhic->bhnc"}[axis]
    found = smoothing._by_parts(equation, jnp.asarray(matrix), jnp.asarray(counts, jnp.bfloat16))
    exact = np.einsum(equation, matrix.astype(np.float64), counts)
    # Sums of 40 positive numbers in float32.
    np.testing.assert_allclose(found, exact, rtol=40 * 2**-24)


@pytest.mark.parametrize(("in_channels", "out_channels"), [(13, 64), (2, 64), (16, 9), (13, 9)])
def test_padded_channels_change_no_number(monkeypatch, in_channels, out_channels):
    rng = np.random.default_rng(0)
    shapes = (2, 8, 8, in_channels), (3, 3, in_channels, out_channels), (2, 8, 8, out_channels)
    # Integers, whose products' sums are exact in any order.
    x, kernel, slope = (rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes)

    def results():
        out, pull = jax.vjp(lambda x, k: convolution._convolve(x, k, 1, 1), x, kernel)
        return out, *pull(slope)

    expected = results()
    monkeypatch.setattr(platforms, "choose", choose_gpu)
    text = str(jax.make_jaxpr(lambda x, k: convolution._convolve(x, k, 1, 1))(x, kernel))
    assert f"f32[2,8,8,{-(-out_channels // 8) * 8}]" in text
    jax.tree.map(np.testing.assert_array_equal, results(), expected)


@pytest.mark.slow  # quick forms: the operations above, and those of tests/networks
@pytest.mark.parametrize("variant", ["sample,modality=s2", "sample"])
def test_a_step_of_gpu_forms_is_the_step_of_cpu_forms(monkeypatch, variant):
    """Losses, thresholds, gradients of one step in float32, from the same records."""
    config = runs.tiny_config("unused", variant, **{"batch_size": B, "data.crop_size": SIZE})
    records = {k: jnp.asarray(v) for k, v in make_records().items()}

    def step(forms):
        definition = pretrain_step.network_definition(config, forms)
        train_step = pretrain_step.make_train_step(config, definition, 64, forms=forms)
        state = away_from_kinks(jax.jit(init)(jax.random.key(0)))
        return jax.jit(train_step, compiler_options=environment.QUICK_OPTIONS)(state, records)

    def init(key):
        return pretrain_step.init_state(config, key)

    state, expected = step(platforms.CPU)
    monkeypatch.setattr(platforms, "choose", choose_gpu)
    gpu_state, found = step(platforms.GPU)
    assert jax.tree.structure(gpu_state) == jax.tree.structure(state)
    for path, count in jax.tree.leaves_with_path(state.batch_stats):
        if count.dtype == jnp.int32:  # the decoder's BatchNorms count both modalities
            (own,) = (x for p, x in jax.tree.leaves_with_path(gpu_state.batch_stats) if p == path)
            assert own == count > 0
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        # Images differ by up to 1e-5, and sums run in another order.
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


def test_upsampled_convolution_by_a_transpose_is_the_one_by_products(monkeypatch):
    rng = np.random.default_rng(0)
    shapes = (2, 6, 8, 5), (3, 3, 5, 3), (2, 12, 16, 3)
    # Integers, whose products' sums are exact in any order.
    x, kernel, slope = (rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes)

    def results():
        out, pull = jax.vjp(jax.jit(convolution.convolve_upsampled), x, kernel)
        return out, *pull(slope)

    expected = results()
    monkeypatch.setattr(platforms, "choose", choose_gpu)
    jax.tree.map(np.testing.assert_array_equal, results(), expected)
