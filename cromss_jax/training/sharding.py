"""Where arrays live: parameters replicated, the batch cut along its first dimension."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(num_devices: int = 0, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, "data".

    Args:
      num_devices: the first so many devices; 0 takes all.
      devices: to choose from; those of all processes unless given.
    """
    devices = jax.devices() if devices is None else devices
    count = num_devices or len(devices)
    return jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The first dimension cut over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch lie on this process's devices, [b] int, ascending.

    Not always neighbours: `jax.make_mesh` puts the chips of a TPU slice into the order of a ring,
    which leaves a host and comes back to it.
    """
    indices = batch_sharded(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What XLA is told when a step is compiled, by name."""
    if mesh.devices.flat[0].platform != "cpu":
        return {}
    # To leave `layers.materialised` alone: by default this pass undoes it early.
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


def jit_step(function: Callable, mesh: Mesh, *, donate_state: bool = False) -> Callable:
    """Compiles (state, records) -> anything: the state and the result replicated, records cut."""
    return jax.jit(
        function,
        in_shardings=(replicated(mesh), batch_sharded(mesh)),
        out_shardings=replicated(mesh),
        donate_argnums=(0,) if donate_state else (),
        compiler_options=compiler_options(mesh),
    )


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch, `process_rows`, on its devices."""
    sharding = batch_sharded(mesh)
    # Where other transfers are forbidden this one is meant.
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: jax.make_array_from_process_local_data(sharding, rows)
            for name, rows in batch.items()
        }


def wait(array: jax.Array) -> None:
    """Waits until the first device of this process has computed an array, as all do in step.

    Where another process ends, collectives on CPU fail at once on the devices next to its own, of
    which the first is one; the others wait on, until the runtime ends this process (100 s).
    """
    array.addressable_data(0).block_until_ready()
