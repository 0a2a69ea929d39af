"""Starting JAX's runtime of several processes: on Cloud TPU, under SLURM, or by flags."""

import os
from collections.abc import Mapping

import jax


class DistributedError(ValueError):
    """The processes cannot find each other."""


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether SLURM or a TPU slice started this process as one of several.

    Args:
      environment: `os.environ`. SLURM's `srun` numbers its tasks; a slice on GKE names its hosts.
    """
    by_slurm = "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1
    return by_slurm or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wanted: bool | None = None,
) -> bool:
    """Starts the runtime of several processes, before any device is used.

    Args:
      coordinator_address: "host:port" of process 0.
      num_processes: how many.
      process_id: which this is, from 0. All three or none; without them JAX asks SLURM or Cloud
        TPU.
      wanted: False for a process on its own, whatever started it; None for what
        `is_one_of_several` says or the three ask for.

    Returns:
      Whether it was started.

    Raises:
      DistributedError: a sentence for the user.
    """
    told = (coordinator_address, num_processes, process_id)
    if any(x is not None for x in told) and None in told:
        raise DistributedError(
            "--coordinator_address, --num_processes and --process_id belong together: give all "
            "three, or none where SLURM or Cloud TPU tells them"
        )
    if wanted is None:
        wanted = None not in told or is_one_of_several(os.environ)
    if not wanted:
        return False
    try:
        jax.distributed.initialize(*told)
    except (ValueError, RuntimeError) as error:
        raise DistributedError(f"the processes did not find each other: {error}") from error
    return True
