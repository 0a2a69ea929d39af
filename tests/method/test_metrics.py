"""Scores by hand, absent classes included; the learning-rate schedule as torch counts it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cromss_jax.method import metrics, schedules

pytestmark = pytest.mark.numeric


def test_scores_by_hand():
    # Class 2 is in the labels but never predicted, class 3 nowhere.
    confusion = np.array([[6, 2, 0, 0], [1, 3, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0]])
    found = metrics.scores(confusion)
    np.testing.assert_allclose(found["iou"], [6 / 11, 3 / 8, 0, np.nan])
    np.testing.assert_allclose(found["f1"], [12 / 17, 6 / 11, 0, np.nan])
    np.testing.assert_allclose(found["precision"], [6 / 9, 3 / 7, np.nan, np.nan])
    np.testing.assert_allclose(found["recall"], [6 / 8, 3 / 4, 0, np.nan])
    assert found["oa"] == 9 / 16
    np.testing.assert_allclose(found["miou"], (6 / 11 + 3 / 8) / 3)
    np.testing.assert_allclose(found["aa"], 0.5)
    np.testing.assert_allclose(found["mf1"], (12 / 17 + 6 / 11) / 3)
    np.testing.assert_allclose(found["mprecision"], (6 / 9 + 3 / 7) / 3)


def test_confusion_matrix_counts_every_valid_pixel():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 255], (3, 20, 7))
    predictions = rng.integers(0, 3, labels.shape)
    expected = np.zeros((3, 3), int)
    valid = labels != 255
    np.add.at(expected, (labels[valid], predictions[valid]), 1)
    found = metrics.confusion_matrix(jnp.asarray(labels), jnp.asarray(predictions), 3)
    np.testing.assert_array_equal(found, expected)


def test_counts_beyond_an_int32_are_exact():
    confusion = np.array([[2**30 - 1, 700_000], [0, 2**20]], np.int32)
    counts = jnp.asarray(metrics.no_counts(2))
    for number in range(1, 6):
        counts = metrics.add_counts(counts, confusion)
        np.testing.assert_array_equal(metrics.counted(counts), number * confusion.astype(np.int64))
    assert counts.dtype == jnp.int32
    # The remainders stay below 2^20, so that the next batch of up to 2^30 can be added.
    assert 0 <= counts[1].min() <= counts[1].max() < 2**20


def test_confidences_are_counted_at_or_above_each_level():
    confidence = jnp.array([[[0.0, 1 / 256, 0.5, 1.0, 1.0]]])
    right = jnp.array([[[True, True, False, True, False]]])
    wrong = jnp.array([[[False, False, True, False, False]]])  # the last one is neither
    counts = np.asarray(metrics.confidence_counts(confidence, right, wrong))
    assert counts.shape == (2, 256)
    np.testing.assert_array_equal(counts[0], [3, 2] + 254 * [1])
    np.testing.assert_array_equal(counts[1], 129 * [1] + 127 * [0])


def test_auroc_is_the_chance_that_a_right_label_is_more_confident():
    rng = np.random.default_rng(1)
    # Multiples of 1/256, so that the levels lose nothing; ties count half.
    right, wrong = rng.integers(60, 256, 300) / 256, rng.integers(0, 200, 200) / 256
    expected = np.mean((right[:, None] > wrong[None]) + 0.5 * (right[:, None] == wrong[None]))
    confidence = jnp.asarray(np.concatenate([right, wrong])[None, None], jnp.float32)
    is_right = jnp.arange(500)[None, None] < 300
    counts = metrics.confidence_counts(confidence, is_right, ~is_right)
    np.testing.assert_allclose(metrics.auroc(counts), expected, rtol=1e-12)
    assert np.isnan(
        metrics.auroc(metrics.confidence_counts(confidence, is_right, is_right & False))
    )


@pytest.mark.parametrize("patience", [0, 2, 5])
def test_plateau_is_torchs(patience):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(patience)
    # A falling loss that stalls: improvements just above and below the 1e-4 that counts.
    values = np.cumprod(1 - rng.choice([2e-4, 5e-5, -1e-3, 0], 100)).astype(np.float32)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, eps=0
    )
    ours = schedules.plateau(0.5, patience)
    state = ours.init(())
    update = jax.jit(lambda state, value: ours.update({}, state, value=value)[1])
    rates, expected = [], []
    for value in values:
        theirs.step(float(value))
        state = update(state, value)
        rates.append(float(state.scale))
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates == expected
    assert min(rates) < 0.5


def test_cosine_by_hand():
    found = lambda epoch: float(schedules.cosine(jnp.int32(epoch), 0.4, 0.1, 40))
    # Half a cosine of 0.3 above 0.1, and constant after it.
    np.testing.assert_allclose([found(0), found(20), found(40), found(60)], [0.4, 0.25, 0.1, 0.1])
    np.testing.assert_allclose(found(10), 0.1 + 0.15 * (1 + np.sqrt(0.5)), rtol=1e-6)


def test_learning_rates():
    epoch, scale = jnp.int32(3), jnp.float32(0.25)
    rate = lambda kind: float(schedules.learning_rate(epoch, 0.1, kind, 0.5, scale))
    np.testing.assert_allclose(
        [rate("plateau"), rate("exponential"), rate("constant")], [0.025, 0.0125, 0.1], rtol=1e-6
    )
    with pytest.raises(ValueError, match="unknown learning-rate schedule 'cosine': choose one of"):
        rate("cosine")
