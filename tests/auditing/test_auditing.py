"""Evidence, noise and scores: by hand, by simulation, and against SciPy."""

import numpy as np
import pytest
from scipy import stats

from cromss_jax.auditing import evidence, job, noise, scores
from cromss_jax.method import selection


def test_entangled_by_hand_and_as_the_method():
    s1, s2 = np.float32([0.8, 0.2]), np.float32([0.6, 0.4])
    found = evidence.entangled({"s1": s1, "s2": s2})
    # 1.4 / 4 + 0.48 / 2 = 0.59 and 0.6 / 4 + 0.08 / 2 = 0.19.
    np.testing.assert_allclose(found, [0.59 / 0.78, 0.19 / 0.78], rtol=1e-6)
    mean = (selection.entangle(s1, s2) + selection.entangle(s2, s1)) / 2
    np.testing.assert_allclose(found, mean / mean.sum(), rtol=1e-6)
    # Where the sensors disagree, neither is believed; where they agree, more than each.
    apart = evidence.entangled({"s1": np.float32([0.9, 0.1]), "s2": np.float32([0.1, 0.9])})
    np.testing.assert_allclose(apart, [0.5, 0.5])
    assert evidence.entangled({"s1": s1, "s2": s1})[0] > 0.8
    np.testing.assert_array_equal(evidence.entangled({"s1": s1}), s1)


def test_other_seasons():
    images = np.float32([[1, 0], [0, 1], [0.5, 0.5]])
    np.testing.assert_allclose(
        evidence.other_seasons(images), [[0.25, 0.75], [0.75, 0.25], [0.5, 0.5]]
    )
    np.testing.assert_array_equal(evidence.other_seasons(images[:1]), [[0.5, 0.5]])


def test_other_dates():
    """The third date has the labels of the first: neither speaks for the other."""
    labels = np.uint8([[[0, 1]], [[0, 255]], [[0, 1]]])
    found = evidence.other_dates(labels, 2)
    own = [[3 / 4, 1 / 4], [1 / 2, 1 / 2]]
    np.testing.assert_allclose(found[:, 0], [own, [[5 / 6, 1 / 6], [1 / 6, 5 / 6]], own], rtol=1e-6)
    np.testing.assert_array_equal(evidence.other_dates(labels[:1], 2), np.full((1, 1, 2, 2), 0.5))


def test_witnesses_are_a_product_of_powers():
    images, neighbours = np.float32([0.5, 0.3, 0.2]), np.float32([0.04, 0.16, 0.8])
    found = evidence.combine({"images": images, "neighbours": neighbours})
    product = images * np.sqrt(neighbours)
    np.testing.assert_allclose(found, product / product.sum(), rtol=1e-5)
    # A witness that knows nothing changes nothing.
    uniform = np.full(3, 1 / 3, np.float32)
    again = evidence.combine({"images": images, "neighbours": neighbours, "seasons": uniform})
    np.testing.assert_allclose(again, found, rtol=1e-5)
    labels = np.uint8([0, 2, 255])
    own = evidence.label_probability(np.stack([found] * 3), labels)
    np.testing.assert_allclose(own, [found[0], found[2], 1])


def test_reasons():
    """Rows: label 0 fits; both see 1; they see 1 and 2; S1 alone sees 1; S2 alone; neither."""
    one = np.eye(3, dtype=np.float32)
    probs = {"s1": one[[0, 1, 1, 1, 0, 0]], "s2": one[[1, 1, 2, 0, 1, 0]]}
    labels = np.zeros(6, np.uint8)
    suggested = np.uint8([0, 1, 1, 1, 1, 1])
    found = evidence.reasons(probs, labels, suggested)
    np.testing.assert_array_equal(found, np.arange(6))
    assert [evidence.REASONS[i] for i in evidence.AGREEING] == [
        "S1 and S2 see the same other class",
        "other dates or neighbours",
    ]
    alone = evidence.reasons({"s2": probs["s2"]}, labels, suggested)
    np.testing.assert_array_equal(alone, [0, 4, 4, 5, 4, 5])


