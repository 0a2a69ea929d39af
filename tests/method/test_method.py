"""Losses, selection and smoothing: golden numbers, hand-worked values, invariances."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from cromss_jax import sensors
from cromss_jax.method import losses, schedules, selection, smoothing

pytestmark = pytest.mark.numeric

C = 9
GOLDEN_TOLERANCE = 1e-5  # what the numbers of the published code must be matched to
KINDS = {"c": "cross_entropy", "d": "dice"}
CASES = ("paper_e40", "paper_e80_skew", "kl", "noselect", "nocons_d")


def method(logits, labels, prior, case):
    """The whole loss as the training step composes it, from a golden case's settings."""
    log_probs = {d: jax.nn.log_softmax(x) for d, x in logits.items()}
    stopped = {d: jax.lax.stop_gradient(x) for d, x in log_probs.items()}
    ramp = schedules.ramp_up(jnp.int32(case["epoch"]), case["nep"], case["rm"])
    label = {d: selection.label_confidence(jnp.exp(x), labels) for d, x in stopped.items()}
    kind = {"ce": "entropy", "gini": "gini"}[case["ctype"]]
    prediction = {d: selection.prediction_confidence(x, kind) for d, x in stopped.items()}
    other = {"1": "2", "2": "1"}
    out = {"label": label, "prediction": prediction}
    out["label_entangled"] = {d: selection.entangle(label[d], label[other[d]]) for d in label}
    out["prediction_entangled"] = {
        d: selection.entangle(prediction[d], prediction[other[d]]) for d in label
    }
    keep = selection.keep_fraction(ramp, case["prop"])
    if case["ss"]:
        out["selection"] = {
            d: selection.selection_weights(c, labels, keep, num_classes=C)
            for d, c in out["label_entangled"].items()
        }
        out["consistency"] = {
            d: selection.consistency_weights(c, ramp)
            for d, c in out["prediction_entangled"].items()
        }
    else:
        ones = jnp.ones(labels.shape)
        out["selection"] = out["consistency"] = dict.fromkeys(label, ones)
    if case["ls"]:
        out["targets"] = smoothing.smoothed_targets(labels, prior, *case["ls"])
    else:
        out["targets"] = jax.nn.one_hot(labels, C)
    kinds = [KINDS[letter] for letter in case["loss_type"]]
    total = sum(
        losses.segmentation_loss(log_probs[d], out["targets"], out["selection"][d], kinds)
        for d in log_probs
    )
    total += case["w"] * sum(
        losses.consistency_loss(
            log_probs[d], log_probs[other[d]], out["consistency"][d], case["cl"]
        )
        for d in log_probs
    )
    return total, out


@pytest.mark.parametrize("name", CASES)
def test_golden_losses(shared, name):
    case = json.loads((shared / "golden/loss_cases.json").read_text())[name]
    golden = dict(np.load(shared / f"golden/loss_{name}.npz"))
    logits = {d: jnp.asarray(golden[f"logits_{d}"]) for d in "12"}
    prior = golden.get("smooth_prior")
    compute = jax.jit(jax.value_and_grad(functools.partial(method, case=case), has_aux=True))
    (total, out), grads = compute(logits, golden["labels"], prior)
    found = {"total_loss": total, "smoothed_labels": out["targets"]}
    for d in "12":
        found |= {
            f"grad_logits_{d}": grads[d],
            f"label_confidence_{d}": out["label"][d],
            f"pred_confidence_{d}": out["prediction"][d],
            f"label_confidence_enhanced_{d}": out["label_entangled"][d],
            f"pred_confidence_enhanced_{d}": out["prediction_entangled"][d],
            f"label_weight_{d}": out["selection"][d],
            f"pred_weight_{d}": out["consistency"][d],
        }
    compared = sorted(set(found) & set(golden))
    assert {"total_loss", "grad_logits_1", "grad_logits_2"} <= set(compared)
    unused = set(golden) - set(compared) - {"labels", "logits_1", "logits_2", "smooth_prior"}
    assert not unused
    for key in compared:
        np.testing.assert_allclose(
            found[key], golden[key], atol=GOLDEN_TOLERANCE, rtol=GOLDEN_TOLERANCE, err_msg=key
        )
        if key.startswith("grad"):
            scale = np.abs(golden[key]).max()
            np.testing.assert_allclose(
                found[key] / scale, golden[key] / scale, atol=GOLDEN_TOLERANCE, err_msg=key
            )


