"""Suspects and parcels on small maps, by hand: areas, borders of tiles, reference systems."""

import csv
import dataclasses
import json

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely

from cromss_jax import presets
from cromss_jax.auditing import maps, mosaics, parcels, suspects, vectors, worst
from cromss_jax.mapping.cogs import Grid

UTM = rasterio.CRS.from_epsg(32632).to_wkt()
LEFT, TOP = 500_000.0, 5_000_000.0
NAMES = presets.DYNAMIC_WORLD.names


def write_tile(
    folder, name, column, row, given, wrong, suggested, reason=1, date="20210703", **grid
):
    """A tile whose upper left pixel is at a row and a column of a grid of 10 m."""
    given = np.asarray(given, np.uint8)
    transform = (10.0, 0.0, LEFT + 10 * column, 0.0, -10.0, TOP - 10 * row)
    place = {"crs": UTM, "transform": transform} | grid
    tile = maps.Tile(
        folder / "maps" / name / "season_0", name, 0, date, Grid(*given.shape, **place)
    )
    full = [np.broadcast_to(np.asarray(x), given.shape) for x in (wrong, suggested, reason)]
    maps.write(tile, maps.layers_of(given, *full), presets.DYNAMIC_WORLD)
    return tile


GIVEN = np.zeros((6, 6), int)
WRONG = np.full((6, 6), 0.1)
# Seven pixels around a hole, of which two are less probable; and two that touch by a corner.
WRONG[1:4, 0:3] = 0.9
WRONG[2, 1] = 0.2
WRONG[1, 0] = WRONG[1, 1] = 0.6
WRONG[4, 4] = WRONG[5, 5] = 0.8


def test_polygons_of_a_raster(tmp_path):
    reason = np.full((6, 6), 1)
    reason[3, :] = 2
    tile = write_tile(tmp_path, "a", 0, 0, GIVEN, WRONG, 4, reason)
    found = list(suspects.find([tile], above=0.5, min_area=0.0))
    assert [s.pixels for s in found] == [8, 1, 1]
    ring = found[0]
    assert ring.shape.area == 800
    assert ring.shape.bounds == (LEFT, TOP - 40, LEFT + 30, TOP - 10)
    (hole,) = ring.shape.interiors
    assert hole.bounds == (LEFT + 10, TOP - 30, LEFT + 20, TOP - 20)
    assert (ring.given, ring.suggested) == (0, 4)
    assert ring.hectares == pytest.approx(0.08)
    assert ring.probability == pytest.approx((6 * 0.9 + 2 * 0.6) / 8)
    # Of the lower row S1 and S2 see different classes.
    assert ring.agreement == pytest.approx(5 / 8)
    assert len(list(suspects.find([tile], 0.5, min_area=0.02))) == 1
    assert len(list(suspects.find([tile], 0.5, min_area=0.081))) == 0
    (less,) = suspects.find([tile], above=0.85, min_area=0.02)
    assert less.pixels == 6


def test_labels_that_are_suggested_or_absent_are_no_suspects(tmp_path):
    given = GIVEN.copy()
    given[:, 3:] = 255
    tile = write_tile(tmp_path, "a", 0, 0, given, 0.9, np.where(np.arange(6) < 1, 0, 2))
    (found,) = suspects.find([tile], 0.5, 0.0)
    assert found.shape.bounds == (LEFT + 10, TOP - 60, LEFT + 30, TOP)


def test_a_region_goes_on_over_borders(tmp_path):
    """Four tiles side by side, one of them below, one apart, one of another date."""
    place = {"given": GIVEN, "wrong": 0.9, "suggested": 4}
    tiles = [
        write_tile(tmp_path, "a", 0, 0, **place),
        write_tile(tmp_path, "b", 6, 0, **place),
        write_tile(tmp_path, "c", 6, 6, **place),
        # Overlaps c by two columns.
        write_tile(tmp_path, "d", 10, 6, **place),
        write_tile(tmp_path, "far", 100, 0, **place),
        write_tile(tmp_path, "later", 0, 6, date="20211003", **place),
    ]
    found = {s.location: s for s in suspects.find(tiles, 0.5, 0.0)}
    assert {name: s.pixels for name, s in found.items()} == {
        "a": 36 + 36 + 36 + 24, "far": 36, "later": 36
    }  # fmt: skip
    expected = shapely.union_all(
        [shapely.box(LEFT + 10 * x, TOP - 10 * y - 60, LEFT + 10 * x + 60, TOP - 10 * y)
         for x, y in ((0, 0), (6, 0), (6, 6), (10, 6))]
    )  # fmt: skip
    assert found["a"].shape.equals(expected)
    # Whatever the order of the tiles.
    again = {s.pixels for s in suspects.find(tiles[::-1], 0.5, 0.0)}
    assert again == {132, 36}


