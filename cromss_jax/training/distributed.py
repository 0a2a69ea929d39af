"""Starting JAX's runtime of several processes: on Cloud TPU, under SLURM, or by flags."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import NoReturn

import jax

_log = logging.getLogger(__name__)

# As JAX's own runtime ends a process that has lost another: what starts runs again knows it.
LOST_STATUS = 128 + signal.SIGABRT
# How long JAX waits for the others, when starting and for their signs of life.
_START_SECONDS, _LOST_SECONDS = 300, 100
_LEAVE_SECONDS = 5


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

    JAX ends (SIGABRT) a process that finds no coordinator, and one that waits for another that was
    lost; what is logged here says so beforehand.

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
    if None not in told:
        host, _, port = coordinator_address.rpartition(":")
        if not host or not port.isdecimal():
            raise DistributedError(
                f"--coordinator_address is {coordinator_address}; it must be HOST:PORT of process "
                "0, such as 10.0.0.1:1234"
            )
        if process_id >= num_processes:
            raise DistributedError(
                f"--process_id is {process_id} of --num_processes={num_processes}; they are "
                f"numbered from 0 to {num_processes - 1}"
            )
        if wanted is False:
            raise DistributedError(
                "--nodistributed is for a process on its own; leave out --coordinator_address, "
                "--num_processes and --process_id"
            )
    if wanted is None:
        wanted = None not in told or is_one_of_several(os.environ)
    if not wanted:
        return False
    _log.info("waiting at most %d s for all processes to start", _START_SECONDS)
    try:
        jax.distributed.initialize(
            *told,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_LOST_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        remedy = f"{coordinator_address} must be the host of process 0 and a free port there"
        if None in told:
            remedy = "where neither SLURM nor Cloud TPU tells them, give each "
            remedy += "--coordinator_address, --num_processes and --process_id"
        reason = str(error).splitlines()[0]
        raise DistributedError(
            f"the processes did not find each other ({reason}); {remedy}"
        ) from error
    _log.info(
        "process %d of %d, with %d of %d devices; process 0 writes. If one is lost, the others "
        "end within %d s",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
        _LOST_SECONDS,
    )
    if jax.process_index() > 0:  # what is reported is the same for all
        logging.getLogger(__package__).setLevel(logging.WARNING)
    return True


def leave(sentence: str, status: int) -> NoReturn:
    """Ends the command early: says why, and waits only shortly for the other processes.

    Args:
      sentence: for the user.
      status: exit status.
    """
    if not jax.distributed.is_initialized():
        print(sentence, file=sys.stderr)
        sys.exit(status)
    print(sentence, file=sys.stderr, flush=True)
    # JAX would wait for 300 s for processes that may be gone, or that wait for this one in turn.
    # If all end for the same reason they take leave of each other, at once.
    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    goodbye.start()
    goodbye.join(_LEAVE_SECONDS)
    os._exit(status)


def lost(error: jax.errors.JaxRuntimeError) -> str:
    """What to say when the devices fail under several processes."""
    return (
        f"error: what the processes compute together failed ({str(error).splitlines()[0]}); where "
        "another process ended, its log says why; the same command on all continues"
    )
