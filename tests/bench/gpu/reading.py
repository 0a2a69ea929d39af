"""Reading and `main` by reading threads: `python -m tests.bench.gpu.reading --batch_size=64`.

Made-up records of 0.5 MB from the local disk, written just before and so most likely in memory.
First the input pipeline alone, then `main` with it: images a second, and the share of time in which
the device waits for data, both as the run logs them from its second step on.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from cromss_jax import sensors
from cromss_jax.data import input_pipeline
from tests import runs
from tests.bench import records
from tests.bench.gpu import recipe

_THREADS = flags.DEFINE_list("threads", ["8", "16", "2"], "Numbers of reading threads")
_BATCHES = flags.DEFINE_integer("batches", 40, "Batches to read, and steps to train")
_RUN_THREADS = flags.DEFINE_list("run_threads", ["16", "2"], "The same, for runs of `main`")


def reading_speed(dataset: input_pipeline.TileDataset, num_threads: int) -> float:
    """Images a second of the input pipeline."""
    order = input_pipeline.training_records(
        dataset, np.arange(dataset.num_locations), recipe.BATCH_SIZE.value, seed=0
    )
    batches = input_pipeline.training_batches(
        dataset, sensors.MODALITIES, order, num_threads=num_threads
    )
    for _ in range(num_threads + 2):  # those of the buffer
        next(batches)
    started = time.perf_counter()
    for _ in range(_BATCHES.value):
        next(batches)
    return _BATCHES.value * recipe.BATCH_SIZE.value / (time.perf_counter() - started)


def run_speed(folder: pathlib.Path, data_dir: str, num_threads: int) -> dict[str, float]:
    """What a run of `main` logs."""
    epochs = -(-_BATCHES.value * recipe.BATCH_SIZE.value // recipe.NUM_LOCATIONS)
    more = {
        "data.dir": data_dir,
        "data.num_threads": num_threads,
        "num_epochs": epochs,
        "log_every_steps": _BATCHES.value,
        "checkpoint_every_epochs": epochs + 1,
    }
    chosen = {f"config.{name}": value for name, value in {**recipe.fields(), **more}.items()}
    workdir = folder / f"threads{num_threads}"
    line = runs.command("cromss_jax.main", config="configs/pretrain.py", workdir=workdir, **chosen)
    started = time.perf_counter()
    done = subprocess.run(
        line, cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(done.stdout[-4000:])
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    first = next(entry for entry in lines if "wait_for_data" in entry)
    return {
        "images_per_second": round(first["samples_per_second"], 1),
        "wait_for_data": round(first["wait_for_data"], 4),
        "steps": first["step"],
        "seconds_of_the_run": round(time.perf_counter() - started, 1),
    }


def main(_) -> None:
    """Prints the figures, the last line as JSON."""
    config = recipe.make_config()
    figures = {"cores": os.cpu_count(), "reading": {}, "main": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        started = time.perf_counter()
        data_dir = records.write_dataset(
            folder / "data",
            config.data.crop_size,
            recipe.NUM_LOCATIONS,
            records.SEASONS,
            os.cpu_count(),
        )
        figures["writing_seconds"] = round(time.perf_counter() - started, 1)
        dataset = input_pipeline.open_dataset(data_dir, config.data.name)
        size = sum(path.stat().st_size for path in folder.rglob("*.array_record*"))
        figures["bytes_a_record"] = size // len(dataset.source)
        for count in map(int, _THREADS.value):
            figures["reading"][count] = round(reading_speed(dataset, count), 1)
            print(f"{count} threads read {figures['reading'][count]} images/s", flush=True)
        recipe.show(figures)
        for count in map(int, _RUN_THREADS.value):
            figures["main"][count] = run_speed(folder, data_dir, count)
            print(f"{count} threads, main: {figures['main'][count]}", flush=True)
            recipe.show(figures)


if __name__ == "__main__":
    app.run(main)
