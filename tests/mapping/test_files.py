"""The files of a map: what GDAL and QGIS find in them, and areas."""

import xml.etree.ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.warp

from cromss_jax import presets
from cromss_jax.mapping import areas, cogs, job, products, work
from data_prep.reading import legends

LEGEND = dict(presets.DYNAMIC_WORLD.pairs())
UTM = rasterio.CRS.from_epsg(32632).to_wkt()
GRID = cogs.Grid(1100, 700, UTM, (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0))


def new_work(folder, shape, bands) -> work.Work:
    (folder / "work").mkdir()
    (folder / "work" / "map.json").write_text("{}")
    return work.Work(folder / "work", shape, bands)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("map")
    layers = products.describe(("classes", "probabilities", "agreement"), LEGEND)
    bands = {layer.name: len(layer.bands) for layer in layers}
    unfinished = new_work(folder, (GRID.height, GRID.width), bands)
    rng = np.random.default_rng(0)
    pixels = {}
    for name, count in bands.items():
        high = {"classes": 9, "probabilities": 101, "agreement": 2}[name]
        pixels[name] = rng.integers(0, high, (count, GRID.height, GRID.width), np.uint8)
        pixels[name][:, :100, :50] = 255
    unfinished.write(1, 0, pixels)
    text = products.write(unfinished, layers, GRID, LEGEND, folder, {"weights": "random"})
    return folder, pixels, text


def test_nothing_but_the_files_is_left(written):
    folder, _, _ = written
    names = {"summary.md", "map.json"}
    for name in ("classes", "probabilities", "agreement"):
        names |= {f"{name}.tif", f"{name}.qml", f"{name}.tif.aux.xml"}
    assert {path.name for path in folder.iterdir()} == names - {"probabilities.tif.aux.xml"}


def test_cogs(written):
    """As GDAL's validate_cloud_optimized_geotiff asks: tiles, overviews, headers before pixels."""
    folder, pixels, _ = written
    for name, expected in pixels.items():
        path = folder / f"{name}.tif"
        with rasterio.open(path) as file:
            np.testing.assert_array_equal(file.read(), expected)
            assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert file.nodata == 255
            assert file.crs.to_epsg() == 32632
            assert tuple(file.transform[:6]) == GRID.transform
            assert all(shape == (512, 512) for shape in file.block_shapes)
            assert file.overviews(1) == [2, 4]
            headers = [int(file.tags(ns="TIFF", bidx=1).get("IFD_OFFSET", 0))]
            first = file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1)
            smaller = file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1, ovr=1)
            header = file.get_tag_item("IFD_OFFSET", "TIFF", bidx=1, ovr=1)
            assert int(header) < int(smaller) < int(first), headers


def test_legend_of_classes(written):
    folder, _, _ = written
    with rasterio.open(folder / "classes.tif") as file:
        colours = file.colormap(1)
        tags = file.tags()
    for i, (name, colour) in enumerate(LEGEND.items()):
        assert colours[i] == (*bytes.fromhex(colour[1:]), 255)
        assert tags[f"class_{i}"] == name
    tree = xml.etree.ElementTree.parse(folder / "classes.tif.aux.xml")
    assert [node.text for node in tree.iter("Category")] == list(LEGEND)
    # The reader of legends that users bring.
    found = legends.read_legend(str(folder / "classes.qml"))
    assert found.pairs() == tuple(LEGEND.items())
    assert found.values == tuple((i,) for i in range(9))


def test_overviews_show_the_most_frequent_class(tmp_path):
    layers = products.describe(("classes",), LEGEND)
    unfinished = new_work(tmp_path, (1024, 1024), {"classes": 1})
    classes = np.full((1024, 1024), 8, np.uint8)
    classes[::2, ::2] = 2  # a quarter: a mean would show class 6 or 7
    unfinished.write(1, 0, {"classes": classes[None]})
    grid = cogs.Grid(1024, 1024, UTM, GRID.transform)
    cogs.write(unfinished.path("classes"), layers[0], grid, tmp_path)
    with rasterio.open(tmp_path / "classes.tif", overview_level=0) as file:
        assert (file.read(1) == 8).all()
    unfinished.remove()


def test_probabilities_name_their_classes(written):
    folder, _, _ = written
    with rasterio.open(folder / "probabilities.tif") as file:
        assert file.descriptions == tuple(LEGEND)
        assert set(file.units) == {"%"}


