"""Submits a run to a Cloud TPU slice, through xpk on GKE or through queued resources.

    python -m cromss_jax.launch_tpu --name=mid --cluster=CLUSTER --tpu_type=v5e:4x4 \
        --config=configs/pretrain.py --workdir=gs://BUCKET/mid --data_dir=gs://BUCKET/data

`--config` and `--config.x=y` are those of `cromss_jax.main` and are read here first, so that a typo
is found before anything is asked for. What stands behind ` -- ` goes to xpk or gcloud as it is.
Every host of the slice runs main in a container and installs the locked dependencies before, unless
the image holds them. Hosts get the last commit, not the working tree.
`--dry_run` prints all of it; `-- --dry-run` has xpk itself print the JobSet.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from cromss_jax import command_line, package

_ROOT = package.ROOT
_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "gs:// folder of checkpoints, logs and results")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "gs:// folder of the records: config.data.dir")
_BACKEND = flags.DEFINE_enum(
    "backend", "xpk", ("xpk", "queued_resources"), "xpk needs a GKE cluster; the other only gcloud"
)
_NAME = flags.DEFINE_string("name", None, "Of the workload, or of the queued resource")
_TPU_TYPE = flags.DEFINE_string(
    "tpu_type", None, "A slice, as v5e:4x4 (v4, v5e, v5p, v6e) or in the tool's own words"
)
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices of that type", lower_bound=1)
_CLUSTER = flags.DEFINE_string("cluster", None, "xpk: the GKE cluster")
_PROJECT = flags.DEFINE_string("project", None, "Cloud project; gcloud's default unless given")
_ZONE = flags.DEFINE_string("zone", None, "Zone of the slice; gcloud's default unless given")
_MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts", 10, "How often the run may start again after a preemption", lower_bound=0
)
_GRACE_SECONDS = flags.DEFINE_integer(
    "grace_seconds", 300, "Between SIGTERM and the end: time for a checkpoint", lower_bound=0
)
_IMAGE = flags.DEFINE_string(
    "image", None, "Docker image whose working directory is this source tree, installed"
)
_RUNTIME_VERSION = flags.DEFINE_string(
    "runtime_version", None, "queued_resources: software of the TPU VM; by the slice unless given"
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be run, and run nothing")

# What a host without an image of ours starts from. libtpu's wheels need glibc 2.31 or newer.
_BASE_IMAGE = "python:3.12-slim"
_ARCHIVE = "source.tar.gz"
# One line, as xpk pastes it into YAML. The lock file pins jax, and jax[tpu] the libtpu it fits.
_INSTALL = (
    f"tar -xzf {_ARCHIVE} && pip install -q uv==0.13.9 && "
    "uv pip install -q --system -r requirements.lock 'jax[tpu]' && "
    "uv pip install -q --system --no-deps . && "
)
# By the name before the colon: the tools' name, TensorCores a chip (which the tools count in names
# of v4 and v5p), and the software of a TPU VM (cloud.google.com/tpu/docs/runtimes).
_GENERATIONS = {
    "v4": ("v4", 2, "tpu-ubuntu2204-base"),
    "v5e": ("v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", 2, "v2-alpha-tpuv5"),
    "v6e": ("v6e", 1, "v2-alpha-tpuv6e"),
}
_TOOLS = {
    "xpk": ("xpk", "install it apart from this project, as by `pipx install xpk`"),
    "queued_resources": ("gcloud", "install the Google Cloud CLI (cloud.google.com/sdk)"),
}

# Runs as root on every host, at every boot. Starts again what xpk would: main leaves with 143 when
# told to stop, JAX aborts with 134 when another host is lost; a mistake of the user's (1) stays.
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
    f"{_ROOT} is no git checkout, from which hosts get a commit; launch from one, or name an "
    "--image that holds the project"
)


class LaunchError(ValueError):
    """The run cannot be submitted so."""


def _tool_names(tpu_type: str) -> tuple[str, str]:
    """A slice as xpk and as gcloud call it: v5litepod-4x4 and v5litepod-16 for v5e:4x4."""
    generation, colon, topology = tpu_type.partition(":")
    if not colon:
        return tpu_type, tpu_type
    if generation not in _GENERATIONS or not re.fullmatch(r"\d+(x\d+){1,2}", topology):
        raise LaunchError(
            f"--tpu_type={tpu_type} is no slice; it is one of {', '.join(_GENERATIONS)} and a "
            "topology, as in v5e:4x4 or v5p:2x2x1"
        )
    name, cores, _ = _GENERATIONS[generation]
    for side in topology.split("x"):
        cores *= int(side)
    return f"{name}-{topology}", f"{name}-{cores}"


def _runtime_version(accelerator: str) -> str:
    """The software of a TPU VM, of --runtime_version or what is usual."""
    if _RUNTIME_VERSION.value:
        return _RUNTIME_VERSION.value
    for name, _, version in _GENERATIONS.values():
        if accelerator.startswith(f"{name}-"):
            return version
    raise LaunchError(
        f"--tpu_type={_TPU_TYPE.value} has no usual software; name it by --runtime_version "
        "(gcloud compute tpus versions list)"
    )


def _main_command() -> str:
    """What every host runs in the end: main, with the configuration's flags and gs:// paths."""
    path, colon, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    if "data.dir" in overrides:
        raise LaunchError("config.data.dir is what --data_dir says here; leave the first out")
    folders = {"workdir": _WORKDIR.value, "data_dir": _DATA_DIR.value}
    if init_from := _CONFIG.value.get("init_from"):
        folders["config.init_from"] = init_from
    for name, folder in folders.items():
        if not folder.startswith("gs://"):
            raise LaunchError(
                f"--{name}={folder} lies in no gs:// bucket, and the hosts of a slice see nothing "
                "else; name a folder as gs://BUCKET/PATH (gcloud storage cp -r takes files there)"
            )
    inside = os.path.relpath(command_line.find_config(path), _ROOT)
    if inside.startswith(".."):
        raise LaunchError(
            f"--config={path} lies outside of {_ROOT}, which is all that hosts get; "
            "move it into configs of the git checkout that you launch from"
        )
    arguments = {
        "config": inside + colon + variant,
        **{f"config.{name}": value for name, value in overrides.items()},
        "config.data.dir": _DATA_DIR.value,
        "workdir": _WORKDIR.value,
        "distributed": True,
        # So that what was told to stop is started again.
        "preemption_status": 128 + signal.SIGTERM,
    }
    # exec, so that SIGTERM reaches Python, which then saves.
    command = "exec python -m cromss_jax.main " + shlex.join(
        f"--{name}={value}" for name, value in arguments.items()
    )
    if "\n" in command:
        raise LaunchError("a value of --config.x=y holds a line break; xpk takes a single line")
    return command


