"""Runs where cleanlab is installed (AGPL, no dependency of ours): its label quality of pixels.

`python cleanlab_ranking.py FILE.npz`, with `probs` [N, H, W, C] and `labels` [N, H, W], to which it
adds `segmentation` and `normalized_margin`, [N, H, W] float32: low where a label is suspicious.
"""

import sys

import numpy as np
from cleanlab import rank, segmentation

with np.load(sys.argv[1]) as file:
    probs, labels = file["probs"], file["labels"]
# cleanlab wants a label for each pixel; those without one are not scored.
filled = np.where(labels == 255, 0, labels).astype(int)
_, pixels = segmentation.rank.get_label_quality_scores(
    filled, np.moveaxis(probs, -1, 1).astype(np.float64), verbose=False
)
flat = probs.reshape(-1, probs.shape[-1]).astype(np.float64)
margin = rank.get_label_quality_scores(
    filled.ravel(), flat / flat.sum(axis=1, keepdims=True), method="normalized_margin"
)
np.savez(
    sys.argv[1],
    segmentation=pixels.astype(np.float32),
    normalized_margin=margin.reshape(labels.shape).astype(np.float32),
)