def test_summary_counts_square_kilometres(written):
    _, pixels, text = written
    count = int((pixels["classes"] == 3).sum())
    total = int((pixels["classes"] != 255).sum())
    assert f"| flooded vegetation | {count} | {count / 1e4:.2f} | {count / total:.2%} |" in text
    assert "| no data | 5000 | 0.50 | – |" in text
    assert "| weights | random |" in text


def test_areas_in_degrees_are_those_of_the_ellipsoid():
    wgs84 = rasterio.CRS.from_epsg(4326).to_wkt()
    globe = cogs.Grid(180, 360, wgs84, (1.0, 0.0, -180.0, 0.0, -1.0, 90.0))
    found = areas.pixel_areas(globe)
    # The area of WGS 84: 510,065,621.724 km².
    assert found.sum() * 360 / 1e6 == pytest.approx(510065621.724, rel=1e-9)
    np.testing.assert_allclose(found, found[::-1])
    # A degree at the equator: 110,574 m x 111,320 m, as in tables.
    assert found[89] == pytest.approx(110574 * 111320, rel=2e-4)


def test_areas_in_feet():
    feet = rasterio.CRS.from_epsg(2263).to_wkt()
    grid = cogs.Grid(2, 2, feet, (10.0, 0.0, 0.0, 0.0, -10.0, 0.0))
    np.testing.assert_allclose(areas.pixel_areas(grid), (10 * 0.3048006096) ** 2)


def test_areas_in_web_mercator_are_those_of_the_ellipsoid():
    """A degree by a degree at 50° N, where it shows lengths 1.5 times too long."""
    mercator = rasterio.CRS.from_epsg(3857)
    x, y = rasterio.warp.transform("EPSG:4326", mercator, [9.0, 10.0], [51.0, 50.0])
    step = (x[1] - x[0]) / 500, (y[1] - y[0]) / 700
    grid = cogs.Grid(700, 500, mercator.to_wkt(), (step[0], 0.0, x[0], 0.0, step[1], y[0]))
    wgs84 = rasterio.CRS.from_epsg(4326).to_wkt()
    expected = areas.pixel_areas(cogs.Grid(100, 1, wgs84, (1.0, 0.0, 9.0, 0.0, -0.01, 51.0)))
    found = areas.pixel_areas(grid)
    assert found.sum() * 500 == pytest.approx(expected.sum(), rel=1e-9)
    assert (np.diff(found) > 0).all()
    assert found[0] / -(step[0] * step[1]) == pytest.approx(np.cos(np.radians(51)) ** 2, rel=0.01)


def test_a_projection_that_keeps_areas_has_its_own():
    """At the edge of a zone of UTM a pixel of 10 m has 99.9 or 100.1 m²."""
    np.testing.assert_array_equal(areas.pixel_areas(GRID), 100)
    assert not np.allclose(areas._on_ellipsoid(GRID, rasterio.CRS.from_wkt(UTM)), 100, rtol=5e-4)


def test_what_gdal_cannot_write_is_one_sentence(tmp_path):
    (layer,) = products.describe(("classes",), LEGEND)
    (tmp_path / "work").mkdir()
    with pytest.raises(OSError, match=r"classes.tif cannot be written: "):
        cogs.write(tmp_path / "work" / "lost.raw", layer, GRID, tmp_path)
    assert not list(tmp_path.glob("*.*"))


def test_where_the_crs_is_unknown_pixels_are_counted():
    grid = cogs.Grid(2, 3, "", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    pixels, square_km = areas.count(
        lambda a, b: np.array([[0, 1, 1], [255, 0, 0]], np.uint8)[a:b], grid, 2
    )
    assert square_km is None
    np.testing.assert_array_equal(pixels, [3, 2, 1])
    assert "| a | 3 | – | 60.00% |" in areas.table(("a", "b"), pixels, square_km)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"overlap": 129}, "cannot overlap by 129: choose an overlap from 0 to 128"),
        ({"write": ("classes", "colour")}, "no layer colour: choose from probabilities"),
        ({"write": ("agreement",)}, "agreement is of S1 and S2, the scene has S2 only"),
    ],
)
def test_impossible_settings_are_refused(changes, sentence):
    with pytest.raises(job.MapError, match=sentence):
        job.Settings(**changes).check(("s2",))
