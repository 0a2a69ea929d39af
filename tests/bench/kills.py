"""Runs that are killed or interrupted in every phase: for `tests.bench.faults`.

A run is killed again and again, each time when it is in a certain phase, until it is complete. It
must then have the bits and logs of a run that was left alone. A run that gets a signal must save
what there is to save, and leave.
"""

import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

from tests import runs

# Seconds from a signal to the end: of the current step or batch, and ten.
_LEFT_WITHIN = 10
# From the loss of a process to the end of the others, once they have found each other.
_LOST_WITHIN = 20
_MINUTES = 10  # that anything here should take at most

# Quick compilation, as in the tests: what is compared runs with the same flags.
_QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
_QUICK += "--xla_cpu_use_fusion_emitters=false --xla_force_host_platform_device_count=1"


class Runs:
    """Starts runs of one recipe, and says what they left."""

    def __init__(self, folder: pathlib.Path, mode: str, num_processes: int):
        """Makes the data.

        Args:
          folder: for everything.
          mode: "pretrain" or "finetune".
          num_processes: of each run.
        """
        self.folder, self._finetunes, self._num_processes = (
            folder,
            mode == "finetune",
            num_processes,
        )
        dataset = "dfc2020" if self._finetunes else "ssl4eo_s12_nol"
        sample = {"format": "dfc2020"} if self._finetunes else {"seasons": 2}
        data_dir = runs.make_data(folder, dataset, locations=16, tile_size=48, **sample)
        self._fields = runs.tiny_flags(data_dir) | {"log_every_steps": 1, "checkpoints_to_keep": 1}
        self._recipe = "configs/pretrain.py:sample"
        if num_processes > 1:
            self._fields["num_devices"] = 0
        if self._finetunes:
            of_both = {n for n in self._fields if not n.startswith(("eval", "selection"))}
            self._fields = {n: self._fields[n] for n in of_both} | {"seeds": "(0,)"}
            self._recipe = "configs/finetune.py:task=dfc2020,input=s2,sample"

    def run_folder(self, workdir: pathlib.Path) -> pathlib.Path:
        """Where the checkpoints of a run are."""
        return workdir / "seed_0" if self._finetunes else workdir

    def start(self, workdir: pathlib.Path, compiled: str = "compiled") -> "Started":
        """Starts the processes of a run; `compiled` names the folder of compiled programs."""
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": _QUICK,
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        fields = {f"config.{name}": value for name, value in self._fields.items()}
        line = runs.command("cromss_jax.main", config=self._recipe, workdir=workdir, **fields)
        # What `nohup` and shells have ignored in the background would be ignored by the run.
        line = ["env", "--default-signal=HUP,INT", *line]
        more = [[]]
        if self._num_processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"--coordinator_address=localhost:{free.getsockname()[1]}"
            count = f"--num_processes={self._num_processes}"
            more = [[address, count, f"--process_id={i}"] for i in range(self._num_processes)]
        log = self.folder / f"{workdir.name}.log"
        begun = log.stat().st_size if log.exists() else 0
        with log.open("a") as output:
            processes = [
                subprocess.Popen(
                    [*line, *own], cwd=runs.ROOT, env=environment, stdout=output, stderr=output
                )
                for own in more
            ]
        return Started(processes, self.run_folder(workdir), workdir, log, begun)

    def outcome(self, workdir: pathlib.Path) -> tuple:
        """What must not depend on interruptions."""
        run = self.run_folder(workdir)
        return runs.final_digest(run), runs.logged(run)

    def reference(self) -> tuple:
        """The outcome of a run that is left alone, after which all is compiled."""
        status = self.start(self.folder / "reference").end()
        if status:
            raise RuntimeError((self.folder / "reference.log").read_text())
        return self.outcome(self.folder / "reference")


