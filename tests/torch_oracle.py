"""The method in PyTorch, written from the paper: an oracle for whole training steps.

As plain as the published code: a topk per class, SciPy's Gaussian filters. Import after
`pytest.importorskip("torch")`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F

NUM_CLASSES = 9


def prior(season_labels: np.ndarray, season: int) -> np.ndarray:
    """Spatial-temporal smoothing prior [C, H, W] of one sample's labels [S, H, W], 0..8."""
    one_hot = np.stack([season_labels == c for c in range(NUM_CLASSES)], 1).astype(np.float64)

    def smooth(maps):
        filtered = np.stack([scipy.ndimage.gaussian_filter(m, sigma=3, truncate=4) for m in maps])
        return filtered / filtered.sum(0)

    return (smooth(one_hot.mean(0)) + smooth(one_hot[season])) / 2


def selection_weights(confidence: torch.Tensor, labels: torch.Tensor, keep: float) -> torch.Tensor:
    """Weights [B, H, W] of the segmentation loss, class by class."""
    weights = torch.zeros_like(confidence)
    for c in range(NUM_CLASSES):
        mask = labels == c
        k = math.floor(keep * int(mask.sum()))
        if k:
            threshold = torch.topk(confidence[mask], k).values[-1]
            weights[mask] = (confidence[mask] / threshold).clamp(0, 1)
    return weights


def confidence(log_q: torch.Tensor, kind: str) -> torch.Tensor:
    """Confidence [B, H, W] of a prediction, by its entropy or by Gini's index."""
    p = log_q.exp()
    if kind == "gini":
        return (p * p).sum(1)
    return 1 + (p * log_q).sum(1) / math.log(NUM_CLASSES)


def distance(teacher: torch.Tensor, student: torch.Tensor, kind: str) -> torch.Tensor:
    """Consistency [B, H, W] of a student's log-probabilities with a teacher's."""
    p = teacher.exp()
    per_class = {
        "ce": -p * student,
        "kl": p * (teacher - student),
        "mse": (p - student.exp()) ** 2,
    }
    return per_class[kind].sum(1)


def segmentation(
    log_q: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, kinds: Sequence[str]
) -> torch.Tensor:
    """Cross entropy, focal loss and soft dice of [B, C, H, W], weighted by [B, H, W]."""
    q, total = log_q.exp(), 0
    pixels = {"cross_entropy": -targets * log_q, "focal": -targets * (1 - q) ** 2 * log_q}
    for kind in kinds:
        if kind in pixels:
            total = total + (weights * pixels[kind].sum(1)).sum() / weights.sum()
            continue
        w = weights[:, None]
        overlap = (w * q * targets).sum((0, 2, 3))
        size = (w * (q + targets)).sum((0, 2, 3))
        present = targets.sum((0, 2, 3)) > 0
        total = total + torch.where(present, 1 - 2 * overlap / size.clamp(min=1e-7), 0.0).mean()
    return total


def total_loss(
    logits: dict[str, torch.Tensor],
    labels: torch.Tensor,
    priors: torch.Tensor,
    epoch: int,
    weigh: Callable = selection_weights,
    *,
    kinds: Sequence[str] = ("cross_entropy", "dice"),
    sure_by: str = "entropy",
    consistency: str = "ce",
    consistency_weight: float = 1.0,
    prior_weight: float = 0.15,
    uniform_weight: float = 0.05,
    keep: float = 0.5,
) -> torch.Tensor:
    """The paper's loss, by default with its settings.

    Logits and priors [B, C, H, W]; labels [B, H, W], of which those that are no class are ignored.
    """
    log_q = {m: F.log_softmax(x, 1) for m, x in logits.items()}
    p = {m: x.detach().exp() for m, x in log_q.items()}
    one_hot = torch.stack([labels == c for c in range(NUM_CLASSES)], 1).float()
    targets = (1 - prior_weight - uniform_weight) * one_hot
    targets = targets + prior_weight * priors + uniform_weight / NUM_CLASSES
    targets = targets * one_hot.sum(1, keepdim=True)
    ramp = math.exp(-5 * (1 - min(epoch, 80) / 80) ** 2)
    label = {m: (x * one_hot).sum(1) for m, x in p.items()}
    sure = {m: confidence(x.detach(), sure_by) for m, x in log_q.items()}
    total = 0
    for own, other in (("s1", "s2"), ("s2", "s1")):
        kept = 1 - (1 - keep) * ramp
        w = weigh((label[own] + label["s1"] * label["s2"]) / 2, labels, kept)
        total = total + segmentation(log_q[own], targets, w, kinds)
        # This modality teaches the other.
        u = (1 - ramp) + ramp * (sure[own] + sure["s1"] * sure["s2"]) / 2
        taught = distance(log_q[own].detach(), log_q[other], consistency)
        total = total + consistency_weight * (u * taught).sum() / u.sum()
    return total
