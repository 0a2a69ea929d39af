"""Convolutions by matrix products against XLA's own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cromss_jax.networks import convolution
from cromss_jax.networks.convolution import convolve, convolve_upsampled, patches

pytestmark = pytest.mark.numeric

# Height, width; size, stride, dilation, channels in and out: all ways in which `convolve` computes.
CASES = {
    "narrowing": (8, 6, 3, 1, 1, 40, 32),
    "narrowing, dilated": (8, 6, 3, 1, 2, 40, 32),
    "widening": (8, 6, 3, 1, 1, 32, 40),
    "narrow": (8, 6, 3, 1, 1, 8, 8),
    "smaller than its window": (2, 6, 3, 1, 1, 8, 32),
    "strided": (8, 6, 3, 2, 1, 8, 32),
    "first of a ResNet": (8, 6, 7, 2, 1, 2, 32),
    "1x1": (8, 6, 1, 1, 1, 40, 32),
    "of many pixels": (32, 34, 3, 1, 1, 4, 32),
}


def xla_convolve(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    margin = kernel.shape[0] // 2 * dilation
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(margin, margin)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def small_integers(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    """float32 whose products' sums are exact in any order."""
    rng = np.random.default_rng(0)
    return [rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_a_convolution(case):
    height, width, size, stride, dilation, in_channels, out_channels = CASES[case]
    x, kernel, slope = small_integers(
        (2, height, width, in_channels),
        (size, size, in_channels, out_channels),
        (2, height // stride, width // stride, out_channels),
    )

    def results(function):
        out, pull = jax.vjp(lambda x, k: function(x, k, stride, dilation), x, kernel)
        return out, *pull(slope)

    for found, expected in zip(
        jax.jit(lambda: results(convolve))(), jax.jit(lambda: results(xla_convolve))(), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


# As other devices do it; a CPU can, too.
@pytest.mark.parametrize("function", [convolve_upsampled, convolution._upsampled_by_convolution])
def test_an_upsampled_image_is_convolved(function):
    x, kernel, slope = small_integers((2, 4, 3, 5), (3, 3, 5, 6), (2, 8, 6, 6))

    def expected(x, kernel):
        return xla_convolve(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel, 1, 1)

    def results(function):
        out, pull = jax.vjp(function, x, kernel)
        return out, *pull(slope)

    for found, exact in zip(
        jax.jit(lambda: results(function))(), jax.jit(lambda: results(expected))(), strict=True
    ):
        np.testing.assert_array_equal(found, exact)


def test_patches_begin_with_a_window_s_last_pixel():
    x = jnp.arange(1.0, 10.0).reshape(1, 3, 3, 1)
    seen = patches(x, 3)
    assert seen[0, 1, 1].tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert seen[0, 0, 0].tolist() == [5, 4, 0, 2, 1, 0, 0, 0, 0]


def lowered_gradients(function, platform: str) -> str:
    x, kernel = small_integers((1, 4, 4, 40), (3, 3, 40, 32))
    loss = jax.grad(lambda x, kernel: function(x, kernel).sum(), argnums=(0, 1))
    return jax.jit(loss).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("platform", "products"), [("cpu", True), ("tpu", False)])
def test_only_a_cpu_multiplies_matrices(platform, products):
    text = lowered_gradients(convolve, platform)
    assert ("stablehlo.dot_general" in text) == products
    assert ("stablehlo.convolution" in text) != products


@pytest.mark.parametrize(("platform", "products"), [("cpu", True), ("tpu", False)])
def test_only_a_cpu_multiplies_upsampled_images(platform, products):
    text = lowered_gradients(convolve_upsampled, platform)
    # Packed kernels, too, are made by products, but more precise ones than those of images.
    assert bool(re.search("stablehlo.dot_general.*DEFAULT", text)) == products
    assert ("stablehlo.convolution" in text) != products
