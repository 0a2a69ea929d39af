"""Cards of weight files: input scaling, classes, recipe, scores, origin, as JSON and Markdown."""

import datetime
import json
import logging
import os
from collections.abc import Mapping

from etils import epath

from cromss_jax import files, package, presets, sensors
from cromss_jax.legend import Legend
from cromss_jax.networks import decoders
from cromss_jax.weights.network import Network, Weights, WeightsError

FORMAT = "cromss_jax weights"

_log = logging.getLogger(__name__)

# The recipe has some kilobytes, or, with a legend of 250 classes, some tens of them.
MAX_BYTES = 16 << 20

# What the entries of a card are where they are known.
_FORMS = {"input": Mapping, "classes": list, "colours": list, "recipe": Mapping}
_FORMS |= {"metrics": Mapping, "versions": Mapping, "source": str, "licence": str, "method": str}


def of_run(step: epath.Path, network: Network) -> dict:
    """Information about a run's weights, in addition to the description of their network.

    Args:
      step: folder of one of the run's checkpoints.
      network: the description of the checkpoint's network.

    Raises:
      ValueError: if the run's configuration or log is damaged.
    """
    run = step.parent.parent
    recipe = files.parse_json((run / "config.json").read_text())
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
        "versions": _versions(run / "versions.json"),
        # Weights that the run started from may have another licence.
        "licence": None if recipe.get("init_from") else "Apache-2.0",
        "method": None
        if recipe.get("mode") != "pretrain"
        else "CromSS: Liu, Albrecht, Wang, Zhu, IEEE TGRS 2025 (arXiv 2405.01217)",
    }


def check(card: Mapping, path: os.PathLike) -> None:
    """Checks a card that was read.

    Args:
      card: the card.
      path: where it stands, for the error.

    Raises:
      WeightsError: naming the first entry that is not as `of_run` and `make` write it.
    """
    wrong = [
        name
        for name, form in _FORMS.items()
        if card.get(name) is not None and not isinstance(card[name], form)
    ]
    for name in ("classes", "colours"):
        if name not in wrong and not all(isinstance(text, str) for text in card.get(name) or ()):
            wrong.append(name)
    scaling = (card.get("input") or {}).get("by_band") if "input" not in wrong else {}
    if scaling is not None and not (
        isinstance(scaling, Mapping) and all(isinstance(band, Mapping) for band in scaling.values())
    ):
        wrong.append("input")
    if wrong:
        raise WeightsError(
            f"{path}: the card is damaged, its entry {wrong[0]} is {str(card[wrong[0]])[:60]!r}: "
            "restore it, or delete the card"
        )


def _scaling(band: sensors.Band) -> dict[str, float | str]:
    """The values of one band for the card's formula, which scales raw values x to network input."""
    return {
        "mean": band.mean,
        "std": band.std,
        "low": band.low,
        "high": band.high,
        "unit": band.unit,
    }


def _versions(path: epath.Path) -> dict | None:
    """What a run was trained with; None where that is not known."""
    try:
        found = files.parse_json(path.read_bytes()) if path.exists() else None
    except ValueError as error:
        found = str(error)
    if isinstance(found, dict | None):
        return found
    _log.warning("%s is damaged (%.80s): the card will not say versions", path, found)
    return None


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
    scaling = (card["input"] or {}).get("by_band")
    lines += ["## Input", ""]
    lines += [f"{card['axes']}."]
    if scaling:
        lines += [f"{str(card['input'].get('resolution')).capitalize()}."]
        lines += [f"Each band: `{card['input'].get('formula')}`.", ""]
    else:
        lines += ["The scaling of raw values to input is unknown: ask the source of the weights."]
        lines += [""]
    lines += ["| channel | band | low | high | unit of x |", "|---|---|---|---|---|"]
    for names in card["bands"].values():
        for channel, band in enumerate(names):
            known = (scaling or {}).get(band, {})
            limits = [known.get(name) for name in ("low", "high")]
            row = [f"{x:.8g}" if isinstance(x, int | float) else "?" for x in limits]
            row = " | ".join([*row, str(known.get("unit", "?"))])
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
