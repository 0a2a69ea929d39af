"""Several processes and other numbers of devices: `python -m tests.bench.processes`.

Runs of the tiny recipe, SGD from weights away from the kinks of ReLUs, where rounding is not
amplified, 20 steps each: one process of 8 devices; two of 4; 8 devices continued on 4 and then on
1; one process continued as two; and two processes of which the one and then the other is killed,
and one interrupted. What the steps saw must be the same, and their losses are compared.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from tests import runs

_WORKDIR = flags.DEFINE_string("workdir", None, "Where runs go; a temporary folder by default")
NUM_STEPS, STEPS_AN_EPOCH, BATCH_SIZE = 20, 2, 8
_TIMEOUT = 3600  # seconds, for what should take minutes


class Runs:
    """Starts the command with so many processes and devices, and reads what it left."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.data_dir = runs.make_data(folder, locations=18, seasons=2, tile_size=48)
        self.start = runs.make_start(folder / "start")

    def launch(
        self, name: str, processes: int, devices: int, num_epochs: int
    ) -> list[subprocess.Popen]:
        """Starts a run of `devices` in all; returns its processes."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        fields = {
            **runs.tiny_flags(self.data_dir),
            "num_devices": 0,
            "num_epochs": num_epochs,
            "batch_size": BATCH_SIZE,
            "checkpoint_every_epochs": 1,
            "eval_every_epochs": 100,
            "log_every_steps": 1,
            "init_from": self.start,
            "optimizer.learning_rate": 1e-3,
        }
        line = runs.command(
            "tests.observed",
            config="configs/pretrain.py:sample",
            workdir=self.folder / name,
            preemption_status=143,
            **{f"config.{k}": v for k, v in fields.items()},
        )
        observed = self.folder / f"{name}.observed"
        observed.mkdir(exist_ok=True)
        started = []
        for index in range(processes):
            more = [
                f"--coordinator_address=localhost:{port}",
                f"--num_processes={processes}",
                f"--process_id={index}",
            ]
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
                "OBSERVED": str(observed),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
            }
            log = self.log(name, index).open("a")
            command = [*line, *more] if processes > 1 else line
            started.append(
                subprocess.Popen(command, cwd=runs.ROOT, env=environment, stdout=log, stderr=log)
            )
        return started

    def log(self, name: str, process: int) -> pathlib.Path:
        """What a process printed."""
        return self.folder / f"{name}.{process}.log"

    def run(self, name: str, processes: int, devices: int, num_epochs: int) -> None:
        """The same to its end."""
        for process in self.launch(name, processes, devices, num_epochs):
            if process.wait(timeout=_TIMEOUT) != 0:
                sys.exit(f"{name}: see {self.log(name, 0)}")

    def launch_until(self, name: str, step: int) -> list[subprocess.Popen]:
        """Two processes, when they have logged that step."""
        started = self.launch(name, 2, 8, NUM_STEPS // STEPS_AN_EPOCH)
        while f"step {step}/" not in self.log(name, 0).read_text():
            if any(process.poll() is not None for process in started):
                sys.exit(f"{name}: see {self.log(name, 0)}")
            time.sleep(0.1)
        return started

    def losses(self, name: str) -> np.ndarray:
        """Of each training step."""
        lines = [line for line in runs.logged(self.folder / name) if line["split"] == "train"]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return np.array([line["loss"] for line in lines])

    def observed(self, name: str, process: int) -> tuple[dict[int, dict], list[list[int]]]:
        """What each step saw, the same each time where it was taken again; the records read."""
        lines = (self.folder / f"{name}.observed" / f"{process}.jsonl").read_text().splitlines()
        seen, read = {}, []
        for line in map(json.loads, lines):
            if "read" in line:
                read.append(line["read"])
            elif seen.setdefault(line["step"], line) != line:
                sys.exit(f"{name}: step {line['step']} saw something else when taken again")
        return seen, read

    def copy(self, name: str, new: str) -> None:
        """Copies a run, to be continued otherwise."""
        for suffix in ("", ".observed"):
            shutil.copytree(self.folder / f"{name}{suffix}", self.folder / f"{new}{suffix}")


def main(_) -> None:
    """Prints each comparison, the last line as JSON."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(_WORKDIR.value or temporary).absolute()
        all_runs = Runs(folder)
        num_epochs = NUM_STEPS // STEPS_AN_EPOCH
        figures = {}

        def compare(name: str) -> None:
            found, expected = all_runs.losses(name), all_runs.losses("one process")
            same = all_runs.observed(name, 0)[0] == all_runs.observed("one process", 0)[0]
            difference = float(np.abs(found / expected - 1).max())
            figures[name] = {"loss_difference": difference, "same_samples_and_views": same}
            print(
                f"{name}: losses of {len(found)} steps within {difference:.1e}, samples and views "
                + ("the same" if same else "DIFFERENT"),
                flush=True,
            )

        def end(name: str, step: int, victim: int, how: signal.Signals) -> None:
            """Signals one of two processes, and says how they end."""
            processes = all_runs.launch_until(name, step)
            processes[victim].send_signal(how)
            told = time.monotonic()
            # Its own end was asked for; of interest is the other's.
            statuses = [process.wait(timeout=_TIMEOUT) for process in (processes[1 - victim],)]
            seconds = round(time.monotonic() - told, 1)
            statuses.append(processes[victim].wait(timeout=_TIMEOUT))
            said = [
                line
                for line in all_runs.log(name, 1 - victim).read_text().splitlines()
                if line.startswith("error: ") or "interrupted" in line
            ]
            figures[f"{how.name} to process {victim}"] = {
                "seconds_until_the_other_ended": seconds,
                "its_status": statuses[0],
                "own_status": statuses[1],
                "newest_checkpoint": max(runs.saved_steps(folder / name)),
            }
            print(
                f"{how.name} to process {victim} after step {step}: the other ended {seconds} s "
                f"later with status {statuses[0]} (itself {statuses[1]})\n  {said[-1:]}",
                flush=True,
            )

        all_runs.run("one process", 1, 8, num_epochs)
        seen, _ = all_runs.observed("one process", 0)
        samples = np.concatenate([seen[step]["samples"] for step in range(NUM_STEPS)])
        # Every place once an epoch: 16 of them, each of two seasons, so of 32 records.
        figures["samples"] = {"seen": len(samples), "different": len(np.unique(samples))}
        print(f"{len(samples)} samples seen, {len(np.unique(samples))} different ones", flush=True)

        all_runs.run("two processes", 2, 8, num_epochs)
        compare("two processes")
        read = [all_runs.observed("two processes", process)[1] for process in range(2)]
        figures["rows_a_read"] = sorted({len(rows) for reads in read for rows in reads})
        figures["event_files"] = len(list((folder / "two processes/tensorboard").glob("*")))
        print(
            f"each process read {figures['rows_a_read']} of {BATCH_SIZE} records at a time; "
            f"{figures['event_files']} event file",
            flush=True,
        )

        all_runs.run("8 to 4 to 1", 1, 8, 4)
        all_runs.copy("8 to 4 to 1", "1 to 2 processes")
        all_runs.run("8 to 4 to 1", 1, 4, 7)
        all_runs.run("8 to 4 to 1", 1, 1, num_epochs)
        compare("8 to 4 to 1")
        all_runs.run("1 to 2 processes", 2, 8, num_epochs)
        compare("1 to 2 processes")

        end("ended", 5, 1, signal.SIGKILL)
        end("ended", 9, 0, signal.SIGKILL)
        end("ended", 13, 1, signal.SIGTERM)
        all_runs.run("ended", 2, 8, num_epochs)
        compare("ended")
        print(json.dumps(figures))


if __name__ == "__main__":
    app.run(main)
