"""The parts of `make bench`: what each measures, by which command, and how one is measured."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time

from tests import runs

RESULTS = "tests/bench/results.json"
# Documents with generated tables.
DOCUMENTS = ("tests/bench/README.md", "README.md")
PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "torch", "segmentation_models_pytorch")


@dataclasses.dataclass(frozen=True)
class Part:
    """A bench as `make bench` runs it.

    Attributes:
      measures: what, in words.
      takes: roughly how long on two cores, and what it needs.
      arguments: after `python -m`; `{commit}` stands for the commit that is measured.
      by_default: whether it runs where no parts are named.
    """

    measures: str
    takes: str
    arguments: tuple[str, ...]
    by_default: bool = False


def _claims(setting: str, *more: str) -> tuple[str, ...]:
    # A folder for each commit: an interrupted part continues, but not with runs of other code.
    return ("tests.bench.claims", "--workdir=runs/claims_{commit}", f"--setting={setting}", *more)


PARTS = {
    "sample": Part("the scores of `make pretrain`", "5 min", ("tests.bench.sample",), True),
    "claims": Part("pretraining and selection, few clean tiles", "hours", _claims("sample")),
    "claims_more_steps": Part("the same where views are seen often", "hours", _claims("few")),
    "claims_memorised": Part(
        "the same where labels are memorised", "hours", _claims("memorised", "--seeds=4")
    ),
    "step": Part(
        "the training step and its parts against PyTorch",
        "half an hour",
        ("tests.bench.step",),
        True,
    ),
    "input": Part(
        "reading against the published LMDB pipeline", "3 min", ("tests.bench.input",), True
    ),
    "end_to_end": Part(
        "`main`: images per second, waiting, starting", "10 min", ("tests.bench.end_to_end",), True
    ),
    "tpu": Part(
        "the step as compiled for v5e", "5 min for each of 4 sizes; libtpu", ("tests.bench.tpu",)
    ),
    "gpu": Part(
        "the step on a GPU, its kernels, PyTorch's step, resuming, reading",
        "10 min or more; a GPU",
        ("tests.bench.gpu",),
    ),
    "scaling": Part(
        "the step on 1 to 256 simulated devices", "quarter of an hour", ("tests.bench.scaling",)
    ),
    "processes": Part(
        "several processes, other numbers of devices, lost processes",
        "half an hour or more",
        ("tests.bench.processes",),
    ),
    "faults": Part(
        "flipped bits, kills in every phase, signals, cut and hostile files, disks, two writers",
        "half an hour",
        ("tests.bench.faults",),
    ),
    "mutants": Part(
        "whether the tests notice a hundred wrong lines", "half an hour", ("tests.bench.mutants",)
    ),
    "fuzz": Part(
        "damaged files for every reader of strangers' files",
        "10 min for each of 9 readers",
        ("tests.bench.fuzz",),
    ),
    "maps": Part(
        "maps of scenes against a tiled loop of smp", "half an hour; torch", ("tests.bench.maps",)
    ),
    "audit": Part(
        "wrong labels found by networks that never saw them, and what cleaning brings",
        "two hours",
        ("tests.bench.audit", "--workdir=runs/audit_{commit}", "--compared=1"),
    ),
    "audit_dfc2020": Part(
        "the same of coarse labels, as of MODIS",
        "quarter of an hour",
        (
            "tests.bench.audit",
            "--workdir=runs/audit_dfc2020_{commit}",
            "--dataset=dfc2020",
            "--seeds=0",
            "--stages=audit",
        ),
    ),
    "parity": Part(
        "all networks against smp's", "three quarters of an hour", ("tests.bench.parity",), True
    ),
}


def find_commit() -> str:
    """The checked-out commit; "+changes" follows where files differ, other than those we write."""
    outputs = [f":!{path}" for path in (RESULTS, *DOCUMENTS)]

    def git(*arguments: str) -> str:
        line = ["git", *arguments]
        done = subprocess.run(line, cwd=runs.ROOT, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", *outputs)
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def find_processor() -> str:
    """Model and number of cores."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    # ARM's kernels name no model.
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def find_versions() -> dict[str, str]:
    """Of Python and of the packages that the figures depend on, where they are installed."""
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    return {"python": platform.python_version(), **versions}


def measure(part: Part) -> dict:
    """Runs a part and shows what it prints.

    Returns:
      Its entry in results.json: `figures` is its last line, which is JSON.

    Raises:
      subprocess.CalledProcessError: the part failed.
    """
    commit = find_commit()
    arguments = [argument.format(commit=commit) for argument in part.arguments]
    started = time.monotonic()
    line = [sys.executable, "-m", *arguments]
    with subprocess.Popen(line, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True) as process:
        last = ""
        for last in process.stdout:
            print(last, end="", flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, line)
    return {
        "command": shlex.join(["python", "-m", *arguments]),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": find_processor(),
        "versions": find_versions(),
        "seconds": round(time.monotonic() - started),
        "figures": json.loads(last),
    }
