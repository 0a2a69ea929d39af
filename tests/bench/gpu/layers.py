"""Tests of single layers on a GPU, against PyTorch on the CPU: `python -m tests.bench.gpu.layers`.

TEST_PLATFORM tells the tests where to run, see `tests.environment`.
"""

import subprocess
import sys
import tempfile
from xml.etree import ElementTree

from absl import app, flags

from tests import runs
from tests.bench.gpu import recipe

# Of one device. The most telling first, as time may end.
TESTS = (
    "tests/data/test_preprocess.py",
    "tests/method",
    "tests/networks",
    "tests/training/test_oracle.py",
    "tests/training/test_gradients.py",
    "tests/training/test_optimizers.py",
)
_TESTS = flags.DEFINE_list("tests", TESTS, "What pytest runs")
_WORKERS = flags.DEFINE_integer("workers", 6, "Processes")


def main(_) -> None:
    """Prints what pytest prints, the last line as JSON."""
    chosen = _TESTS.value[:1] if recipe.TINY.value else _TESTS.value
    workers = [] if recipe.TINY.value else ["-n", str(_WORKERS.value), "--dist", "load"]
    with tempfile.NamedTemporaryFile(suffix=".xml") as file:
        line = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        line += ["-m", "not slow", "--color=no", f"--junit-xml={file.name}", *workers, *chosen]
        done = subprocess.run(line, cwd=runs.ROOT, stderr=subprocess.STDOUT)
        suite = ElementTree.parse(file.name).getroot().find("testsuite")
    names = ("tests", "failures", "errors", "skipped")
    bad = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.findall("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    recipe.show({**{name: int(suite.get(name)) for name in names}, "failed": bad})
    sys.exit(done.returncode)


if __name__ == "__main__":
    app.run(main)
