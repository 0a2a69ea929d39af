"""Spatial folds of a data set: locations that lie together are held back together."""

import collections

import numpy as np

from cromss_jax import blocks
from cromss_jax.data import input_pipeline
from cromss_jax.errors import UserError
from data_prep.reading import grids


class FoldError(UserError):
    """Folds that cannot be made. The message is for the user."""


def spatial_folds(
    dataset: input_pipeline.TileDataset, num_folds: int, block_km: float
) -> np.ndarray:
    """The fold of each location, [L] int; locations of one block of the earth share it.

    Raises:
      FoldError: if there are fewer blocks than folds.
    """
    owned: dict[blocks.Block, list[int]] = collections.defaultdict(list)
    for index, start in enumerate(dataset.starts.tolist()):
        record = dataset.source[start]
        a, b, c, d, e, f = record["transform"]
        half = dataset.tile_size / 2
        x, y = a * half + b * half + c, d * half + e * half + f
        crs = record["crs"].decode()
        if not crs:
            raise FoldError(
                f"location {record['location_id'].decode()} has no CRS, so that folds cannot be "
                "made by place: audit without --folds"
            )
        x, y = grids.degrees(crs, x, y)
        owned[blocks.block_of_centre((x, y, x, y), 1000 * block_km)].append(index)
    if len(owned) < num_folds:
        raise FoldError(
            f"the locations lie in {len(owned)} blocks of {block_km:g} km, --folds={num_folds} "
            "needs as many: choose a smaller --block_km or fewer folds"
        )
    fold_of = blocks.deal({block: len(members) for block, members in owned.items()}, num_folds)
    folds = np.zeros(dataset.num_locations, int)
    for block, members in owned.items():
        folds[members] = fold_of[block]
    return folds
