"""Small programs compiled for GPUs without any, where JAX's CUDA plugin is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cromss_jax import plan
from cromss_jax.costs import chips, costs
from cromss_jax.training import sharding


def test_descriptions_of_gpus():
    text = chips.target_config(chips.GPUS["l40s"])
    for line in (
        "device_memory_size: 48000000000",
        "shared_memory_per_block_optin: 101376",  # 99 KiB of 100
        "cuda_compute_capability { major: 8 minor: 9 }",
        'device_description_str: "NVIDIA L40S"',
        "memory_bandwidth: 864000000000",
    ):
        assert f"{line}\n" in text


def convolve(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=numbers)


def product(a, b):
    return jnp.einsum("bij,bjk->bik", a, b)


IMAGE, KERNEL, SLOPE = (4, 33, 33, 16), (3, 3, 16, 32), (4, 16, 16, 32)
FUNCTIONS = {
    "forward": (convolve, (IMAGE, KERNEL)),
    "image's gradient": (
        lambda k, g: jax.linear_transpose(lambda x: convolve(x, k), jnp.zeros(IMAGE, g.dtype))(g),
        (KERNEL, SLOPE),
    ),
    "kernel's gradient": (
        lambda x, g: jax.linear_transpose(lambda k: convolve(x, k), jnp.zeros(KERNEL, g.dtype))(g),
        (IMAGE, SLOPE),
    ),
    "product": (product, ((5, 64, 128), (5, 128, 32))),
}


def compile_for(device, function, shapes):
    alone = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=alone) for shape in shapes]
    return jax.jit(function).lower(*shapes).compile()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arithmetic_is_that_of_the_compiler_for_cpus(gpu_compiler, name):
    expected = compile_for(jax.devices("cpu")[0], *FUNCTIONS[name]).cost_analysis()["flops"]
    compiled = compile_for(plan.find_devices("h100:1")[0], *FUNCTIONS[name])
    cost = costs.measure(compiled, platform="gpu")
    assert cost.flops == pytest.approx(expected, rel=1e-12)
    shapes = FUNCTIONS[name][1]
    assert cost.memory["arguments"] == sum(4 * np.prod(shape) for shape in shapes)
    # At least the arguments and the result.
    moved = cost.memory["arguments"] + cost.memory["outputs"]
    assert cost.hbm_bytes >= moved
    assert cost.launches >= 1


@pytest.mark.parametrize("topology", [*(f"{kind}:8" for kind in chips.GPUS), "h100:2x4"])
def test_every_gpu_compiles(gpu_compiler, topology):
    devices = plan.find_devices(topology)
    assert (len(devices), devices[0].platform) == (8, "gpu")
    assert devices[0].device_kind == chips.GPUS[topology[:4]].processor.name
    assert len({device.process_index for device in devices}) == (2 if "x" in topology else 1)

    def step(_, x):
        return jax.lax.fori_loop(0, 7, lambda i, total: total + jnp.sum(x * total), 1.0)

    jitted = sharding.jit_step(step, sharding.make_mesh(0, devices))
    shapes = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.float32)
    cost = costs.measure(jitted.lower(*shapes).compile(), platform="gpu")
    assert cost.collectives == {"all-reduce": costs.Collective(7, 28)}
    (loop,) = cost.loops
    assert loop.rounds == 7
    assert cost.launches >= 2 * 7  # the sum, and the sum of all devices
