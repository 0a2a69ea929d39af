"""Jobs for SLURM: what is submitted, and what a real SLURM on this machine makes of it."""

import json
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from tests import runs

ROOT = runs.ROOT
NODES = ("127.0.0.1", "127.0.0.2")
FLAGS = ("--gpus_per_node=2", "--time=10")
PRETRAIN = "--config=configs/pretrain.py"
FINETUNE = "--config=configs/finetune.py"
# Two nodes on this machine; any two devices are GPUs to SLURM. cred_expire: SLURM starts a requeued
# job only after that many seconds.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={nodes[0]} NodeHostname={nodes[0]} NodeAddr={nodes[0]} Port={ports[1]} CPUs=8 Gres=gpu:2
NodeName={nodes[1]} NodeHostname={nodes[1]} NodeAddr={nodes[1]} Port={ports[2]} CPUs=8 Gres=gpu:2
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# In place of main: notes how it was started. At its first start it waits for a signal and exits
# as main does, and the next time it succeeds; or it ends at once with STATUS.
STAND_IN = """
import json, os, pathlib, signal, sys, time
import absl.flags
given = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
names = ("SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_PROCID", "SLURM_NTASKS",
         "SLURM_CPUS_PER_TASK", "CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS")
seen = {name: os.environ.get(name) for name in names}
interrupted = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: interrupted.append(1))
noted = pathlib.Path("starts." + os.environ["SLURM_JOB_ID"])
with noted.open("a") as file:
    file.write(json.dumps([given, seen]) + "\\n")
status = os.environ["STATUS"]
if status == "interrupted" and seen["SLURM_RESTART_COUNT"] is None:
    while not interrupted:
        time.sleep(0.1)
    sys.exit(int(given["preemption_status"]))
sys.exit(0 if status == "interrupted" else int(status))
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A SLURM of two nodes; yields the environment of its commands."""
    for daemon in ("slurmctld", "slurmd"):
        if not shutil.which(daemon):
            pytest.skip(f"{daemon} is not on PATH (apt-get install slurm-wlm)")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    sockets = [socket.socket() for _ in range(3)]
    for free in sockets:
        free.bind(("", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            folder=folder, host=socket.gethostname(), user=user, nodes=NODES, ports=ports
        )
    )
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    try:
        daemons = [["slurmctld"], *(["slurmd", "-N", node] for node in NODES)]
        for daemon in daemons:
            subprocess.run(daemon, check=True, env=environment, capture_output=True)
        until(
            lambda: command(environment, "sinfo", "--noheader", "--format=%T %D") == "idle 2\n", 60
        )
        yield environment
    finally:
        if command(environment, "squeue", "--noheader"):
            command(environment, "scancel", f"--user={user}")
            until(lambda: not command(environment, "squeue", "--noheader"), 60)
        for daemon in ("slurmctld", *NODES):
            pid = folder / f"{daemon}.pid"
            if pid.exists():
                os.kill(int(pid.read_text()), 15)


def command(environment: dict[str, str], *words: str) -> str:
    """What a command of SLURM prints."""
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def until(happened: Callable[[], object], seconds: float) -> None:
    """Waits."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


def show(environment: dict[str, str], job: str) -> dict[str, str]:
    """The fields of a job."""
    line = command(environment, "scontrol", "show", "job", "--oneliner", job)
    return dict(field.split("=", 1) for field in line.split() if "=" in field)


def wait_for_end(environment: dict[str, str], job: str, seconds: float = 60) -> dict[str, str]:
    """The fields of a job that has ended."""
    ended = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}
    until(lambda: show(environment, job)["JobState"] in ended, seconds)
    return show(environment, job)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the launcher, and the stand-in for main."""
    folder = tmp_path_factory.mktemp("a project")
    (folder / "cromss_jax").mkdir()
    names = ("__init__", "command_line", "files", "launch", "launch_slurm", "package", "sensors")
    for name in names:
        shutil.copy(ROOT / f"cromss_jax/{name}.py", folder / "cromss_jax")
    (folder / "cromss_jax/main.py").write_text(STAND_IN)
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


