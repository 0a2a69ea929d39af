"""Pieces of land: parcels, towns, roads and rivers, and the true classes of a season.

Arrays are [T,T] over a tile of pixels of 10 m, and lengths are in pixels.
"""

import dataclasses

import numpy as np
from scipy import ndimage

from cromss_jax.presets import DYNAMIC_WORLD
from data_prep.sample.fields import gaussian_field, pixel_grid

WATER, TREES, GRASS, MARSH, CROPS, SHRUB, BUILT, BARE, SNOW = range(len(DYNAMIC_WORLD))
# By class: lies open under the sky, so that snow covers it and moist soil shows through.
IS_OPEN = np.isin(range(len(DYNAMIC_WORLD)), (GRASS, CROPS, SHRUB, BARE))


@dataclasses.dataclass
class Land:
    """What does not change with the seasons; every array is [T,T]."""

    cover: np.ndarray  # uint8, class of dry and snowless land
    parcel: np.ndarray  # int from 0, fields, stands and blocks; towns leave gaps in the numbers
    bank: np.ndarray  # float32, distance from the mean water line, negative in the water
    marsh: np.ndarray  # float32, how far from the water flooded vegetation reaches
    height: np.ndarray  # float32, 0..1 in mountains, 0 elsewhere
    street: np.ndarray  # bool, street within a built area