def _git(*arguments: str) -> str:
    """What git prints about the source tree."""
    try:
        return subprocess.run(
            ["git", "-C", _ROOT, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise LaunchError(_NO_CHECKOUT) from error


def _commit() -> str:
    """The commit that hosts get.

    Raises:
      LaunchError: if what would run here is not what is committed.
    """
    if package.IS_INSTALLED:  # whatever repository may lie around it
        raise LaunchError(_NO_CHECKOUT)
    sources = ("cromss_jax", "configs", "pyproject.toml", "requirements.lock")
    if changed := _git("status", "--porcelain", "--", *sources):
        raise LaunchError(
            f"hosts get the last commit, and {changed.splitlines()[0].split()[-1]} is not as "
            "committed; commit it first, or name an --image"
        )
    return _git("rev-parse", "HEAD")


def _given(**options) -> list[str]:
    """Options of a tool, without those that have no value."""
    return [
        f"--{name.replace('_', '-')}={value}"
        for name, value in options.items()
        if value is not None
    ]


def _startup_script(command: str, archive: str = "") -> str:
    """What a host runs when it boots.

    Args:
      command: what the container runs.
      archive: gs:// path of the source tree; unless an image holds it.
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
    """The shell script that submits the run; it wants to start in an empty folder.

    Args:
      options: further options of xpk or gcloud.

    Raises:
      LaunchError: for flags that cannot work.
    """
    if options and not options[0].startswith("-"):
        raise LaunchError(
            f"{options[0]} is no flag; options of the tool stand behind ` -- `, as in -- --spot"
        )
    xpk_type, accelerator = _tool_names(_TPU_TYPE.value)
    command = _main_command()
    archiving = []
    if not _IMAGE.value:
        command = _INSTALL + command
        commit = _commit()
        archive = ["git", "-C", str(_ROOT), "archive", "--format=tar.gz", commit]
        archiving.append(f"{shlex.join(archive)} > {_ARCHIVE}")
    lines = ["set -eu", f"# In a container of every host: {command}", *archiving]
    common = _given(project=_PROJECT.value, zone=_ZONE.value)
    if _BACKEND.value == "xpk":
        if not _CLUSTER.value:
            raise LaunchError(
                "xpk needs a GKE cluster: name it by --cluster, or without GKE use "
                "--backend=queued_resources"
            )
        submit = ["xpk", "workload", "create", f"--cluster={_CLUSTER.value}"]
        submit += _given(workload=_NAME.value, tpu_type=xpk_type, num_slices=_NUM_SLICES.value)
        submit += common
        submit += _given(
            max_restarts=_MAX_RESTARTS.value,
            termination_grace_period_seconds=_GRACE_SECONDS.value,
            docker_image=_IMAGE.value,
        )
        if not _IMAGE.value:  # xpk puts the folder into an image of its own
            submit += _given(base_docker_image=_BASE_IMAGE, script_dir=".")
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
            submit += _given(node_id=_NAME.value)
        else:
            submit += _given(node_count=_NUM_SLICES.value, node_prefix=_NAME.value)
        submit += _given(
            accelerator_type=accelerator, runtime_version=_runtime_version(accelerator)
        )
        submit += common
        submit.append("--metadata-from-file=startup-script=startup.sh")
    lines.append(shlex.join([*submit, *options]))
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Submits or prints; a sentence and exit code 1 for what the user can mend."""
    try:
        script = submission(arguments[1:])
        if _DRY_RUN.value:
            print(f"# In an empty folder:\n{script}", end="")
            return
        tool, remedy = _TOOLS[_BACKEND.value]
        if not shutil.which(tool):
            raise LaunchError(f"{tool} was not found, which submits the run; {remedy}")
    except LaunchError as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(subprocess.run(["bash", "-c", script], cwd=folder).returncode)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir", "data_dir", "name", "tpu_type"])
    app.run(main, flags_parser=command_line.parse)
