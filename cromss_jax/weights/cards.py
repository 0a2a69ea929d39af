"""Cards of weight files: input scaling, classes, recipe, scores, origin, as JSON and Markdown."""

import datetime
import json
from collections.abc import Mapping

from etils import epath

from cromss_jax import files, package, presets, sensors
from cromss_jax.legend import Legend
from cromss_jax.networks import decoders
from cromss_jax.weights.network import Network, Weights

FORMAT = "cromss_jax weights"


def of_run(step: epath.Path, network: Network) -> dict:
    """Information about a run's weights, in addition to the description of their network.

    Args:
      step: folder of one of the run's checkpoints.
      network: the description of the checkpoint's network.

    Raises:
      ValueError: if the run's configuration or log is damaged.
    """
    run = step.parent.parent
    recipe = json.loads((run / "config.json").read_text())
    versions = run / "versions.json"
    # Runs of earlier versions do not say them: they were trained on Dynamic World's classes, and on
    # bands with the statistics of SSL4EO-S12.
    saved = recipe.get("legend")
    legend = Legend.from_dict(saved) if saved else presets.DYNAMIC_WORLD
    rows = recipe.get("imagery")
    known = sensors.bands_of_rows(rows) if rows else sensors.preset_bands()
    by_name = {band.name: band for band in known}
    bands = [by_name[band] for names in network.bands.values() for band in names]
    return {
        "input": {
            "formula": "floor(clip((x - low) / (high - low) * 255, 0, 255)) / 255",
            "resolution": "every band at 10 m, coarser ones upsampled bicubically (a = -0.5)",
            "by_band": {band.name: _scaling(band) for band in bands},
        },
        "classes": list(legend.names),
        "colours": list(legend.colours),
        "recipe": recipe,
        "metrics": _metrics(run, int(step.name) if step.name.isdigit() else None),
        "source": str(step),
        "versions": json.loads(versions.read_text()) if versions.exists() else None,
        # Weights that the run started from may have another licence.
        "licence": None if recipe.get("init_from") else "Apache-2.0",
        "method": None
        if recipe.get("mode") != "pretrain"
        else "CromSS: Liu, Albrecht, Wang, Zhu, IEEE TGRS 2025 (arXiv 2405.01217)",
    }


def _scaling(band: sensors.Band) -> dict[str, float | str]:
    """The values of one band for the card's formula, which scales raw values x to network input."""
    return {
        "mean": band.mean,
        "std": band.std,
        "low": band.low,
        "high": band.high,
        "unit": band.unit,
    }


def _metrics(run: epath.Path, step: int | None) -> dict:
    """The last validation scores up to a step, without those of single classes."""
    found = {}
    for entry in files.read_metrics(run / "metrics.jsonl"):
        if entry["split"] == "validation" and (step is None or entry["step"] <= step):
            found = entry
    return {name: value for name, value in found.items() if name.count("/") < 2}


def make(found: Weights, network: Network, layout: str) -> dict:
    """The card of a file.

    Args:
      found: the weights that the file's content comes from, with their card.
      network: description of the network in the file.
      layout: layout of the file's keys.
    """
    unknown = dict.fromkeys(
        (
            "input",
            "classes",
            "colours",
            "recipe",
            "metrics",
            "source",
            "versions",
            "licence",
            "method",
        )
    )
    return {
        **unknown,
        **found.card,
        "classes": found.card.get("classes") if network.num_classes else None,
        "colours": found.card.get("colours") if network.num_classes else None,
        "format": FORMAT,
        "layout": layout,
        "network": {
            "fusion": network.fusion,
            "resnet": network.depth,
            "decoder": network.decoder if network.num_classes else None,
            "num_classes": network.num_classes,
            "description": str(network),
        },
        "axes": "[batch, bands, height, width], height and width multiples of "
        + str(decoders.STRIDES[network.decoder]),
        "modality": list(network.bands),
        "bands": {modality: list(names) for modality, names in network.bands.items()},
        "converted": {
            "by": f"cromss_jax {package.version()}",
            "on": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
    }


def text(card: Mapping, name: str) -> str:
    """The card as Markdown, for people."""
    lines = [f"# {name}", "", f"{card['network']['description']}; layout `{card['layout']}`."]
    lines += [f"{card['method']}.", ""] if card["method"] else [""]
    scaling = card["input"] and card["input"]["by_band"]
    lines += ["## Input", ""]
    lines += [f"{card['axes']}."]
    if scaling:
        lines += [f"{card['input']['resolution'].capitalize()}."]
        lines += [f"Each band: `{card['input']['formula']}`.", ""]
    else:
        lines += ["The scaling of raw values to input is unknown: ask the source of the weights."]
        lines += [""]
    lines += ["| channel | band | low | high | unit of x |", "|---|---|---|---|---|"]
    for names in card["bands"].values():
        for channel, band in enumerate(names):
            row = "? | ? | ?"
            if scaling:
                row = "{low:.8g} | {high:.8g} | {unit}".format(**scaling[band])
            lines += [f"| {channel} | {band} | {row} |"]
    lines += [""]
    if card["classes"]:
        classes = [f"{index} {name}" for index, name in enumerate(card["classes"])]
        lines += ["## Classes", "", ", ".join(classes) + ".", ""]
    if card["metrics"]:
        lines += ["## Scores", "", "| score | value |", "|---|---|"]
        lines += [
            f"| {key} | {value:.6g} |"
            for key, value in card["metrics"].items()
            if isinstance(value, int | float)
        ]
        lines += [""]
    if card["recipe"]:
        recipe = json.dumps(card["recipe"], indent=2)
        lines += ["## Recipe", "", "```json", recipe, "```", ""]
    lines += ["## Origin", ""]
    lines += [
        f"From `{card['source']}`, converted by {card['converted']['by']} on "
        f"{card['converted']['on']}."
    ]
    if card["versions"]:
        lines += [", ".join(f"{k} {v}" for k, v in card["versions"].items()) + "."]
    lines += [f"Licence: {card['licence'] or 'unknown, ask the source of the weights'}.", ""]
    return "\n".join(lines)
