"""Submits a run to a Cloud TPU slice, by xpk on GKE or by queued resources.

    python -m cromss_jax.launch_tpu --name=mid --cluster=CLUSTER --tpu_type=v5e:4x4 \
        --config=configs/pretrain.py --workdir=gs://BUCKET/mid --data_dir=gs://BUCKET/data

`--config` and `--config.x=y` are the flags of `cromss_jax.main`. They are parsed here first, so a
typo is found before a slice is requested. Arguments after ` -- ` are passed on to xpk or gcloud.
Every host of the slice runs main in a container. It first installs the locked dependencies, unless
the image contains them. Hosts get the last commit, not the working tree.
`--dry_run` prints all commands; with `-- --dry-run`, xpk itself prints the JobSet.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from absl import app, flags

from cromss_jax import command_line, launch, package
from cromss_jax.errors import UserError
from cromss_jax.launch import LaunchError

_ROOT = package.ROOT
_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "gs:// folder for checkpoints, logs and results")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "gs:// folder of the records; sets config.data.dir"
)
_BACKEND = flags.DEFINE_enum(
    "backend",
    "xpk",
    ("xpk", "queued_resources"),
    "xpk needs a GKE cluster; queued_resources needs only gcloud",
)
_NAME = flags.DEFINE_string("name", None, "Name of the workload or of the queued resource")
_TPU_TYPE = flags.DEFINE_string(
    "tpu_type",
    None,
    "A slice of v4, v5e, v5p or v6e, such as v5e:4x4, or the tool's own name for a slice",
)
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Number of slices", lower_bound=1)
_CLUSTER = flags.DEFINE_string("cluster", None, "xpk: name of the GKE cluster")
_PROJECT = flags.DEFINE_string("project", None, "Cloud project; default: gcloud's")
_ZONE = flags.DEFINE_string("zone", None, "Zone of the slice; default: gcloud's")
_MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts", 10, "How often the run may restart after a preemption", lower_bound=0
)
_GRACE_SECONDS = flags.DEFINE_integer(
    "grace_seconds",
    300,
    "Seconds from SIGTERM to the kill, in which a checkpoint is written",
    lower_bound=0,
)
_IMAGE = flags.DEFINE_string(
    "image", None, "Docker image with this source tree installed in its working directory"
)
_RUNTIME_VERSION = flags.DEFINE_string(
    "runtime_version",
    None,
    "queued_resources: software version of the TPU VM; default: the usual one for the slice",
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands without running them")

# The base image of hosts if --image is not given. libtpu's wheels need glibc 2.31 or newer.
_BASE_IMAGE = "python:3.12-slim"
_ARCHIVE = "source.tar.gz"
# One line, because xpk pastes it into YAML. The lock file pins jax; jax[tpu] pins libtpu.
_INSTALL = (
    f"tar -xzf {_ARCHIVE} && pip install -q uv==0.13.9 && "
    "uv pip install -q --system -r requirements.lock 'jax[tpu]' && "
    "uv pip install -q --system --no-deps . && "
)
# By TPU generation: the tools' name; the cores per chip by which the tools count (TensorCores for
# v4 and v5p, else chips); the TPU VM's software (cloud.google.com/tpu/docs/runtimes).
_GENERATIONS = {
    "v4": ("v4", 2, "tpu-ubuntu2204-base"),
    "v5e": ("v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", 2, "v2-alpha-tpuv5"),
    "v6e": ("v6e", 1, "v2-alpha-tpuv6e"),
}
_TOOLS = {
    "xpk": ("xpk", "install it separately from this project, such as by `pipx install xpk`"),
    "queued_resources": ("gcloud", "install the Google Cloud CLI (cloud.google.com/sdk)"),
}

# Runs as root on every host at every boot. It restarts a run in the same cases as xpk: main exits
# with 143 after SIGTERM, JAX aborts with 134 if another host is lost. After a user error (1) it
# does not restart.
_STARTUP = """\
#!/bin/bash
set -eu
mkdir -p /var/cromss_jax
cd /var/cromss_jax
{prepare}
for attempt in $(seq 0 {max_restarts}); do
  docker rm --force cromss_jax >/dev/null 2>&1 || true
  status=0
  docker run --name=cromss_jax --init --privileged --net=host --stop-timeout={grace_seconds} \\
    {mounts}{image} bash -c {command} || status=$?
  echo "cromss_jax: attempt $attempt ended with status $status"
  [ $status -eq 42 ] || [ $status -ge 127 ] || exit $status
  sleep 10
