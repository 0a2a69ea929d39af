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


def jit_step(function: Callable, mesh: Mesh, *, donate_state: bool = False) -> Callable:
    """Compiles (state, records) -> anything: the state and the result replicated, records cut."""
    return jax.jit(
        function,
        in_shardings=(replicated(mesh), batch_sharded(mesh)),
        out_shardings=replicated(mesh),
        donate_argnums=(0,) if donate_state else (),
    )


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices, as part of the global batch."""
    sharding = batch_sharded(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
