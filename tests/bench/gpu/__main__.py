"""Measures and tests on one GPU: `python -m tests.bench.gpu [--only=PARTS] [--minutes=8]`.

Each part runs in a process of its own, so that one's memory and failure are not the next one's, the
most important first. It prints what it finds, as it finds it, and its last line of JSON goes to
--output, also of a part that fails or is stopped. Parts that measure no time run beside each other.
The exit status is 1 unless all parts succeeded. `--tiny` tries all of it on a CPU. What is compiled
is kept in --compiled, so that parts, and later calls for what was not reached, share it.

On a machine that has the packages of requirements-test.lock this needs nothing more. Where JAX,
PyTorch, Flax, Orbax, timm and pytest are, and nothing can be fetched, these wheels suffice, 12 MB:

    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 \\
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \\
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl \\
        array-record docstring-parser dm-tree googleapis-common-protos grain immutabledict \\
        indexed-gzip ml-collections portpicker segmentation-models-pytorch==0.6.0 simple-parsing \\
        tensorboardX tensorflow-datasets tensorflow-metadata termcolor toml
    python3 -m pip wheel --no-deps -w .whl promise
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent import futures

from absl import app, flags

from tests import runs


@dataclasses.dataclass(frozen=True)
class Part:
    """A module of this package.

    Attributes:
      measures: what, in words.
      arguments: after `python -m tests.bench.gpu.`
      seconds: after which it is stopped.
      environment: beside that of this process.
      is_timed: whether it must have the device to itself.
    """

    measures: str
    arguments: tuple[str, ...]
    seconds: int
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_timed: bool = True


# PyTorch's side takes the whole card: its process only imports JAX.
_TORCH = {"JAX_PLATFORMS": "cpu"}
# Several processes share the card.
_SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# float32 products are not to be rounded to TF32.
_TESTS = {**_SHARED, "TEST_PLATFORM": "cuda", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
PARTS = {
    "step": Part("our step at 64, and its kernels", ("step", "--batch_size=64", "--trace"), 240),
    "torch": Part("PyTorch's at 64", ("pytorch", "--batch_size=64"), 150, _TORCH),
    "resume": Part("a killed run against a whole one", ("resume",), 170, _SHARED, is_timed=False),
    "tests": Part("tests of single layers", ("layers",), 170, _TESTS, is_timed=False),
    "data": Part("`main` by reading threads", ("reading", "--batch_size=64"), 120),
    "step128": Part("our step at 128", ("step", "--batch_size=128"), 180),
    "torch128": Part(
        "PyTorch's at 128, as called", ("pytorch", "--batch_size=128", "--nocompile"), 60, _TORCH
    ),
}
_ONLY = flags.DEFINE_list("only", list(PARTS), "Parts to run, in this order")
flags.register_validator(
    "only",
    lambda names: set(names) <= PARTS.keys(),
    message=f"There is no such part. Choose from: {', '.join(PARTS)}.",
)
_MINUTES = flags.DEFINE_float("minutes", 8, "Of all parts together; the rest is stopped")
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file for all figures")
_COMPILED = flags.DEFINE_string("compiled", None, "Where compiled programs are kept")
_TINY = flags.DEFINE_bool("tiny", False, "Sizes for a CPU")
_LEAST_SECONDS = 15  # in which no part ends


def run_part(name: str, seconds: float, environment: Mapping[str, str]) -> tuple[dict, str]:
    """Runs a part and shows what it prints.

    Returns:
      Its figures, and why it failed, "" if it did not.
    """
    part = PARTS[name]
    line = [sys.executable, "-m", f"tests.bench.gpu.{part.arguments[0]}", *part.arguments[1:]]
    line += ["--tiny", "--batch_size=4"] if _TINY.value else []
    if name == "tests":  # it then has time to show the failures
        line += [f"--seconds={max(seconds - 20, 10)}"]
    more = {} if _TINY.value and name == "tests" else part.environment
    process = subprocess.Popen(
        line,
        cwd=runs.ROOT,
        env={**os.environ, **environment, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    timer = threading.Timer(seconds, lambda: os.killpg(process.pid, signal.SIGKILL))
    timer.start()
    figures, started = {}, time.monotonic()
    for text in process.stdout:
        if text.startswith("{"):
            figures = json.loads(text)
        else:
            print(text if part.is_timed else f"{name}: {text}", end="", flush=True)
    process.wait()
    timer.cancel()
    took = time.monotonic() - started
    print(f"{name}: {json.dumps(figures)}\n{name} took {took:.0f} s", flush=True)
    if took >= seconds:
        return figures, f"stopped after {seconds:.0f} s"
    return figures, f"status {process.returncode}" if process.returncode else ""


def groups(names: Sequence[str]) -> list[list[str]]:
    """Parts that run beside each other: neighbours that measure no time."""
    found: list[list[str]] = []
    for name in names:
        if found and not any(PARTS[other].is_timed for other in (name, found[-1][-1])):
            found[-1].append(name)
        else:
            found.append([name])
    return found


def ratios(figures: Mapping[str, Mapping]) -> dict[str, float]:
    """Our images a second over PyTorch's, for each way that PyTorch ran."""
    found = {}
    for ours, theirs in (("step", "torch"), ("step128", "torch128")):
        speed = figures.get(ours, {}).get("images_per_second")
        for way in ("eager", "compiled"):
            other = figures.get(theirs, {}).get(way, {}).get("images_per_second")
            if speed and other:
                found[f"{ours} / {theirs} {way}"] = round(speed / other, 3)
    return found


def main(_) -> None:
    """Runs the chosen parts and prints ratios and failures last."""
    deadline = time.monotonic() + 60 * _MINUTES.value
    figures, failed = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "PYTHONUNBUFFERED": "1",
            "TF_CPP_MIN_LOG_LEVEL": "1",
            "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(_COMPILED.value or folder).absolute()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for names in groups(_ONLY.value):
            left = deadline - time.monotonic()
            for name in names:
                print(f"\n==== {name}: {PARTS[name].measures} ({left:.0f} s left)", flush=True)
            if left < _LEAST_SECONDS:
                figures |= {name: {} for name in names}
                failed |= dict.fromkeys(names, "not run: no time was left")
                continue
            limits = [left if _TINY.value else min(left, PARTS[name].seconds) for name in names]
            with futures.ThreadPoolExecutor(len(names)) as pool:
                done = pool.map(run_part, names, limits, [environment] * len(names))
            for name, (found, why) in zip(names, done, strict=True):
                figures[name] = found
                failed |= {name: why} if why else {}
            if _OUTPUT.value:
                written = {**figures, "ratios": ratios(figures), "failed": failed}
                pathlib.Path(_OUTPUT.value).write_text(json.dumps(written, indent=1) + "\n")
    print(f"\nours / PyTorch's images a second: {ratios(figures)}\nfailed: {failed}", flush=True)
    print(json.dumps({**figures, "ratios": ratios(figures)}), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    app.run(main)
