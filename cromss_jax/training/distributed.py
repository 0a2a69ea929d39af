"""Starting and ending JAX's multi-process runtime: on Cloud TPU, under SLURM, or by flags."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from cromss_jax import files, lock
from cromss_jax.errors import UserError
from cromss_jax.training import preemption

_log = logging.getLogger(__name__)

# The exit status after another process was lost. JAX's runtime uses it too, and tools that restart
# runs know it.
LOST_STATUS = 128 + signal.SIGABRT

# How long JAX waits for the other processes, at the start and for their heartbeats.
_START_SECONDS, _LOST_SECONDS = 300, 100
_LEAVE_SECONDS = 5


class DistributedError(UserError):
    """The processes cannot find each other."""


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether SLURM or a TPU slice started this process as one of several.

    Args:
      environment: `os.environ`. SLURM's `srun` sets task numbers; a slice on GKE sets host names.
    """
    by_slurm = "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1
    return by_slurm or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wanted: bool | None = None,
) -> bool:
    """Starts the multi-process runtime; must be called before any device is used.

    JAX ends a process by SIGABRT if it finds no coordinator, or if it waits for a process that was
    lost. The log messages announce these timeouts.

    Args:
      coordinator_address: "host:port" of process 0.
      num_processes: number of processes.
      process_id: number of this process, from 0. Give all three of these or none; without them JAX
        asks SLURM or Cloud TPU.
      wanted: True to start the runtime, False for a single process in any environment. None starts
        it if the three arguments are given or `is_one_of_several` is true.

    Returns:
      Whether the runtime was started.

    Raises:
      DistributedError: if the arguments cannot work or the processes do not find each other; the
        message is for the user.
    """
    given = (coordinator_address, num_processes, process_id)
    _check(*given, wanted)
    if wanted is None:
        wanted = None not in given or is_one_of_several(os.environ)
    if not wanted:
        return False
    _log.info("waiting up to %d s for all processes to start", _START_SECONDS)
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_LOST_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        remedy = f"{coordinator_address} must be the host of process 0 and a free port there"
        if None in given:
            remedy = "without SLURM or Cloud TPU, set --coordinator_address, --num_processes and "
            remedy += "--process_id for each process"
        reason = files.first_line(error)
        raise DistributedError(
            f"the processes did not find each other ({reason}): {remedy}"
        ) from error
    preemption.share_with_jax()
    _log.info(
        "process %d of %d, with %d of %d devices; process 0 writes the files. If a process is "
        "lost, the others end within %d s",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
        _LOST_SECONDS,
    )
    if jax.process_index() > 0:  # all processes would log the same
        logging.getLogger("cromss_jax").setLevel(logging.WARNING)
    return True


def _check(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    wanted: bool | None,
) -> None:
    """Raises DistributedError for arguments of `initialize` that cannot work."""
    given = (coordinator_address, num_processes, process_id)
    if all(x is None for x in given):
        return
    if None in given:
        raise DistributedError(
            "some of --coordinator_address, --num_processes and --process_id are missing: set all "
            "three, or none under SLURM or Cloud TPU"
        )
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdecimal():
        raise DistributedError(
            f"--coordinator_address is {coordinator_address}: it must be HOST:PORT of process 0, "
            "such as 10.0.0.1:1234"
        )
    if process_id >= num_processes:
        raise DistributedError(
            f"--process_id is {process_id} and --num_processes is {num_processes}: processes are "
            f"numbered from 0 to {num_processes - 1}"
        )
    if wanted is False:
        raise DistributedError(
            "--nodistributed is for a single process: remove --coordinator_address, "
            "--num_processes and --process_id"
        )


def of_process_0(*found: bool) -> tuple[bool, ...]:
    """What process 0 found."""
    if jax.process_count() == 1:
        return found
    return tuple(map(bool, multihost_utils.broadcast_one_to_all(np.array(found))))


@contextlib.contextmanager
def only_writer(folder: epath.Path) -> Iterator[None]:
    """Holds the lock of a run's folder, in process 0.

    Raises:
      lock.LockedError, DistributedError: in all processes, if another run writes there.
    """
    with contextlib.ExitStack() as holding:
        problem = None
        if jax.process_index() == 0:
            try:
                holding.enter_context(lock.held(folder / lock.NAME))
            except OSError as error:
                problem = error
        (is_locked,) = of_process_0(problem is not None)
        if is_locked:
            raise problem or DistributedError("process 0 cannot write the workdir, see its log")
        yield


def leave(sentence: str, status: int) -> NoReturn:
    """Ends the command early: prints the reason and waits only briefly for the other processes.

    It waits for no thread: Orbax has some that wait for minutes after an error.

    Args:
      sentence: the reason, a message for the user.
      status: exit status.
    """
    with contextlib.suppress(OSError):  # the terminal may be closed
        sys.stdout.flush()
        print(sentence, file=sys.stderr, flush=True)
    if not jax.distributed.is_initialized():
        os._exit(status)
    # JAX would wait up to 300 s for processes that have ended or that are waiting for this one. If
    # all processes end for the same reason, the shutdown succeeds at once.
    shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    shutdown.start()
    shutdown.join(_LEAVE_SECONDS)
    os._exit(status)


def lost(error: jax.errors.JaxRuntimeError) -> str:
    """The message for a device failure with several processes."""
    return (
        f"error: the joint computation of the processes failed ({files.first_line(error)}): if "
        "another process ended, its log has the reason; run the same command on all hosts to "
        "continue"
    )
