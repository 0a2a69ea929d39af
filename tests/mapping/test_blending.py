"""Blending against sums over the whole scene, and the layers by hand."""

import numpy as np

from cromss_jax.mapping import blending, windows

CLASSES = 3


def test_strips_are_the_sums_over_the_whole_scene():
    rng = np.random.default_rng(0)
    cut = windows.cut_scene(75, 50, size=32, overlap=8)
    probs = rng.random((len(cut), *cut.shape, CLASSES), np.float32)
    whole = np.zeros((75, 50, CLASSES))
    for index in range(len(cut)):
        i, j = divmod(index, len(cut.columns.starts))
        row, column = cut.place(index)
        weights = np.outer(cut.rows.weights[i], cut.columns.weights[j])
        whole[row : row + 32, column : column + 32] += probs[index] * weights[..., None]
    strips = blending.Strips(cut, ("s2",), CLASSES)
    found = []
    for index in range(len(cut)):
        strips.add(index, {"s2": np.ones(cut.shape, bool)}, {"s2": probs[index]})
        row, column = divmod(index, len(cut.columns.starts))
        if column + 1 == len(cut.columns.starts):
            blended, valid = strips.finish(row)
            assert valid["s2"].all()
            found.append(blended["s2"])
    np.testing.assert_allclose(np.concatenate(found), whole, atol=1e-6)


def test_equal_predictions_are_left_as_they_are():
    """No seam where windows agree: the map is the prediction, up to rounding."""
    truth = np.random.default_rng(1).dirichlet(np.ones(CLASSES), (70, 70)).astype(np.float32)
    cut = windows.cut_scene(70, 70, size=32, overlap=12)
    strips = blending.Strips(cut, ("s1",), CLASSES)
    found = []
    for index in range(len(cut)):
        row, column = cut.place(index)
        own = truth[row : row + 32, column : column + 32]
        strips.add(index, {"s1": np.ones(cut.shape, bool)}, {"s1": own})
        if column == cut.columns.starts[-1]:
            found.append(strips.finish(cut.rows.starts.index(row))[0]["s1"])
    np.testing.assert_allclose(np.concatenate(found), truth, atol=1e-6)


def test_both_sensors_by_hand():
    s1 = np.array([[[0.8, 0.2], [0.8, 0.2], [0.8, 0.2]]], np.float32)
    s2 = np.array([[[0.5, 0.5], [0.1, 0.9], [0.1, 0.9]]], np.float32)
    valid = {"s1": np.array([[True, True, False]]), "s2": np.array([[True, False, False]])}
    found = blending.combine({"s1": s1, "s2": s2}, valid)
    # sqrt(0.8 0.5) to sqrt(0.2 0.5) is 2 to 1; then S1 alone; then nothing.
    np.testing.assert_allclose(found, [[[2 / 3, 1 / 3], [0.8, 0.2], [0, 0]]], atol=1e-6)
    layers = blending.layers({"s1": s1, "s2": s2}, valid)
    np.testing.assert_array_equal(layers["classes"], [[[0, 0, 255]]])
    np.testing.assert_array_equal(layers["confidence"], [[[67, 80, 255]]])
    np.testing.assert_array_equal(layers["probabilities"], [[[67, 80, 255]], [[33, 20, 255]]])
    np.testing.assert_array_equal(layers["agreement"], [[[1, 255, 255]]])
    everywhere = {m: np.ones((1, 3), bool) for m in valid}
    np.testing.assert_array_equal(
        blending.layers({"s1": s1, "s2": s2}, everywhere)["agreement"], [[[1, 0, 0]]]
    )


def test_agreeing_sensors_are_one():
    """Equal probabilities stay as they are: neither sensor counts twice."""
    probs = np.random.default_rng(2).dirichlet(np.ones(4), (5, 5)).astype(np.float32)
    valid = dict.fromkeys(("s1", "s2"), np.ones((5, 5), bool))
    np.testing.assert_allclose(
        blending.combine({"s1": probs, "s2": probs}, valid), probs, atol=1e-6
    )
