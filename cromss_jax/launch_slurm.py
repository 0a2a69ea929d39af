"""Submits a run to a SLURM cluster, which starts it again after its time limit.

    python -m cromss_jax.launch_slurm --nodes=2 --gpus_per_node=4 --time=24:00:00 \
        --config=configs/pretrain.py --workdir=runs/mid -- --account=ACCOUNT --partition=gpu

Run it on a login node, in the folder and the virtual environment that the run needs: jobs start in
the same folder with the same Python, and both must be on a disk that the nodes share. `--config`
and `--config.x=y` are the flags of `cromss_jax.main`. They are parsed here first, so a typo is
found before the job waits in the queue. Arguments after ` -- ` are passed on to sbatch.

`--seeds=0,1,2` submits one job per seed of a fine-tuning run, as a job array. Another job, which
SLURM starts when they have finished, scores all seeds and writes the table.

`--dry_run` prints the shell script that submits.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

from absl import app, flags

from cromss_jax import command_line, files, launch
from cromss_jax.errors import UserError
from cromss_jax.launch import LaunchError

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, logs and results")
_NODES = flags.DEFINE_integer("nodes", 1, "Number of nodes", lower_bound=1)
_GPUS_PER_NODE = flags.DEFINE_integer(
    "gpus_per_node", None, "GPUs of each node; 0: CPUs only", lower_bound=0
)
_CPUS_PER_TASK = flags.DEFINE_integer(
    "cpus_per_task",
    None,
    "CPU cores for each GPU, or for each node without GPUs; default: config.data.num_threads + 1",
    lower_bound=1,
)
_TIME = flags.DEFINE_string(
    "time", None, "Time limit of the job as in sbatch, such as 24:00:00; then it is requeued"
)
_GRACE_SECONDS = flags.DEFINE_integer(
    "grace_seconds",
    120,
    "Seconds before the time limit at which the run is interrupted and saves a checkpoint",
    lower_bound=1,
)
_SEEDS = flags.DEFINE_list("seeds", None, "Fine-tuning: one job per seed, such as 0,1,2")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the script that submits, without running it")

# One process per GPU, because JAX under SLURM gives each process the GPU of its number on the node
# (jax/_src/clusters/slurm_cluster.py): a single process per node would use the first GPU only. Each
# process must see all GPUs that the job has on the node to find its own, as it does unless they are
# bound to processes (--gpu-bind, --gpus-per-task).
#
# The signal is sent to the processes of srun and not to this script, which B:USR1 would do. main
# then saves a checkpoint and exits with INTERRUPTED_STATUS. No other status is requeued: the same
# error would come again. When a node fails, SLURM requeues the job by itself, because of --requeue.
_SCRIPT = """\
#!/bin/bash
{directives}
{environment}srun --cpus-per-task="$SLURM_CPUS_PER_TASK" {command}
status=$?
if [ $status -eq {interrupted} ]; then  # interrupted: it has saved, and continues from there
  scontrol requeue "{job}"
fi
exit $status
"""


def _script(array: Sequence[int] = (), seeds: Sequence[int] = ()) -> str:
    """The batch script.

    Args:
      array: seeds that have a job each, the jobs of an array.
      seeds: seeds of a single job; empty leaves them to the configuration.
    """
    workdir = files.absolute(_WORKDIR.value)
    directives = launch.options(
        job_name=workdir.name,
        nodes=_NODES.value,
        ntasks_per_node=max(_GPUS_PER_NODE.value, 1),
        gpus_per_node=_GPUS_PER_NODE.value or None,
        cpus_per_task=_CPUS_PER_TASK.value or _CONFIG.value.data.num_threads + 1,
        time=_TIME.value,
        signal=f"USR1@{_GRACE_SECONDS.value}",
        array=",".join(map(str, array)) or None,
        open_mode="append",  # of the log, which a requeued job would overwrite
    )
    directives.append("--requeue")
    file, variants = launch.config_file()
    path = str(file.absolute())
    if ":" in path:  # which would end the name of the file; jobs start in this folder
        path = os.path.relpath(file)
    arguments = {
        "config": f"{path}{variants}",
        **{f"config.{name}": value for name, value in launch.config_overrides().items()},
        "workdir": workdir,
        "preemption_status": launch.INTERRUPTED_STATUS,
    }
    if seeds:
        arguments["config.seeds"] = tuple(seeds)
    command = f"{shlex.quote(sys.executable)} -m cromss_jax.main {launch.main_flags(arguments)}"
    job = "$SLURM_JOB_ID"
    if array:
        command += ' "--config.seeds=($SLURM_ARRAY_TASK_ID,)"'
        # The SLURM_JOB_ID of one job of an array is also the number of the whole array.
        job = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {shlex.quote(directive)}" for directive in directives),
        environment="" if _GPUS_PER_NODE.value else "export JAX_PLATFORMS=cpu\n",
        command=command,
        interrupted=launch.INTERRUPTED_STATUS,
        job=job,
    )


def _seeds() -> list[int]:
    """The seeds of the job array; empty without --seeds.

    Raises:
      LaunchError: if they are no seeds, or if the configuration has none.
    """
    if _SEEDS.value is None:
        return []
    if "seeds" not in _CONFIG.value:
        raise LaunchError(
            "--seeds is for fine-tuning, and the configuration has no field seeds: remove --seeds"
        )
    if "seeds" in launch.config_overrides():
        raise LaunchError("config.seeds is set by --seeds here: remove --config.seeds")
    seeds = [int(seed) for seed in _SEEDS.value if seed.isdecimal()]
    if not seeds or len(set(seeds)) < len(_SEEDS.value):
        raise LaunchError(
            f"--seeds={','.join(_SEEDS.value)} must be different numbers from 0, separated by "
            "commas, such as --seeds=0,1,2"
        )
    return seeds


def submission(options: Sequence[str]) -> str:
    """The shell script that submits the run.

    Args:
      options: further options for sbatch.

    Raises:
      LaunchError: if the flags cannot work.
    """
    launch.check_further_options(options, "sbatch", "--account=ACCOUNT")
    num_processes = _NODES.value * max(_GPUS_PER_NODE.value, 1)  # each has one device
    if _CONFIG.value.batch_size % num_processes:
        raise LaunchError(
            f"config.batch_size is {_CONFIG.value.batch_size}, but the batch must be divisible by "
            f"the number of processes, {num_processes}: use a multiple of {num_processes}, or "
            "other --nodes and --gpus_per_node"
        )
    sbatch = shlex.join(["sbatch", *options])
    seeds = _seeds()
    here = "<<'END_OF_SCRIPT'"
    if not seeds:
        return f"{sbatch} {here}\n{_script()}END_OF_SCRIPT\n"
    return (
        "set -e\n"
        f"seeds=$({sbatch} --parsable {here}\n{_script(array=seeds)}END_OF_SCRIPT\n)\n"
        "# When all seeds have finished: scores them and writes the table.\n"
        f"{sbatch} --dependency=afterok:${{seeds%%;*}} --kill-on-invalid-dep=yes {here}\n"
        f"{_script(seeds=seeds)}END_OF_SCRIPT\n"
    )


def main(arguments: list[str]) -> None:
    """Submits or prints. Errors that the user can fix are printed as one sentence, exit code 1."""
    try:
        script = submission(arguments[1:])
        if _DRY_RUN.value:
            print(script, end="")
            return
        launch.check_tool("sbatch", "run this on a login node of the cluster")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(subprocess.run(["bash", "-c", script]).returncode)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir", "gpus_per_node", "time"])
    app.run(main, flags_parser=command_line.parse)