def test_tiles_off_by_half_a_pixel_are_not_joined(tmp_path):
    place = {"given": GIVEN, "wrong": 0.9, "suggested": 4}
    half = (10.0, 0.0, LEFT + 65, 0.0, -10.0, TOP)
    tiles = [
        write_tile(tmp_path, "a", 0, 0, **place),
        write_tile(tmp_path, "b", 0, 0, **place, transform=half),
    ]
    assert [len(c.tiles) for c in mosaics.clusters(tiles)] == [1, 1]
    moved = write_tile(tmp_path, "c", -6, 0, **place)
    (first, _) = mosaics.clusters([tiles[0], moved, tiles[1]])
    assert first.grid.transform[2] == LEFT - 60
    assert (first.grid.height, first.grid.width) == (6, 12)
    assert first.origins == ((0, 6), (0, 0))


def test_geopackage(tmp_path):
    place = {"wrong": 0.9, "suggested": 4}
    tiles = [
        write_tile(tmp_path, "small", 100, 0, GIVEN[:3, :3], **place),
        write_tile(tmp_path, "large", 0, 0, GIVEN + 1, **place),
        write_tile(tmp_path, "nowhere", 0, 0, GIVEN, **place, crs=""),
    ]
    said = suspects.write(tmp_path, tiles, NAMES, 0.5, 0.01, has_both=True)
    assert said["polygons"] == 2
    assert said["without_place"] == 1
    assert said["hectares"] == pytest.approx(0.45)
    meta, _, geometry, values = pyogrio.raw.read(tmp_path / "suspects.gpkg", layer="suspects")
    table = dict(zip(meta["fields"], values, strict=True))
    assert meta["crs"] == "EPSG:32632"
    assert table["rank"].tolist() == [1, 2]
    assert table["location"].tolist() == ["large", "small"]
    assert table["given"].tolist() == [NAMES[1], NAMES[0]]
    assert table["suggested"].tolist() == [NAMES[4]] * 2
    np.testing.assert_allclose(table["hectares"], [0.36, 0.09])
    assert [shapely.from_wkb(g).area for g in geometry] == [3600, 900]
    assert not list(tmp_path.glob("*unfinished*"))
    # Of one sensor there is no agreement; without suspects the layer is empty.
    suspects.write(tmp_path, tiles, NAMES, 0.5, 0.01, has_both=False)
    _, _, _, values = pyogrio.raw.read(tmp_path / "suspects.gpkg", columns=["agreement"])
    assert np.isnan(values[0]).all()
    assert suspects.write(tmp_path, tiles, NAMES, 0.95, 0.01, True)["first"] == []
    assert pyogrio.read_info(tmp_path / "suspects.gpkg")["features"] == 0


def test_several_reference_systems_are_written_in_degrees(tmp_path):
    place = {"given": GIVEN, "wrong": 0.9, "suggested": 4}
    other = rasterio.CRS.from_epsg(32633).to_wkt()
    degrees = rasterio.CRS.from_epsg(4326).to_wkt()
    tiles = [
        write_tile(tmp_path, "a", 0, 0, **place),
        write_tile(tmp_path, "b", 0, 0, **place, crs=other),
        write_tile(
            tmp_path, "c", 0, 0, **place, crs=degrees, transform=(1e-4, 0, 12, 0, -1e-4, 60)
        ),
    ]
    suspects.write(tmp_path, tiles, NAMES, 0.5, 0.0, has_both=True)
    meta, _, geometry, values = pyogrio.raw.read(tmp_path / "suspects.gpkg")
    table = dict(zip(meta["fields"], values, strict=True))
    assert meta["crs"] == "EPSG:4326"
    centres = {
        n: shapely.from_wkb(g).centroid for n, g in zip(table["location"], geometry, strict=True)
    }
    # The middle meridians of zones 32 and 33; 45.15 degrees are 5000 km from the equator.
    assert centres["a"].x == pytest.approx(9, abs=1e-3)
    assert centres["b"].x == pytest.approx(15, abs=1e-3)
    assert centres["a"].y == pytest.approx(45.15, abs=5e-3)
    # A ten-thousandth of a degree at 60 degrees north: 11.14 m by 5.58 m.
    (area,) = table["hectares"][table["location"] == "c"]
    assert area == pytest.approx(36 * 11.14 * 5.58 / 1e4, rel=2e-3)


def test_the_worst_date_of_a_location(tmp_path):
    tiles = []
    for name, wrong in (("a", 0.2), ("b", 0.9), ("c", 0.5)):
        for season, more in enumerate((0.0, 0.1, 0.05)):
            own = write_tile(tmp_path / str(season), name, 0, 0, GIVEN, wrong + more - 0.1, 4)
            tiles.append(dataclasses.replace(own, season=season))
    assert [(t.location, t.season) for t in worst.rank(tiles, ["b", "c"])] == [("b", 1), ("c", 1)]
    assert worst.rank(tiles, []) == []


