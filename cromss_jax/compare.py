"""Prints one table of several finetuning runs: `python -m cromss_jax.compare RUN [RUN ...]`.

The layout is that of the paper: one row per data set, one column per input and initial weights.
Each cell is the mIoU in percent with the encoder frozen / fine-tuned, as mean ± standard deviation
over the seeds.
"""

import sys
from collections.abc import Iterable

import numpy as np
from absl import app
from etils import epath

from cromss_jax import files
from cromss_jax.errors import UserError
from cromss_jax.method import metrics
from cromss_jax.results import report

# The settings that all runs of a table must share.
_SAME = ("resnet", "num_train_tiles")
# What else a table is made of.
_KEYS = ("confusions", "dataset", "encoder", "input", "num_bands", "weights")


class CompareError(UserError):
    """Runs that make no table. The message is for the user."""


def table(folders: Iterable[str]) -> str:
    """The table of the runs in the given folders, in Markdown.

    Raises:
      CompareError: if a folder has no results, or if two runs belong to the same cell.
      files.PathError: if the program cannot read from the storage of a folder.
    """
    cells: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    kinds: list[dict] = []
    for folder in folders:
        path = files.absolute(folder) / "results.json"
        if not path.is_file():
            raise CompareError(f"{path} not found: pass the folders of finished finetuning runs")
        run = _results(path)
        if run["encoder"] not in ("frozen", "trained"):
            raise CompareError(
                f"{folder}: the encoder is {run['encoder']!r}; the table needs 'frozen' or "
                "'trained'"
            )
        kind = {key: run[key] for key in _SAME}
        if kinds and kind not in kinds:
            raise CompareError(
                f"{folder} has {kind} and the runs before it have {kinds[0]}: make one table for "
                "each"
            )
        kinds.append(kind)
        name = run["weights"] + (f" {run['num_bands']}B" if run["input"] == "s2" else "")
        cell = cells.setdefault((run["dataset"], run["input"], name), {})
        if run["encoder"] in cell:
            raise CompareError(
                f"{folder} is a second run with weights {run['weights']} and encoder "
                f"{run['encoder']}: give one of them another --config.weights_name in training"
            )
        cell[run["encoder"]] = [
            metrics.scores(np.array(confusion))["miou"] for confusion in run["confusions"]
        ]
    return report.transfer_table(cells)


def _results(path: epath.Path) -> dict:
    """The content of a run's results.

    Raises:
      CompareError: if it is damaged.
    """
    try:
        run = files.parse_json(path.read_bytes())
        missing = {*_SAME, *_KEYS} - run.keys()
    except (ValueError, AttributeError) as error:
        missing = {str(error)}
    if missing:
        raise CompareError(
            f"{path} is damaged ({', '.join(sorted(missing))}): start the run again, which writes "
            "it anew"
        )
    return run


def main(arguments: list[str]) -> None:
    """Prints the table. Errors that the user can fix are printed as one sentence, exit code 1."""
    if len(arguments) < 2:
        raise app.UsageError("no folder given: pass the folders of one or more finetuning runs")
    try:
        print(table(arguments[1:]))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
