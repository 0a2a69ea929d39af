"""Windows and their weights: hand-worked, and what they promise for any size."""

import numpy as np
import pytest

from cromss_jax.mapping import windows


def test_hand_worked():
    axis = windows.cut(length=10, size=4, overlap=1)
    assert axis.starts == (0, 3, 6)
    assert axis.ends == (3, 6, 10)
    # An overlap of one pixel is shared half and half.
    np.testing.assert_allclose(axis.weights[0], [1, 1, 1, 0.5])
    np.testing.assert_allclose(axis.weights[1], [0.5, 1, 1, 0.5])
    np.testing.assert_allclose(axis.weights[2], [0.5, 1, 1, 1])
    two = windows.cut(length=6, size=4, overlap=2)
    rise = np.sin(np.pi / 2 * np.array([0.25, 0.75])) ** 2
    np.testing.assert_allclose(two.weights, [[1, 1, *rise[::-1]], [*rise, 1, 1]], atol=1e-7)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 57, 64, 65, 100, 257])
@pytest.mark.parametrize("overlap", [0, 1, 8, 16])
def test_weights_sum_to_one_everywhere(length, overlap):
    axis = windows.cut(length, 32, overlap)
    total = np.zeros(length)
    for start, weights in zip(axis.starts, axis.weights, strict=True):
        assert (weights > 0).all()
        total[start : start + axis.size] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert axis.starts[-1] + axis.size == length
    shared = axis.size - np.diff(axis.starts)
    assert (shared >= overlap).all()
    # No fewer windows would do.
    assert len(axis.starts) == 1 or (len(axis.starts) - 2) * (32 - overlap) + 32 < length


def test_weights_change_slowly():
    """From pixel to pixel by no more than the raised cosine's steepest slope."""
    axis = windows.cut(300, 64, 16)
    for i, (start, weights) in enumerate(zip(axis.starts, axis.weights, strict=True)):
        padded = np.pad(weights, 1, mode="edge" if i in (0, len(axis.starts) - 1) else "constant")
        overlap = 64 - np.diff(axis.starts).max()
        inner = padded[1:] if start == 0 else padded[:-1] if start + 64 == 300 else padded
        assert np.abs(np.diff(inner)).max() <= np.pi / 2 / overlap


def test_a_scene_smaller_than_a_window_is_one():
    cut = windows.cut_scene(20, 100, size=32, overlap=8)
    assert cut.shape == (20, 32)
    assert len(cut) == len(cut.columns.starts)
    assert [cut.place(i)[0] for i in range(len(cut))] == [0] * len(cut)


def test_impossible_overlaps_are_refused():
    with pytest.raises(ValueError, match="overlap of 17: the overlap must be from 0 to half"):
        windows.cut(100, 32, 17)
