"""Weights to PyTorch and back, from the command line.

    python -m cromss_jax.convert to_torch --checkpoint=WORKDIR --output=s2.safetensors \
        --layout=encoder --modality=s2
    python -m cromss_jax.convert from_torch --input=released.ckpt --output=DIR

Layouts: `lightning`, the published code's file; `unet`, the smp model of one modality (`smp.Unet`,
or `smp.PSPNet`, `smp.DeepLabV3Plus`, `smp.FPN` by the network's decoder); `encoder`, smp's encoder;
`torchvision`, a plain ResNet without `fc` (the same keys as smp's encoder).
"""

import datetime
import importlib.metadata
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath

from cromss_jax import decoders, sensors, weight_files, weights

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "to_torch: folder of a run (its newest checkpoint), or of one checkpoint"
)
_INPUT = flags.DEFINE_string("input", None, "from_torch: file of PyTorch weights, any layout")
_OUTPUT = flags.DEFINE_string(
    "output", None, "File (to_torch; .safetensors, .pt, .ckpt) or folder (from_torch) to write"
)
_LAYOUT = flags.DEFINE_enum("layout", None, weights.LAYOUTS, "to_torch: keys of which network")
_MODALITY = flags.DEFINE_enum(
    "modality", None, sensors.MODALITIES, "to_torch: which one, where the layout holds one"
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "float16", "bfloat16"], "to_torch: of the file"
)
_BANDS = flags.DEFINE_list(
    "bands", None, "from_torch: the bands in order, where their number doesn't tell them"
)
_COMMANDS = ("to_torch", "from_torch")


def scaling(bands: dict[str, tuple[str, ...]]) -> dict[str, dict]:
    """How raw values become a network's input: by band, `input = clip(...) / 255`."""
    return {
        band: {
            "mean": mean,
            "std": std,
            "low": mean - 2 * std,
            "high": mean + 2 * std,
            "unit": "dB" if band in sensors.S1_BANDS else "reflectance * 10000 (L1C)",
        }
        for names in bands.values()
        for band in names
        for mean, std in (sensors.BAND_STATISTICS[band],)
    }


def _metrics(run: epath.Path, step: int) -> dict:
    """The scores of the last validation up to a step, classes left out."""
    path, found = run / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        if entry.get("split") == "validation" and entry["step"] <= step:
            found = entry
    classes = tuple(f"/{name}" for name in sensors.CLASS_NAMES)
    return {name: value for name, value in found.items() if not name.endswith(classes)}