def test_parcels(tmp_path):
    """Columns 0 to 2 are class 0, a third of it is wrong and rather 4; the others are class 1."""
    given = np.where(np.arange(6) < 3, 0, 1) + np.zeros((6, 1), int)
    given[0] = 255
    wrong = np.where(np.arange(6) < 1, 0.9, 0.3) + np.zeros((6, 1))
    suggested = np.where(np.arange(6) < 2, 4, given)
    tiles = [
        write_tile(tmp_path, "a", 0, 0, given, wrong, suggested),
        write_tile(tmp_path, "b", 0, 0, given, wrong, suggested, date="20211003"),
    ]
    boxes = [
        shapely.box(LEFT, TOP - 60, LEFT + 40, TOP),
        shapely.MultiPolygon([shapely.box(LEFT + 41, TOP - 60, LEFT + 59, TOP)]),
        shapely.box(LEFT + 900, TOP, LEFT + 950, TOP + 50),
    ]
    shapes = vectors.reproject(np.array(boxes, object), UTM, "EPSG:4326")
    fields = {"owner": np.array(["x", "y", None], object)}
    path = tmp_path / "fields.gpkg"
    vectors.write(path, vectors.Polygons(shapes, fields, "EPSG:4326"), "Unknown")
    own = vectors.read(str(path))
    counts = parcels.count(own, tiles, len(NAMES))
    assert parcels.write(tmp_path, own, counts, NAMES) == {"parcels": 3, "judged": 2}
    meta, _, _, values = pyogrio.raw.read(tmp_path / "parcels.gpkg")
    assert meta["crs"] == "EPSG:4326"
    table = dict(zip(meta["fields"], values, strict=True))
    assert table["owner"].tolist() == ["x", "y", None]
    # Five labelled rows of two dates: 15 + 5 pixels each, 20 suggest class 4.
    assert table["audit_pixels"].tolist() == [40, 20, 0]
    assert table["audit_label"].tolist() == [NAMES[0], NAMES[1], None]
    np.testing.assert_allclose(table["audit_share"], [0.75, 1, np.nan])
    np.testing.assert_allclose(table["audit_wrong"], [(0.9 + 0.3 + 0.3) / 3, 0.3, np.nan])
    assert table["audit_suggested"].tolist() == [NAMES[4], NAMES[1], None]
    with (tmp_path / "parcels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["audit_label"] for row in rows] == [NAMES[0], NAMES[1], ""]
    assert rows[0]["owner"] == "x"


def test_columns_that_a_geopackage_has_for_itself_are_renamed(tmp_path):
    """QGIS writes the `fid` of a GeoPackage to shapefiles, as numbers with decimals."""
    shape = {"type": "Polygon", "coordinates": [[[0, 0], [0, 1], [1, 1], [0, 0]]]}
    feature = {"type": "Feature", "geometry": shape}
    features = [feature | {"properties": {"FID": x, "geom": "b", "name": "c"}} for x in (1.5, 1.5)]
    path = tmp_path / "parcels.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    read = vectors.read(str(path))
    vectors.write(tmp_path / "copy.gpkg", read, "Polygon")
    again = vectors.read(str(tmp_path / "copy.gpkg"))
    assert {name: list(x) for name, x in again.fields.items()} == {
        "source_fid": [1.5, 1.5], "source_geom": ["b", "b"], "name": ["c", "c"]
    }  # fmt: skip
    with pytest.raises(vectors.VectorError, match=r"none/copy.gpkg cannot be written: "):
        vectors.write(tmp_path / "none" / "copy.gpkg", read, "Polygon")


def test_parcels_that_cannot_be_used(tmp_path):
    with pytest.raises(vectors.VectorError, match="none.gpkg cannot be read as polygons"):
        vectors.read(str(tmp_path / "none.gpkg"))
    path = tmp_path / "x.geojson"
    path.write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(vectors.VectorError, match="holds no polygons"):
        vectors.read(str(path))
    path.write_text(
        '{"type": "FeatureCollection", "features": [{"type": "Feature", "properties": {},'
        '"geometry": {"type": "Point", "coordinates": [9, 45]}}]}'
    )
    with pytest.raises(vectors.VectorError, match="holds a Point as feature 1"):
        vectors.read(str(path))
    box = np.array([shapely.box(0, 0, 1, 1)], object)
    vectors.write(tmp_path / "y.gpkg", vectors.Polygons(box, {}, "EPSG:4326"), "Polygon")
    _, _, geometry, _ = pyogrio.raw.read(tmp_path / "y.gpkg")
    shapefile = tmp_path / "y.shp"
    with pytest.warns(UserWarning, match="crs"):
        pyogrio.raw.write(shapefile, geometry, [], [], geometry_type="Polygon")
    with pytest.raises(vectors.VectorError, match="does not say its reference system"):
        vectors.read(str(shapefile))


def test_a_killed_writer_leaves_the_former_file(tmp_path, monkeypatch):
    box = np.array([shapely.box(0, 0, 1, 1)], object)
    path = tmp_path / "z.gpkg"
    vectors.write(path, vectors.Polygons(box, {}, "EPSG:4326"), "Polygon")
    before = path.read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(vectors.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        vectors.write(path, vectors.Polygons(box[[0, 0]], {}, "EPSG:4326"), "Polygon")
    assert path.read_bytes() == before
    monkeypatch.undo()
    vectors.write(path, vectors.Polygons(box[[0, 0]], {}, "EPSG:4326"), "Polygon")
    assert pyogrio.read_info(path)["features"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["z.gpkg"]
