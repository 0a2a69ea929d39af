"""Tests of single layers on a GPU, against PyTorch on the CPU: `python -m tests.bench.gpu.layers`.

TEST_PLATFORM tells the tests where to run, see `tests.environment`.
"""

import re
import signal
import subprocess
import sys
import threading

from absl import app, flags

from tests import runs
from tests.bench.gpu import recipe

# Of one device. The most telling first, as time may end.
TESTS = [
    "tests/data/test_preprocess.py",
    "tests/method",
    "tests/networks",
    "tests/training/test_gradients.py",
    "tests/training/test_optimizers.py",
    "tests/training/test_oracle.py",
]
SEVERAL_DEVICES = (
    "tests/training/test_gradients.py::test_microbatches_gather_nothing",
    "tests/networks/test_fusion.py::test_devices_exchange_a_fused_batch_norms_sums_alone",
)
_TESTS = flags.DEFINE_list("tests", TESTS, "What pytest runs")
_WORKERS = flags.DEFINE_integer("workers", 6, "Processes")
_SECONDS = flags.DEFINE_float("seconds", 120, "After which what has ended is shown")


def main(_) -> None:
    """Prints what pytest prints, the last line as JSON."""
    chosen = _TESTS.value[:1] if recipe.TINY.value else _TESTS.value
    workers = [] if recipe.TINY.value else ["-n", str(_WORKERS.value), "--dist", "load"]
    # Other versions than those of the lock files warn of other things.
    line = [sys.executable, "-m", "pytest", "-o", "addopts=", "-W", "default", "-v", "--tb=short"]
    line += ["-p", "no:cacheprovider", "-p", "no:warnings", "--color=no", "-m", "not slow"]
    line += ["-p", "tests.bench.gpu.failures", "--no-summary"]
    line += [f"--deselect={name}" for name in SEVERAL_DEVICES]
    line += ["--maxfail=20", *workers, *chosen]
    figures = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0, "failed": []}
    process = subprocess.Popen(line, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True)
    # pytest then shows the failures so far.
    timer = threading.Timer(_SECONDS.value, process.send_signal, [signal.SIGINT])
    timer.start()
    for text in process.stdout:
        # "[gw0] [ 10%] PASSED tests/a.py::b ", or "tests/a.py::b PASSED [ 10%]".
        ended = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", text) if "%]" in text else None
        if not ended:
            if not text.startswith("tests/") or "Error" in text:  # the start of a test
                print(text, end="", flush=True)
            continue
        outcome = ended[1]
        figures[outcome] += 1
        if outcome in ("FAILED", "ERROR"):
            name = re.search(r"\S+::\S.*?(?= (?:FAILED|ERROR)|\s*$)", text)[0]
            figures["failed"].append(name)
            print(f"{outcome} {name}", flush=True)
        recipe.show(figures)
    timer.cancel()
    sys.exit(process.wait())


if __name__ == "__main__":
    app.run(main)
