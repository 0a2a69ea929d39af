"""The method in PyTorch, written from the paper: an oracle for whole training steps.

As plain as the published code: a topk per class, SciPy's Gaussian filters. Import after
`pytest.importorskip("torch")`.
"""

import math
from collections.abc import Callable

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


def total_loss(
    logits: dict[str, torch.Tensor],
    labels: torch.Tensor,
    priors: torch.Tensor,
    epoch: int,
    weigh: Callable = selection_weights,
) -> torch.Tensor:
    """The paper's loss with its settings: logits and priors [B, C, H, W], labels [B, H, W]."""
    log_q = {m: F.log_softmax(x, 1) for m, x in logits.items()}
    p = {m: x.detach().exp() for m, x in log_q.items()}
    one_hot = F.one_hot(labels, NUM_CLASSES).permute(0, 3, 1, 2).float()
    targets = 0.8 * one_hot + 0.15 * priors + 0.05 / NUM_CLASSES
    ramp = math.exp(-5 * (1 - min(epoch, 80) / 80) ** 2)
    keep = 1 - 0.5 * ramp
    label = {m: (x * one_hot).sum(1) for m, x in p.items()}
    entropy = {m: -(x * log_q[m].detach()).sum(1) for m, x in p.items()}
    sure = {m: 1 - h / math.log(NUM_CLASSES) for m, h in entropy.items()}
    total = 0
    for own, other in (("s1", "s2"), ("s2", "s1")):
        w = weigh((label[own] + label["s1"] * label["s2"]) / 2, labels, keep)
        total = total + (w * -(targets * log_q[own]).sum(1)).sum() / w.sum()
        q, w = log_q[own].exp(), w[:, None]
        overlap = (w * q * targets).sum((0, 2, 3))
        size = (w * (q + targets)).sum((0, 2, 3))
        present = targets.sum((0, 2, 3)) > 0
        total = total + torch.where(present, 1 - 2 * overlap / size.clamp(min=1e-7), 0.0).mean()
        # This modality teaches the other.
        u = (1 - ramp) + ramp * (sure[own] + sure["s1"] * sure["s2"]) / 2
        total = total + (u * -(p[own] * log_q[other]).sum(1)).sum() / u.sum()
    return total
