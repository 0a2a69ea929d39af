"""Complete lands, one function for each archetype: farmland, forest, river and so on."""

import numpy as np

from data_prep.sample.fields import gaussian_field, pixel_grid
from data_prep.sample.land import (
    BARE,
    BUILT,
    CROPS,
    GRASS,
    SHRUB,
    TREES,
    Land,
    add_hamlets,
    add_river,
    add_town,
    draw_classes,
    draw_parcels,
    dry_land,
    meander_distance,
)


def _farmland(rng: np.random.Generator, size: int) -> Land:
    parcel, border = draw_parcels(rng, size, rng.uniform(11, 20), rng.uniform(24, 44))
    cover = draw_classes(rng, parcel, {CROPS: 72, GRASS: 15, TREES: 6, SHRUB: 5, BARE: 2})
    hedge = draw_classes(rng, parcel, {TREES: rng.uniform(0, 0.3), CROPS: 1.0}) == TREES
    cover[hedge & (border < 1.3)] = TREES
    land = dry_land(cover, parcel)
    add_hamlets(rng, land, rng.integers(1, 4))
    return land


def _forest(rng: np.random.Generator, size: int) -> Land:
    parcel, _ = draw_parcels(rng, size, 28, 34, districts=4)
    cover = draw_classes(rng, parcel, {TREES: 82, GRASS: 6, SHRUB: 9, BARE: 3})
    glade = gaussian_field(rng, size, 14)
    cover[glade > 1.5] = GRASS
    cover[glade < -1.7] = SHRUB
    land = dry_land(cover, parcel)
    land.bank = 12 * (1.9 - gaussian_field(rng, size, 25))
    land.marsh = 4 * np.maximum(0, gaussian_field(rng, size, 25))
    land.cover[meander_distance(rng, size, 0.5) < 0.8] = BARE
    if rng.random() < 0.5:
        fields = _farmland(rng, size)
        here = gaussian_field(rng, size, 60) > rng.uniform(0.5, 1.2)
        land.cover[here] = fields.cover[here]
        land.parcel = np.where(here, fields.parcel + parcel.max() + 1, parcel)
    return land


def _river(rng: np.random.Generator, size: int) -> Land:
    land = _farmland(rng, size) if rng.random() < 0.7 else _forest(rng, size)
    add_river(rng, land, rng.uniform(7, 18), rng.uniform(6, 12))
    riparian = gaussian_field(rng, size, 12) > 0.3
    land.cover[riparian & (land.bank < 14) & (land.cover != BUILT)] = TREES
    land.cover[(land.bank < 3) & (gaussian_field(rng, size, 20) > 0.9)] = BARE
    return land


def _settlement(rng: np.random.Generator, size: int) -> Land:
    land = _farmland(rng, size)
    centre = rng.uniform(0.25, 0.75, 2) * size
    add_town(rng, land, centre, rng.uniform(0.25, 0.5) * size)
    if rng.random() < 0.4:
        add_river(rng, land, rng.uniform(5, 10), 3)
    avenue = meander_distance(rng, size, 0.3) < 1.6
    land.cover[avenue] = BUILT
    land.street |= avenue
    return land


def _coast(rng: np.random.Generator, size: int) -> Land:
    inland = (_farmland, _forest, _shrubland, _settlement)[rng.integers(4)](rng, size)
    x, y = pixel_grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    across = (x - size / 2) * np.cos(angle) + (y - size / 2) * np.sin(angle)
    shore = (
        across + 0.2 * size * rng.uniform(-1, 1) + 0.1 * size * gaussian_field(rng, size, 45, 1.0)
    )
    inland.bank = np.minimum(inland.bank + 15, shore)
    beach = rng.uniform(5, 14) * np.maximum(0.2, 0.9 + 0.6 * gaussian_field(rng, size, 40))
    inland.cover[shore < beach + 6] = SHRUB
    inland.cover[shore < beach] = BARE
    inland.marsh = np.where(shore < 40, 7 * np.maximum(0, gaussian_field(rng, size, 35) - 0.6), 0)
    return inland


def _mountains(rng: np.random.Generator, size: int) -> Land:
    ridges = 1.3 - np.abs(gaussian_field(rng, size, 60, 1.4)) + 0.4 * gaussian_field(rng, size, 100)
    height = (ridges - ridges.min()) / np.ptp(ridges)
    zone = height + 0.05 * gaussian_field(rng, size, 10)
    treeline = rng.uniform(0.4, 0.6)
    parcel, _ = draw_parcels(rng, size, 20, 30)
    cover = draw_classes(rng, parcel, {GRASS: 55, TREES: 20, CROPS: 20, SHRUB: 5})
    cover[zone > 0.2] = TREES
    cover[(zone > 0.2) & (gaussian_field(rng, size, 12) > 1.3)] = GRASS
    cover[zone > treeline] = SHRUB
    cover[zone > treeline + 0.06] = GRASS
    cover[zone > treeline + 0.16] = BARE
    land = dry_land(cover, parcel)
    land.height = height
    if rng.random() < 0.5:
        land.bank = 120 * (zone - rng.uniform(0.05, 0.12))
        land.marsh = np.full((size, size), 2, np.float32)
    return land


def _shrubland(rng: np.random.Generator, size: int) -> Land:
    parcel, _ = draw_parcels(rng, size, 45, 60)
    cover = np.full((size, size), SHRUB, np.uint8)
    cover[gaussian_field(rng, size, 22, 0.8) > rng.uniform(0.4, 1.0)] = BARE
    cover[gaussian_field(rng, size, 22, 0.8) > 1.1] = GRASS
    wadi = meander_distance(rng, size, 0.9) + 2 * gaussian_field(rng, size, 10)
    cover[(wadi < 12) & (gaussian_field(rng, size, 5) > 0.5)] = TREES
    cover[wadi < rng.uniform(2, 6)] = BARE
    land = dry_land(cover, parcel)
    if rng.random() < 0.5:  # fields with centre-pivot irrigation
        x, y = pixel_grid(size)
        for _ in range(rng.integers(1, 5)):
            cx, cy = rng.uniform(0, size, 2)
            circle = np.hypot(x - cx, y - cy) < rng.uniform(16, 30)
            land.cover[circle] = CROPS
            land.parcel = np.where(circle, land.parcel.max() + 1, land.parcel)
    if rng.random() < 0.6:
        add_hamlets(rng, land, 2)
    return land


def _wetland(rng: np.random.Generator, size: int) -> Land:
    land = _farmland(rng, size) if rng.random() < 0.5 else _forest(rng, size)
    land.bank = 11 * (gaussian_field(rng, size, 35, 1.0) + rng.uniform(0.1, 0.8))
    land.marsh = rng.uniform(7, 13) * np.maximum(0, 0.9 + 0.7 * gaussian_field(rng, size, 30))
    meadow = land.bank < land.marsh + 6
    land.cover[meadow] = np.where(gaussian_field(rng, size, 15) > 0.4, SHRUB, GRASS)[meadow]
    return land


ARCHETYPES = {
    "farmland": _farmland,
    "forest": _forest,
    "river": _river,
    "settlement": _settlement,
    "coast": _coast,
    "mountains": _mountains,
    "shrubland": _shrubland,
    "wetland": _wetland,
}