def test_golden_smoothing_prior(shared):
    golden = np.load(shared / "golden/smoothing_prior.npz")
    season_labels = jnp.asarray(golden["labels_b"])[None]
    found = {"temporal_b": smoothing.temporal_prior(season_labels, C)}
    for season in (0, 2):
        labels = season_labels[:, season]
        found[f"spatial_b_{season}"] = smoothing.spatial_prior(labels, C)
        found[f"ts_b_{season}"] = smoothing.smoothing_prior(season_labels, labels, C, "ts")
    assert set(found) == set(golden) - {"labels_b"}
    for key, value in found.items():
        np.testing.assert_allclose(value[0], golden[key], atol=GOLDEN_TOLERANCE, err_msg=key)


@pytest.mark.parametrize(("kind", "sees"), [("t", "seasons"), ("s", "space"), ("ts", "both")])
def test_kinds_of_priors(kind, sees):
    """Two seasons of one class each, of which the second is drawn: time halves, space does not."""
    season_labels = jnp.stack([jnp.full((1, 30, 30), 1), jnp.full((1, 30, 30), 2)], axis=1)
    prior = smoothing.smoothing_prior(season_labels, season_labels[:, 1], 3, kind)
    expected = {"seasons": [0, 0.5, 0.5], "space": [0, 0, 1], "both": [0, 0.25, 0.75]}[sees]
    np.testing.assert_allclose(prior, np.broadcast_to(expected, prior.shape), atol=1e-6)


def test_targets_by_hand():
    prior = jnp.array([[[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]]])
    targets = smoothing.smoothed_targets(jnp.array([[[0, 3]]]), prior, 0.2, 0.3)
    # 0.5 onehot + 0.2 prior + 0.3 / 3; a label that is no class is ignored.
    expected = [[[[0.7, 0.15, 0.15], [0, 0, 0]]]]
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


def test_golden_scaling(shared):
    golden = np.load(shared / "golden/downstream_clip.npz")
    for modality, bands in (("s1", sensors.S1_BANDS), ("s2", sensors.S2_BANDS)):
        for i, band in enumerate(bands):
            values = golden[modality][..., i]
            clipped = golden[f"{modality}_clip"][..., i]
            np.testing.assert_array_equal(sensors.scale_to_uint8(values, band), clipped, band)
            # Standardised as published: S1 between its own percentiles, S2 between mean ± 2 std.
            mean, std = sensors.BAND_STATISTICS[band]
            limits = (mean - 2 * std, mean + 2 * std)
            if modality == "s1":
                limits = np.percentile(values, (1, 99))
            found = (np.clip(values.astype(np.float64), *limits) - mean) / std
            expected = golden[f"{modality}_norm"][..., i]
            np.testing.assert_allclose(found, expected, atol=GOLDEN_TOLERANCE, err_msg=band)


def test_golden_scaling_back_to_reflectance(shared):
    golden = np.load(shared / "golden/normalize13.npz")
    for i, band in enumerate(sensors.S2_BANDS):
        found = sensors.values_of_uint8(golden["img"][..., i], band) / 10000
        np.testing.assert_allclose(
            found, golden["out"][..., i], atol=GOLDEN_TOLERANCE, err_msg=band
        )


@pytest.mark.parametrize("size", [5, 24, 264])
def test_gaussian_matrix_is_scipys_filter(size):
    signal = np.random.default_rng(0).random(size)
    expected = scipy.ndimage.gaussian_filter1d(signal, 3.0, mode="reflect", truncate=4.0)
    # The matrix is rounded to float32.
    np.testing.assert_allclose(smoothing.gaussian_matrix(size) @ signal, expected, rtol=1e-6)


