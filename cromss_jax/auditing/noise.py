"""How often labels are wrong, by class, from predictions alone: confident learning.

A pixel labelled y counts as of class k where k is the most probable of the classes whose
probability reaches the mean over the pixels labelled k. The counts, scaled to the number of labels,
estimate how labels and classes occur together (Northcutt, Jiang, Chuang, "Confident learning",
JAIR 2021). No truth is used. Of the images alone the estimate is too high: errors of the network
count as errors of labels. Of all witnesses it is too low: labels vouch for their neighbours. The
mean of both is reported.
Dimensions: L locations, N pixels, C classes.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Noise:
    """The joint distribution of labels and classes.

    Attributes:
      joint: [C, C], rows are labels, columns are classes; sums to one.
    """

    joint: np.ndarray

    @property
    def error_rates(self) -> np.ndarray:
        """Share of wrong labels among those of each class, [C]; NaN for absent labels."""
        total = self.joint.sum(axis=1)
        with np.errstate(invalid="ignore"):
            return 1 - np.diag(self.joint) / np.where(total > 0, total, np.nan)

    @property
    def error_rate(self) -> float:
        """Share of wrong labels among all."""
        return float(1 - np.trace(self.joint))

    @property
    def transitions(self) -> np.ndarray:
        """P(class | label), [C, C]: what labels of each class really are; rows sum to one."""
        return _rows(self.joint)


def _rows(joint: np.ndarray) -> np.ndarray:
    """Rows divided by their sums; the identity's where there is nothing."""
    total = joint.sum(axis=1, keepdims=True)
    return np.where(total > 0, joint / np.where(total > 0, total, 1), np.eye(len(joint)))


def thresholds(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean probability of each class among the pixels labelled so.

    Args:
      probs: [N, C].
      labels: [N] integers in 0..C-1.

    Returns:
      [C] float64; infinity for classes without a label.
    """
    counts = np.bincount(labels, minlength=probs.shape[1])
    own = np.take_along_axis(probs, labels[:, None].astype(np.int64), axis=1)[:, 0]
    sums = np.bincount(labels, own, minlength=probs.shape[1])
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)


def confident_counts(probs: np.ndarray, labels: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Counts pixels by (label, class of confident predictions), [C, C] int64.

    Args:
      probs: [N, C].
      labels: [N] integers in 0..C-1.
      limits: [C] from `thresholds`.
    """
    num_classes = probs.shape[1]
    reached = np.where(probs >= limits, probs, -1)
    classes = reached.argmax(axis=1)
    counted = reached.max(axis=1) >= 0
    pairs = labels[counted].astype(np.int64) * num_classes + classes[counted]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def estimate(counts: np.ndarray, label_counts: np.ndarray) -> Noise:
    """The joint distribution: each label's row of counts scaled to how often it occurs.

    Args:
      counts: [..., C, C] from `confident_counts`; the mean over leading dimensions is taken, after
        scaling.
      label_counts: [C] number of pixels of each label.
    """
    num_classes = len(label_counts)
    each = [_rows(own) for own in counts.reshape(-1, num_classes, num_classes).astype(np.float64)]
    joint = np.mean(each, axis=0) * label_counts[:, None]
    return Noise(joint / max(joint.sum(), 1))


def intervals(
    counts: np.ndarray, label_counts: np.ndarray, seed: int = 0, draws: int = 200
) -> np.ndarray:
    """How far estimates may be off because few places were seen: 5th and 95th percentile.

    Whole locations are drawn with replacement, as pixels of one resemble each other.

    Args:
      counts: [L, ..., C, C] of each location, see `estimate`.
      label_counts: [L, C] likewise.
      seed: of the draws.
      draws: how many.

    Returns:
      [2, C + 1] of the error rate of each label, and of all.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        # How often each location is drawn: a sum of weighted locations needs no copy of them.
        often = np.bincount(rng.integers(len(counts), size=len(counts)), minlength=len(counts))
        noise = estimate(np.tensordot(often, counts, 1), often @ label_counts)
        found.append([*noise.error_rates, noise.error_rate])
    return np.nanpercentile(found, [5, 95], axis=0)


def fit_shifts(wrong: np.ndarray, labels: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Calibrates evidence to expected error rates: a shift of its log-odds for each label.

    Args:
      wrong: [N] evidence that a label is wrong, in (0, 1).
      labels: [N] integers in 0..C-1.
      rates: [C] the share of wrong labels that is expected of each class; NaN leaves it as it is.

    Returns:
      [C] shifts, after which the mean of the evidence is the expected rate.
    """
    shifts = np.zeros(len(rates))
    for label, rate in enumerate(rates):
        own = log_odds(wrong[labels == label])
        if not len(own) or not np.isfinite(rate):
            continue
        target = np.clip(rate, 1e-4, 1 - 1e-4)
        low, high = -30.0, 30.0
        # The mean grows with the shift: halve the interval until it is found.
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if _sigmoid(own + middle).mean() < target else (low, middle)
        shifts[label] = (low + high) / 2
    return shifts


def apply_shifts(wrong: np.ndarray, labels: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Evidence with the shift of its label; see `fit_shifts`."""
    own = np.append(shifts, 0.0)[np.minimum(labels, len(shifts))]
    return _sigmoid(log_odds(wrong) + own).astype(np.float32)


def log_odds(probability: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), of values at most 1e-6 from 0 and 1."""
    clipped = np.clip(probability.astype(np.float64), 1e-6, 1 - 1e-6)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))