def test_a_label_that_is_probably_wrong_is_not_suggested():
    product = np.float32([[0.4, 0.5, 0.1], [0.2, 0.15, 0.65]])
    labels = np.uint8([0, 2])
    # The odds of a wrong label are 1.5 and 35 / 65, of which shifts make exp(shift) as many.
    for shift, wrong, suggested in (
        (0.0, [0.6, 0.35], [1, 2]),
        (np.log(1 / 1.5), [0.5, 0.35 / (0.35 + 0.65 * 1.5)], [1, 2]),
        (np.log(6.0), [0.9, 2.1 / 2.75], [1, 0]),
    ):
        calibration = job.Calibration(np.zeros((2, 3)), np.full(3, shift))
        found = calibration.judge(product, labels)
        np.testing.assert_allclose(found[0], wrong, rtol=1e-5)
        np.testing.assert_array_equal(found[1], suggested)
        assert found[1].dtype == np.uint8


def simulated(num: int = 60_000):
    """Classes, noisy labels of known noise, and predictions that are right nine times in ten."""
    rng = np.random.default_rng(0)
    transition = np.array([[0.8, 0.2, 0.0], [0.1, 0.9, 0.0], [0.3, 0.0, 0.7]])
    truth = rng.choice(3, num, p=[0.5, 0.3, 0.2])
    labels = (rng.random(num)[:, None] > transition[truth].cumsum(1)).sum(1).astype(np.uint8)
    probs = np.full((num, 3), 0.1, np.float32)
    guessed = np.where(rng.random(num) < 0.9, truth, rng.integers(0, 3, num))
    probs[np.arange(num), guessed] = 0.8
    joint = np.zeros((3, 3))
    np.add.at(joint, (labels, truth), 1 / num)
    return truth, labels, probs, joint


def test_confident_counts_by_hand():
    probs = np.float32([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.55, 0.45], [0.3, 0.7]])
    labels = np.uint8([0, 0, 1, 1, 0])
    limits = noise.thresholds(probs, labels)
    np.testing.assert_allclose(limits, [(0.9 + 0.6 + 0.3) / 3, (0.8 + 0.45) / 2])
    # The second is exactly at no limit but class 0's; the fourth reaches none.
    limits = np.array([0.6, 0.625], np.float32)
    np.testing.assert_array_equal(noise.confident_counts(probs, labels, limits), [[2, 1], [0, 1]])
    found = noise.estimate(np.array([[2, 1], [0, 1]]), np.array([3, 2]))
    np.testing.assert_allclose(found.joint, [[0.4, 0.2], [0, 0.4]])
    assert found.error_rate == pytest.approx(0.2)
    np.testing.assert_allclose(found.error_rates, [1 / 3, 0])
    np.testing.assert_allclose(found.transitions, [[2 / 3, 1 / 3], [0, 1]])
    both = noise.estimate(np.array([[[2, 1], [0, 1]], [[3, 0], [1, 1]]]), np.array([3, 2]))
    np.testing.assert_allclose(both.joint, [[0.5, 0.1], [0.1, 0.3]])


def test_noise_of_a_simulation_is_found():
    _, labels, probs, joint = simulated()
    counts = noise.confident_counts(probs, labels, noise.thresholds(probs, labels))
    found = noise.estimate(counts, np.bincount(labels))
    # Predictions are wrong in 7 of 100, of which the estimate takes some for wrong labels.
    np.testing.assert_allclose(found.joint, joint, atol=0.03)
    perfect = np.eye(3, dtype=np.float32)[simulated()[0]]
    counts = noise.confident_counts(perfect, labels, noise.thresholds(perfect, labels))
    np.testing.assert_allclose(noise.estimate(counts, np.bincount(labels)).joint, joint, atol=1e-12)


def test_intervals_hold_the_estimate_and_shrink_with_more_locations():
    _, labels, probs, _ = simulated()
    limits = noise.thresholds(probs, labels)
    widths = []
    for parts in (10, 100):
        size = 60 * parts
        chunks = [slice(i * 60, (i + 1) * 60) for i in range(parts)]
        counts = np.stack([noise.confident_counts(probs[c], labels[c], limits) for c in chunks])
        sizes = np.stack([np.bincount(labels[c], minlength=3) for c in chunks])
        low, high = noise.intervals(counts, sizes)
        rate = noise.estimate(counts.sum(0), sizes.sum(0)).error_rate
        assert low[-1] < rate < high[-1], size
        widths.append(high[-1] - low[-1])
    # As the square root of their number.
    assert widths[1] == pytest.approx(widths[0] / np.sqrt(10), rel=0.5)


