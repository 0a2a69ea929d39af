"""Pictures of a run: samples with their labels, confidences and weights, and confusion matrices.

Import this module only where something is drawn: matplotlib takes a second to import.
"""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.colors
import matplotlib.figure
import matplotlib.image
import matplotlib.patches
import numpy as np
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg

from cromss_jax import files
from cromss_jax.legend import Legend

TITLES = {"s1": "Sentinel-1", "s2": "Sentinel-2", "labels": "Noisy label", "prior": "Prior"}
TITLES |= {"truth": "Truth", "prediction": "Prediction", "label_confidence": "Label confidence"}
TITLES |= {"selection_weights": "Selection weights", "suggested": "Suggested"}
TITLES |= {"wrong_probability": "Label is wrong"}
_SHARES = ("label_confidence", "selection_weights", "wrong_probability")


def class_colours(labels: np.ndarray, legend: Legend) -> np.ndarray:
    """The legend's colours for [H, W] labels, ignored pixels black: [H, W, 3] in [0, 1]."""
    table = np.zeros((256, 3))
    table[: len(legend)] = [matplotlib.colors.to_rgb(c) for c in legend.colours]
    return table[np.asarray(labels, np.uint8)]


def _stretch(image: np.ndarray) -> np.ndarray:
    """Stretches the contrast of [H, W, 3] from its 2nd and 98th percentile to 0 and 1."""
    low, high = np.percentile(image, (2, 98), axis=(0, 1))
    return np.clip((image - low) / np.maximum(high - low, 1e-6), 0, 1)


def _drawable(
    name: str, values: np.ndarray, s2_bands: tuple[str, ...], legend: Legend
) -> np.ndarray:
    if name == "s1":
        return _stretch(values[..., [0, 1, 0]])
    if name == "s2":
        colours = [s2_bands.index(band) for band in ("B4", "B3", "B2") if band in s2_bands]
        # If red, green or blue is missing, the first band is shown in grey.
        return _stretch(values[..., colours if len(colours) == 3 else [0, 0, 0]])
    if name.startswith(_SHARES):
        return values
    return class_colours(values, legend)


def draw_samples(
    shown: Mapping[str, np.ndarray], s2_bands: tuple[str, ...], legend: Legend
) -> np.ndarray:
    """Draws one row per sample, with a column for each of its maps.

    Args:
      shown: the result of the picture step, [n, H, W] or [n, H, W, K] by name.
      s2_bands: names of the bands in `shown["s2"]`.
      legend: the classes.

    Returns:
      [H, W, 3] uint8.
    """
    order = ["s2", "s1", "truth", "labels", "prior"]
    order = [name for name in order if name in shown]
    order += sorted(name for name in shown if "/" in name)
    count = len(shown["labels"])
    # Below the samples, nine classes a line, or five below few maps.
    per_line = 9 if len(order) > 5 else 5
    bottom = 0.4 + 0.2 * ((len(legend) - 1) // per_line)
    height = 1.72 * count + 0.35 + bottom
    figure = matplotlib.figure.Figure(figsize=(1.7 * len(order), height), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(count, len(order), squeeze=False)
    for row in range(count):
        for axis, name in zip(axes[row], order, strict=True):
            drawn = _drawable(name, shown[name][row], s2_bands, legend)
            axis.imshow(drawn, vmin=0, vmax=1, cmap="magma", interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                kind, _, modality = name.partition("/")
                axis.set_title(f"{TITLES[kind]} {modality.upper()}".strip(), fontsize=8)
    handles = [matplotlib.patches.Patch(color=c) for c in legend.colours]
    figure.legend(handles, legend.names, loc="lower center", ncols=per_line, fontsize=8)
    top = max(0.95, 1 - 0.4 / height)
    figure.subplots_adjust(0.005, bottom / height, 0.995, top, 0.03, 0.03)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_picture(path: epath.Path, pixels: np.ndarray) -> None:
    """Writes [H, W, 3] uint8 as PNG."""
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels, format="png")
    files.write_whole(path, buffer.getvalue())


def draw_confusion(confusion: np.ndarray, legend: Legend) -> np.ndarray:
    """Draws a confusion matrix in percent of each row, with the classes in their colours.

    Args:
      confusion: [C, C] integers; rows are labels, columns are predictions.
      legend: names and colours of the classes.

    Returns:
      [H, W, 3] uint8.
    """
    count = len(legend)
    shares = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    # Many classes are drawn smaller, without numbers, so that the picture stays below 3000 pixels.
    shrink = min(1.0, 40 / count)
    size = (0.62 * shrink * count + 2.6, 0.5 * shrink * count + 2.2)
    figure = matplotlib.figure.Figure(figsize=size, dpi=100)
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.imshow(shares, vmin=0, vmax=100, cmap="Greys", aspect="auto")
    for row, column in np.ndindex(count, count) if shrink == 1 else ():
        share = shares[row, column]
        colour = "white" if share > 55 else "black"
        axis.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    for i, colour in enumerate(legend.colours):
        patch = {"color": colour, "clip_on": False, "lw": 0}
        axis.add_patch(matplotlib.patches.Rectangle((-0.78, i - 0.5), 0.28, 1, **patch))
        axis.add_patch(matplotlib.patches.Rectangle((i - 0.5, count - 0.5), 1, 0.28, **patch))
    axis.set_xticks(range(count), legend.names, rotation=45, ha="right", fontsize=8 * shrink)
    axis.set_yticks(range(count), legend.names, fontsize=8 * shrink)
    axis.tick_params(length=0, pad=12)
    axis.set_xlabel("predicted")
    axis.set_ylabel("labelled (rows in percent)")
    figure.tight_layout()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_reliability(groups: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Draws observed over predicted shares, with the number of pixels below.

    Args:
      groups: each with `predicted` and `observed` in [0, 1], and `pixels`.

    Returns:
      [H, W, 3] uint8.
    """
    figure = matplotlib.figure.Figure(figsize=(4.2, 5), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axis, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    predicted = [100 * group["predicted"] for group in groups]
    axis.plot((0, 100), (0, 100), color="0.7", lw=1)
    axis.plot(predicted, [100 * group["observed"] for group in groups], "o-", color="#3b528b")
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 100)
    axis.set_ylabel("labels that are wrong (%)")
    below.bar(predicted, [group["pixels"] for group in groups], width=6, color="#3b528b")
    below.set_ylabel("pixels")
    below.set_xlabel("predicted probability (%)")
    figure.tight_layout()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