class Started:
    """A run in progress."""

    def __init__(
        self,
        processes: list[subprocess.Popen],
        run: pathlib.Path,
        workdir: pathlib.Path,
        log: pathlib.Path,
        begun: int,
    ):
        self.processes, self.run, self.workdir = processes, run, workdir
        self._log, self._begun = log, begun
        self.started = time.monotonic()
        self.continues = bool(self.saved())

    def said(self) -> str:
        """What the processes have logged."""
        with self._log.open() as file:
            file.seek(self._begun)
            return file.read()

    def names(self) -> list[str]:
        """In the folder of checkpoints."""
        try:
            return os.listdir(self.run / "checkpoints")
        except FileNotFoundError:
            return []

    def saved(self) -> list[int]:
        """Steps of the checkpoints."""
        return [int(name) for name in self.names() if name.isdigit()]

    def last_metrics(self) -> dict:
        """The last complete line of the log of metrics."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        return json.loads(whole[-1]) if whole else {"split": "", "step": 0}

    def reach(self, is_there: Callable[["Started"], bool]) -> bool:
        """Waits for a phase; False if the run ended before."""
        while all(process.poll() is None for process in self.processes):
            if is_there(self):
                return True
            time.sleep(0.002)
        return False

    def kill(self, index: int) -> None:
        """Kills one process. The others notice and end, or are ended, as a scheduler would.

        While they start they would wait for it for minutes.
        """
        self.processes[index].kill()
        for process in self.processes:
            try:
                process.wait(timeout=_LOST_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def end(self) -> int:
        """Waits for all processes; the first status that is not 0."""
        statuses = [process.wait(timeout=60 * _MINUTES) for process in self.processes]
        return next(filter(None, statuses), 0)


def _is_validating(run: Started) -> bool:
    if not re.search(r"step \d+/|continuing", run.said()):  # the log may be of a run before
        return False
    last = run.last_metrics()
    return last["split"] == "train" and last["step"] in (4, 7) and last["step"] in run.saved()


def _is_scoring(run: Started) -> bool:
    is_done = re.search(r"step (\d+)/\1,|at step 4$", run.said(), re.MULTILINE)
    return bool(is_done) and not (run.workdir / "results.json").exists()


# In an order in which a run that is killed in each still reaches the next.
_PRETRAINING = {
    "start": lambda run: time.monotonic() - run.started > 1.5,
    "compile": lambda run: not run.continues and "to train on" in run.said(),
    "step": lambda run: re.search(r"step \d+/", run.said()) is not None,
    "save": lambda run: any("orbax-checkpoint-tmp" in name for name in run.names()),
    "removal": lambda run: len(run.saved()) > 1,
    "evaluation": _is_validating,
    "restore": lambda run: run.continues and "to train on" in run.said(),
    # The log is written first, then the picture.
    "picture": lambda run: run.last_metrics()["split"] == "validation",
}
# Fine-tuning scores once, at the end.
PHASES = {
    "pretrain": _PRETRAINING,
    "finetune": {
        **{n: reached for n, reached in _PRETRAINING.items() if n not in ("evaluation", "picture")},
        "evaluation": _is_scoring,
        "picture": lambda run: (run.workdir / "results.json").exists(),
    },
}


def kills(
    mode: str, num_processes: int
) -> Callable[[pathlib.Path, random.Random, int], Iterator[str]]:
    """The part that kills runs of a mode, as many times as there are trials."""

    def inject(folder: pathlib.Path, rng: random.Random, trials: int) -> Iterator[str]:
        made = Runs(folder, mode, num_processes)
        expected, phases = made.reference(), PHASES[mode]
        rounds = [list(phases)] * (trials // len(phases)) + [list(phases)[: trials % len(phases)]]
        for number, names in enumerate(rounds):
            workdir, killed = folder / f"killed_{number}", []
            for name in names:
                run = made.start(workdir)
                if not run.reach(phases[name]):
                    yield f"{name}: NOT REACHED"
                    continue
                time.sleep(rng.choice((0, 0, rng.uniform(0, 0.2))))
                run.kill(rng.randrange(num_processes))
                killed.append(name)
            if killed and made.start(workdir).end():
                raise RuntimeError((folder / f"{workdir.name}.log").read_text())
            same = not killed or made.outcome(workdir) == expected
            yield from [name if same else f"{name}: ENDED DIFFERENTLY" for name in killed]

    return inject


# Each signal in each phase would take an hour. In the order in which a run comes to the phases.
SIGNALS = (
    ("compile", signal.SIGTERM),
    ("start", signal.SIGINT),
    ("step", signal.SIGUSR1),
    ("step", signal.SIGINT),
    ("evaluation", signal.SIGTERM),
    ("restore", signal.SIGTERM),
    ("step", signal.SIGHUP),
    ("save", signal.SIGUSR2),
    ("picture", signal.SIGTERM),
)


def interruptions(folder: pathlib.Path, rng: random.Random, trials: int) -> Iterator[str]:
    """Yields, for each signal, how long pretraining took to leave."""
    del rng
    made = Runs(folder, "pretrain", 1)
    digest, _ = made.reference()
    workdir = folder / "interrupted"
    for name, told in SIGNALS[:trials]:
        found = f"{told.name} in {name}"
        # A program that is compiled takes seconds, one that is read does not.
        run = made.start(workdir, "empty" if name == "compile" else "compiled")
        if not run.reach(PHASES["pretrain"][name]):
            yield f"{found}: NOT REACHED"
            continue
        if name == "compile":
            time.sleep(1)
        sent = time.monotonic()
        run.processes[0].send_signal(told)
        status, seconds = run.end(), time.monotonic() - sent
        if status or "Traceback" in run.said() or seconds > _LEFT_WITHIN:
            yield f"{found}: status {status} after {seconds:.1f} s"
        else:
            yield f"{found}: left in {seconds:.1f} s"
    if made.start(workdir).end() or made.outcome(workdir)[0] != digest:
        yield "ENDED DIFFERENTLY"
