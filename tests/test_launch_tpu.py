"""What is sent for a Cloud TPU slice, and what the real tools make of it."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
SLICE = ("--name=mid", "--tpu_type=v5e:4x4")
FOLDERS = ("--workdir=gs://bucket/mid", "--data_dir=gs://bucket/data")
XPK = (*SLICE, *FOLDERS, "--cluster=cluster")
QUEUED = (*SLICE, *FOLDERS, "--backend=queued_resources")
# As typed in a shell, by hand from what the tools' --help says.
INSTALL = (
    "tar -xzf source.tar.gz && pip install -q uv==0.13.9 && "
    "uv pip install -q --system -r requirements.lock 'jax[tpu]' && "
    "uv pip install -q --system --no-deps . && "
)
MAIN = (
    "exec python -m cromss_jax.main --config=configs/pretrain.py "
    "--config.data.dir=gs://bucket/data --workdir=gs://bucket/mid "
    "--distributed=True --preemption_status=143"
)
RECORDER = """#!{python}
import json, pathlib, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv) + "\\n")
for name in ("source.tar.gz", "startup.sh"):
    if pathlib.Path(name).exists():
        pathlib.Path({folder!r}, name).write_bytes(pathlib.Path(name).read_bytes())
"""
# The command line once for each list of arguments, with imports shared: a second less for each.
FORKS = """
import json, os, runpy, sys, tempfile
import ml_collections.config_flags
from cromss_jax import sensors

done = []
for arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv[1:] = arguments
            runpy.run_module("cromss_jax.launch_tpu", run_name="__main__", alter_sys=True)
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        done.append((status, out.read(), err.read()))
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A commit of what the launcher reads, so that the state of this checkout doesn't matter."""
    folder = tmp_path_factory.mktemp("a project")
    for name in ("__init__", "command_line", "launch", "launch_tpu", "package", "sensors"):
        (folder / "cromss_jax").mkdir(exist_ok=True)
        shutil.copy(ROOT / f"cromss_jax/{name}.py", folder / "cromss_jax")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in ("pyproject.toml", "requirements.lock", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x")
    return folder


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins for the tools, which note how they are called."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def git(folder, *arguments) -> str:
    done = subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True)
    return done.stdout.decode().strip()


def put(tools, name: str, text: str):
    (tools / name).write_text(text)
    (tools / name).chmod(0o755)


def record(tools, *names):
    """Puts tools there that do nothing but note how they are called."""
    text = RECORDER.format(python=sys.executable, log=str(tools / "log"), folder=str(tools))
    for name in names:
        put(tools, name, text)


def calls(tools) -> list[list[str]]:
    lines = [json.loads(line) for line in (tools / "log").read_text().splitlines()]
    return [[pathlib.Path(tool).name, *arguments] for tool, *arguments in lines]


