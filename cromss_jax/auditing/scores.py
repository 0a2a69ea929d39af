"""How well wrong labels are found, where the truth is known: ranking and calibration."""

import numpy as np

# Evidence is counted in so many bins of equal width.
NUM_BINS = 4096
SHARES = (0.01, 0.05, 0.10)


def count(wrong_probability: np.ndarray, is_wrong: np.ndarray) -> np.ndarray:
    """Counts right and wrong labels by evidence, [2, NUM_BINS] int64.

    Args:
      wrong_probability: [N] in [0, 1].
      is_wrong: [N] bool.
    """
    bins = np.minimum((wrong_probability * NUM_BINS).astype(int), NUM_BINS - 1)
    return np.stack(
        [np.bincount(bins[chosen], minlength=NUM_BINS) for chosen in (~is_wrong, is_wrong)]
    )


def ranking(counts: np.ndarray) -> dict[str, float]:
    """AUROC, AUPRC (average precision), and precision among the most suspicious pixels.

    Pixels of the same bin are tied: they count half in the AUROC and have one precision.

    Args:
      counts: [2, NUM_BINS] from `count`.

    Returns:
      `auroc`, `auprc`, and `precision_at_1`, `_5`, `_10` (percent); NaN if all labels are alike.
    """
    right, wrong = counts[:, ::-1].astype(np.float64)
    if not right.sum() or not wrong.sum():
        names = ("auroc", "auprc", *(f"precision_at_{s:.0%}".rstrip("%") for s in SHARES))
        return dict.fromkeys(names, float("nan"))
    hits = np.concatenate([[0], np.cumsum(wrong) / wrong.sum()])
    alarms = np.concatenate([[0], np.cumsum(right) / right.sum()])
    flagged = np.cumsum(right + wrong)
    precision = np.cumsum(wrong) / np.maximum(flagged, 1)
    found = {
        "auroc": float(np.trapezoid(hits, alarms)),
        "auprc": float(np.sum(np.diff(hits) * precision)),
    }
    for share in SHARES:
        wanted = share * flagged[-1]
        i = int(np.searchsorted(flagged, wanted))
        before = flagged[i - 1] if i else 0.0
        inside = np.cumsum(wrong)[i - 1] if i else 0.0
        # Of the bin that reaches the share, the part that is needed.
        part = (wanted - before) / (flagged[i] - before)
        found[f"precision_at_{share:.0%}".rstrip("%")] = float((inside + part * wrong[i]) / wanted)
    return found


def reliability(counts: np.ndarray, num_groups: int = 10) -> list[dict[str, float]]:
    """The share of wrong labels by predicted probability, in groups of equal width.

    Args:
      counts: [2, NUM_BINS] from `count`.
      num_groups: how many.

    Returns:
      For each group that has pixels: `predicted`, `observed` and `pixels`.
    """
    centres = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    groups = []
    for bins in np.array_split(np.arange(NUM_BINS), num_groups):
        right, wrong = counts[:, bins]
        total = right.sum() + wrong.sum()
        if total:
            mean = float(((right + wrong) * centres[bins]).sum() / total)
            groups.append(
                {"predicted": mean, "observed": float(wrong.sum() / total), "pixels": int(total)}
            )
    return groups


def calibration_error(groups: list[dict[str, float]]) -> float:
    """Mean distance of predicted and observed shares, weighted by pixels."""
    total = sum(group["pixels"] for group in groups)
    distance = sum(abs(g["predicted"] - g["observed"]) * g["pixels"] for g in groups)
    return distance / max(total, 1)
