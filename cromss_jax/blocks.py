"""Blocks of the earth's surface, so that what is held back has no close neighbours.

Blocks are cells of about the same size between parallels and meridians. They do not depend on
scenes, so that overlapping scenes, also of different UTM zones, are split in the same way.
"""

import collections
import hashlib
import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

# Metres of a degree of latitude.
_DEGREE = 111_195.0

Block = tuple[int, int]
# A block, or a number that stands for it.
Key = TypeVar("Key", bound=Hashable)
# West, south, east and north in degrees; east is less than west across the antimeridian.
Bounds = tuple[float, float, float, float]


def blocks_of(bounds: Bounds, size: float, gap: float = 0.0) -> set[Block]:
    """The blocks that a tile touches.

    Args:
      bounds: of the tile.
      size: side of a block in metres.
      gap: metres around the tile that count as its own.
    """
    west, south, east, north = bounds
    if east < west:
        east += 360
    south, north = max(south - gap / _DEGREE, -90.0), min(north + gap / _DEGREE, 90.0)
    step = size / _DEGREE
    # The parallel nearest to a pole, where degrees of longitude are shortest.
    shrink = max(math.cos(math.radians(max(abs(south), abs(north)))), 1e-6)
    west, east = west - gap / _DEGREE / shrink, east + gap / _DEGREE / shrink
    found = set()
    for row in range(math.floor(south / step), math.floor(north / step) + 1):
        middle = min(abs(row + 0.5) * step, 89.9)
        count = max(1, round(360 * math.cos(math.radians(middle)) / step))
        width = 360 / count
        for column in range(math.floor(west / width), math.floor(east / width) + 1):
            found.add((row, column % count))
    return found


def block_of_centre(bounds: Bounds, size: float) -> Block:
    """The block in which the centre of a tile lies."""
    west, south, east, north = bounds
    if east < west:
        east += 360
    x, y = (west + east) / 2, (south + north) / 2
    return min(blocks_of((x, y, x, y), size))


def side_of(tiles: Sequence[Bounds]) -> float:
    """The usual side of tiles in metres, from north to south."""
    return float(np.median([north - south for _, south, _, north in tiles])) * _DEGREE


def draw(sizes: Mapping[Key, int], order: Iterable[Key], limit: float) -> set[Key]:
    """The blocks that are held back.

    Args:
      sizes: number of tiles in each block.
      order: of the draw.
      limit: number of tiles that they together may hold.

    Returns:
      Blocks in that order, without those that no longer fit; if none fits, the smallest.
    """
    held, total = set(), 0
    for block in order:
        if total + sizes[block] <= limit:
            held.add(block)
            total += sizes[block]
    return held or {min(sizes, key=sizes.get)}


def deal(sizes: Mapping[Key, int], num_folds: int) -> dict[Key, int]:
    """The fold of each block: from the largest on, each goes to the fold with the fewest tiles."""
    folds, totals = {}, np.zeros(num_folds, int)
    for block in sorted(sizes, key=lambda block: (-sizes[block], block)):
        folds[block] = int(totals.argmin())
        totals[folds[block]] += sizes[block]
    return folds


def split(
    tiles: Sequence[Bounds], fraction: float, size: float, gap: float, seed: int
) -> np.ndarray:
    """Which tiles are held back.

    Blocks are drawn that together hold no more than the wanted share of the tiles, but at least one
    is. The tiles with their centre in such a block are held back. The others are trained on, if
    they are further than `gap` from all of them and do not touch them.

    Args:
      tiles: their bounds.
      fraction: share of the tiles that is held back, above 0.
      size: side of a block in metres.
      gap: distance in metres that tiles of the two kinds must exceed.
      seed: of the draw.

    Returns:
      [tiles] int8: 1 held back, 0 trained on, -1 neither.

    Raises:
      ValueError: if all tiles lie in one block.
    """
    centres = [block_of_centre(bounds, size) for bounds in tiles]
    present = sorted(set(centres))
    if len(present) < 2:
        raise ValueError("all tiles lie in one block")
    # By a digest, so that more scenes leave the order of the blocks as it is.
    order = sorted(present, key=lambda b: hashlib.sha256(f"{seed} {b}".encode()).digest())
    sizes = collections.Counter(centres)
    held = draw({block: sizes[block] for block in order}, order, fraction * len(tiles))
    kinds = np.array([int(centre in held) for centre in centres], np.int8)
    near: dict[Block, list[Bounds]] = {}
    for bounds, kind in zip(tiles, kinds, strict=True):
        if kind == 1:
            for block in blocks_of(bounds, size, gap):
                near.setdefault(block, []).append(bounds)
    for i, bounds in enumerate(tiles):
        others = itertools.chain(*(near.get(block, ()) for block in blocks_of(bounds, size)))
        if kinds[i] == 0 and any(_is_near(bounds, other, gap) for other in others):
            kinds[i] = -1
    return kinds


def _is_near(a: Bounds, b: Bounds, gap: float) -> bool:
    """Whether two tiles touch, or are at most `gap` metres apart."""
    north_south = max(a[1] - b[3], b[1] - a[3]) * _DEGREE
    # The parallel nearest to a pole, where degrees of longitude are shortest.
    shrink = math.cos(math.radians(min(max(map(abs, (a[1], a[3], b[1], b[3]))), 90)))
    (west, width), (other_west, other_width) = ((t[0], (t[2] - t[0]) % 360) for t in (a, b))
    east_west = min((other_west - west - width) % 360, (west - other_west - other_width) % 360)
    # What overlaps is nearly a whole turn away in both directions.
    if east_west > 180:
        east_west = 0.0
    return math.hypot(max(north_south, 0.0), east_west * _DEGREE * shrink) <= gap
