"""Which locations are held back for validation."""

import numpy as np
import pytest

from cromss_jax.data import validation_split
from cromss_jax.data.input_pipeline import DataError


def test_held_back_locations():
    train, held_back = validation_split.split_locations(1000, 0.01, seed=0)
    assert len(held_back) == 10
    for part in (train, held_back):
        np.testing.assert_array_equal(part, np.sort(part))
    # 1.98 are rounded, not cut off.
    assert len(validation_split.split_locations(99, 0.02, seed=0)[1]) == 2
    assert not np.array_equal(held_back, validation_split.split_locations(1000, 0.01, seed=1)[1])
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_back])), np.arange(1000))
    assert len(validation_split.split_locations(4, 0.01, seed=0)[1]) == 1
    assert len(validation_split.split_locations(4, 0.0, seed=0)[1]) == 0
    with pytest.raises(DataError, match="1 locations and .*fraction is 0.01"):
        validation_split.split_locations(1, 0.01, seed=0)


def test_validation_takes_whole_blocks():
    blocks = np.repeat(np.arange(10), [30, 5, 8, 10, 12, 9, 7, 6, 10, 3])
    train, held_back = validation_split.split_locations(100, 0.2, 0, blocks)
    assert np.array_equal(np.union1d(train, held_back), np.arange(100))
    assert not set(blocks[train]) & set(blocks[held_back])
    assert 10 < len(held_back) <= 20
    # A tenth of a block: the smallest one.
    assert set(blocks[validation_split.split_locations(100, 0.01, 0, blocks)[1]]) == {9}
    assert len(validation_split.split_locations(100, 0.0, 0, blocks)[1]) == 0
    # As many blocks as fit exactly; of two blocks one.
    fours = np.repeat(np.arange(4), 5)
    assert len(validation_split.split_locations(20, 0.5, 0, fours)[1]) == 10
    assert len(validation_split.split_locations(10, 0.5, 0, fours[:10])[1]) == 5
    with pytest.raises(DataError, match="all locations lie in one block"):
        validation_split.split_locations(100, 0.2, 0, np.zeros(100))
    with pytest.raises(DataError, match="no training locations are left"):
        validation_split.split_locations(100, 1.0, 0, blocks)