def launch(
    folder: pathlib.Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "cromss_jax.launch_slurm", *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


def submit(environment: dict[str, str], folder: pathlib.Path, *arguments: str) -> str:
    """The number of the job."""
    done = launch(folder, *arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.removeprefix("Submitted batch job ").strip()


def starts(folder: pathlib.Path, job: str) -> list[tuple[dict, dict]]:
    """How the stand-in was started in a job: its flags and environment."""
    path = folder / f"starts.{job}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_script(project):
    done = launch(
        project,
        *("--config=configs/finetune.py:task=dw,input=s1", "--config.init_from=it's {seed}"),
        *("--nodes=2", "--gpus_per_node=4", "--cpus_per_task=8", "--time=24:00:00"),
        *("--grace_seconds=300", "--workdir=runs/a run", "--dry_run"),
        *("--", "--account=earth", "--constraint=a100|h100"),
    )
    assert done.returncode == 0, done.stderr
    config = shlex.quote(f"--config={project}/configs/finetune.py:task=dw,input=s1")
    workdir = shlex.quote(f"--workdir={project}/runs/a run")
    init_from = shlex.quote("--config.init_from=it's {seed}")
    assert done.stdout == (
        "sbatch --account=earth '--constraint=a100|h100' <<'END_OF_SCRIPT'\n"
        "#!/bin/bash\n"
        "#SBATCH '--job-name=a run'\n"
        "#SBATCH --nodes=2\n"
        "#SBATCH --ntasks-per-node=4\n"
        "#SBATCH --gpus-per-node=4\n"
        "#SBATCH --cpus-per-task=8\n"
        "#SBATCH --time=24:00:00\n"
        "#SBATCH --signal=USR1@300\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --requeue\n"
        'srun --cpus-per-task="$SLURM_CPUS_PER_TASK" '
        f"{sys.executable} -m cromss_jax.main {config} {init_from} {workdir} "
        "--preemption_status=143\n"
        "status=$?\n"
        "if [ $status -eq 143 ]; then  # interrupted: it has saved, and continues from there\n"
        '  scontrol requeue "$SLURM_JOB_ID"\n'
        "fi\n"
        "exit $status\n"
        "END_OF_SCRIPT\n"
    )


def test_a_folder_with_a_colon(project, tmp_path):
    """Its jobs begin there, and read the configuration by its name within."""
    own = shutil.copytree(project, tmp_path / "a:b")
    done = launch(own, PRETRAIN, "--gpus_per_node=1", "--time=1", "--workdir=runs/a", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert " --config=configs/pretrain.py " in done.stdout


MISTAKES = (
    ([PRETRAIN, "--config.batch_sise=4"], 'Did you mean "batch_size"'),
    (["--config=configs/pretrian.py"], "--config=configs/pretrian.py: no such file"),
    ([PRETRAIN, "--nodes=3"], "config.batch_size is 128, but the batch must be divisible by the "
     "number of processes, 6: use a multiple of 6"),
    ([PRETRAIN, "--seeds=0,1"], "--seeds is for fine-tuning, and the configuration has no field "
     "seeds"),
    ([FINETUNE, "--seeds=0,1,1"], "must be different numbers from 0"),
    ([FINETUNE, "--seeds=0-2"], "--seeds=0-2 must be different numbers"),
    ([FINETUNE, "--seeds="], "--seeds= must be different numbers"),
    ([FINETUNE, "--seeds=0", "--config.seeds=(1,)"], "remove --config.seeds"),
    ([PRETRAIN, "--workdir=s3://bucket/run"], "s3:// is not supported"),
    ([PRETRAIN, "--partition=gpu"], "Unknown command line flag 'partition"),
    ([PRETRAIN, "gpu"], "gpu is not a flag: put options of sbatch after ` -- `"),
    ([PRETRAIN, "--gpus_per_node=-1"], "--gpus_per_node=-1"),
)  # fmt: skip


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES)
def test_mistakes_are_found_before_anything_is_submitted(project, arguments, sentence):
    # There is no sbatch at hand: that would be another sentence.
    done = launch(project, *FLAGS, "--workdir=runs/a", *arguments, environment={"PATH": ""})
    assert done.returncode == 1
    assert not done.stdout
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_slurm_it_says_so(project):
    done = launch(project, PRETRAIN, *FLAGS, "--workdir=runs/a", environment={"PATH": ""})
    assert (done.returncode, done.stderr) == (
        1,
        "error: sbatch, which submits the run, was not found: run this on a login node of the "
        "cluster\n",
    )


@pytest.mark.slow
def test_options_go_to_sbatch(slurm, project):
    arguments = (PRETRAIN, *FLAGS, "--workdir=runs/a", "--", "--test-only")
    done = launch(project, *arguments, environment=slurm)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr
    refused = launch(project, *arguments, "--constraint=h100", environment=slurm)
    assert refused.returncode == 1
    assert "Invalid feature specification" in refused.stderr


@pytest.mark.slow
def test_an_interrupted_job_is_requeued_with_the_same_command(slurm, project):
    environment = {**slurm, "STATUS": "interrupted"}
    value = """it's "{seed}" $HOME"""
    job = submit(
        environment,
        project,
        *(PRETRAIN, *FLAGS, "--nodes=2", "--workdir=runs/a run", f"--config.init_from={value}"),
    )
    until(lambda: len(starts(project, job)) == 4, 60)
    command(slurm, "scancel", "--signal=USR1", job)
    ended = wait_for_end(slurm, job)
    assert (ended["JobState"], ended["Restarts"], ended["Requeue"]) == ("COMPLETED", "1", "1")
    assert ended["Command"] == "(null)"  # the script is from standard input, no file of it is left
    first, second = starts(project, job)[:4], starts(project, job)[4:]
    for given, seen in first + second:
        assert given == {
            "config": f"{project}/configs/pretrain.py",
            "config.init_from": value,
            "workdir": f"{project}/runs/a run",
            "preemption_status": "143",
        }
        # JAX takes the GPU of its number on the node, so each process must see all of them.
        assert seen["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert (seen["SLURM_NTASKS"], seen["SLURM_CPUS_PER_TASK"]) == ("4", "3")
    for begun, restarts in ((first, None), (second, "1")):
        assert sorted(seen["SLURM_PROCID"] for _, seen in begun) == ["0", "1", "2", "3"]
        assert {seen["SLURM_RESTART_COUNT"] for _, seen in begun} == {restarts}


@pytest.mark.slow
def test_an_error_is_not_requeued(slurm, project):
    environment = {**slurm, "STATUS": "1"}
    arguments = (
        PRETRAIN,
        *FLAGS,
        "--gpus_per_node=0",
        "--workdir=runs/a",
        "--",
        "--cpus-per-task=2",
    )
    job = submit(environment, project, *arguments)
    ended = wait_for_end(slurm, job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0")
    ((_, seen),) = starts(project, job)
    assert (seen["JAX_PLATFORMS"], seen["CUDA_VISIBLE_DEVICES"]) == ("cpu", None)
    assert seen["SLURM_CPUS_PER_TASK"] == "2"  # of sbatch's own option, in the step too


@pytest.mark.slow
def test_a_cancelled_job_is_not_requeued(slurm, project):
    """Although its process gets SIGTERM, saves and exits as after any interruption."""
    environment = {**slurm, "STATUS": "interrupted"}
    job = submit(environment, project, PRETRAIN, *FLAGS, "--workdir=runs/a")
    until(lambda: len(starts(project, job)) == 2, 60)
    command(slurm, "scancel", job)
    until(lambda: not command(slurm, "squeue", "--noheader"), 60)
    ended = show(slurm, job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.slow
def test_each_seed_has_a_job_that_is_requeued_alone_and_a_last_one_scores_all(slurm, project):
    environment = {**slurm, "STATUS": "interrupted"}
    arguments = (FINETUNE, "--gpus_per_node=1", "--time=10", "--seeds=3,5")
    last = submit(environment, project, *arguments, "--workdir=runs/a")
    array = str(int(last) - 1)
    assert show(slurm, last)["Dependency"].startswith(f"afterok:{array}")
    for seed in ("3", "5"):  # the last of an array has the array's number: it must not requeue both
        task = f"{array}_{seed}"
        until(lambda task=task: starts(project, show(slurm, task)["JobId"]), 60)
        command(slurm, "scancel", "--signal=USR1", task)
        ended = wait_for_end(slurm, task)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
        given, again = (given for given, _ in starts(project, ended["JobId"]))
        assert given == again
        assert given["config.seeds"] == f"({seed},)"
    assert ended["JobId"] == array
    assert show(slurm, f"{array}_3")["Restarts"] == "1"
    until(lambda: starts(project, last), 60)
    ((given, seen),) = starts(project, last)[:1]
    assert (given["config.seeds"], seen["SLURM_ARRAY_TASK_ID"]) == ("(3, 5)", None)
    command(slurm, "scancel", last)


@pytest.mark.slow
def test_the_time_limit_interrupts(slurm, project):
    environment = {**slurm, "STATUS": "interrupted"}
    arguments = (FINETUNE, "--gpus_per_node=1", "--time=2", "--grace_seconds=30")
    job = submit(environment, project, *arguments, "--workdir=runs/a")
    ended = wait_for_end(slurm, job, 180)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")


def overrides(fields: dict[str, object]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in fields.items()]


def one_device_each(environment: dict[str, str]) -> dict[str, str]:
    """The same environment with one CPU device; the last of equal flags counts."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    return {**environment, "XLA_FLAGS": flags}


def run_alone(config: str, workdir: pathlib.Path, fields: dict[str, object]) -> None:
    """One process, without SLURM."""
    line = [*runs.command("cromss_jax.main", config=config, workdir=workdir), *overrides(fields)]
    environment = one_device_each(dict(os.environ))
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_nodes_train_as_one_process_and_an_interruption_changes_no_bit(slurm, tmp_path):
    fields = {
        **runs.tiny_flags(runs.make_data(tmp_path, locations=18, seasons=2, tile_size=48)),
        "num_devices": 0,
        "num_epochs": 8,
        "eval_every_epochs": 100,
        "log_every_steps": 1,
        "init_from": runs.make_start(tmp_path / "start"),
        "optimizer.learning_rate": 1e-3,
    }
    config = "configs/pretrain.py:sample"
    run_alone(config, tmp_path / "alone", fields)

    def submit_run(name: str) -> tuple[str, pathlib.Path]:
        log = tmp_path / f"{name}.log"
        flags = (f"--config={config}", f"--workdir={tmp_path / name}", *overrides(fields))
        resources = ("--nodes=2", "--gpus_per_node=0", "--time=60", "--", f"--output={log}")
        return submit(one_device_each(slurm), ROOT, *flags, *resources), log

    job, log = submit_run("whole")
    ended = wait_for_end(slurm, job, 600)
    assert (ended["JobState"], ended["NumNodes"], ended["Restarts"]) == ("COMPLETED", "2", "0")
    assert "process 0 of 2, with 1 of 2 devices" in log.read_text()
    losses = [
        np.array(
            [line["loss"] for line in runs.logged(tmp_path / name) if line["split"] == "train"]
        )
        for name in ("alone", "whole")
    ]
    assert losses[0].shape == (16,)
    # The samples are the same, sums over them have another order: 2e-7 was the largest difference.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)

    job, log = submit_run("interrupted")
    until(lambda: log.exists() and "step 3/" in log.read_text(), 300)
    command(slurm, "scancel", "--signal=USR1", job)
    ended = wait_for_end(slurm, job, 600)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    said = log.read_text()
    assert said.count("interrupted: saved step") == 1  # process 0 logs
    assert said.count("continuing from") == 1  # process 0
    assert runs.final_digest(tmp_path / "interrupted") == runs.final_digest(tmp_path / "whole")
    assert runs.logged(tmp_path / "interrupted") == runs.logged(tmp_path / "whole")


@pytest.mark.slow
def test_seeds_in_jobs_of_their_own_give_the_table_of_one_run(slurm, tmp_path):
    data = runs.make_data(tmp_path, "dfc2020", format="dfc2020", locations=16, tile_size=48)
    fields = {
        "network.depth": 10,
        "data.dir": data,
        "data.crop_size": 32,
        "batch_size": 4,
        "num_epochs": 2,
        "checkpoint_every_epochs": 1,
    }
    config = "configs/finetune.py:task=dfc2020,input=s1,encoder=trained,sample"
    run_alone(config, tmp_path / "alone", {**fields, "seeds": "(0, 1)"})
    last = submit(
        one_device_each(slurm),
        ROOT,
        *(f"--config={config}", f"--workdir={tmp_path / 'jobs'}", *overrides(fields)),
        *("--seeds=0,1", "--gpus_per_node=0", "--time=60", "--", "--output=/dev/null"),
    )
    assert wait_for_end(slurm, last, 600)["JobState"] == "COMPLETED"
    expected, found = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("alone", "jobs")
    )
    assert found == expected
    assert found["seeds"] == [0, 1]
    assert "| mean ± standard deviation |" in (tmp_path / "jobs/results.md").read_text()
