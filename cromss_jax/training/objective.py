"""The training objective of a configuration: `training_loss` combines the parts of the method.

Each equation is a function in `cromss_jax.method`. Dimensions: B batch, H height, W width,
C classes.
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections

from cromss_jax import presets, sensors
from cromss_jax.method import losses, schedules, selection, smoothing
from cromss_jax.training.state import Maps, Metrics


def num_classes(config: ml_collections.ConfigDict) -> int:
    """C, which `run.describe_data` takes from the data set; without it, Dynamic World's."""
    return config.network.get("num_classes", len(presets.DYNAMIC_WORLD))


def stored_bands(config: ml_collections.ConfigDict) -> tuple[sensors.Band, ...] | None:
    """The bands of the records, which `run.describe_data` takes from the data set, if it did."""
    return sensors.bands_of_rows(config.imagery) if "imagery" in config else None


def others(modality: str, maps: Maps) -> jax.Array | None:
    """The other modality's entry; None if there is only one modality."""
    return next((value for name, value in maps.items() if name != modality), None)


def entangled(confidences: Maps) -> dict[str, jax.Array]:
    """Each modality's confidence combined with the other's; unchanged for a single modality."""
    return {
        modality: own
        if len(confidences) == 1
        else selection.entangle(own, others(modality, confidences))
        for modality, own in confidences.items()
    }


@jax.named_scope("selection")
def label_confidences(log_probs: Maps, labels: jax.Array) -> dict[str, jax.Array]:
    """P[y] of each modality, [B, H, W], without gradient."""
    return {
        modality: selection.label_confidence(jnp.exp(jax.lax.stop_gradient(x)), labels)
        for modality, x in log_probs.items()
    }


@jax.named_scope("selection")
def selection_weights(
    config: ml_collections.ConfigDict,
    confidences: Maps,
    labels: jax.Array,
    ramp: jax.Array,
    num_scopes: int,
    together: bool = False,
) -> dict[str, jax.Array]:
    """Weights of the segmentation loss by modality, [B, H, W], 0 at ignored pixels.

    `num_scopes` and `together` are as for `training_loss`.
    """
    if not config.selection.enabled:
        return dict.fromkeys(confidences, (labels < num_classes(config)).astype(jnp.float32))
    keep = selection.keep_fraction(ramp, config.selection.final_keep_fraction)
    weigh = functools.partial(
        selection.selection_weights,
        labels=labels,
        keep_fraction=keep,
        num_classes=num_classes(config),
        num_scopes=num_scopes,
    )
    confidences = entangled(confidences)
    if not together:
        return {modality: weigh(confidence) for modality, confidence in confidences.items()}
    weights = jax.vmap(weigh)(jnp.stack(list(confidences.values())))
    return dict(zip(confidences, weights, strict=True))


@jax.named_scope("selection")
def consistency_weights(
    config: ml_collections.ConfigDict, log_probs: Maps, ramp: jax.Array
) -> dict[str, jax.Array]:
    """Weights of the consistency loss by teaching modality, [B, H, W], without gradient."""
    kind = config.selection.confidence
    if not config.selection.enabled:
        return {modality: jnp.ones(x.shape[:-1]) for modality, x in log_probs.items()}
    confidences = {
        modality: selection.prediction_confidence(jax.lax.stop_gradient(x), kind)
        for modality, x in log_probs.items()
    }
    return {
        modality: selection.consistency_weights(confidence, ramp)
        for modality, confidence in entangled(confidences).items()
    }


def consistency_losses(
    config: ml_collections.ConfigDict, log_probs: Maps, weights: Maps
) -> Metrics:
    """Consistency losses in both directions, each with the teacher's weights.

    The result is empty for a single modality.
    """
    return {
        f"consistency/{teacher}_to_{student}": losses.consistency_loss(
            log_probs[teacher], log_probs[student], weights[teacher], config.loss.consistency
        )
        for teacher in log_probs
        for student in log_probs
        if teacher != student
    }


def total_loss(config: ml_collections.ConfigDict, parts: Metrics) -> jax.Array:
    """Sum of the segmentation losses plus lambda times the sum of the consistency losses."""
    weight = {"segmentation": 1.0, "consistency": config.loss.consistency_weight}
    return sum(weight[name.split("/")[0]] * value for name, value in parts.items())


@jax.named_scope("losses")
def training_loss(
    config: ml_collections.ConfigDict,
    logits: Maps,
    batch: Maps,
    epoch: jax.Array,
    num_scopes: int = 1,
    together: bool = False,
) -> tuple[jax.Array, Metrics]:
    """The loss to minimise and the metrics to report (paper, Section III).

    Args:
      config: the configuration.
      logits: [B, H, W, C] float32 for each modality. For packed networks all maps, here and below,
        have the dimensions [B, 16, H W / 16] instead of [B, H, W].
      batch: examples from `preprocess.examples`, with a prior if the configuration needs one.
      epoch: scalar, counted from 0; determines the ramp.
      num_scopes: number of equal parts of the batch that have their own class thresholds.
      together: whether the modalities' thresholds are found in one search, in fewer operations.

    Returns:
      The scalar loss, and scalar metrics by name.
    """
    labels = batch["labels"]
    # In float32, because the networks return float32 logits for every compute dtype.
    log_probs = {m: jax.nn.log_softmax(x) for m, x in logits.items()}
    ramp = schedules.ramp_up(epoch, config.selection.ramp_epochs, config.selection.ramp)

    confidences = label_confidences(log_probs, labels)
    weights = selection_weights(config, confidences, labels, ramp, num_scopes, together)
    targets = smoothed_targets(config, batch)
    parts = {
        f"segmentation/{m}": losses.segmentation_loss(
            x, targets, weights[m], config.loss.segmentation
        )
        for m, x in log_probs.items()
    }
    teachers = consistency_weights(config, log_probs, ramp)
    parts |= consistency_losses(config, log_probs, teachers)
    loss = total_loss(config, parts)

    valid = (labels < num_classes(config)).astype(jnp.float32)
    report = {"loss": loss, "ramp": ramp, **parts}
    for m, x in log_probs.items():
        hits = (losses.argmax(x) == labels).astype(jnp.float32)
        report[f"accuracy/{m}"] = losses.weighted_mean(hits, valid)
        report[f"label_confidence/{m}"] = losses.weighted_mean(confidences[m], valid)
        report[f"selection_weight/{m}"] = losses.weighted_mean(weights[m], valid)
        if "truth" in batch:
            wrong = (labels != batch["truth"]).astype(jnp.float32)
            known = valid * (batch["truth"] < num_classes(config))
            report[f"wrong_labels_selected/{m}"] = losses.weighted_mean(wrong, known * weights[m])
    return loss, report


def smoothed_targets(config: ml_collections.ConfigDict, batch: Maps) -> jax.Array:
    """Targets y' of a batch, [B, H, W, C]; one-hot labels if the batch has no prior."""
    if "prior" not in batch:
        return jax.nn.one_hot(batch["labels"], num_classes(config), dtype=jnp.float32)
    return smoothing.smoothed_targets(
        batch["labels"], batch["prior"], config.loss.prior_weight, config.loss.uniform_weight
    )


def prior_kind(config: ml_collections.ConfigDict) -> str | None:
    """The kind of smoothing prior that the configuration needs; None without label smoothing."""
    smooths = config.loss.prior_weight > 0 or config.loss.uniform_weight > 0
    return config.loss.prior if smooths else None
