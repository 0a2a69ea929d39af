"""Speed of `main` itself, data included: `python -m tests.bench.end_to_end`.

Runs pretraining from the command line on the procedural sample, a batch of 8 crops of 128 pixels,
for ResNet-18 and ResNet-50: images a second and the share of time that the device waits for data,
both as the run logs them from its first step on. Then the sample recipe's time from the start of
the process to the end of the first step: once with nothing compiled, once by the same command
continuing the run.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from tests import runs

_STEPS = flags.DEFINE_integer("steps", 30, "Steps of each run", lower_bound=3)
_DEPTHS = flags.DEFINE_list("depths", ["18", "50"], "ResNets")
_STARTS = flags.DEFINE_bool("starts", True, "Whether starting is measured")

BATCH_SIZE, CROP, TILE = 8, 128, 132


def command(workdir: pathlib.Path, variant: str, data_dir: str, **fields) -> list[str]:
    """Of a run without validation, which logs as the bench needs it."""
    fields = {"data.dir": data_dir, "data.validation_fraction": 0.0, **fields}
    return runs.command(
        "cromss_jax.main",
        config=f"configs/pretrain.py{variant}",
        workdir=workdir,
        **{f"config.{name}": value for name, value in fields.items()},
    )


def environment() -> dict[str, str]:
    """Without a cache of compiled programs that others filled."""
    return {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}


def speed(folder: pathlib.Path, data_dir: str, depth: str, num_locations: int) -> dict[str, float]:
    """Of a run of some steps."""
    num_steps = _STEPS.value
    workdir = folder / f"resnet{depth}"
    line = command(
        workdir,
        "",
        data_dir,
        batch_size=BATCH_SIZE,
        num_epochs=-(-num_steps * BATCH_SIZE // num_locations),
        log_every_steps=num_steps,
        checkpoint_every_epochs=1000,
        **{
            "data.crop_size": CROP,
            "network.depth": depth,
            "schedule.name": "constant",
            "optimizer.learning_rate": 1e-4,
        },
    )
    done = subprocess.run(line, cwd=runs.ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    first = next(entry for entry in lines if "wait_for_data" in entry)
    shutil.rmtree(workdir)
    return {
        f"resnet{depth}_images_per_second": round(first["samples_per_second"], 2),
        f"resnet{depth}_wait_for_data": round(first["wait_for_data"], 5),
    }


def seconds_to_first_step(folder: pathlib.Path, data_dir: str, name: str) -> float:
    """From the start of the process until its first step is done; then the run is told to stop."""
    fields = {"schedule.name": "constant", "log_every_steps": 1}
    line = command(folder / name, ":sample", data_dir, **fields)
    started = time.perf_counter()
    process = subprocess.Popen(
        line, cwd=runs.ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    said = ""
    seconds = None
    for text in process.stderr:
        said += text
        if seconds is None and re.search(r"step \d+/", text):
            seconds = time.perf_counter() - started
            process.terminate()  # saves the step
    if process.wait() or seconds is None:
        sys.exit(said[-3000:])
    return seconds


def main(_) -> None:
    """Prints the figures, the last line as JSON."""
    figures = {}
    num_locations = 32
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        data_dir = runs.make_data(
            folder, locations=num_locations, seasons=4, tile_size=TILE, seed=0
        )
        for depth in _DEPTHS.value:
            figures |= speed(folder, data_dir, depth, num_locations)
        if _STARTS.value:
            for which in ("first", "second"):
                seconds = seconds_to_first_step(folder, data_dir, "starts")
                figures[f"{which}_start_seconds"] = round(seconds, 1)
    for key, value in figures.items():
        print(f"{key:32}{value}")
    print(json.dumps({**figures, "batch_size": BATCH_SIZE, "crop_size": CROP}))


if __name__ == "__main__":
    app.run(main)
