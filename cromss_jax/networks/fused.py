"""BatchNorm in training, alone and after a 1x1 convolution, with gradients written out, for GPUs.

A GPU starts a kernel for each operation that XLA does not fuse with its neighbours. Derived
automatically, BatchNorm's gradient is eight kernels that read or write an activation eight times.
Here it is four, and five reads and writes: sums are reduced together, and the ReLU's mask is
computed again from the input. Values are those of `layers` up to rounding.

Statistics are in float32, or in the dtype of the input if that is wider.
"""

import functools
import math

import jax
import jax.numpy as jnp

EPSILON = 1e-5


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sums(axis: int, *arrays: jax.Array) -> list[jax.Array]:
    """Sums over an axis of arrays of one shape, in one operation."""
    zeros = tuple(jnp.zeros((), x.dtype) for x in arrays)

    def add(first: tuple, second: tuple) -> tuple:
        return tuple(a + b for a, b in zip(first, second, strict=True))

    return jax.lax.reduce(arrays, zeros, add, [axis])


def _pixel_sums(*arrays: jax.Array) -> jax.Array:
    """Sums over all pixels of n arrays [B, H, W, C], [n, C], in two operations.

    The second adds the sums of groups, which are about as many as a group has pixels. A group lies
    within one sample, so that devices exchange only their results, by one all-reduce.
    """
    batch, height, width, num_channels = arrays[0].shape
    groups_of_all = 2 ** ((batch * height * width).bit_length() // 2)
    groups_of_sample = 2 ** max((groups_of_all // batch).bit_length() - 1, 0)
    groups = batch * math.gcd(height * width, groups_of_sample)
    grouped = [x.reshape(groups, -1, num_channels) for x in arrays]
    sums = jnp.concatenate(_sums(1, *grouped), axis=-1).sum(0)
    return sums.reshape(-1, num_channels)


def _like(x: jax.Array, *vectors: jax.Array) -> list[jax.Array]:
    """Vectors [C] with as many dimensions as x."""
    return [vector.reshape(*[1] * (x.ndim - 1), -1) for vector in vectors]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def normalise(
    x: jax.Array, weight: jax.Array, bias: jax.Array, running_mean: jax.Array, relu: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises a batch by its own statistics.

    Args:
      x: [B, H, W, C].
      weight: [C].
      bias: [C].
      running_mean: [C], to which a bfloat16 batch's statistics are computed relative; no gradient.
      relu: whether negative results become 0.

    Returns:
      The result, of x's shape and dtype; the batch's mean and biased variance [C], which have no
      gradient.
    """
    return _normalise(x, weight, bias, running_mean, relu)[0]


def _normalise(x, weight, bias, running_mean, relu):
    wide, count = _wide(x), x.size // x.shape[-1]
    # As in `layers.BatchNorm`: in one pass in bfloat16, else in two.
    centre = running_mean if x.dtype == jnp.bfloat16 else wide.mean((0, 1, 2))
    centred = wide - _like(x, centre)[0]
    total, squares = _pixel_sums(centred, jnp.square(centred))
    shift = total / count
    mean, var = centre + shift, jnp.maximum(squares / count - jnp.square(shift), 0)
    inverse = jax.lax.rsqrt(var + EPSILON)  # of the standard deviation
    y = _scaled(wide, mean, inverse * weight, bias)
    y = jax.nn.relu(y) if relu else y
    return (y.astype(x.dtype), mean, var), (x, weight, bias, mean, inverse)


def _scaled(wide, mean, scale, bias):
    mean, scale, bias = _like(wide, mean, scale, bias)
    return (wide - mean) * scale + bias


def _normalise_gradients(relu, residuals, output_grads):
    x, weight, bias, mean, inverse = residuals
    wide, count, scale = _wide(x), x.size // x.shape[-1], inverse * weight

    def grad(scale: jax.Array) -> jax.Array:
        """The output's gradient before the ReLU."""
        grad = _wide(output_grads[0])
        return jnp.where(_scaled(wide, mean, scale, bias) > 0, grad, 0) if relu else grad

    centred = wide - _like(x, mean)[0]
    summed = grad(scale)
    bias_grad, products = _pixel_sums(summed, summed * centred)
    # What the batch's mean and variance add to the gradient of an output: a constant, and a
    # multiple of the centred input.
    constant, slope = _like(x, scale * bias_grad / count, scale * inverse**2 * products / count)
    # The barrier lets XLA compute the ReLU's mask again; it would write it to memory.
    again = grad(jax.lax.optimization_barrier(scale))
    x_grad = again * _like(x, scale)[0] - constant - centred * slope
    return x_grad.astype(x.dtype), inverse * products, bias_grad, jnp.zeros_like(mean)


normalise.defvjp(_normalise, _normalise_gradients)


@jax.custom_vjp
def normalised_product(
    x: jax.Array, kernel: jax.Array, weight: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Multiplies pixels by a matrix and normalises the products, as `layers.normalised_product`.

    Args:
      x: [N, K] pixels.
      kernel: [K, D] float32.
      weight: [D], of the BatchNorm.
      bias: [D].

    Returns:
      The result [N, D] of x's dtype; mean and biased variance of the products [D], which have no
      gradient.
    """
    return _product(x, kernel, weight, bias)[0]


_matmul = functools.partial(jnp.matmul, precision="highest")


def _product(x, kernel, weight, bias):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    pixel_mean = _wide(x).mean(0)
    squares = jnp.einsum("nk,nl->kl", x, x, preferred_element_type=wide)
    covariance = squares / len(x) - jnp.outer(pixel_mean, pixel_mean)
    # One product for the covariance and the mean.
    products = _matmul(jnp.concatenate([covariance, pixel_mean.reshape(1, -1)]), kernel)
    spread, mean = products[:-1], products[-1]
    var = (kernel * spread).sum(0)
    # Rounding can make a variance of 0 negative.
    inverse = jax.lax.rsqrt(jnp.maximum(var, 0) + EPSILON)
    scaled = (kernel * (inverse * weight).reshape(1, -1)).astype(x.dtype)
    # Uses the rounded kernel, so that the mean is exactly that of the products computed below.
    centre = _matmul(pixel_mean, _wide(scaled))
    y = (_wide(x @ scaled) - centre.reshape(1, -1) + bias.reshape(1, -1)).astype(x.dtype)
    residuals = x, kernel, weight, pixel_mean, spread, mean, inverse, scaled
    return (y, mean, jnp.maximum(var, 0)), residuals


def _product_gradients(residuals, output_grads):
    x, kernel, weight, pixel_mean, spread, mean, inverse, scaled = residuals
    grad, wide = output_grads[0], kernel.dtype
    bias_grad = _wide(grad).sum(0)
    scaled_grad = jnp.einsum("nk,nd->kd", x, grad, preferred_element_type=wide)
    scale_grad = (kernel * scaled_grad).sum(0) - mean * bias_grad
    scaled_grad -= jnp.outer(pixel_mean, bias_grad)
    # The variance is w.S w for the covariance S and a column w of the kernel.
    var_grad = -0.5 * scale_grad * weight * inverse**3
    scale, twice = ((v.reshape(1, -1)) for v in (inverse * weight, 2 * var_grad))
    kernel_grad = scaled_grad * scale + spread * twice
    squares_grad = _matmul(kernel * twice, kernel.T) / len(x)  # twice, as S is symmetric
    shares = _wide(scaled) * bias_grad.reshape(1, -1) + kernel * twice * mean.reshape(1, -1)
    mean_grad = (shares / -len(x)).sum(1)  # of each pixel
    # In x's dtype: float32 products of whole images would take several times as long.
    x_grad = _wide(grad @ scaled.T + x @ squares_grad.astype(x.dtype))
    x_grad = (x_grad + mean_grad.reshape(1, -1)).astype(x.dtype)
    return x_grad, kernel_grad, scale_grad * inverse, bias_grad


normalised_product.defvjp(_product, _product_gradients)
