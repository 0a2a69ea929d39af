"""Kills pretraining at random moments and compares the endings: `python -m tests.bench.kills`.

One run is left alone. Each of the others is killed (SIGKILL) at a moment drawn over the length of
the first, started again with the same command, and must end with the same bits and logs.
"""

import json
import os
import pathlib
import random
import subprocess
import tempfile
import time

from absl import app, flags

from tests import runs

_KILLS = flags.DEFINE_integer("kills", 10, "How many runs are killed")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments")


def main(_) -> None:
    """Prints every kill and its ending, the last line as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        data_dir = runs.make_data(folder, locations=16, seasons=2, tile_size=48)
        overrides = {f"config.{k}": v for k, v in runs.tiny_flags(data_dir).items()}

        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}

        def start(workdir: pathlib.Path) -> subprocess.Popen:
            line = runs.command(
                "cromss_jax.main",
                config="configs/pretrain.py:sample",
                workdir=workdir,
                **overrides,
            )
            log = (folder / f"{workdir.name}.log").open("a")
            return subprocess.Popen(line, cwd=runs.ROOT, env=environment, stdout=log, stderr=log)

        def finish(workdir: pathlib.Path) -> float:
            started = time.monotonic()
            code = start(workdir).wait()
            if code:
                raise RuntimeError((folder / f"{workdir.name}.log").read_text())
            return time.monotonic() - started

        reference = folder / "reference"
        finish(reference)
        digest, logged = runs.final_digest(reference), runs.logged(reference)
        # Killed runs take the programs that the first one compiled.
        length = finish(folder / "again")
        rng = random.Random(_SEED.value)
        equal = 0
        for number in range(_KILLS.value):
            workdir = folder / f"killed_{number}"
            moment = rng.uniform(0, length)
            process = start(workdir)
            time.sleep(moment)
            process.kill()
            process.wait()
            saved = runs.saved_steps(workdir)
            finish(workdir)
            same = runs.final_digest(workdir) == digest and runs.logged(workdir) == logged
            equal += same
            print(
                f"killed after {moment:5.1f} of {length:.1f} s, newest checkpoint "
                f"{max(saved, default=None)}: {'bit-equal' if same else 'DIFFERENT'}",
                flush=True,
            )
    print(json.dumps({"kills": _KILLS.value, "bit_equal_endings": equal}))


if __name__ == "__main__":
    app.run(main)
