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

from cromss_jax import metrics, report


def table(folders: Iterable[str]) -> str:
    """The table of the runs in some folders.

    Raises:
      ValueError: for a folder without results, or two runs for one place of the table.
    """
    cells: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for folder in folders:
        path = pathlib.Path(folder) / "results.json"
        if not path.is_file():
            raise ValueError(f"{path} not found: name folders of finished finetuning runs")
        run = json.loads(path.read_text())
        cell = cells.setdefault((run["dataset"], run["input"], run["weights"]), {})
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
