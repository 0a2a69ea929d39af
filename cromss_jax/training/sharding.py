"""Sharding: parameters are replicated, the batch is sharded along its first dimension."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cromss_jax import platforms


def make_mesh(num_devices: int = 0, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, "data".

    Args:
      num_devices: how many of the devices to use, from the first; 0 means all.
      devices: the devices to choose from; by default those of all processes.
    """
    devices = jax.devices() if devices is None else devices
    count = num_devices or len(devices)
    return jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The first dimension divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch on this process's devices, [b] int, ascending.

    They are not always adjacent: `jax.make_mesh` orders the chips of a TPU slice as a ring, which
    can leave a host and return to it.
    """
    indices = batch_sharded(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[index] for index in indices]))


# By default, XLA tries a hundred programs for each matrix product on a GPU and compares the results
# of all ways to compute a convolution. With ResNet-50 that had not ended after seven minutes on an
# H200. With cuBLAS's products and no comparison it took two, with part of the tuning known.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 1}


def compiler_options(mesh: Mesh, *, deterministic: bool = False) -> dict[str, str | bool | int]:
    """XLA's compiler options for a step, by name.

    Args:
      mesh: the devices.
      deterministic: whether a GPU may only run operations that give the same bits every time. CPUs
        and TPUs always do.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "cpu":
        # By default, this pass removes the barriers of `layers.materialised` too early.
        return {"xla_disable_hlo_passes": "cse_barrier_expander"}
    if platform == "gpu":
        return _GPU_OPTIONS | {"xla_gpu_exclude_nondeterministic_ops": deterministic}
    return {}


def jit_step(
    function: Callable, mesh: Mesh, *, deterministic: bool = False, donate_state: bool = False
) -> Callable:
    """Jits a function of (state, records).

    The state and the result are replicated; the records are sharded along the first dimension.
    `deterministic` is as for `compiler_options`.
    """
    platform = mesh.devices.flat[0].platform

    @functools.wraps(function)
    def step(state, records):
        with platforms.known(platform):
            return function(state, records)

    return jax.jit(
        step,
        in_shardings=(replicated(mesh), batch_sharded(mesh)),
        out_shardings=replicated(mesh),
        donate_argnums=(0,) if donate_state else (),
        compiler_options=compiler_options(mesh, deterministic=deterministic),
    )


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Moves this process's rows of a batch (`process_rows`) to its devices."""
    sharding = batch_sharded(mesh)
    # This transfer is intended, also where implicit transfers are forbidden.
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: jax.make_array_from_process_local_data(sharding, rows)
            for name, rows in batch.items()
        }


def wait(array: jax.Array) -> None:
    """Waits until the first device of this process has computed an array.

    All devices compute in step. If another process ends, collectives on CPU fail at once on the
    devices adjacent to that process's, which include the first one. The other devices keep waiting
    until the runtime ends this process (100 s).
    """
    array.addressable_data(0).block_until_ready()