def test_shifts_make_the_mean_the_expected_rate():
    rng = np.random.default_rng(0)
    wrong, labels = rng.random(1000) ** 2, rng.integers(0, 3, 1000)
    shifts = noise.fit_shifts(wrong, labels, np.array([0.1, 0.5, np.nan]))
    found = noise.apply_shifts(wrong, labels, shifts)
    assert found[labels == 0].mean() == pytest.approx(0.1, abs=1e-5)
    assert found[labels == 1].mean() == pytest.approx(0.5, abs=1e-5)
    np.testing.assert_allclose(found[labels == 2], wrong[labels == 2], atol=1e-5)
    # The order within a label stays.
    own = labels == 0
    np.testing.assert_array_equal(np.argsort(found[own]), np.argsort(wrong[own]))


def test_ranking_against_scipy_and_sorting():
    rng = np.random.default_rng(0)
    is_wrong = rng.random(5000) < 0.2
    evidence_ = np.clip(rng.normal(0.4 + 0.2 * is_wrong, 0.15), 0, 0.9999)
    # Without ties, as in no bin there are two.
    evidence_ = np.rint(evidence_ * scores.NUM_BINS) / scores.NUM_BINS
    found = scores.ranking(scores.count(evidence_, is_wrong))
    statistic = stats.mannwhitneyu(evidence_[is_wrong], evidence_[~is_wrong]).statistic
    pairs = is_wrong.sum() * (~is_wrong).sum()
    assert found["auroc"] == pytest.approx(statistic / pairs, abs=1e-9)
    order = np.argsort(-evidence_, kind="stable")
    precision = np.cumsum(is_wrong[order]) / np.arange(1, 5001)
    assert found["auprc"] == pytest.approx(precision[is_wrong[order]].mean(), abs=2e-3)
    assert found["precision_at_5"] == pytest.approx(is_wrong[order][:250].mean(), abs=0.02)
    assert np.isnan(scores.ranking(scores.count(evidence_, np.ones(5000, bool)))["auroc"])


def test_perfect_evidence():
    is_wrong = np.arange(100) < 10
    found = scores.ranking(scores.count(np.where(is_wrong, 0.9, 0.1), is_wrong))
    assert found == {
        "auroc": 1.0,
        "auprc": pytest.approx(1),
        "precision_at_1": pytest.approx(1),
        "precision_at_5": pytest.approx(1),
        "precision_at_10": pytest.approx(1),
    }


def test_reliability():
    probability = np.repeat([0.25, 0.75], [100, 300])
    is_wrong = np.concatenate([np.arange(100) < 20, np.arange(300) < 240])
    groups = scores.reliability(scores.count(probability, is_wrong), 2)
    assert [g["observed"] for g in groups] == [0.2, 0.8]
    assert [g["pixels"] for g in groups] == [100, 300]
    assert scores.calibration_error(groups) == pytest.approx(0.05, abs=2e-4)


def test_one_wrong_patch_is_found():
    """The images of all seasons see class 1 where one season's label says 0."""
    rng = np.random.default_rng(0)
    truth = (np.arange(24)[:, None] + np.zeros((3, 24, 24), int) >= 12).astype(np.uint8)
    labels = truth.copy()
    labels[1, 14:20, 4:10] = 0
    labels[:, :, -1] = 255
    sure = 0.7 + 0.2 * rng.random((2, 3, 24, 24)).astype(np.float32)
    probs = {
        m: np.where(np.eye(2, dtype=bool)[truth], p[..., None], 1 - p[..., None])
        for m, p in zip(("s1", "s2"), sure, strict=True)
    }
    prior = np.full((3, 24, 24, 2), 0.5, np.float32)
    found = {"labels": labels, "prior": prior}
    settings = job.Settings(pixels=10_000)
    calibration = job.calibrate(lambda _: (probs, found), np.array([0]), settings)
    # One map for all dates and no neighbours: labels have nothing to say.
    same = job.witnesses(probs, prior, np.repeat(labels[:1], 3, axis=0))
    np.testing.assert_allclose(*same, rtol=1e-5)
    _, product = job.witnesses(probs, prior, labels)
    wrong, suggested = calibration.judge(product, labels)
    is_wrong = (labels != truth) & (labels != 255)
    assert wrong[is_wrong].min() > 2 * wrong[~is_wrong & (labels != 255)].max()
    assert (suggested[is_wrong] == 1).all()
    # What is expected is what is estimated; confident learning counts the confident half.
    share = is_wrong.sum() / (labels != 255).sum()
    assert share / 3 < wrong[labels != 255].mean() < 2 * share
