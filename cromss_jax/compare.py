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

# The settings that all runs of a table must share, and those that the runs of a row must.
_OF_ALL, _OF_A_ROW = ("resnet",), ("num_train_tiles", "decoder")
_TEXTS = ("dataset", "input", "weights")
# What each run says; those of earlier versions say no decoder.
_KEYS = {*_TEXTS, "confusions", "encoder", "num_bands", "num_train_tiles", "resnet"}


class CompareError(UserError):
    """Runs that make no table. The message is for the user."""


def table(folders: Iterable[str]) -> str:
    """The table of the runs in the given folders, in Markdown.

    Raises:
      CompareError: if a folder has no results, or if two runs belong to the same cell.
      files.PathError: if the program cannot read from the storage of a folder.
    """
    cells: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    kinds: dict[str | None, dict] = {}
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
        for scope, keys in ((None, _OF_ALL), (run["dataset"], _OF_A_ROW)):
            kind = {key: run.get(key) for key in keys}
            if kind != kinds.setdefault(scope, kind):
                raise CompareError(
                    f"{folder} has {kind} and the runs before it have {kinds[scope]}: make one "
                    "table for each"
                )
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
        wrong = _KEYS - run.keys()
        wrong |= {name for name in _TEXTS if not isinstance(run.get(name, ""), str)}
        shapes = [np.shape(np.array(own, np.int64)) for own in run.get("confusions", ())]
        if not wrong and not (shapes and all(s[:1] + s[:1] == s for s in shapes)):
            wrong = {"confusions"}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        wrong = {str(error)}
    if wrong:
        raise CompareError(
            f"{path} is damaged ({', '.join(sorted(wrong))}): start the run again, which writes "
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