def make_card(network: weights.Network, layout: str, step: epath.Path) -> dict:
    """What a user of a file of weights must know; goes beside it as JSON.

    Args:
      network: what is in the file.
      layout: under which keys.
      step: the checkpoint's folder.
    """
    run = step.parent.parent
    is_run = (run / "config.json").exists() and not (step / "network.json").exists()
    versions = run / "versions.json"
    return {
        "format": "cromss_jax weights",
        "layout": layout,
        "network": {
            "fusion": network.fusion,
            "resnet": network.depth,
            "decoder": network.decoder if network.num_classes else None,
            "num_classes": network.num_classes,
            "description": str(network),
        },
        "modality": list(network.bands),
        "bands": {modality: list(names) for modality, names in network.bands.items()},
        "input": {
            "axes": "[batch, bands, height, width], height and width multiples of "
            + str(decoders.STRIDES[network.decoder]),
            "formula": "floor(clip((x - low) / (high - low) * 255, 0, 255)) / 255",
            "resolution": "every band at 10 m, coarser ones upsampled bicubically (a = -0.5)",
            "by_band": scaling(network.bands),
        },
        "classes": list(sensors.CLASS_NAMES) if network.num_classes else None,
        "recipe": json.loads((run / "config.json").read_text()) if is_run else None,
        "metrics": _metrics(run, int(step.name)) if is_run else None,
        "source": str(step),
        "versions": json.loads(versions.read_text()) if is_run and versions.exists() else None,
        "converted": {
            "by": f"cromss_jax {importlib.metadata.version('cromss_jax')}",
            "on": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
        "licence": "Apache-2.0",
        "method": "CromSS: Liu, Albrecht, Wang, Zhu, IEEE TGRS 2025 (arXiv 2405.01217)",
    }


def card_text(card: dict, name: str) -> str:
    """The card as Markdown, for people."""
    rows = [
        f"| {i} | {band} | {s['low']:.8g} | {s['high']:.8g} | {s['unit']} |"
        for names in card["bands"].values()
        for i, band in enumerate(names)
        for s in (card["input"]["by_band"][band],)
    ]
    lines = [
        f"# {name}",
        "",
        f"{card['network']['description']}; layout `{card['layout']}`. {card['method']}.",
        "",
        "## Input",
        "",
        f"{card['input']['axes']}; {card['input']['resolution']}.",
        f"Each band: `{card['input']['formula']}`.",
        "",
        "| channel | band | low | high | unit of x |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
    if card["classes"]:
        classes = [f"{index} {name}" for index, name in enumerate(card["classes"])]
        lines += ["## Classes", "", ", ".join(classes) + ".", ""]
    if card["metrics"]:
        lines += ["## Scores at validation", "", "| score | value |", "|---|---|"]
        lines += [
            f"| {key} | {value:.6g} |"
            for key, value in card["metrics"].items()
            if isinstance(value, int | float)
        ]
        lines += [""]
    if card["recipe"]:
        recipe = json.dumps(card["recipe"], indent=2)
        lines += ["## Recipe", "", "```json", recipe, "```", ""]
    made = card["versions"] or {}
    lines += [
        "## Origin",
        "",
        f"Checkpoint `{card['source']}`, converted by {card['converted']['by']} on "
        f"{card['converted']['on']}.",
        *([", ".join(f"{k} {v}" for k, v in made.items()) + "."] if made else []),
        f"Licence: {card['licence']}.",
        "",
    ]
    return "\n".join(lines)


def to_torch(
    checkpoint: str, output: str, layout: str, modality: str | None, dtype: str = "float32"
) -> str:
    """Writes a checkpoint's weights as a file for PyTorch, with its card; returns a summary.

    Args:
      checkpoint: folder of a run, of one of its checkpoints, or of converted weights.
      output: file to write; beside it come a `.json` and a `.md`.
      layout: see `weights.to_layout`.
      modality: likewise.
      dtype: of parameters and statistics in the file.

    Raises:
      weights.WeightsError: a sentence for the user.
    """
    step = weight_files.find_checkpoint(checkpoint)
    network, arrays = weights.to_layout(weight_files.load_run(step), layout, modality)
    arrays = {
        key: array if array.dtype.kind in "iu" else array.astype(jnp.dtype(dtype))
        for key, array in arrays.items()
    }
    overflown = [key for key, array in arrays.items() if not np.isfinite(array).all()]
    if overflown:
        raise weights.WeightsError(f"{dtype} cannot hold {', '.join(overflown)}; use another")
    path, card = pathlib.Path(output), make_card(network, layout, step)
    lightning = {"cromss_jax": card} if layout == "lightning" else None
    weight_files.write(path, arrays, lightning)
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    path.with_suffix(".md").write_text(card_text(card, path.name))
    return f"{path}: {network}, {len(arrays)} tensors, {dtype}, from {step}"


def from_torch(path: str, output: str, bands: tuple[str, ...] | None = None) -> str:
    """Writes the weights of a PyTorch file as a checkpoint's folder; returns a summary.

    Args:
      path: file of any layout.
      output: folder to write, which must not be there; `to_torch` and `init_from` take it.
      bands: of a single modality, in order, where their number doesn't tell them.

    Raises:
      weights.WeightsError: a sentence for the user.
    """
    if epath.Path(output).exists():
        raise weights.WeightsError(f"{output} is there already; choose another --output")
    known = None
    if bands:
        unknown = sorted(set(bands) - set(sensors.BAND_STATISTICS))
        if unknown:
            raise weights.WeightsError(
                f"unknown bands {', '.join(unknown)}; known are {', '.join(sensors.S1_BANDS)} and "
                f"{', '.join(sensors.S2_BANDS)}"
            )
        known = {"s1" if set(bands) <= set(sensors.S1_BANDS) else "s2": tuple(bands)}
    found = weight_files.load(path, known)
    weight_files.write_folder(epath.Path(output), found)
    return "\n".join(
        [f"{output}: {found.network}, {len(found.arrays)} tensors, from {path}", *found.notes]
    )


def main(arguments: list[str]) -> None:
    """Runs the command; what the user can mend is told in one sentence."""
    command = arguments[1] if len(arguments) == 2 else None
    needed = {
        "to_torch": {"checkpoint": _CHECKPOINT, "output": _OUTPUT, "layout": _LAYOUT},
        "from_torch": {"input": _INPUT, "output": _OUTPUT},
    }
    if command not in needed:
        sys.exit(f"error: say what to do, {' or '.join(_COMMANDS)}; found {arguments[1:]}")
    missing = [f"--{name}" for name, flag in needed[command].items() if flag.value is None]
    if missing:
        sys.exit(f"error: {command} needs {', '.join(missing)} (--helpshort lists the flags)")
    logging.set_verbosity(logging.WARNING)
    try:
        if command == "to_torch":
            summary = to_torch(
                _CHECKPOINT.value, _OUTPUT.value, _LAYOUT.value, _MODALITY.value, _DTYPE.value
            )
        else:
            summary = from_torch(
                _INPUT.value, _OUTPUT.value, tuple(_BANDS.value) if _BANDS.value else None
            )
        print(summary)
    except (weights.WeightsError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
