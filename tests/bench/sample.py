"""The scores of `make pretrain`: `python -m tests.bench.sample`.

Generates the sample, pretrains on it by the sample's recipe, as `make pretrain` does, in a
temporary folder, and takes the scores of the last validation.
"""

import json
import pathlib
import subprocess
import tempfile

from absl import app

from tests import runs

# Of all that is validated.
SCORES = ("oa", "aa", "miou", "mf1", "label_confidence_auroc")


def main(_) -> None:
    """Prints the run's table, and its scores as JSON in the last line."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        data_dir = runs.make_data(folder, locations=64, seasons=4, tile_size=132, seed=0)
        workdir = folder / "run"
        fields = {"config": "configs/pretrain.py:sample", "config.data.dir": data_dir}
        subprocess.run(
            runs.command("cromss_jax.main", workdir=workdir, **fields), check=True, cwd=runs.ROOT
        )
        print((workdir / "results.md").read_text())
        lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "validation"][-1]
    kept = {k: v for k, v in last.items() if "/iou/" in k or set(k.split("/")) & set(SCORES)}
    print(json.dumps({k: v if v is None else round(v, 6) for k, v in kept.items()}))


if __name__ == "__main__":
    app.run(main)