def launch(project, *lines: Sequence[str], cwd=None) -> list[subprocess.CompletedProcess]:
    """The command, once with each list of arguments; from the project's folder or another."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        cwd=cwd or project,
        env={**os.environ, "PYTHONPATH": str(project)},
        input=json.dumps(lines),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [
        subprocess.CompletedProcess(line, *one)
        for line, one in zip(lines, json.loads(done.stdout), strict=True)
    ]


def printed(project, *lines: Sequence[str]) -> list[list[str]]:
    """The lines of the dry run, once with each list of arguments."""
    every = ("--config=configs/pretrain.py", "--dry_run")
    dry_runs = launch(project, *((*every, *line) for line in lines))
    for done in dry_runs:
        assert done.returncode == 0, done.stderr
    return [done.stdout.splitlines() for done in dry_runs]


@pytest.fixture(scope="module")
def startup_script(project) -> str:
    (lines,) = printed(project, [*QUEUED, "--max_restarts=2", "--grace_seconds=60"])
    return "\n".join(lines[lines.index("#!/bin/bash") : lines.index("END_OF_STARTUP")])


def check_refused(done: subprocess.CompletedProcess, sentence: str):
    assert done.returncode == 1, done.args
    assert not done.stdout
    assert done.stderr.startswith("error: "), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr


def test_the_lines_for_xpk(project):
    commit = git(project, "rev-parse", "HEAD")
    installed, image = printed(
        project,
        [*XPK, "--project=earth", "--zone=us-west4-a", "--", "--spot"],
        [*XPK, "--image=eu.gcr.io/a/b:1", "--max_restarts=3"],
    )
    assert installed == [
        "# In an empty folder:",
        "set -eu",
        f"# In a container of every host: {INSTALL}{MAIN}",
        f"git -C '{project}' archive --format=tar.gz {commit} > source.tar.gz",
        "xpk workload create --cluster=cluster --workload=mid --tpu-type=v5litepod-4x4 "
        "--num-slices=1 --project=earth --zone=us-west4-a --max-restarts=10 "
        "--termination-grace-period-seconds=300 --base-docker-image=python:3.12-slim "
        f"--script-dir=. {shlex.quote(f'--command={INSTALL}{MAIN}')} --spot",
    ]
    assert image[1:] == [
        "set -eu",
        f"# In a container of every host: {MAIN}",
        "xpk workload create --cluster=cluster --workload=mid --tpu-type=v5litepod-4x4 "
        "--num-slices=1 --max-restarts=3 --termination-grace-period-seconds=300 "
        f"--docker-image=eu.gcr.io/a/b:1 '--command={MAIN}'",
    ]


def test_the_lines_for_queued_resources(project):
    commit = git(project, "rev-parse", "HEAD")
    installed, image = printed(
        project,
        [*QUEUED, "--", "--spot", "--valid-until-duration=6h"],
        [*QUEUED, "--image=eu.gcr.io/a/b:1", "--num_slices=2", "--tpu_type=v5p:2x2x2"],
    )
    assert installed[3:6] == [
        f"git -C '{project}' archive --format=tar.gz {commit} > source.tar.gz",
        f"gcloud storage cp source.tar.gz gs://bucket/mid/source/{commit}.tar.gz",
        "cat > startup.sh <<'END_OF_STARTUP'",
    ]
    assert installed[-2:] == [
        "END_OF_STARTUP",
        "gcloud compute tpus queued-resources create mid --node-id=mid "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite "
        "--metadata-from-file=startup-script=startup.sh --spot --valid-until-duration=6h",
    ]
    assert "gcloud auth configure-docker --quiet eu.gcr.io" in image
    assert f"    eu.gcr.io/a/b:1 bash -c '{MAIN}' || status=$?" in image
    assert image[-1] == (
        "gcloud compute tpus queued-resources create mid --node-count=2 --node-prefix=mid "
        "--accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 "
        "--metadata-from-file=startup-script=startup.sh"
    )


def test_the_tools_words_for_a_slice_stay(project):
    usual, unusual, gke = printed(
        project,
        [*QUEUED, "--tpu_type=v5litepod-8"],
        [*QUEUED, "--tpu_type=v9-8", "--runtime_version=v9-base"],
        [*XPK, "--tpu_type=v4-8"],
    )
    assert "--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite" in usual[-1]
    assert "--accelerator-type=v9-8 --runtime-version=v9-base" in unusual[-1]
    assert "--tpu-type=v4-8 " in gke[-1]


def test_values_reach_main_as_they_were_given(project, tools):
    """Through our quoting, bash, the container's bash, and main's own parser."""
    record(tools, "xpk", "tar", "pip", "uv", "python")
    arguments = (
        "--config=configs/finetune.py:task=dw,input=s1",
        *("--config.seeds=(0, 1)", "--config.save_predictions", "--config.batch_size", "64"),
        "--config.init_from=gs://bucket/it's {$HOME}",
        *XPK,
    )
    (done,) = launch(project, arguments)
    assert done.returncode == 0, done.stderr
    (create,) = calls(tools)
    assert create[:4] == ["xpk", "workload", "create", "--cluster=cluster"]
    with tarfile.open(tools / "source.tar.gz") as source:
        names = set(source.getnames())
    assert {"requirements.lock", "configs/finetune.py", "cromss_jax/launch_tpu.py"} <= names
    (tools / "log").unlink()
    command = create[-1].removeprefix("--command=")
    subprocess.run(["bash", "-c", command], check=True)
    *installed, last = calls(tools)
    assert [call[0] for call in installed] == ["tar", "pip", "uv", "uv"]
    assert installed[2][-3:] == ["-r", "requirements.lock", "jax[tpu]"]
    assert last == [
        *("python", "-m", "cromss_jax.main", "--config=configs/finetune.py:task=dw,input=s1"),
        *("--config.seeds=(0, 1)", "--config.save_predictions=True", "--config.batch_size=64"),
        "--config.init_from=gs://bucket/it's {$HOME}",
        *("--config.data.dir=gs://bucket/data", "--workdir=gs://bucket/mid"),
        *("--distributed=True", "--preemption_status=143"),
    ]


@pytest.mark.parametrize(
    ("statuses", "attempts"),
    [((0,), 1), ((143, 134, 0), 3), ((1, 0), 1), ((143, 143, 143, 0), 3)],
    ids=["finished", "interrupted, then a host lost", "a user error", "too many restarts"],
)
def test_the_startup_script_starts_again_what_was_interrupted(
    project, startup_script, tools, tmp_path, statuses, attempts
):
    script = startup_script.replace("/var/cromss_jax", str(tmp_path / "host"))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "requirements.lock" in script
    assert "exec python -m cromss_jax.main" in script
    record(tools, "gcloud", "sleep")
    (tools / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    put(
        tools,
        "docker",
        f'#!/bin/bash\n[ $1 = run ] || exit 1\necho "$@" >> {tools}/runs\n'
        f"status=$(head -1 {tools}/statuses)\nsed -i 1d {tools}/statuses\nexit $status\n",
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == statuses[attempts - 1], done.stderr
    runs = (tools / "runs").read_text().splitlines()
    assert len(runs) == attempts
    assert "--init --privileged --net=host --stop-timeout=60" in runs[0]
    commit = git(project, "rev-parse", "HEAD")
    source = f"gs://bucket/mid/source/{commit}.tar.gz"
    assert calls(tools)[0] == ["gcloud", "storage", "cp", source, "source.tar.gz"]


MISTAKES = (
    ([*XPK, "--config.los.prior=s"], 'Did you mean "loss" instead of "los"'),
    ([*XPK, "--config.batch_sise=4"], 'Did you mean "batch_size"'),
    ([*XPK, "--config=configs/pretrain.py:fusion=early"], "has no variant 'fusion=early'"),
    ([*XPK, "--config=configs/pretrian.py"], "--config=configs/pretrian.py: no such file"),
    ([*XPK, "--config=a.py", "--config.seed=1"], "--config=a.py: no such file"),
    ([*XPK, "--workdir=runs/mid"], "--workdir=runs/mid is not in a gs:// bucket"),
    ([*XPK, "--workdir=s3://b/mid"], "--workdir=s3://b/mid is not in a gs:// bucket"),
    ([*XPK, "--data_dir=data"], "--data_dir=data is not in a gs:// bucket"),
    ([*XPK, "--config.init_from=runs/x"], "--config.init_from=runs/x is not in a gs:// bucket"),
    ([*XPK, "--config.data.dir=gs://b"], "config.data.dir is set by --data_dir"),
    ([*SLICE, *FOLDERS], "--cluster is missing, and xpk needs a GKE cluster"),
    ([*XPK, "--tpu_type=v5e:44"], "--tpu_type=v5e:44 is not a slice"),
    ([*QUEUED, "--tpu_type=v9-8"], "set --runtime_version"),
    ([*XPK, "spot"], "spot is not a flag: put options of xpk or gcloud after ` -- `"),
    ([*SLICE, FOLDERS[0]], "--data_dir must have a value"),
)


def test_mistakes_are_found_before_anything_is_sent(project, tools):
    record(tools, "xpk", "gcloud")
    lines = (["--config=configs/pretrain.py", *arguments] for arguments, _ in MISTAKES)
    for done, (_, sentence) in zip(launch(project, *lines), MISTAKES, strict=True):
        check_refused(done, sentence)
    assert not (tools / "log").exists()


def test_only_what_is_committed_is_sent(project, tmp_path):
    other = tmp_path / "configs"
    shutil.copytree(project / "configs", other)
    (outside,) = launch(project, [f"--config={other / 'pretrain.py'}", *XPK])
    check_refused(outside, "move the file into configs")
    copy = tmp_path / "copy"
    shutil.copytree(project, copy)
    with (copy / "configs/pretrain.py").open("a") as file:
        file.write("# changed\n")
    arguments = ("--config=configs/pretrain.py", "--dry_run", *XPK)
    (changed,) = launch(copy, arguments)
    check_refused(changed, "configs/pretrain.py has changes that are not committed: commit them")
    git(copy, "checkout", "-q", "--", "configs")
    (copy / ".gitignore").write_text("own.py")
    for name in ("own.py", "configs/own.py"):
        shutil.copy(copy / "configs/pretrain.py", copy / name)
        (ignored,) = launch(copy, (f"--config={name}", *arguments[1:]))
        check_refused(ignored, f"hosts get the last commit, and {name} is not in it: commit it")
    shutil.rmtree(copy / ".git")
    exported, image = launch(copy, arguments, [*arguments, "--image=eu.gcr.io/a/b:1"])
    check_refused(exported, "is not a git checkout")
    assert image.returncode == 0


def test_it_starts_in_any_folder(project, tmp_path):
    """Hosts get the checkout's configuration; a file of the folder's own, which they lack, wins."""
    arguments = ("--config=configs/pretrain.py", "--dry_run", *XPK)
    (elsewhere,) = launch(project, arguments, cwd=tmp_path)
    assert elsewhere.stdout.splitlines()[2].endswith(INSTALL + MAIN)
    assert f"taken from the package, {project / 'configs/pretrain.py'}" in elsewhere.stderr
    shutil.copytree(project / "configs", tmp_path / "configs")
    (own,) = launch(project, arguments, cwd=tmp_path)
    check_refused(own, f"--config=configs/pretrain.py is outside of {project}")


def test_a_missing_tool_is_named(project, monkeypatch):
    git_folder = pathlib.Path(shutil.which("git")).parent
    if shutil.which("xpk", path=git_folder):
        pytest.skip("xpk lies beside git")
    monkeypatch.setenv("PATH", str(git_folder))
    (done,) = launch(project, ["--config=configs/pretrain.py", *XPK])
    check_refused(done, "xpk, which submits the run, was not found: install it")


def test_xpk_accepts_it_and_its_container_hands_sigterm_on(project, tools, tmp_path):
    if not shutil.which("xpk"):
        pytest.skip("xpk is not on PATH (pipx install xpk)")
    manifest = tmp_path / "jobset.yaml"
    # Neither cluster nor credentials: xpk's own dry run asks for nothing.
    arguments = (
        "--config=configs/pretrain.py:fusion=late",
        "--config.init_from=gs://bucket/it's {x}: y",
        *(*XPK, "--num_slices=2", "--project=earth", "--zone=us-west4-a"),
        *("--", "--dry-run", f"--output-manifest-file={manifest}"),
    )
    (done,) = launch(project, arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    spec = yaml.safe_load(manifest.read_text())["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 10
    (slices,) = spec["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"]) == (2, 4)  # slices, hosts of each
    (rule,) = job["podFailurePolicy"]["rules"]
    # These do not fail the job, so that it restarts: interrupted, and another host lost.
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert {143, 134} < set(rule["onExitCodes"]["values"])
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    record(tools, "tar", "pip", "uv")
    put(tools, "sleep", "#!/bin/bash\nexec /bin/sleep 0.1\n")  # xpk looks every 5 seconds
    put(
        tools,
        "python",
        f"#!{sys.executable}\nimport signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "print(sys.argv[1:], flush=True)\nsignal.pause()\n",
    )
    process = subprocess.Popen(container["command"], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("["):
            break
    assert "--config.init_from=gs://bucket/it's {x}: y" in line
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_gclouds_parser_accepts_it(project, tmp_path, monkeypatch):
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not on PATH")
    # Without an account nothing can be sent: gcloud says so after it has read the flags.
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CORE_CHECK_GCE_METADATA", "false")
    arguments = (
        *("--config=configs/pretrain.py", "--image=eu.gcr.io/a/b:1", *QUEUED),
        *("--project=earth", "--zone=us-west4-a", "--", "--spot", "--valid-until-duration=6h"),
    )
    done, mistyped = launch(project, arguments, [*arguments, "--spott"])
    assert done.returncode == 1
    assert "do not currently have an active account" in done.stderr
    assert "unrecognized arguments: --spott" in mistyped.stderr