def test_prior_with_ignored_pixels():
    labels = jnp.full((1, 40, 40), 255).at[0, :, 0].set(3)
    prior = smoothing.spatial_prior(labels, C)
    # Within the filter's reach only class 3 is known; beyond 12 pixels nothing is.
    np.testing.assert_allclose(prior[0, :, 5], np.eye(C)[3][None].repeat(40, 0), atol=1e-6)
    np.testing.assert_allclose(prior[0, :, 20], 1 / C, rtol=1e-6)
    # A season of which nothing is known leaves the temporal prior as it is.
    known = jax.random.randint(jax.random.key(0), (1, 2, 40, 40), 0, C)
    padded = jnp.concatenate([known, jnp.full((1, 1, 40, 40), 255)], axis=1)
    np.testing.assert_allclose(
        smoothing.temporal_prior(known, C), smoothing.temporal_prior(padded, C), atol=1e-6
    )
    targets = smoothing.smoothed_targets(labels, prior, 0.15, 0.05)
    np.testing.assert_allclose(targets[0, :, 0].sum(-1), 1.0, rtol=1e-6)
    assert not targets[0, :, 1:].any()


# Images of an odd number of pixels, of as many as one sum counts, of more, of a prime number.
@pytest.mark.parametrize(
    "shape",
    [
        (4, 31, 17),
        pytest.param((2, 1023, 128), marks=pytest.mark.slow),
        pytest.param((2, 64, 2048), marks=pytest.mark.slow),
        (2, 1031, 1),
    ],
)
def test_thresholds_equal_a_sort(shape):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, C + 1, shape, np.uint8)
    labels[labels == C] = 255
    labels[0] = 4  # of one class, every pixel counts: the largest sums
    # Ties, zeros, ones and subnormals among them.
    values = np.array([0, 1e-42, 1e-20, 0.25, 0.5, 1], np.float32)
    confidence = np.where(
        rng.random(labels.shape) < 0.5, rng.random(labels.shape), rng.choice(values, labels.shape)
    ).astype(np.float32)
    confidence[0] = 1
    thresholds = jax.jit(selection.class_thresholds)
    for keep in (0.01, 0.3, 0.5, 0.999, 1.0):
        counts = np.bincount(labels[labels != 255], minlength=C)
        k = np.floor(np.float32(keep) * counts).astype(np.int32)
        found = thresholds(confidence, labels, k)
        for c in range(C):
            if k[c]:
                expected = np.sort(confidence[labels == c])[::-1][k[c] - 1]
                assert np.asarray(found)[c] == expected


