"""Parcels that users bring: for each what its label is, whether it is wrong, what it should be."""

import csv
import io
import pathlib
from collections.abc import Sequence

import numpy as np
import rasterio
import rasterio.features
import shapely
from etils import epath

from cromss_jax import files, sensors
from cromss_jax.auditing import maps, vectors

FILE, TABLE = "parcels.gpkg", "parcels.csv"


class Counts:
    """What the maps say inside of each parcel. Memory: 24 bytes x parcels x classes."""

    def __init__(self, num_parcels: int, num_classes: int):
        """Nothing is counted yet."""
        self.given = np.zeros((num_parcels, num_classes), np.int64)
        self.wrong = np.zeros((num_parcels, num_classes))
        self.suggested = np.zeros((num_parcels, num_classes), np.int64)

    def add(
        self, parcel: int, given: np.ndarray, percent: np.ndarray, suggested: np.ndarray
    ) -> None:
        """Adds labelled pixels of a parcel, [n] each."""
        count = self.given.shape[1]
        self.given[parcel] += np.bincount(given, minlength=count)
        self.wrong[parcel] += np.bincount(given, percent / 100, minlength=count)
        self.suggested[parcel] += np.bincount(suggested, minlength=count)


def count(parcels: vectors.Polygons, tiles: Sequence[maps.Tile], num_classes: int) -> Counts:
    """Counts the pixels of all dates whose centres lie in each parcel.

    Args:
      parcels: in any reference system.
      tiles: with maps on disk; those without a reference system are left out.
      num_classes: C.
    """
    found = Counts(len(parcels.shapes), num_classes)
    by_crs: dict[str, tuple[np.ndarray, shapely.STRtree]] = {}
    for tile in tiles:
        grid = tile.grid
        if not grid.crs:
            continue
        if grid.crs not in by_crs:
            own = parcels.in_crs(grid.crs)
            by_crs[grid.crs] = own, shapely.STRtree(own)
        shapes, tree = by_crs[grid.crs]
        a, b, c, d, e, f = grid.transform
        corners = [(0, 0), (grid.width, 0), (grid.width, grid.height), (0, grid.height)]
        border = shapely.Polygon([(a * x + b * y + c, d * x + e * y + f) for x, y in corners])
        inside = np.sort(tree.query(border))
        if not len(inside):
            continue
        given, percent, suggested = (
            maps.read(tile, name) for name in (maps.GIVEN, maps.WRONG, maps.SUGGESTED)
        )
        for parcel in inside.tolist():
            outside = rasterio.features.geometry_mask(
                [shapes[parcel]], (grid.height, grid.width), rasterio.Affine(*grid.transform)
            )
            chosen = ~outside & (given != sensors.IGNORE_LABEL)
            found.add(parcel, given[chosen], percent[chosen], suggested[chosen])
    return found


def table(counts: Counts, names: Sequence[str]) -> dict[str, np.ndarray]:
    """A row for each parcel, columns by name.

    `audit_label` is the class of most of its labels, `audit_share` their share, `audit_wrong` the
    mean probability that these are wrong, `audit_suggested` the class that is suggested on most of
    its pixels, `audit_pixels` how many pixels of all dates were judged. Where that is 0, the others
    are empty.
    """
    pixels = counts.given.sum(axis=1)
    label = counts.given.argmax(axis=1)[:, None]
    own = np.take_along_axis(counts.given, label, axis=1)[:, 0]
    wrong = np.take_along_axis(counts.wrong, label, axis=1)[:, 0]
    known = pixels > 0

    def named(classes: np.ndarray) -> np.ndarray:
        texts = [names[c] if k else None for c, k in zip(classes.tolist(), known, strict=True)]
        return np.array(texts, object)

    return {
        "audit_label": named(label[:, 0]),
        "audit_share": np.where(known, own / np.maximum(pixels, 1), np.nan),
        "audit_wrong": np.where(known, wrong / np.maximum(own, 1), np.nan),
        "audit_suggested": named(counts.suggested.argmax(axis=1)),
        "audit_pixels": pixels,
    }


def write(
    folder: pathlib.Path, parcels: vectors.Polygons, counts: Counts, names: Sequence[str]
) -> dict:
    """Writes `parcels.gpkg`, with the columns of the users' file, and the same table as CSV.

    Returns:
      What the report says of it.
    """
    fields = {**parcels.fields, **table(counts, names)}
    everything = vectors.Polygons(parcels.shapes, fields, parcels.crs)
    folder.mkdir(parents=True, exist_ok=True)
    vectors.write(folder / FILE, everything, "Unknown")
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(fields)
    for row in zip(*fields.values(), strict=True):
        rows.writerow(["" if v is None or v != v else v for v in row])
    files.write_whole(epath.Path(folder / TABLE), text.getvalue().encode())
    judged = counts.given.sum(axis=1) > 0
    return {"parcels": len(judged), "judged": int(judged.sum())}
