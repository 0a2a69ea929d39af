"""A run that is killed and continued against one that is not: `python -m tests.bench.gpu.resume`.

ResNet-18 in bfloat16 on made-up data. Both runs take their programs from one compilation cache, as
one run and its continuation do. All arrays of their last checkpoints must be the same, bit by bit.
With `config.deterministic` where the configuration has it; a third run, whole and without it, says
whether two runs agree by themselves.
"""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

from absl import app

from configs import pretrain
from tests import runs
from tests.bench import records
from tests.bench.gpu import recipe

LOCATIONS, SEASONS, CROP, BATCH_SIZE = 32, 2, 96, 16
EPOCHS, EVERY = 30, 5  # of two steps
KILLED_AFTER = "step 24/"  # the checkpoint of step 20 is finished by then, or 10's is


def command(workdir: pathlib.Path, data_dir: str, **more) -> list[str]:
    """A run with checkpoints on the way and no validation."""
    fields = {
        "data.dir": data_dir,
        "data.name": "made_up",
        "data.validation_fraction": 0.0,
        "data.crop_size": CROP,
        "network.depth": 18,
        "network.dtype": "bfloat16",
        "num_devices": 1,
        "batch_size": BATCH_SIZE,
        "num_epochs": EPOCHS,
        "checkpoint_every_epochs": EVERY,
        "log_every_steps": 1,
        "schedule.name": "constant",
        "optimizer.learning_rate": 1e-3,
        **(recipe.TINY_FIELDS if recipe.TINY.value else {}),
        **more,
    }
    flags = {f"config.{name}": value for name, value in fields.items()}
    return runs.command("cromss_jax.main", config="configs/pretrain.py", workdir=workdir, **flags)


def finish(line: list[str]) -> None:
    """Runs a command to its end."""
    done = subprocess.run(
        line, cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(done.stdout[-4000:])


def kill(line: list[str]) -> None:
    """Starts a run and ends it by SIGKILL after some steps."""
    process = subprocess.Popen(
        line, cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = ""
    for text in process.stdout:
        said += text
        if KILLED_AFTER in text:
            process.kill()
    if process.wait() != -signal.SIGKILL:
        sys.exit(f"the run was not killed: {said[-4000:]}")


def main(_) -> None:
    """Prints what is the same, the last line as JSON."""
    known = "deterministic" in pretrain.get_config()
    asked = {"deterministic": True} if known else {}
    figures = {"deterministic": known}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        crop = recipe.TINY_FIELDS["data.crop_size"] if recipe.TINY.value else CROP
        data_dir = records.write_dataset(folder / "data", crop, LOCATIONS, SEASONS, 1)

        kill(command(folder / "killed", data_dir, **asked))
        figures["steps_saved_when_killed"] = runs.saved_steps(folder / "killed")
        finish(command(folder / "killed", data_dir, **asked))
        finish(command(folder / "whole", data_dir, **asked))
        digests = {n: runs.final_digest(folder / n) for n in ("killed", "whole")}
        figures["killed_and_whole_are_the_same"] = digests["killed"] == digests["whole"]
        print(f"{digests}, saved when killed: {figures['steps_saved_when_killed']}", flush=True)
        logs = [runs.logged(folder / n) for n in digests]
        unequal = (a["step"] for a, b in itertools.zip_longest(*logs, fillvalue={}) if a != b)
        figures["first_step_logged_otherwise"] = next(unequal, None)
        recipe.show(figures)

        if known:
            for number in (1, 2):
                finish(command(folder / f"free{number}", data_dir))
            free = {runs.final_digest(folder / f"free{number}") for number in (1, 2)}
            figures["two_free_runs_are_the_same"] = len(free) == 1
            recipe.show(figures)
    if not figures["killed_and_whole_are_the_same"]:
        sys.exit("the killed and continued run ends otherwise than the whole one")


if __name__ == "__main__":
    app.run(main)