def test_selection_weights_by_hand():
    labels = jnp.array([[[0, 0, 0, 0, 1, 1, 2, 255]]])
    confidence = jnp.array([[[0.8, 0.4, 0.2, 0.0, 0.0, 0.0, 0.7, 0.9]]])
    compute = jax.jit(functools.partial(selection.selection_weights, num_classes=3))
    weights = lambda keep: np.asarray(compute(confidence, labels, jnp.float32(keep)))[0, 0]
    # Two of four of class 0 are kept: threshold 0.4. Class 1's threshold is 0: weight 1.
    # Half of one pixel of class 2 is none: weight 0.
    np.testing.assert_allclose(weights(0.5), [1, 1, 0.5, 0, 1, 1, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(weights(1.0), [1, 1, 1, 1, 1, 1, 1, 0])
    np.testing.assert_allclose(weights(0.0), [0.8, 0.4, 0.2, 0, 0, 0, 0.7, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("ramp", "final", "kept"), [(0.0, 0.2, 1.0), (0.5, 0.2, 0.6), (1.0, 0.2, 0.2), (0.5, 0.8, 0.9)]
)
def test_the_kept_fraction_falls_to_its_final_value(ramp, final, kept):
    np.testing.assert_allclose(selection.keep_fraction(ramp, final), kept)


def test_confidences_by_hand():
    probs = jnp.array([[[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]]])
    np.testing.assert_allclose(
        selection.prediction_confidence(jnp.log(probs), "gini"), [[[0.38, 0.66]]], rtol=1e-6
    )
    entropy = -(0.5 * np.log(0.5) + 0.3 * np.log(0.3) + 0.2 * np.log(0.2))
    found = selection.prediction_confidence(jnp.log(probs), "entropy")
    np.testing.assert_allclose(found[0, 0, 0], 1 - entropy / np.log(3), rtol=1e-5)
    np.testing.assert_allclose(
        selection.label_confidence(probs, jnp.array([[[1, 255]]])), [[[0.3, 0]]], rtol=1e-6
    )
    np.testing.assert_allclose(selection.entangle(jnp.float32(0.8), jnp.float32(0.5)), 0.6)
    confidence = jnp.array([0.0, 0.4, 1.0])
    np.testing.assert_allclose(
        selection.consistency_weights(confidence, jnp.float32(0.25)), [0.75, 0.85, 1.0]
    )


def test_a_confidence_does_not_leave_zero_to_one_by_rounding():
    log_probs = jax.nn.log_softmax(1e-4 * jax.random.normal(jax.random.key(0), (1, 40, 40, C)))
    found = selection.prediction_confidence(log_probs, "entropy")
    assert 0 <= found.min() <= found.max() <= 1


def test_scopes_are_separate_batches():
    keys = jax.random.split(jax.random.key(2))
    confidence = jax.random.uniform(keys[0], (4, 8, 8))
    labels = jax.random.randint(keys[1], (4, 8, 8), 0, C)
    keep, weights = jnp.float32(0.5), functools.partial(selection.selection_weights, num_classes=C)
    together = jax.jit(functools.partial(weights, num_scopes=2))(confidence, labels, keep)
    for part in (slice(0, 2), slice(2, 4)):
        alone = jax.jit(weights)(confidence[part], labels[part], keep)
        np.testing.assert_array_equal(together[part], alone)


def test_saturated_prediction_has_confidence_one():
    log_probs = jax.nn.log_softmax(jnp.array([[[[1000.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]]))
    np.testing.assert_allclose(
        selection.prediction_confidence(log_probs, "entropy"), [[[1.0, 0.0]]], atol=1e-6
    )
    np.testing.assert_allclose(
        selection.prediction_confidence(log_probs, "gini"), [[[1.0, 1 / 3]]], rtol=1e-6
    )


def test_ramps():
    epochs = jnp.array([0, 40, 80, 81, 200])
    np.testing.assert_allclose(
        schedules.ramp_up(epochs, 80, "exp"), [np.exp(-5), np.exp(-1.25), 1, 1, 1], rtol=1e-6
    )
    np.testing.assert_allclose(schedules.ramp_up(epochs, 80, "linear"), [0, 0.5, 1, 1, 1])
    for ramp in (schedules.ramp_up(epochs, 80, "none"), schedules.ramp_up(epochs, 0, "exp")):
        np.testing.assert_array_equal(ramp, np.ones(5))


@pytest.fixture
def example():
    keys = jax.random.split(jax.random.key(3), 4)
    log_probs = [jax.nn.log_softmax(2 * jax.random.normal(k, (2, 6, 5, C))) for k in keys[:2]]
    targets = jax.nn.softmax(jax.random.normal(keys[2], (2, 6, 5, C)))
    return log_probs, targets, jax.random.uniform(keys[3], (2, 6, 5))


def test_losses_by_hand():
    log_probs = jnp.log(jnp.array([[[[0.5, 0.5], [0.2, 0.8]]]]))
    targets = jnp.array([[[[1.0, 0.0], [1.0, 0.0]]]])
    weights = jnp.array([[[3.0, 1.0]]])
    loss = lambda kind: losses.segmentation_loss(log_probs, targets, weights, [kind])
    np.testing.assert_allclose(loss("cross_entropy"), (3 * np.log(2) + np.log(5)) / 4, rtol=1e-6)
    np.testing.assert_allclose(
        loss("focal"), (3 * 0.25 * np.log(2) + 0.64 * np.log(5)) / 4, rtol=1e-6
    )
    # Class 1 is absent from the targets: it counts as 0.
    np.testing.assert_allclose(loss("dice"), (1 - 2 * 1.7 / (1.7 + 4)) / 2, rtol=1e-6)


def test_dice_does_not_depend_on_the_scale_of_small_weights():
    log_probs = jnp.log(jnp.array([[[[0.5, 0.5]]]]))
    targets = jnp.array([[[[1.0, 0.0]]]])
    # 1 - 2 * 0.5 / 1.5, of one of two classes, down to where the floor of 1e-7 begins.
    for weight in (1.0, 1e-3, 1e-6):
        found = losses.soft_dice(log_probs, targets, jnp.full((1, 1, 1), weight))
        np.testing.assert_allclose(found, (1 / 3) / 2, rtol=1e-5)
    np.testing.assert_allclose(
        losses.soft_dice(log_probs, targets, jnp.full((1, 1, 1), 1e-8)), (1 - 0.1) / 2, rtol=1e-5
    )


def test_consistency_by_hand():
    teacher = jnp.log(jnp.array([[[[0.5, 0.5], [0.2, 0.8]]]]))
    student = jnp.log(jnp.array([[[[0.25, 0.75], [0.5, 0.5]]]]))
    weights = jnp.array([[[3.0, 1.0]]])
    loss = lambda kind: losses.consistency_loss(teacher, student, weights, kind)
    ce = (-0.5 * np.log(0.25) - 0.5 * np.log(0.75), np.log(2))
    np.testing.assert_allclose(loss("ce"), (3 * ce[0] + ce[1]) / 4, rtol=1e-6)
    entropy = (np.log(2), -0.2 * np.log(0.2) - 0.8 * np.log(0.8))
    kl = [c - h for c, h in zip(ce, entropy, strict=True)]
    np.testing.assert_allclose(loss("kl"), (3 * kl[0] + kl[1]) / 4, rtol=1e-5)
    # Summed over the classes: 2 * 0.25^2 and 2 * 0.3^2.
    np.testing.assert_allclose(loss("mse"), (3 * 0.125 + 0.18) / 4, rtol=1e-6)
    assert loss("none") == 0


def test_of_equal_values_the_first_class_is_taken():
    values = jnp.array([[[[1.0, 3, 3, 0], [0, 0, 0, 0], [0, 1, 2, 3], [-1, -2, -1, -3]]]])
    np.testing.assert_array_equal(losses.argmax(values), [[[1, 0, 3, 0]]])


@pytest.mark.parametrize("kind", losses.SEGMENTATION_LOSSES)
def test_weights_scale_out_and_zero_weight_is_absence(example, kind):
    (log_probs, _), targets, weights = example
    loss = lambda w, x=log_probs: losses.segmentation_loss(x, targets, w, [kind])
    np.testing.assert_allclose(loss(weights), loss(7 * weights), rtol=1e-5)
    masked = weights.at[:, 2].set(0.0)
    np.testing.assert_allclose(loss(masked), loss(masked, log_probs.at[:, 2].set(-1.0)), rtol=1e-6)
    assert loss(jnp.zeros_like(weights)) in (0.0, 1.0)  # nothing selected: finite


@pytest.mark.parametrize("kind", ["ce", "kl", "mse"])
def test_consistency_teaches_the_student_only(example, kind):
    (teacher, student), _, weights = example
    grads = jax.grad(losses.consistency_loss, argnums=(0, 1))(teacher, student, weights, kind)
    assert not np.any(grads[0])
    assert np.any(grads[1])
    if kind in ("kl", "mse"):
        same = losses.consistency_loss(teacher, teacher, weights, kind)
        np.testing.assert_allclose(same, 0.0, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: losses.segmentation_loss(x, x, w, ["lovasz"]),
        lambda x, w: losses.consistency_loss(x, x, w, "l1"),
        lambda x, w: selection.prediction_confidence(x, "ce"),
        lambda x, w: schedules.ramp_up(jnp.int32(0), 80, "cosine"),
    ],
)
def test_unknown_names_are_errors(example, call):
    (log_probs, _), _, weights = example
    with pytest.raises(ValueError, match="unknown .*: choose "):
        call(log_probs, weights)
