"""Scores from confusion matrices, and how well confidence tells wrong labels from right ones."""

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
      [C, C] int32, rows labels, columns predictions.
    """
    # The product runs in float32, exact while an image has fewer than 2^24 pixels.
    label_one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    prediction_one_hot = jax.nn.one_hot(predictions, num_classes, dtype=jnp.float32)
    per_image = jnp.einsum("bhwc,bhwd->bcd", label_one_hot, prediction_one_hot)
    return jnp.sum(per_image.astype(jnp.int32), axis=0)


def no_counts(num_classes: int) -> np.ndarray:
    """What `add_counts` begins with: [2, C, C] int32."""
    return np.zeros((2, num_classes, num_classes), np.int32)


def add_counts(counts: jax.Array, confusion: jax.Array) -> jax.Array:
    """Adds a batch's confusion matrix to the counts of a whole data set, on the device.

    A test set has more pixels than an int32 can count, and there is no int64 on the device.

    Args:
      counts: [2, C, C] int32, multiples of 2^20 and the rest.
      confusion: [C, C] int32, below 2^30.

    Returns:
      [2, C, C] int32, exact up to 2^51.
    """
    rest = counts[1] + confusion
    return jnp.stack([counts[0] + (rest >> 20), rest & (2**20 - 1)])


def counted(counts: np.ndarray) -> np.ndarray:
    """The confusion matrix [C, C] int64 that the counts [2, C, C] hold."""
    high, rest = np.asarray(counts, np.int64)
    return (high << 20) + rest


def scores(confusion: np.ndarray) -> dict[str, float | np.ndarray]:
    """Scores of a confusion matrix.

    Args:
      confusion: [C, C] integers, rows labels, columns predictions.

    Returns:
      Per class, [C] float64: `iou`, `f1`, `precision`, `recall`, NaN where undefined (a class
      absent from labels and predictions has no IoU; the published code counts it as 1). Scalars
      in [0, 1]: `oa` overall accuracy, and the means over the classes that the labels hold:
      `aa` (recall), `miou`, `mf1`, `mprecision`.
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
    # A class that is never predicted has no precision; its share of the mean is 0.
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
      right: [B, H, W] bool, pixels whose noisy label is the truth.
      wrong: [B, H, W] bool, pixels whose noisy label is not.

    Returns:
      [2, 256] int32: right, wrong; level i is i / 256.
    """

    def count_above(level: jax.Array) -> jax.Array:
        above = confidence >= level
        return jnp.stack([jnp.sum(above & right), jnp.sum(above & wrong)])

    levels = jnp.arange(NUM_CONFIDENCE_LEVELS, dtype=jnp.float32) / NUM_CONFIDENCE_LEVELS
    return jax.lax.map(count_above, levels).T.astype(jnp.int32)


def auroc(counts: np.ndarray) -> float:
    """Area under the ROC curve of telling right labels from wrong by their confidence.

    Args:
      counts: [2, L] of `confidence_counts`, right and wrong at or above rising levels from 0.

    Returns:
      In [0, 1], 0.5 for chance; NaN if either kind is absent.
    """
    right, wrong = np.asarray(counts, np.float64)
    if right[0] == 0 or wrong[0] == 0:
        return float("nan")
    hit_rate = np.append(right / right[0], 0.0)[::-1]
    false_rate = np.append(wrong / wrong[0], 0.0)[::-1]
    return float(np.trapezoid(hit_rate, false_rate))