done
exit $status
"""

_NO_CHECKOUT = (
    f"{_ROOT} is not a git checkout, and hosts get a commit: launch from a checkout, or set "
    "--image to an image that contains the project"
)


def _tool_names(tpu_type: str) -> tuple[str, str]:
    """The names of a slice in xpk and in gcloud: v5litepod-4x4 and v5litepod-16 for v5e:4x4."""
    generation, colon, topology = tpu_type.partition(":")
    if not colon:
        return tpu_type, tpu_type
    if generation not in _GENERATIONS or not re.fullmatch(r"\d+(x\d+){1,2}", topology):
        raise LaunchError(
            f"--tpu_type={tpu_type} is not a slice; use one of {', '.join(_GENERATIONS)} and its "
            "shape, such as v5e:4x4 or v5p:2x2x1"
        )
    name, cores, _ = _GENERATIONS[generation]
    for side in topology.split("x"):
        cores *= int(side)
    return f"{name}-{topology}", f"{name}-{cores}"


def _runtime_version(accelerator: str) -> str:
    """The software version of the TPU VM: --runtime_version, or the usual one for the slice."""
    if _RUNTIME_VERSION.value:
        return _RUNTIME_VERSION.value
    for name, _, version in _GENERATIONS.values():
        if accelerator.startswith(f"{name}-"):
            return version
    raise LaunchError(
        f"the software version for --tpu_type={_TPU_TYPE.value} is not known: set "
        "--runtime_version (`gcloud compute tpus versions list` shows the versions)"
    )


def _configuration() -> tuple[str, str]:
    """The configuration's file within the source tree, which hosts get, and its variants."""
    file, variants = launch.config_file()
    inside = os.path.relpath(file, _ROOT)
    if inside.startswith(".."):
        raise LaunchError(
            f"--config={file} is outside of {_ROOT}, and hosts get only that folder: move the "
            "file into configs of the git checkout that you launch from"
        )
    return inside, variants


def _main_command() -> str:
    """The command that every host runs: main, with the configuration's flags and gs:// paths."""
    config, variants = _configuration()
    overrides = launch.config_overrides()
    if "data.dir" in overrides:
        raise LaunchError("--config.data.dir is set by --data_dir here: remove --config.data.dir")
    folders = {"workdir": _WORKDIR.value, "data_dir": _DATA_DIR.value}
    if init_from := _CONFIG.value.get("init_from"):
        folders["config.init_from"] = init_from
    for name, folder in folders.items():
        if not folder.startswith("gs://"):
            raise LaunchError(
                f"--{name}={folder} is not in a gs:// bucket, and the hosts of a slice cannot "
                "read it: use gs://BUCKET/PATH (`gcloud storage cp -r` copies files there)"
            )
    arguments = {
        "config": config + variants,
        **{f"config.{name}": value for name, value in overrides.items()},
        "config.data.dir": _DATA_DIR.value,
        "workdir": _WORKDIR.value,
        "distributed": True,
        "preemption_status": launch.INTERRUPTED_STATUS,
    }
    # exec, so that SIGTERM reaches Python, which then saves a checkpoint.
    command = f"exec python -m cromss_jax.main {launch.main_flags(arguments)}"
    if "\n" in command:
        raise LaunchError(
            "the value of a --config.x=y flag contains a line break, and xpk accepts only a single "
            "line: remove the line break"
        )
    return command


