"""Scores from confusion matrices, and how well confidence separates right from wrong labels."""

import jax
import jax.numpy as jnp
import numpy as np

NUM_CONFIDENCE_LEVELS = 256


def confusion_matrix(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    """Counts pixels by (label, prediction).

    Args:
      labels: [B, H, W] integers; pixels outside 0..C-1 are not counted.
      predictions: [B, H, W] integers in 0..C-1.
      num_classes: C.

    Returns:
      [C, C] int32; rows are labels, columns are predictions.
    """
    # The product runs in float32, which is exact for images of fewer than 2^24 pixels.
    label_one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    prediction_one_hot = jax.nn.one_hot(predictions, num_classes, dtype=jnp.float32)
    per_image = jnp.einsum("bhwc,bhwd->bcd", label_one_hot, prediction_one_hot)
    return jnp.sum(per_image.astype(jnp.int32), axis=0)


def no_counts(num_classes: int) -> np.ndarray:
    """The initial value for `add_counts`: zeros, [2, C, C] int32."""
    return np.zeros((2, num_classes, num_classes), np.int32)


def add_counts(counts: jax.Array, confusion: jax.Array) -> jax.Array:
    """Adds a batch's confusion matrix to the counts of a whole data set, on the device.

    A test set has more pixels than an int32 can count, and int64 is not available on the device.
    Each count is therefore stored as two int32: a multiple of 2^20 and a remainder.

    Args:
      counts: [2, C, C] int32, the multiples of 2^20 and the remainders.
      confusion: [C, C] int32, below 2^30.

    Returns:
      [2, C, C] int32, exact up to 2^51.
    """
    rest = counts[1] + confusion
    return jnp.stack([counts[0] + (rest >> 20), rest & (2**20 - 1)])


def counted(counts: np.ndarray) -> np.ndarray:
    """Converts the counts [2, C, C] of `add_counts` to a confusion matrix [C, C] int64."""
    high, rest = np.asarray(counts, np.int64)
    return (high << 20) + rest


def scores(confusion: np.ndarray) -> dict[str, float | np.ndarray]:
    """Scores of a confusion matrix.

    Args:
      confusion: [C, C] integers; rows are labels, columns are predictions.

    Returns:
      Per class, [C] float64: `iou`, `f1`, `precision`, `recall`. Undefined values are NaN: a class
      absent from labels and predictions has no IoU (the published code counts it as 1).
      Scalars in [0, 1]: `oa` (overall accuracy), and the means over the classes that occur in the
      labels: `aa` (of recall), `miou`, `mf1`, `mprecision`.
    """
    confusion = np.asarray(confusion, np.float64)
    hits, labelled, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        per_class = {
            "iou": hits / (labelled + predicted - hits),
            "f1": 2 * hits / (labelled + predicted),
            "precision": hits / predicted,
            "recall": hits / labelled,
        }
        oa = float(hits.sum() / labelled.sum())
    present = labelled > 0
    # A class that is never predicted has no precision; it enters the mean as 0.
    means = {
        f"m{name}": float(np.nan_to_num(values[present]).mean()) if present.any() else np.nan
        for name, values in per_class.items()
    }
    means["aa"] = means.pop("mrecall")
    return {**per_class, "oa": oa, **means}


def confidence_counts(confidence: jax.Array, right: jax.Array, wrong: jax.Array) -> jax.Array:
    """Counts right and wrong labels at or above each of 256 levels of confidence.

    Args:
      confidence: [B, H, W] float32 in [0, 1].
      right: [B, H, W] bool, pixels whose noisy label equals the true class.
      wrong: [B, H, W] bool, pixels whose noisy label differs from the true class.

    Returns:
      [2, 256] int32: counts of right and of wrong labels; level i is i / 256.
    """

    def count_above(level: jax.Array) -> jax.Array:
        above = confidence >= level
        return jnp.stack([jnp.sum(above & right), jnp.sum(above & wrong)])

    levels = jnp.arange(NUM_CONFIDENCE_LEVELS, dtype=jnp.float32) / NUM_CONFIDENCE_LEVELS
    return jax.lax.map(count_above, levels).T.astype(jnp.int32)


def auroc(counts: np.ndarray) -> float:
    """Area under the ROC curve for detecting right labels by their confidence.

    Args:
      counts: [2, L] from `confidence_counts`: right and wrong labels at or above levels that rise
        from 0.

    Returns:
      A value in [0, 1], 0.5 for chance; NaN if there are no right or no wrong labels.
    """
    right, wrong = np.asarray(counts, np.float64)
    if right[0] == 0 or wrong[0] == 0:
        return float("nan")
    hit_rate = np.append(right / right[0], 0.0)[::-1]
    false_rate = np.append(wrong / wrong[0], 0.0)[::-1]
    return float(np.trapezoid(hit_rate, false_rate))
