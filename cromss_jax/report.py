"""What people see of a run: metric logs, TensorBoard, tables and pictures."""

import json
import os
import pathlib
from collections.abc import Mapping

import matplotlib
import matplotlib.colors
import matplotlib.figure
import numpy as np
import tensorboardX
from matplotlib.backends.backend_agg import FigureCanvasAgg

from cromss_jax import sensors

_COLOURS = np.array([matplotlib.colors.to_rgb(c) for c in sensors.CLASS_COLOURS])
TITLES = {"s1": "Sentinel-1", "s2": "Sentinel-2", "labels": "Noisy label", "prior": "Prior"}
TITLES |= {"truth": "Truth", "prediction": "Prediction", "label_confidence": "Label confidence"}
TITLES |= {"selection_weights": "Selection weights"}


class MetricLog:
    """Writes scalars and pictures to `metrics.jsonl` and TensorBoard, on one process."""

    def __init__(self, workdir: str, step: int):
        """Opens the logs, dropping what an interrupted run wrote past `step`."""
        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        kept = []
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            # A kill may have cut the last line short.
            kept = [line for line in lines if line.endswith("\n")]
            kept = [line for line in kept if json.loads(line)["step"] <= step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self._path)
        self._board = tensorboardX.SummaryWriter(
            os.path.join(workdir, "tensorboard"), purge_step=step + 1
        )

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes one line of named numbers; NaN becomes null."""
        finite = {k: float(v) if np.isfinite(v) else None for k, v in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        for name, value in finite.items():
            if value is not None:
                self._board.add_scalar(f"{split}/{name}", value, step)
        self._board.flush()

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Shows [H, W, 3] uint8 in TensorBoard."""
        self._board.add_image(name, pixels, step, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        """Ends writing."""
        self._board.close()


def class_colours(labels: np.ndarray) -> np.ndarray:
    """Dynamic World's colours for [H, W] labels, ignored pixels black: [H, W, 3] in [0, 1]."""
    table = np.zeros((256, 3))
    table[: len(_COLOURS)] = _COLOURS
    return table[np.asarray(labels, np.uint8)]


def _stretch(image: np.ndarray) -> np.ndarray:
    """Stretches [H, W, 3] between its 2nd and 98th percentile, for looking at."""
    low, high = np.percentile(image, (2, 98), axis=(0, 1))
    return np.clip((image - low) / np.maximum(high - low, 1e-6), 0, 1)


def _drawable(name: str, values: np.ndarray, s2_bands: tuple[str, ...]) -> np.ndarray:
    if name == "s1":
        return _stretch(values[..., [0, 1, 0]])
    if name == "s2":
        colours = [s2_bands.index(band) for band in ("B4", "B3", "B2") if band in s2_bands]
        # Without all three colours, the first band in grey.
        return _stretch(values[..., colours if len(colours) == 3 else [0, 0, 0]])
    if name.startswith(("label_confidence", "selection_weights")):
        return values
    return class_colours(values)


def draw_samples(shown: Mapping[str, np.ndarray], s2_bands: tuple[str, ...]) -> np.ndarray:
    """Draws samples as rows and what is known of them as columns.

    Args:
      shown: what the picture step returns, [n, H, W] or [n, H, W, K].
      s2_bands: names of the bands of `shown["s2"]`.

    Returns:
      [H, W, 3] uint8.
    """
    order = ["s2", "s1", "truth", "labels", "prior"]
    order = [name for name in order if name in shown]
    order += sorted(name for name in shown if "/" in name)
    count = len(shown["labels"])
    figure = matplotlib.figure.Figure(figsize=(1.7 * len(order), 1.72 * count + 0.75), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(count, len(order), squeeze=False)
    for row in range(count):
        for axis, name in zip(axes[row], order, strict=True):
            drawn = _drawable(name, shown[name][row], s2_bands)
            axis.imshow(drawn, vmin=0, vmax=1, cmap="magma", interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                kind, _, modality = name.partition("/")
                axis.set_title(f"{TITLES[kind]} {modality.upper()}".strip(), fontsize=8)
    handles = [matplotlib.patches.Patch(color=c) for c in sensors.CLASS_COLOURS]
    figure.legend(handles, sensors.CLASS_NAMES, loc="lower center", ncols=9, fontsize=8)
    figure.subplots_adjust(0.005, 0.4 / (1.72 * count + 0.75), 0.995, 0.95, 0.03, 0.03)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_picture(path: str, pixels: np.ndarray) -> None:
    """Writes [H, W, 3] uint8 as PNG."""
    matplotlib.image.imsave(path, pixels)


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.1f}"


def results_table(scores: Mapping[str, Mapping], aurocs: Mapping[str, float]) -> str:
    """Results in Markdown.

    Args:
      scores: `metrics.scores` by "<what is scored> against <reference>".
      aurocs: area under the ROC curve of label confidence, by modality; empty without truth.
    """
    lines = ["| scored | OA | AA | mIoU | mF1 | " + " | ".join(sensors.CLASS_NAMES) + " |"]
    lines.append("|---" * (5 + sensors.NUM_CLASSES) + "|")
    for name, row in scores.items():
        means = [_percent(row[key]) for key in ("oa", "aa", "miou", "mf1")]
        per_class = [_percent(value) for value in row["iou"]]
        lines.append(f"| {name} | " + " | ".join(means + per_class) + " |")
    lines.append("\nIn percent; the classes' columns are IoU. Held-back locations, all seasons.")
    for modality, value in aurocs.items():
        lines.append(
            f"Label confidence tells wrong labels from right ones ({modality.upper()}): "
            f"AUROC {value:.3f}."
        )
    return "\n".join(lines) + "\n"
