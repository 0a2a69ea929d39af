"""Suspects: connected pixels of one label that should be one other class, as polygons."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import rasterio.features
import shapely
from rasterio.windows import Window

from cromss_jax.auditing import evidence, maps, mosaics, vectors
from cromss_jax.mapping import areas
from cromss_jax.mapping.cogs import Grid

FILE = "suspects.gpkg"
_HECTARE = 1e4  # m²


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A region.

    Attributes:
      shape: its polygon in the reference system of its labels; pixels that touch by a corner alone
        are apart.
      crs: that reference system, WKT.
      location: in which its first pixel lies.
      date: as of `maps.Tile`.
      given: index of the class of its labels.
      suggested: index of the class that they should be.
      pixels: how many.
      hectares: their area.
      probability: mean probability that the labels are wrong.
      agreement: share of the pixels where S1 and S2 see the same class.
    """

    shape: shapely.Polygon
    crs: str
    location: str
    date: str
    given: int
    suggested: int
    pixels: int
    hectares: float
    probability: float
    agreement: float


def find(tiles: Sequence[maps.Tile], above: float, min_area: float) -> Iterator[Suspect]:
    """Finds the suspects on the maps of tiles, also across their borders.

    GDAL follows the borders of regions row by row. Memory holds the polygons of one mosaic and the
    pixels around one polygon, not the mosaic.

    Args:
      tiles: with maps on disk, in a known reference system.
      above: probability from which a label is a suspect, on the maps: in whole percents.
      min_area: hectares; smaller regions are left out.
    """
    for cluster in mosaics.clusters(tiles):
        row_areas = areas.pixel_areas(cluster.grid)
        a, b, _, d, e, _ = cluster.grid.transform
        with mosaics.opened(cluster, round(100 * above)) as mosaic:
            regions = rasterio.features.shapes(
                rasterio.band(mosaic.key, 1), mask=rasterio.band(mosaic.facts, 3)
            )
            for outline, key in regions:
                shape = shapely.geometry.shape(outline)
                pixels = round(shape.area / abs(a * e - b * d))
                if pixels * row_areas.max() < min_area * _HECTARE:
                    continue
                window = _window(shape, cluster.grid)
                part = cluster.grid.window(
                    window.row_off, window.col_off, window.height, window.width
                )
                inside = rasterio.features.rasterize(
                    [shape],
                    out_shape=(part.height, part.width),
                    transform=rasterio.Affine(*part.transform),
                    dtype="uint8",
                ).astype(bool)
                own = row_areas[window.row_off : window.row_off + window.height]
                hectares = float(inside.sum(axis=1) @ own) / _HECTARE
                if hectares < min_area:
                    continue
                percent, reason = (mosaic.facts.read(i, window=window)[inside] for i in (1, 2))
                given, suggested = divmod(int(key), 256)
                first = window.col_off + int(inside[0].argmax())
                tile = cluster.tile_at(window.row_off, first)
                yield Suspect(
                    shape, cluster.grid.crs, tile.location, tile.date,
                    given, suggested, pixels, hectares, float(percent.mean()) / 100,
                    float(np.isin(reason, evidence.AGREEING).mean()),
                )  # fmt: skip


def _window(shape: shapely.Polygon, grid: Grid) -> Window:
    """The pixels around a polygon of whole pixels."""
    corners = grid.pixels(np.array(shape.exterior.coords))
    (left, upper), (right, lower) = corners.min(axis=0).round(), corners.max(axis=0).round()
    return Window(int(left), int(upper), int(right - left), int(lower - upper))


def write(
    folder: pathlib.Path,
    tiles: Sequence[maps.Tile],
    names: Sequence[str],
    above: float,
    min_area: float,
    has_both: bool,
) -> dict:
    """Writes `suspects.gpkg`, the largest expected wrong area first.

    Args:
      folder: of the audit.
      tiles: all of it; those without a reference system are left out.
      names: of the classes.
      above: see `find`.
      min_area: see `find`.
      has_both: whether both sensors judged; else there is no agreement.

    Returns:
      What the report says of it.
    """
    placed = [tile for tile in tiles if tile.grid.crs]
    found = sorted(find(placed, above, min_area), key=lambda s: -s.hectares * s.probability)
    systems = {suspect.crs for suspect in found}
    crs = systems.pop() if len(systems) == 1 else "EPSG:4326"
    shapes = np.empty(len(found), object)
    owned = collections.defaultdict(list)
    for i, suspect in enumerate(found):
        owned[suspect.crs].append(i)
    for source, indices in owned.items():
        own = np.array([found[i].shape for i in indices], object)
        shapes[indices] = vectors.reproject(own, source, crs)
    fields = {
        "rank": np.arange(1, len(found) + 1),
        "given": np.array([names[s.given] for s in found], object),
        "suggested": np.array([names[s.suggested] for s in found], object),
        "hectares": np.array([s.hectares for s in found], float),
        "mean_probability": np.array([s.probability for s in found], float),
        # NaN is written as "unknown".
        "agreement": np.array([s.agreement if has_both else np.nan for s in found], float),
        "pixels": np.array([s.pixels for s in found], int),
        "location": np.array([s.location for s in found], object),
        "date": np.array([s.date for s in found], object),
    }
    folder.mkdir(parents=True, exist_ok=True)
    vectors.write(folder / FILE, vectors.Polygons(shapes, fields, crs), "Polygon")
    return {
        "above": above,
        "min_area": min_area,
        "polygons": len(found),
        "hectares": float(fields["hectares"].sum()),
        "without_place": len(tiles) - len(placed),
        "first": [
            {k: v[i].item() if k in ("rank", "hectares", "mean_probability") else v[i]
             for k, v in fields.items() if k not in ("agreement", "pixels")}
            for i in range(min(len(found), 10))
        ],
    }  # fmt: skip
