"""Commands as users type them, without a second or two of imports each.

A server imports what takes long and forks a process for each command. Where the check is about the
start of a process, its environment or signals, use `subprocess` and `runs.command`.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback

ROOT = pathlib.Path(__file__).parents[1]
# What the commands import, but for the commands themselves: their flags are global.
HEAVY = (
    "cromss_jax.auditing.job",
    "cromss_jax.mapping.job",
    "cromss_jax.pretrained",
    "cromss_jax.results.pictures",
    "cromss_jax.training.finetune",
    "cromss_jax.training.pretrain",
    "data_prep.datasets.downstream",
    "data_prep.datasets.scenes",
    "data_prep.datasets.ssl4eo_s12_nol",
    "data_prep.datasets.terramesh",
    "data_prep.sample.nol",
)


def run(module: str, *arguments: object, cwd: os.PathLike = ROOT) -> subprocess.CompletedProcess:
    """Runs `python -m module arguments` with its output captured as text."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (os.path.join(folder, name) for name in ("out", "err"))
        line = [module, *map(str, arguments)]
        server = _server()
        request = {"line": line, "cwd": str(cwd), "files": [out, err]}
        request["environment"] = dict(os.environ)
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        texts = [pathlib.Path(path).read_text() for path in (out, err)]
    return subprocess.CompletedProcess(line, status, *texts)


def run_flags(module: str, **flags: object) -> subprocess.CompletedProcess:
    """The same with flags by name."""
    return run(module, *(f"--{name}={value}" for name, value in flags.items()))


@functools.cache
def _server() -> subprocess.Popen:
    line = [sys.executable, "-m", "tests.commands"]
    server = subprocess.Popen(
        line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # closes its input, which ends it
    return server


def _serve() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()  # a collection would copy all of it in each process
    answers = os.fdopen(os.dup(1), "w")
    for request in sys.stdin:
        request = json.loads(request)
        child = os.fork()
        if not child:
            _become(**request)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, file=answers, flush=True)


def _become(line: list[str], cwd: str, files: list[str], environment: dict[str, str]) -> None:
    """Lets this process be the command, and end with it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(line)
    status = 0
    try:
        runpy.run_module(line[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    # As the interpreter ends, without a second of taking apart what was imported.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