def draw_parcels(
    rng: np.random.Generator, size: int, width: float, length: float, districts: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Brick-like parcels with slightly bent borders, rotated differently in each district.

    Returns:
      ids [size,size] from 0 without gaps, and the distance to the nearest border.
    """
    x, y = pixel_grid(size)
    x = x + 0.25 * width * gaussian_field(rng, size, 4 * width, 2.5)
    y = y + 0.25 * width * gaussian_field(rng, size, 4 * width, 2.5)
    centres = rng.uniform(0, size, (districts, 2))
    district = np.argmin([(x - cx) ** 2 + (y - cy) ** 2 for cx, cy in centres], axis=0)
    main_angle = rng.uniform(0, np.pi)
    # More rows and columns than the diagonal needs, whatever the draws.
    rows, columns = int(5 * size / width) + 4, int(9 * size / length) + 4
    ids = np.zeros((size, size), np.int64)
    border = np.zeros((size, size), np.float32)
    for i in range(districts):
        angle = main_angle + (i > 0) * rng.normal(0, 0.5)
        here = district == i
        u = np.cos(angle) * x[here] + np.sin(angle) * y[here]
        v = np.cos(angle) * y[here] - np.sin(angle) * x[here]
        row_edges = np.cumsum(rng.uniform(0.6, 1.4, rows) * width) - 2 * size
        row = np.searchsorted(row_edges, u).clip(1, rows - 1)
        column_edges = np.cumsum(rng.uniform(0.4, 1.6, columns) * length) - 4 * size
        v = v + rng.uniform(-2 * size, size, rows)[row]
        column = np.searchsorted(column_edges, v).clip(1, columns - 1)
        ids[here] = (i * rows + row) * columns + column
        border[here] = np.minimum.reduce(
            [
                u - row_edges[row - 1],
                row_edges[row] - u,
                v - column_edges[column - 1],
                column_edges[column] - v,
            ]
        )
    # Renumbered without gaps, as np.unique would do, but without sorting.
    return (np.cumsum(np.bincount(ids.ravel()) > 0) - 1)[ids], border


def draw_classes(
    rng: np.random.Generator, ids: np.ndarray, weights: dict[int, float]
) -> np.ndarray:
    """A class for every id, drawn with the given weights: uint8 of the shape of `ids`."""
    p = np.array(list(weights.values()), float)
    return rng.choice(np.array(list(weights), np.uint8), ids.max() + 1, p=p / p.sum())[ids]


def meander_distance(rng: np.random.Generator, size: int, bend: float) -> np.ndarray:
    """Distance [size,size] to a line through the tile that meanders as rivers do.

    A sine-generated curve (Langbein and Leopold, "River meanders", 1966): the direction swings
    by `bend` radians; 0.3 makes a road, 1.4 a river.
    """
    step = np.arange(-3 * size, 3 * size, 0.5)
    swing = np.sin(2 * np.pi * step / rng.uniform(70, 130) + rng.uniform(0, 6))
    drift = np.sin(2 * np.pi * step / rng.uniform(300, 500) + rng.uniform(0, 6))
    direction = rng.uniform(0, 2 * np.pi) + bend * swing + 0.5 * drift
    x, y = 0.5 * np.cumsum(np.cos(direction)), 0.5 * np.cumsum(np.sin(direction))
    middle = len(step) // 2
    x, y = np.array([x - x[middle], y - y[middle]]) + rng.uniform(0.3, 0.7, (2, 1)) * size
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    away = np.ones((size, size), bool)
    away[y[inside].astype(int), x[inside].astype(int)] = False
    return ndimage.distance_transform_edt(away).astype(np.float32)


def dry_land(cover: np.ndarray, parcel: np.ndarray) -> Land:
    """Land without water or mountains."""
    zeros = np.zeros(cover.shape, np.float32)
    far = np.full(cover.shape, 1e3, np.float32)
    return Land(cover, parcel, far, zeros, zeros, np.zeros(cover.shape, bool))


def add_town(rng: np.random.Generator, land: Land, centre: np.ndarray, radius: float) -> None:
    """Adds blocks, streets and parks around `centre` (x, y)."""
    size = len(land.cover)
    x, y = pixel_grid(size)
    distance = np.hypot(x - centre[0], y - centre[1])
    distance += 0.3 * radius * gaussian_field(rng, size, radius / 2, 1.0)
    block, border = draw_parcels(rng, size, 8, 14, districts=2)
    quarter, _ = draw_parcels(rng, size, 18, 26, districts=2)
    town = draw_classes(rng, block, {BUILT: 84, GRASS: 7, TREES: 7, BARE: 2})
    park = draw_classes(rng, quarter, {BUILT: 84, GRASS: 7, TREES: 9})
    street = border < 0.9
    town[street] = BUILT
    town = np.where(park == BUILT, town, park)
    here = distance < radius
    land.cover[here] = town[here]
    land.street |= here & street
    land.parcel = np.where(here, block + land.parcel.max() + 1, land.parcel)


def add_hamlets(rng: np.random.Generator, land: Land, count: int) -> None:
    """Scatters small groups of houses and joins them by a road."""
    size = len(land.cover)
    road = meander_distance(rng, size, 0.3)
    land.cover[road < 1.2] = BUILT
    land.street |= road < 1.2
    near = np.argwhere(road < 12)
    for y, x in near[rng.integers(len(near), size=count)]:
        add_town(rng, land, np.array([x, y]), rng.uniform(3, 9))


def add_river(rng: np.random.Generator, land: Land, width: float, marsh: float) -> None:
    """Adds a river, with up to about `marsh` pixels of marsh along its banks."""
    size = len(land.cover)
    channel = width / 2 * (1 + 0.2 * gaussian_field(rng, size, 30))
    land.bank = np.minimum(land.bank, meander_distance(rng, size, rng.uniform(0.9, 1.5)) - channel)
    land.marsh = np.maximum(land.marsh, marsh * np.maximum(0, 0.6 + gaussian_field(rng, size, 25)))


def true_map(rng: np.random.Generator, land: Land, warmth: float, snow: bool) -> np.ndarray:
    """True classes [T,T] uint8 of one season: high or low water, and snow.

    Args:
      rng: of the season.
      land: what lies there.
      warmth: -1 in winter to 1 in summer; moves the snow line in mountains.
      snow: whether it covers flat land too.
    """
    truth = land.cover.copy()
    level = rng.uniform(-1.2, 1.5)
    reach = level + land.marsh * rng.uniform(0.8, 1.2)
    truth[(land.bank < reach) & (truth != BUILT)] = MARSH
    truth[land.bank < level] = WATER
    drift = gaussian_field(rng, len(truth), 12)
    snow_line = 0.62 + 0.35 * warmth + rng.normal(0, 0.04)
    covered = (land.height > 0) & (land.height + 0.05 * drift > snow_line)
    if snow:
        covered |= IS_OPEN[truth] & (drift > -1)
    truth[covered & (truth != WATER) & (truth != BUILT)] = SNOW
    return truth
