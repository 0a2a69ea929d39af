"""The report of an audit: JSON for programs, Markdown for people."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cromss_jax.auditing import scores
from cromss_jax.auditing.noise import Noise

RELIABILITY = "reliability.png"


def content(
    names: Sequence[str],
    noise: Noise,
    between: Sequence[float],
    intervals: np.ndarray,
    expected: np.ndarray,
    label_counts: np.ndarray,
    suggested: np.ndarray,
    worst: Sequence[tuple[float, float, str]],
    ranked: np.ndarray | None,
    facts: Mapping[str, str],
) -> dict[str, Any]:
    """All that a report says, as JSON.

    Args:
      names: of the C classes.
      noise: the estimate of confident learning.
      between: the error rates by the images alone and by all witnesses, whose mean it is.
      intervals: [2, C + 1] of its error rates, see `noise.intervals`.
      expected: [C] mean probability that labels of a class are wrong.
      label_counts: [C] pixels labelled so.
      suggested: [C, C] pixels by (label, suggested class).
      worst: of locations, how many labels are probably wrong, the mean probability, the name.
      ranked: counts from `scores.count` where the truth is known, else None.
      facts: what is said about how it was made.
    """
    rates, transitions = noise.error_rates, noise.transitions
    found: dict[str, Any] = {
        "made": dict(facts),
        "error_rate": {
            "estimate": noise.error_rate,
            "interval_90": intervals[:, -1].tolist(),
            "by_images_alone": float(between[0]),
            "by_all_witnesses": float(between[1]),
            "expected": float((expected * label_counts).sum() / max(label_counts.sum(), 1)),
        },
        "classes": [
            {
                "name": name,
                "pixels": int(label_counts[i]),
                "error_rate": None if np.isnan(rates[i]) else float(rates[i]),
                "interval_90": None if np.isnan(rates[i]) else intervals[:, i].tolist(),
                "expected": float(expected[i]),
                "is_really": dict(zip(names, transitions[i].tolist(), strict=True)),
                "suggested": dict(zip(names, suggested[i].tolist(), strict=True)),
            }
            for i, name in enumerate(names)
        ],
        "worst_locations": [
            {"name": name, "wrong_labels": round(count), "wrong": share}
            for count, share, name in worst
        ],
    }
    if ranked is not None:
        groups = scores.reliability(ranked)
        found["against_truth"] = {
            "error_rate": float(ranked[1].sum() / max(ranked.sum(), 1)),
            **scores.ranking(ranked),
            "reliability": groups,
            "calibration_error": scores.calibration_error(groups),
        }
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """The report as a page; see `content`."""
    low, high = found["error_rate"]["interval_90"]
    lines = [
        "# Audit of labels",
        "",
        f"Estimated share of wrong labels: **{found['error_rate']['estimate']:.1%}** "
        f"({low:.1%} to {high:.1%}, 90 % interval over locations). By the images alone it is "
        f"{found['error_rate']['by_images_alone']:.1%}, which errors of the network raise; with "
        f"the labels around it is {found['error_rate']['by_all_witnesses']:.1%}, which errors in "
        "patches lower.",
        "",
        "| label | pixels | wrong | 90 % interval | is really |",
        "|---|---|---|---|---|",
    ]
    for row in found["classes"]:
        if row["error_rate"] is None:
            lines.append(f"| {row['name']} | 0 | – | – | – |")
            continue
        others = sorted(
            ((share, name) for name, share in row["is_really"].items() if name != row["name"]),
            reverse=True,
        )
        really = ", ".join(f"{name} {share:.0%}" for share, name in others[:3] if share >= 0.01)
        low, high = row["interval_90"]
        lines.append(
            f"| {row['name']} | {row['pixels']} | {row['error_rate']:.1%} | "
            f"{low:.1%} to {high:.1%} | {really or '–'} |"
        )
    lines += ["", "## Worst locations", "", "| location | labels probably wrong | of its labels |"]
    lines += ["|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['wrong_labels']} | {row['wrong']:.1%} |"
        for row in found["worst_locations"]
    ]
    if "pictures" in found:
        lines += ["", f"![The worst dates of the first of these]({found['pictures']})"]
    if "suspects" in found:
        lines += ["", *_suspects(found["suspects"])]
    if "parcels" in found:
        lines += ["", "## Parcels", "", "{judged} of {parcels} hold labelled pixels; their rows are"
                  " in `parcels.gpkg` and `parcels.csv`.".format(**found["parcels"])]  # fmt: skip
    if "against_truth" in found:
        lines += ["", *_against_truth(found["against_truth"])]
    lines += ["", "## How it was made", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in found["made"].items()]
    return "\n".join(lines) + "\n"


def _suspects(found: Mapping[str, Any]) -> list[str]:
    """The first polygons, in lines."""
    lines = [
        "## Suspects",
        "",
        f"{found['polygons']} polygons of at least {found['min_area']:g} ha whose labels are wrong "
        f"with a probability of {found['above']:.0%} or more: {found['hectares']:.1f} ha of all "
        "dates, in `suspects.gpkg`.",
    ]
    if found["without_place"]:
        lines.append(f"{found['without_place']} maps have no reference system, and are left out.")
    lines += ["", "| rank | location | date | label | should be | ha | wrong |"]
    lines.append("|---|---|---|---|---|---|---|")
    return lines + [
        f"| {row['rank']} | {row['location']} | {row['date']} | {row['given']} | "
        f"{row['suggested']} | {row['hectares']:.2f} | {row['mean_probability']:.0%} |"
        for row in found["first"]
    ]


def _against_truth(found: Mapping[str, Any]) -> list[str]:
    """Scores of the probabilities, in lines."""
    lines = [
        "## Against the truth",
        "",
        f"The data set knows the truth: {found['error_rate']:.1%} of its labels are wrong. "
        f"AUROC {found['auroc']:.3f}, AUPRC {found['auprc']:.3f}; of the most suspicious 1, 5 and "
        f"10 % of the pixels {found['precision_at_1']:.1%}, {found['precision_at_5']:.1%} and "
        f"{found['precision_at_10']:.1%} are wrong. Calibration error "
        f"{found['calibration_error']:.1%}.",
        "",
        f"![Observed over predicted shares of wrong labels]({RELIABILITY})",
        "",
        "| predicted | wrong | pixels |",
        "|---|---|---|",
    ]
    return lines + [
        f"| {g['predicted']:.1%} | {g['observed']:.1%} | {g['pixels']} |"
        for g in found["reliability"]
    ]
