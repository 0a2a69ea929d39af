"""One table of several finetuning runs: `python -m cromss_jax.compare RUN [RUN ...]`.

Laid out like the paper's: a row a data set, a column an input and its first weights, each cell
mIoU in percent, encoder frozen / trained, mean ± standard deviation over the seeds.
"""

import json
import pathlib
import sys
from collections.abc import Iterable

import numpy as np
from absl import app

from cromss_jax.method import metrics
from cromss_jax.results import report

# What runs in one table have in common.
_SAME = ("resnet", "num_train_tiles")


def table(folders: Iterable[str]) -> str:
    """The table of the runs in some folders.

    Raises:
      ValueError: for a folder without results, or two runs for one place of the table.
    """
    cells: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    kinds: list[dict] = []
    for folder in folders:
        path = pathlib.Path(folder) / "results.json"
        if not path.is_file():
            raise ValueError(f"{path} not found: name folders of finished finetuning runs")
        run = json.loads(path.read_text())
        if run["encoder"] not in ("frozen", "trained"):
            raise ValueError(
                f"{folder}: encoder {run['encoder']!r}; the table has frozen and trained ones"
            )
        kind = {key: run[key] for key in _SAME}
        if kinds and kind not in kinds:
            raise ValueError(
                f"{folder} is a run of {kind}, not of {kinds[0]} as those before it: make a table "
                "of each"
            )
        kinds.append(kind)
        name = run["weights"] + (f" {run['num_bands']}B" if run["input"] == "s2" else "")
        cell = cells.setdefault((run["dataset"], run["input"], name), {})
        if run["encoder"] in cell:
            raise ValueError(
                f"{folder}: a second run with weights {run['weights']} and encoder "
                f"{run['encoder']}; tell them apart by --config.weights_name when training"
            )
        cell[run["encoder"]] = [
            metrics.scores(np.array(confusion))["miou"] for confusion in run["confusions"]
        ]
    return report.transfer_table(cells)


def main(arguments: list[str]) -> None:
    """Prints the table; a sentence for what the user can mend."""
    if len(arguments) < 2:
        raise app.UsageError("name the folders of one or more finetuning runs")
    try:
        print(table(arguments[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