def _git(*arguments: str) -> str:
    """Runs git in the source tree and returns its output."""
    try:
        return subprocess.run(
            ["git", "-C", _ROOT, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise LaunchError(_NO_CHECKOUT) from error


def _commit() -> str:
    """The commit that hosts get.

    Raises:
      LaunchError: if the working tree has changes that are not committed, or if the configuration
        is in no commit.
    """
    if package.IS_INSTALLED:  # even if it is installed inside another repository
        raise LaunchError(_NO_CHECKOUT)
    config, _ = _configuration()
    sources = ("cromss_jax", "configs", "pyproject.toml", "requirements.lock", config)
    if changed := _git("status", "--porcelain", "--", *sources):
        raise LaunchError(
            f"hosts get the last commit, and {changed.splitlines()[0].split()[-1]} has changes "
            "that are not committed: commit them first, or set --image"
        )
    if not _git("ls-tree", "HEAD", "--", config):  # git was told to ignore it
        raise LaunchError(
            f"hosts get the last commit, and {config} is not in it: commit it first, or set --image"
        )
    return _git("rev-parse", "HEAD")


def _startup_script(command: str, archive: str = "") -> str:
    """The script that a host runs at boot.

    Args:
      command: command that the container runs.
      archive: gs:// path of the source tree; empty if the image contains it.
    """
    if archive:
        prepare = f"gcloud storage cp {shlex.quote(archive)} {_ARCHIVE}"
        mounts = "--volume=/var/cromss_jax:/app --workdir=/app "
    else:
        registry = _IMAGE.value.partition("/")[0]
        prepare = f"gcloud auth configure-docker --quiet {shlex.quote(registry)}"
        mounts = ""
    return _STARTUP.format(
        prepare=prepare,
        mounts=mounts,
        max_restarts=_MAX_RESTARTS.value,
        grace_seconds=_GRACE_SECONDS.value,
        image=shlex.quote(_IMAGE.value or _BASE_IMAGE),
        command=shlex.quote(command),
    )


def submission(options: Sequence[str]) -> str:
    """The shell script that submits the run; it must be started in an empty folder.

    Args:
      options: further options for xpk or gcloud.

    Raises:
      LaunchError: if the flags cannot work.
    """
    launch.check_further_options(options, "xpk or gcloud", "--spot")
    xpk_type, accelerator = _tool_names(_TPU_TYPE.value)
    command = _main_command()
    archiving = []
    if not _IMAGE.value:
        command = _INSTALL + command
        commit = _commit()
        archive = ["git", "-C", str(_ROOT), "archive", "--format=tar.gz", commit]
        archiving.append(f"{shlex.join(archive)} > {_ARCHIVE}")
    lines = ["set -eu", f"# In a container of every host: {command}", *archiving]
    common = launch.options(project=_PROJECT.value, zone=_ZONE.value)
    if _BACKEND.value == "xpk":
        if not _CLUSTER.value:
            raise LaunchError(
                "--cluster is missing, and xpk needs a GKE cluster: set it, or use "
                "--backend=queued_resources without GKE"
            )
        submit = ["xpk", "workload", "create", f"--cluster={_CLUSTER.value}"]
        submit += launch.options(
            workload=_NAME.value, tpu_type=xpk_type, num_slices=_NUM_SLICES.value
        )
        submit += common
        submit += launch.options(
            max_restarts=_MAX_RESTARTS.value,
            termination_grace_period_seconds=_GRACE_SECONDS.value,
            docker_image=_IMAGE.value,
        )
        if not _IMAGE.value:  # xpk builds an image with the contents of the folder
            submit += launch.options(base_docker_image=_BASE_IMAGE, script_dir=".")
        submit.append(f"--command={command}")
    else:
        if _IMAGE.value:
            script = _startup_script(command)
        else:
            uploaded = f"{_WORKDIR.value.rstrip('/')}/source/{commit}.tar.gz"
            lines.append(shlex.join(["gcloud", "storage", "cp", _ARCHIVE, uploaded]))
            script = _startup_script(command, uploaded)
        lines.append(f"cat > startup.sh <<'END_OF_STARTUP'\n{script}END_OF_STARTUP")
        submit = ["gcloud", "compute", "tpus", "queued-resources", "create", _NAME.value]
        if _NUM_SLICES.value == 1:
            submit += launch.options(node_id=_NAME.value)
        else:
            submit += launch.options(node_count=_NUM_SLICES.value, node_prefix=_NAME.value)
        submit += launch.options(
            accelerator_type=accelerator, runtime_version=_runtime_version(accelerator)
        )
        submit += common
        submit.append("--metadata-from-file=startup-script=startup.sh")
    lines.append(shlex.join([*submit, *options]))
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Submits or prints. Errors that the user can fix are printed as one sentence, exit code 1."""
    try:
        script = submission(arguments[1:])
        if _DRY_RUN.value:
            print(f"# In an empty folder:\n{script}", end="")
            return
        launch.check_tool(*_TOOLS[_BACKEND.value])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(subprocess.run(["bash", "-c", script], cwd=folder).returncode)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir", "data_dir", "name", "tpu_type"])
    app.run(main, flags_parser=command_line.parse)
