"""Several processes and other numbers of devices: `python -m tests.bench.processes`.

Runs of the tiny recipe, SGD from weights away from the kinks of ReLUs, where rounding is not
amplified: one process of 8 devices; two of 4; 8 devices continued on 4 and then on 1; one process
continued as two. Losses are compared step by step. Then one of two processes is killed: the other
must end by itself, and the run must go on.
"""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from tests import runs

_WORKDIR = flags.DEFINE_string("workdir", None, "Where runs go; a temporary folder by default")
NUM_STEPS, STEPS_AN_EPOCH = 20, 2


def make_start(folder: pathlib.Path) -> pathlib.Path:
    """Weights away from the kinks of ReLUs, as a folder to start from."""
    code = """
import dataclasses, sys
import jax
from etils import epath
from cromss_jax import step, torch_keys, weight_files, weights
from tests import runs
from tests.test_sharding import away_from_kinks
config = runs.tiny_config("unused")
state = away_from_kinks(jax.jit(lambda k: step.init_state(config, k))(jax.random.key(0)))
arrays = torch_keys.to_torch_state(state.params) | torch_keys.to_torch_state(state.batch_stats)
found = weights.Weights(weights.Network.of_config(config), arrays)
weight_files.write_folder(epath.Path(sys.argv[1]), found)
"""
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=runs.ROOT)
    return folder


class Runs:
    """Starts the command with so many processes and devices."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.data_dir = runs.make_data(folder, locations=18, seasons=2, tile_size=48)
        self.start = make_start(folder / "start")

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
            "batch_size": 8,
            "checkpoint_every_epochs": 1,
            "eval_every_epochs": 100,
            "log_every_steps": 1,
            "init_from": self.start,
            "optimizer.learning_rate": 1e-3,
        }
        line = runs.command(
            "cromss_jax.main",
            config="configs/pretrain.py:sample",
            workdir=self.folder / name,
            **{f"config.{k}": v for k, v in fields.items()},
        )
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
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
            }
            log = (self.folder / f"{name}.{index}.log").open("a")
            command = [*line, *more] if processes > 1 else line
            started.append(
                subprocess.Popen(command, cwd=runs.ROOT, env=environment, stdout=log, stderr=log)
            )
        return started

    def run(self, name: str, processes: int, devices: int, num_epochs: int) -> None:
        """The same to its end."""
        for process in self.launch(name, processes, devices, num_epochs):
            if process.wait(timeout=600) != 0:
                sys.exit(f"{name}: see {self.folder}/{name}.*.log")

    def losses(self, name: str) -> np.ndarray:
        """Of each training step."""
        lines = [line for line in runs.logged(self.folder / name) if line["split"] == "train"]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return np.array([line["loss"] for line in lines])

    def copy(self, name: str, new: str) -> None:
        shutil.copytree(self.folder / name, self.folder / new)


def main(_) -> None:
    """Prints each comparison, the last line as JSON."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(_WORKDIR.value or temporary).absolute()
        all_runs = Runs(folder)
        num_epochs = NUM_STEPS // STEPS_AN_EPOCH
        figures = {}

        def compare(name: str) -> None:
            found, expected = all_runs.losses(name), all_runs.losses("one process")
            figures[name] = float(np.abs(found / expected - 1).max())
            print(f"{name}: losses of {len(found)} steps within {figures[name]:.1e}", flush=True)

        all_runs.run("one process", 1, 8, num_epochs)
        all_runs.run("two processes", 2, 8, num_epochs)
        compare("two processes")

        all_runs.run("8 to 4 to 1", 1, 8, 4)
        all_runs.copy("8 to 4 to 1", "1 to 2 processes")
        all_runs.run("8 to 4 to 1", 1, 4, 7)
        all_runs.run("8 to 4 to 1", 1, 1, num_epochs)
        compare("8 to 4 to 1")
        all_runs.run("1 to 2 processes", 2, 8, num_epochs)
        compare("1 to 2 processes")

        first, second = all_runs.launch("killed", 2, 8, num_epochs)
        log = folder / "killed.0.log"
        while not re.search(r"step 9/", log.read_text()):
            time.sleep(0.2)
        second.kill()
        killed = time.monotonic()
        status = first.wait(timeout=600)
        figures["seconds_until_the_other_ended"] = round(time.monotonic() - killed, 1)
        figures["its_exit_status"] = status
        print(log.read_text()[-1500:])
        all_runs.run("killed", 2, 8, num_epochs)
        compare("killed")
        print(json.dumps(figures))


if __name__ == "__main__":
    app.run(main)
