"""Which locations are held back for validation: drawn singly, or by blocks of the earth."""

import numpy as np

from cromss_jax import blocks
from cromss_jax.data.input_pipeline import DataError


def split_locations(
    num_locations: int,
    validation_fraction: float,
    seed: int,
    location_blocks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Splits the locations into training and validation.

    Validation gets at least one location if `validation_fraction` is above 0.

    Args:
      num_locations: of the data set.
      validation_fraction: share for validation.
      seed: of the draw.
      location_blocks: [locations] int, see `TileDataset.blocks`. Whole blocks are drawn then,
        see `blocks.draw`.

    Returns:
      Indices of the training and of the validation locations, both sorted.

    Raises:
      DataError: if no training location would be left.
    """
    num_validation = round(num_locations * validation_fraction)
    if validation_fraction > 0:
        num_validation = max(num_validation, 1)
    if num_validation >= num_locations:
        raise DataError(
            f"no training locations are left: the data set has {num_locations} locations and "
            f"config.data.validation_fraction is {validation_fraction}; use more locations or a "
            "smaller fraction"
        )
    if location_blocks is not None and num_validation:
        return _split_blocks(location_blocks, num_validation, seed)
    order = np.random.default_rng(seed).permutation(num_locations)
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])


def _split_blocks(
    location_blocks: np.ndarray, num_validation: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits the locations by whole blocks; see `split_locations`."""
    numbers, counts = np.unique(location_blocks, return_counts=True)
    if len(numbers) < 2:
        raise DataError(
            "all locations lie in one block, so that none can be held back for validation: build "
            "the data set with a smaller --block_size, or set config.data.validation_fraction to 0"
        )
    sizes = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    order = numbers[np.random.default_rng(seed).permutation(len(numbers))].tolist()
    is_held = np.isin(location_blocks, list(blocks.draw(sizes, order, num_validation)))
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)
