"""Command line: `python -m cromss_jax.main --config=configs/pretrain.py --workdir=DIR`."""

import contextlib
import gc
import logging
import sys

from absl import app, flags

from cromss_jax import command_line
from cromss_jax.errors import UserError
from cromss_jax.training import preemption

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, logs and results")
_PREEMPTION_STATUS = command_line.define_preemption_status()
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", None, "One of several processes; found out by itself under SLURM and on GKE"
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which this is, from 0", lower_bound=0)


def main(arguments: list[str]) -> None:
    """Runs the configuration; a sentence and exit code 1 for what the user can mend."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    command_line.log_progress()
    command_line.quieten_orbax()
    # Imported here, as signals are noticed by now.
    import jax

    from cromss_jax import files
    from cromss_jax.training import (
        devices,
        distributed,
        finetune,
        memory,
        pretrain,
        run,
        scoring,
        settings,
    )

    memory.keep_freed_memory()
    gc.freeze()  # modules stay: collections while tracing need not go through them
    try:
        workdir = str(files.absolute(_WORKDIR.value))
        settings.use_default_numbers()
        settings.keep_compiled(workdir)
        distributed.initialize(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value
        )
        devices.check()
        modes = {"pretrain": pretrain.pretrain, "finetune": finetune.finetune}
        modes["evaluate"] = scoring.evaluate
        if _CONFIG.value.mode not in modes:
            raise run.ConfigError(
                f"config.mode is {_CONFIG.value.mode!r}; choose from {', '.join(modes)}"
            )
        with contextlib.ExitStack() as holding:
            if _CONFIG.value.mode != "finetune":  # which locks its seeds: jobs may share them out
                holding.enter_context(distributed.only_writer(files.absolute(workdir)))
            modes[_CONFIG.value.mode](_CONFIG.value, workdir)
    except preemption.Preempted as interruption:
        logging.getLogger("cromss_jax").info("%s", interruption)
        sys.exit(_PREEMPTION_STATUS.value)
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        distributed.leave(distributed.lost(error), distributed.LOST_STATUS)
    except (UserError, OSError) as error:
        distributed.leave(f"error: {error}", 1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    preemption.watch(command_line.find_preemption_status)
    app.run(main, flags_parser=command_line.parse)
