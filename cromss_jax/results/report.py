"""Reports of a run: metric logs, TensorBoard and tables."""

import functools
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from cromss_jax import files


class MetricLog:
    """Writes scalars to `metrics.jsonl`, and scalars and pictures to TensorBoard; one process."""

    def __init__(self, workdir: str, step: int, validated: bool = True):
        """Opens the logs and removes entries that an interrupted run wrote after `step`.

        Args:
          workdir: of the run.
          step: from where the run continues.
          validated: whether the validation of that step is done; if not, its entry is removed.
        """
        self._path = epath.Path(workdir) / "metrics.jsonl"
        kept = [
            entry
            for entry in files.read_metrics(self._path)
            if entry["step"] < step
            or (entry["step"] == step and (validated or entry["split"] != "validation"))
        ]
        self._text = "".join(json.dumps(entry) + "\n" for entry in kept)
        files.write_whole(self._path, self._text.encode())
        self._workdir, self._step = workdir, step

    def open_board(self) -> None:
        """Opens TensorBoard now; otherwise the first scalars wait some seconds for its import."""
        _ = self._board

    @functools.cached_property
    def _board(self):
        # Imported late because it imports torch if that is installed, which delays the start.
        import tensorboardX

        folder = os.path.join(self._workdir, "tensorboard")
        return tensorboardX.SummaryWriter(folder, purge_step=self._step + 1)

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes one line of named numbers; NaN and infinity become null."""
        finite = {k: float(v) if np.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"step": step, "split": split, **finite}) + "\n"
        self._text += line
        if files.in_bucket(self._path):
            files.write_whole(self._path, self._text.encode())
        else:
            with self._path.open("a") as file:
                file.write(line)
        for name, value in finite.items():
            if value is not None:
                self._board.add_scalar(f"{split}/{name}", value, step)
        self._board.flush()

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture, [H, W, 3] uint8, to TensorBoard."""
        self._board.add_image(name, pixels, step, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        """Closes the logs."""
        if "_board" in vars(self):
            self._board.close()


def _percent(values: Sequence[float]) -> str:
    """The mean in percent, with the standard deviation if there are several values."""
    known = np.array([value for value in values if not np.isnan(value)])
    if not known.size:
        return "–"
    mean = f"{100 * known.mean():.1f}"
    # The sample standard deviation (ddof=1), because the seeds are a sample.
    return mean if known.size == 1 else f"{mean} ± {100 * known.std(ddof=1):.1f}"


def _in_a_cell(text: str) -> str:
    """A text of others in a table of Markdown, where a bar would begin the next cell."""
    return text.replace("|", r"\|")


def scores_table(scores: Mapping[str, Sequence[Mapping]], class_names: Sequence[str]) -> str:
    """Table of scores in Markdown, in percent: OA, AA, mIoU, mF1 and the IoU of each class.

    Args:
      scores: by row, `metrics.scores` of one or more runs. For several runs the table shows mean ±
        standard deviation.
      class_names: C names.
    """
    names = " | ".join(map(_in_a_cell, class_names))
    lines = [f"| scored | OA | AA | mIoU | mF1 | {names} |"]
    lines.append("|---" * (5 + len(class_names)) + "|")
    for name, runs in scores.items():
        columns = [[run[key] for run in runs] for key in ("oa", "aa", "miou", "mf1")]
        columns += np.stack([run["iou"] for run in runs], axis=-1).tolist()
        lines.append(f"| {_in_a_cell(name)} | " + " | ".join(map(_percent, columns)) + " |")
    return "\n".join(lines) + "\n"


def transfer_table(cells: Mapping[tuple[str, str, str], Mapping[str, Sequence[float]]]) -> str:
    """Table of mIoU of many runs in Markdown, like the paper's: frozen / fine-tuned encoder.

    Args:
      cells: the mIoU of each run by (data set, input, weights), then by encoder: "frozen" or
        "trained" (fine-tuned).
    """
    rows = list(dict.fromkeys(dataset for dataset, _, _ in cells))
    columns = list(dict.fromkeys(key[1:] for key in cells))
    names = (f"{input_.upper()} {_in_a_cell(name)}" for input_, name in columns)
    lines = ["| | " + " | ".join(names) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for dataset in rows:
        shown = []
        for column in columns:
            by_encoder = cells.get((dataset, *column), {})
            pair = (by_encoder.get(encoder) for encoder in ("frozen", "trained"))
            shown.append(" / ".join(_percent(values) if values else "–" for values in pair))
        lines.append(f"| {dataset} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"
