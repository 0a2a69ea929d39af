"""Scenes: small rasters in several CRSs, with values that can be worked out by hand."""

import dataclasses
import datetime
import json
import pathlib
import shutil
import warnings
import zipfile

import numpy as np
import pytest
import rasterio
import rasterio.warp
from affine import Affine
from rasterio.enums import Resampling
from scipy import ndimage

from cromss_jax import blocks, presets, sensors
from cromss_jax.data import input_pipeline
from cromss_jax.legend import Legend
from data_prep import errors, options
from data_prep.datasets import (
    scene_images,
    scene_labels,
    scene_scan,
    scene_table,
    scene_tiles,
    scenes,
)
from data_prep.reading import rasters, registration, warping
from tests import commands

UTM33, UTM32, DEGREES, EUROPE = "EPSG:32633", "EPSG:32632", "EPSG:4326", "EPSG:3035"
LEFT, TOP = 400_000.0, 5_800_000.0
# Side of the scenes of these tests in pixels of 10 m.
SIDE = 192
LEGEND = Legend.of({"water": "#0000ff", "trees": "#00ff00"}, values=(10, 20), ignored=(0,))
OPTIONS = options.Options(legend=LEGEND)
SCENE = pathlib.Path(__file__).parents[2].parent / "shared/real/scene"


def wkt(crs):
    return rasterio.CRS.from_string(crs).to_wkt()


def utm_transform(metres):
    return Affine(metres, 0, LEFT, 0, -metres, TOP)


def moved(column, row):
    return Affine(10, 0, LEFT + 10 * column, 0, -10, TOP - 10 * row)


def pixel_centres(transform, height, width):
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return warping.apply(transform, columns, rows)


def cover(crs, metres, margin=5):
    """Transform and size of a grid in another CRS that covers the scene."""
    size = metres / 100_000 if crs == DEGREES else metres
    bounds = (LEFT, TOP - 10 * SIDE, LEFT + 10 * SIDE, TOP)
    left, bottom, right, top = rasterio.warp.transform_bounds(UTM33, crs, *bounds)
    transform = Affine(size, 0, left - margin * size, 0, -size, top + margin * size)
    height = int((top - bottom) / size) + 2 * margin + 1
    width = int((right - left) / size) + 2 * margin + 1
    return transform, height, width


def grid(side=SIDE, metres=10):
    return warping.Grid(wkt(UTM33), tuple(utm_transform(metres)[:6]), side, side)


def write(path, pixels, crs, transform, descriptions=(), **tags):
    with warnings.catch_warnings(action="ignore"), rasterio.open(
        path, "w", driver="GTiff", height=pixels.shape[1], width=pixels.shape[2],
        count=len(pixels), dtype=pixels.dtype, crs=crs, transform=transform, **tags,
    ) as file:  # fmt: skip
        file.write(pixels)
        for i, name in enumerate(descriptions, 1):
            file.set_band_description(i, name)


def random_fields(seed, side=SIDE):
    """(side, side) numbers from 0 to 1: fields without a regular pattern, of some 10 pixels."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(side, side)), 4)
    return np.digitize(smooth, np.quantile(smooth, np.arange(1, 6) / 6)) / 5


BANDS = ("B2", "B3", "B4", "B8", "B11")


def write_s2(folder, add=0):
    """Five bands in five files, one of them at 20 m; the darkest pixels are near 100."""
    for i, name in enumerate(BANDS):
        metres = 20 if name == "B11" else 10
        fields = random_fields(i)[:: metres // 10, :: metres // 10]
        pixels = (100 + 3000 * fields + add).astype(np.uint16)
        write(folder / f"{name}.tif", pixels[None], UTM33, utm_transform(metres))


def write_s1(folder, name="s1_20220703.tif", shift=(0, 0)):
    """dB, with the edges of B11."""
    fields = np.roll(random_fields(4), shift, (0, 1))
    noise = np.random.default_rng(1).normal(0, 0.5, (2, SIDE, SIDE))
    pixels = np.stack([-14 + 8 * fields, -21 + 8 * fields]) + noise
    write(folder / name, pixels.astype(np.float32), UTM33, utm_transform(10), ("VV", "VH"))


def write_labels(folder, name="map.tif"):
    pixels = np.where(random_fields(9) < 0.5, 10, 20).astype(np.uint8)
    write(folder / name, pixels[None], UTM33, utm_transform(10), nodata=0)


@pytest.fixture
def folder(tmp_path):
    write_s2(tmp_path)
    write_s1(tmp_path)
    write_labels(tmp_path)
    return tmp_path


ROW = "here,2022-07-01,B*.tif,s1_*.tif,map.tif"


def write_table(folder, *rows, header="scene,date,s2,s1,labels"):
    path = folder / "scenes.csv"
    path.write_text("\n".join([header, *(rows or [ROW])]) + "\n")
    return path


def cutting(**changes):
    changes = {"tile_size": 64, "stride": 64, "test_fraction": 0.0} | changes
    return scenes.Cutting(**changes)


def build(folder, cut=None, opts=OPTIONS, data_dir=None, **arguments):
    built = scenes.Scenes(
        table=folder / "scenes.csv",
        data_dir=data_dir or folder / "data",
        cutting=cut or cutting(),
        options=opts,
        **arguments,
    )
    built.build()
    return built


def open_split(folder, split="train"):
    return input_pipeline.open_dataset(str(folder / "data"), "scenes", split)


def acquisition(folder, *rows, header="scene,date,s2,s1,labels", opts=OPTIONS):
    table = scene_table.read(write_table(folder, *rows, header=header))
    return scene_table.acquisition(table[0], opts)


# Warping


@pytest.mark.parametrize("is_turned", [False, True])
def test_affine_field_at_20_metres_is_interpolated_exactly(tmp_path, is_turned):
    rows, columns = np.mgrid[:48, :48]
    pixels = (1000 + 2 * columns + 4 * rows).astype(np.uint16)
    transform = utm_transform(20)
    if is_turned:
        pixels, transform = pixels[::-1], Affine(20, 0, LEFT, 0, 20, TOP - 48 * 20)
    write(tmp_path / "B11.tif", pixels[None], UTM33, transform)
    found = acquisition(tmp_path, "a,20220701,B11.tif,B11.tif", header="scene,date,s2,labels")
    read = scene_images.read_s2(found, grid(96), scene_images.Units())
    # A pixel of 10 m lies a quarter of 20 m off: 1000 + 2 (j - 0.5) / 2 + 4 (i - 0.5) / 2.
    rows, columns = np.mgrid[:96, :96]
    want = 1000 + (columns - 0.5) + 2 * (rows - 0.5)
    assert read.valid.all()
    # At the edge the kernel lacks neighbours.
    inner = slice(4, -4)
    np.testing.assert_allclose(read.pixels[0][inner, inner], want[inner, inner], atol=1e-3)


def test_radar_of_another_zone_is_interpolated_in_power(tmp_path):
    transform, height, width = cover(UTM32, 10)
    x, y = pixel_centres(transform, height, width)

    def power(x, y):
        return 0.2 + 1e-5 * (x - transform.c) + 2e-5 * (transform.f - y)

    db = 10 * np.log10(power(x, y))
    write(tmp_path / "s1.tif", np.stack([db, db - 7]).astype(np.float32), UTM32, transform)
    found = acquisition(tmp_path, "a,20220701,s1.tif,s1.tif", header="scene,date,s1,labels")
    read = scene_images.read_s1(found, grid(), scene_images.Units())
    centres = pixel_centres(utm_transform(10), SIDE, SIDE)
    to_x, to_y = rasterio.warp.transform(UTM33, UTM32, *(c.ravel() for c in centres))
    want = power(np.reshape(to_x, (SIDE, SIDE)), np.reshape(to_y, (SIDE, SIDE)))
    assert read.valid.all()
    # float32 dB of the file.
    np.testing.assert_allclose(10 ** (read.pixels[0] / 10), want, rtol=2e-6)
    np.testing.assert_allclose(10 ** ((read.pixels[1] + 7) / 10), want, rtol=2e-6)


@pytest.mark.parametrize(("crs", "metres"), [(DEGREES, 10), (EUROPE, 25), (UTM32, 3), (UTM33, 10)])
def test_labels_are_the_nearest_pixel(tmp_path, crs, metres):
    transform, height, width = cover(crs, metres)
    values = np.random.default_rng(0).choice([0, 10, 20], (height, width)).astype(np.uint8)
    write(tmp_path / "map.tif", values[None], crs, transform, nodata=0)
    layers = rasters.layers(str(tmp_path / "map.tif"))
    labels, covered = scene_labels.read(layers, grid(), LEGEND)
    # Each pixel centre by itself.
    x, y = pixel_centres(utm_transform(10), SIDE, SIDE)
    x, y = rasterio.warp.transform(UTM33, crs, x.ravel(), y.ravel())
    columns, rows = warping.apply(~transform, np.array(x), np.array(y))
    exact = values[np.floor(rows).astype(int), np.floor(columns).astype(int)].reshape(SIDE, SIDE)
    np.testing.assert_array_equal(labels, np.select([exact == 10, exact == 20], [0, 1], 255))
    np.testing.assert_array_equal(covered, exact != 0)
    # GDAL's own, in pieces so small that it approximates no coordinate by more than rounding.
    for row, column in ((0, 0), (96, 40), (176, 176)):
        piece = np.zeros((8, 8), np.uint8)
        rasterio.warp.reproject(
            values, piece, src_transform=transform, src_crs=crs, dst_crs=UTM33,
            dst_transform=moved(column, row),
            resampling=Resampling.nearest,
        )  # fmt: skip
        np.testing.assert_array_equal(piece, exact[row : row + 8, column : column + 8])


@pytest.mark.parametrize("kernel", [Resampling.nearest, Resampling.cubic, Resampling.bilinear])
def test_pixels_do_not_depend_on_the_window(tmp_path, kernel):
    transform, height, width = cover(DEGREES, 17)
    values = np.random.default_rng(0).random((1, height, width)).astype(np.float32)
    write(tmp_path / "map.tif", values, DEGREES, transform)
    (layer,) = rasters.layers(str(tmp_path / "map.tif"))

    def read(piece):
        image = rasters.read([layer], warping.source_window(layer, piece))
        return warping.warp(image.pixels, image.crs, image.transform, piece, kernel, np.nan)[0]

    whole = read(grid())
    for row, column, side in ((0, 0, 64), (100, 30, 50), (128, 128, 64)):
        part = read(grid().window(row, column, side, side))
        np.testing.assert_allclose(
            part, whole[row : row + side, column : column + side], rtol=0, atol=2e-6
        )


def test_own_pixels_are_copied(tmp_path):
    write_s2(tmp_path)
    found = acquisition(tmp_path, "a,20220701,B2.tif,B2.tif", header="scene,date,s2,labels")
    read = scene_images.read_s2(found, grid().window(-8, 100, 200, 100), scene_images.Units())
    pixels = rasterio.open(tmp_path / "B2.tif").read(1)
    np.testing.assert_array_equal(read.pixels[0, 8:, :92], pixels[:, 100:])
    assert read.valid[0, 8:, :92].all()
    assert not read.valid[0, :8].any()
    assert not read.valid[0, :, 92:].any()


def test_nodata_is_in_no_kernel(tmp_path):
    pixels = np.full((1, 96, 96), 3000, np.uint16)
    pixels[:, :, 48:] = 0
    write(tmp_path / "B11.tif", pixels, UTM33, utm_transform(20))
    write(tmp_path / "B12.tif", pixels, UTM33, utm_transform(20))
    found = acquisition(tmp_path, "a,20220701,B1?.tif,B11.tif", header="scene,date,s2,labels")
    read = scene_images.read_s2(found, grid(), scene_images.Units())
    assert read.valid[:, :, :96].all()
    assert not read.valid[:, :, 96:].any()
    assert (read.pixels[:, :, :96] == 3000).all()


def test_zeros_of_one_band_are_dark_pixels(folder):
    # B11, alone at 20 m: 0 where the other bands are not, and 0 where they are 0, too.
    for name in BANDS:
        with rasterio.open(folder / f"{name}.tif", "r+") as file:
            pixels = file.read()
            side = pixels.shape[1]
            pixels[:, : side // 2] = 0
            if name == "B11":
                pixels[:, :, : side // 2] = 0
            file.write(pixels)
    found = acquisition(folder)
    read = scene_images.read_s2(found, grid(), scene_images.Units())
    assert not read.valid[:, :96].any()
    assert read.valid[:, 96:].all()
    assert (read.pixels[-1, 96:, :96] == 0).all()
    # Where brightness falls steeply, the kernel overshoots, below 0 in a few pixels.
    assert (read.pixels[-1, 96:, 100:] > 0).mean() > 0.95


# The table


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("scene,date,s2,s1", ROW[:-8], "has no column labels: its first line must name"),
        ("scene,date,s2,s1,label", ROW, "has no column labels"),
        ("scene,date,s2,s1,labels,notes", ROW + ",x", "has a column 'notes'"),
        ("scene,date,s2,s2,labels", ROW, "has a column 's2' 2 times"),
        ("scene,date,s2,s1,labels", ROW + ",x", "line 2 has 6 cells, the first line 5"),
        ("scene,date,s2,s1,labels", "," + ROW[5:], "line 2 has no scene"),
        ("scene,date,s2,s1,labels", ROW.replace("2022-07-01", "July"), "has the date 'July'"),
        ("scene,date,s2,s1,labels", "here,20220701,,,map.tif", "has neither s2 nor s1"),
        ("scene,date,s2,s1,labels", "here,20220701,B2.tif,,", "has no labels"),
        ("scene,date,s2,s1,labels", ROW.replace("B*", "C*"), "matches no file in"),
        ("scene,date,s2,s1,labels", "here,20220701,.,,map.tif", "which is no .SAFE product"),
        ("scene,date,s2,s1,labels", ROW + "\n" + ROW, "has the date 2022-07-01 also in line 2"),
        (
            "scene,date,s2,s1,labels",
            ROW + "\nhere,2022-08-01,B*.tif,,map.tif",
            "line 2 has s1, line 3 has none: all rows must have it, or none",
        ),
        ("scene,date,s2,s1,labels", "", "has no rows"),
        ("scene;date;s2;labels", "a;b;c;d", "separated by commas, of which s1 or s2"),
        ("scene,date,s2,s1,labels", ROW.replace("2022", "2202"), "but Sentinel images are of 2014"),
        (
            "scene,date,s2,s1,labels",
            ROW + "\n" + ROW.replace("2022-07-01", "2022-07-20"),
            "line 3 names the imagery and labels of line 2: keep one",
        ),
        (
            "scene,date,s2,labels,truth",
            "here,2022-07-01,B*.tif,map.tif,map.tif",
            "names the same files as labels and as truth",
        ),
    ],
)
def test_wrong_table(folder, header, row, message):
    path = write_table(folder, row, header=header)
    with pytest.raises(errors.BuildError) as error:
        scene_table.read(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_table_that_does_not_exist(tmp_path):
    with pytest.raises(errors.BuildError, match="does not exist: a CSV file with the columns"):
        scene_table.read(tmp_path / "scenes.csv")


def test_bands_by_name_description_and_position(tmp_path):
    pixels = np.ones((13, 8, 8), np.uint16)
    write(tmp_path / "all.tif", pixels, UTM33, utm_transform(10))
    header = "scene,date,s2,labels"
    write(tmp_path / "map.tif", pixels[:1], UTM33, utm_transform(10))
    found = acquisition(tmp_path, "a,20220701,all.tif,map.tif", header=header)
    assert found.s2_bands == sensors.S2_BANDS
    l2a = dataclasses.replace(OPTIONS, s2_level="L2A")
    write(tmp_path / "l2a.tif", pixels[:12], UTM33, utm_transform(10))
    found = acquisition(tmp_path, "a,20220701,l2a.tif,map.tif", header=header, opts=l2a)
    assert found.s2_bands == sensors.S2_BAND_SUBSETS[12]
    write(tmp_path / "x.tif", pixels[:3], UTM33, utm_transform(10), ("B04", "NDVI", "B8A"))
    found = acquisition(tmp_path, "a,20220701,x.tif,map.tif", header=header)
    assert [(layer.name, layer.index) for layer in found.s2[0]] == [("B4", 1), ("B8A", 3)]
    write(tmp_path / "T33_B04_10m.tif", pixels[:1], UTM33, utm_transform(10))
    write(tmp_path / "T33_B04_20m.tif", pixels[:1], UTM33, utm_transform(20))
    found = acquisition(tmp_path, "a,20220701,T33_*.tif,map.tif", header=header)
    assert [layer.path[-11:] for layer in found.s2[0]] == ["B04_10m.tif"]
    some = dataclasses.replace(OPTIONS, s2_bands=("B2", "B3", "B4"))
    write(tmp_path / "y.tif", pixels[:3], UTM33, utm_transform(10))
    found = acquisition(tmp_path, "a,20220701,y.tif,map.tif", header=header, opts=some)
    assert found.s2_bands == ("B2", "B3", "B4")
    with pytest.raises(errors.BadFileError, match=r"3 bands without names"):
        acquisition(tmp_path, "a,20220701,y.tif,map.tif", header=header)
    with pytest.raises(errors.BadFileError, match="no file holds B2, B3"):
        acquisition(tmp_path, "a,20220701,x.tif,map.tif", header=header, opts=some)


def test_date_of_radar():
    def found(path):
        return scene_table._date_in_name((pathlib.Path(path),))

    assert found("s1/20221003_VV.tif") == datetime.datetime(2022, 10, 3)
    granule = "S1A_IW_GRDH_1SDV_20200607T010800_20200607T010825_032904_03CFBA_D457"
    assert found(f"{granule}/VV.tif") == datetime.datetime(2020, 6, 7, 1, 8)
    assert found("20200607/VV.tif") is None
    assert found("tile_20229999.tif") is None


# Blocks


def metres_apart(a, b):
    """Distance of two boxes in metres, on a sphere, from their corners and the middles of edges."""

    def edge(bounds):
        west, south, east, north = bounds
        steps = np.linspace(0, 1, 3)
        x = np.concatenate([west + steps * (east - west)] * 2 + [[west] * 3, [east] * 3])
        y = np.concatenate([[south] * 3, [north] * 3] + [south + steps * (north - south)] * 2)
        lon, lat = np.radians(x), np.radians(y)
        return np.stack(
            [np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1
        )

    return 6_371_000 * np.linalg.norm(edge(a)[:, None] - edge(b), axis=-1).min()


@pytest.mark.parametrize("gap", [0, 3000])
@pytest.mark.parametrize("latitude", [0.5, 60.0, -78.0])
def test_blocks_do_not_leak(latitude, gap):
    # Two scenes of neighbouring UTM zones that overlap, one on each side of the antimeridian.
    tiles = []
    for zone in (60, 1):
        crs = rasterio.CRS.from_epsg((32600 if latitude > 0 else 32700) + zone)
        lon = 179.5 if zone == 60 else -179.5
        (x,), (y,) = rasterio.warp.transform(DEGREES, crs, [lon], [latitude])
        for i in range(14):
            for j in range(14):
                left, top = x + 2640 * (j - 7), y + 2640 * (i - 7)
                box = (left, top - 2640, left + 2640, top)
                tiles.append(rasterio.warp.transform_bounds(crs, DEGREES, *box))
    kinds = blocks.split(tiles, 0.2, 12_000, gap, seed=0)
    held = [tile for tile, kind in zip(tiles, kinds, strict=True) if kind == 1]
    trained = [tile for tile, kind in zip(tiles, kinds, strict=True) if kind == 0]
    assert 0 < len(held) <= 0.2 * len(tiles)
    assert len(trained) > 0.3 * len(tiles)
    near = [(a, b) for a in held for b in trained if abs(a[1] - b[1]) < 0.1]
    nearest = min(metres_apart(a, b) for a, b in near)
    # Tiles that touch are left out. The next ones are a tile away, of another zone less.
    assert nearest > max(gap, 500)


def test_blocks_depend_on_the_place_alone():
    tiles = [(7 + i / 50, 50.0, 7 + i / 50 + 0.01, 50.01) for i in range(60)]
    kinds = blocks.split(tiles, 0.3, 5000, 0, seed=0)
    order = np.random.default_rng(0).permutation(60)
    shuffled = blocks.split([tiles[i] for i in order], 0.3, 5000, 0, seed=0)
    np.testing.assert_array_equal(shuffled, kinds[order])
    others = [blocks.split(tiles, 0.3, 5000, 0, seed=seed).tolist() for seed in range(1, 5)]
    assert kinds.tolist() not in others


def test_one_block_cannot_be_split(folder):
    write_table(folder)
    with pytest.raises(errors.BuildError, match=r"all tiles lie in one block of 500\.0 km"):
        build(folder, cutting(test_fraction=0.1, block_size=500_000.0))


# Builds


def test_records(folder):
    write_table(folder)
    built = build(folder)
    dataset = open_split(folder)
    assert (dataset.num_locations, dataset.tile_size) == (9, 64)
    assert dataset.legend.names == LEGEND.names
    assert [band.name for band in dataset.bands] == ["VV", "VH", *BANDS]
    pixels = rasterio.open(folder / "B3.tif").read(1)
    labels = rasterio.open(folder / "map.tif").read(1)
    seen = set()
    for i in range(9):
        record = dataset.source[i]
        name, row, column = record["location_id"].decode().rsplit("_", 2)
        place = np.s_[int(row) : int(row) + 64, int(column) : int(column) + 64]
        seen.add((name, int(row), int(column)))
        np.testing.assert_array_equal(
            record["s2"][..., 1], sensors.scale_to_uint8(pixels[place], "B3")
        )
        np.testing.assert_array_equal(record["labels"][0], np.where(labels[place] == 10, 0, 1))
        assert record["transform"].tolist()[2] == LEFT + 10 * int(column)
        assert record["timestamp"] == b"2022-07-01T00:00:00"
    assert seen == {("here", r, c) for r in (0, 64, 128) for c in (0, 64, 128)}
    report = json.loads(built.report.json_path.read_text())
    (facts,) = report["tables"]["Acquisitions"]
    assert facts["offset"].startswith("0 (dark pixels near")
    assert facts["Sentinel-1"].startswith("dB, VV -10, VH -1")
    assert facts["days apart"] == "2"
    assert facts["shift S1 to S2"].startswith("+0 rows, +0 columns")
    classes = {row["class"]: row for row in report["tables"]["Classes"]}
    assert classes["trees"]["share of pixels, train"] == pytest.approx((labels == 20).mean())
    assert classes["trees"]["records, train"] == 9
    assert "| trees |" in built.report.summary_path.read_text()


def test_dates_are_seasons(folder):
    (folder / "later").mkdir()
    write_s2(folder / "later", add=500)
    shutil.copy(folder / "map.tif", folder / "other.tif")
    rows = ["here,2022-10-01,later/B*.tif,map.tif", "here,2022-07-01,B*.tif,map.tif",
            "there,2022-10-01,later/B*.tif,other.tif"]  # fmt: skip
    write_table(folder, *rows, header="scene,date,s2,labels")
    # Darkest pixels near 600 do not tell an offset.
    build(folder, opts=dataclasses.replace(OPTIONS, s2_offset=0))
    dataset = open_split(folder)
    assert dataset.season_counts.tolist() == [2] * 9 + [1] * 9
    first, second, other = (dataset.source[i] for i in (0, 1, 18))
    assert [int(r["season"]) for r in (first, second, other)] == [0, 1, 0]
    assert [r["timestamp"][:10] for r in (first, second)] == [b"2022-07-01", b"2022-10-01"]
    assert first["labels"].shape == (2, 64, 64)
    assert (other["labels"][1] == 255).all()
    assert (first["s2"].astype(int) <= second["s2"]).all()
    assert "s1" not in dataset.features


def test_radar_alone_truth_and_mask(folder):
    truth = np.full((1, SIDE, SIDE), 10, np.uint8)
    write(folder / "truth.tif", truth, UTM33, utm_transform(10))
    mask = np.zeros((1, SIDE // 2, SIDE // 2), np.uint8)
    mask[:, :16] = 1
    write(folder / "mask.tif", mask, UTM33, utm_transform(20))
    write_table(
        folder,
        "here,2022-07-01,s1_*.tif,map.tif,truth.tif,mask.tif",
        header="scene,date,s1,labels,truth,mask",
    )
    built = build(folder)
    dataset = open_split(folder)
    assert dataset.has_truth
    assert "s2" not in dataset.features
    record = dataset.source[0]
    assert (record["truth"] == 0).all()
    assert (record["labels"][0, :32] == 255).all()
    assert (record["labels"][0, 32:] != 255).all()
    assert built.report.counts["masked"] == 3


def test_nodata_is_no_class_and_is_counted(folder):
    # The left third and the upper left tile have no imagery, the right third no label.
    for name in BANDS:
        with rasterio.open(folder / f"{name}.tif", "r+") as file:
            pixels = file.read()
            side = pixels.shape[1]
            pixels[:, :, : side // 3] = 0
            pixels[:, : side // 6] = 0
            file.write(pixels)
    with rasterio.open(folder / "map.tif", "r+") as file:
        pixels = file.read()
        pixels[:, :, 128:] = 0
        file.write(pixels)
    write_table(folder)
    built = build(folder)
    dataset = open_split(folder)
    ids = [dataset.source[i]["location_id"].decode() for i in range(len(dataset.source))]
    assert sorted(ids) == ["here_0_64", "here_128_64", "here_64_64"]
    record = dataset.source[ids.index("here_0_64")]
    assert (record["labels"][0, :32] == 255).all()
    assert (record["s2"][:32] == 127).all()
    assert (record["labels"][0, 32:] != 255).all()
    report = json.loads(built.report.json_path.read_text())
    assert report["tables"]["Tiles"] == [
        {"tiles": "laid out", "number": 9},
        {"tiles": "empty, left out", "number": 6},
    ]
    (row,) = [r for r in report["tables"]["Findings"] if r["finding"] == "S2 invalid"]
    assert row["share of all pixels"] == pytest.approx(0.5 / 3)


def test_workers_change_no_bit(folder):
    write_table(folder)
    cut = cutting(tile_size=32, stride=24, test_fraction=0.2)
    digests = [
        build(folder, cut, data_dir=folder / f"data{n}", num_workers=n).info.metadata[
            "records_digest"
        ]
        for n in (1, 2)
    ]
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"train", "test"}


def test_grid_of_the_labels(folder):
    transform, height, width = cover(EUROPE, 20, margin=0)
    values = np.random.default_rng(0).choice([10, 20], (1, height, width)).astype(np.uint8)
    write(folder / "map.tif", values, EUROPE, transform)
    write_table(folder)
    build(folder, cutting(grid="labels", tile_size=32, stride=32))
    record = open_split(folder).source[0]
    _, row, column = record["location_id"].decode().rsplit("_", 2)
    part = values[0, int(row) : int(row) + 32, int(column) : int(column) + 32]
    labels = record["labels"][0]
    inside = labels != 255
    assert inside.mean() > 0.4
    np.testing.assert_array_equal(labels[inside], np.where(part == 10, 0, 1)[inside])


def test_geographic_scene_gets_metres(tmp_path):
    transform, height, width = cover(DEGREES, 10)
    pixels = np.random.default_rng(0).integers(100, 3000, (1, height, width)).astype(np.uint16)
    write(tmp_path / "B4.tif", pixels, DEGREES, transform)
    found = acquisition(tmp_path, "a,20220701,B4.tif,B4.tif", header="scene,date,s2,labels")
    laid = scenes._grid(found, cutting())
    assert rasterio.CRS.from_wkt(laid.crs).to_epsg() == 32633
    assert laid.transform[0] == 10
    assert laid.transform[2] % 10 == 0
    assert 2 * SIDE > laid.width >= SIDE


# What is refused


def edit(folder, name, change):
    with rasterio.open(folder / name, "r+") as file:
        file.write(change(file.read()))


def scan_error(folder, *rows, cut=None):
    write_table(folder, *rows)
    with pytest.raises(errors.BuildError, match="bad locations: 1") as error:
        build(folder, cut)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_swapped_radar_bands(folder):
    edit(folder, "s1_20220703.tif", lambda p: p[::-1])
    assert "VH (median -10" in (text := scan_error(folder))
    assert "is brighter than VV" in text


def test_unknown_radar_unit(folder):
    edit(folder, "s1_20220703.tif", lambda p: p + 200)
    assert "neither dB (-60 to -1), nor dB * 100, nor linear power" in scan_error(folder)


@pytest.mark.parametrize("unit", [scene_images.POWER, scene_images.CENTIBELS])
def test_radar_units_are_converted(folder, unit):
    db = rasterio.open(folder / "s1_20220703.tif").read()
    raw = 10 ** (db / 10) if unit == scene_images.POWER else np.rint(100 * db).astype(np.int16)
    found = acquisition(folder)
    want = scene_images.read_s1(found, grid(), scene_images.Units())
    write(folder / "s1_20220703.tif", raw, UTM33, utm_transform(10), ("VV", "VH"))
    rasters._open_for.cache_clear()
    found = acquisition(folder)
    tiles = [grid().window(0, 0, 64, 64)]
    scanned = scene_scan.scan(found, tiles, OPTIONS)
    assert scanned.units.s1 == unit
    read = scene_images.read_s1(found, grid(), scanned.units)
    np.testing.assert_allclose(read.pixels, want.pixels, atol=0.0051)


def test_radar_of_another_season(folder):
    text = scan_error(folder, ROW.replace("2022-07-01", "2022-01-01"))
    assert "183 days from the date of its row, 2022-01-01: --max_days=60 are allowed" in text


def test_radar_of_another_place(folder):
    far = moved(5000, 0)
    write(folder / "s1_20220703.tif", np.full((2, 64, 64), -10, np.float32), UTM33, far)
    assert "has no valid pixel on the grid of here" in scan_error(folder)


def test_radar_that_is_shifted(folder):
    write_s1(folder, shift=(0, 12))
    text = scan_error(folder, cut=cutting(tile_size=192, stride=192))
    assert "lies 12 pixels off Sentinel-2 of here 2022-07-01 by what both show" in text
    assert "-12 columns" in text


def test_band_that_was_never_filled(folder):
    edit(folder, "B4.tif", np.zeros_like)
    assert "B4 is 0 in all tiles sampled: the band was never filled" in scan_error(folder)


def test_unknown_offset(folder):
    write_s2(folder, add=700)
    assert "give --s2_offset=0 or --s2_offset=1000" in scan_error(folder)


def test_bands_in_another_order(folder):
    medians = [1600, 1400, 1300, 1350, 1550, 2100, 2350, 2300, 2550, 830, 20, 2200, 1500]
    pixels = np.array([medians[-1:] + medians[:-1]], np.uint16).T[..., None]
    pixels = np.broadcast_to(pixels, (13, SIDE, SIDE))
    for name in BANDS:
        (folder / f"{name}.tif").unlink()
    write(folder / "B.tif", pixels, UTM33, utm_transform(10))
    assert "B11 (median 20) is darker than B10 (830)" in scan_error(folder)


def test_labels_of_another_legend(folder):
    edit(folder, "map.tif", lambda p: p + 1)
    write_table(folder)
    with pytest.raises(errors.BuildError, match="labels 11, 21 are not 0, 10, 20"):
        build(folder)


def test_labels_of_another_place(folder):
    far = moved(5000, 0)
    write(folder / "map.tif", np.full((1, 64, 64), 10, np.uint8), UTM33, far)
    assert "map.tif: does not cover any tile of here 2022-07-01" in scan_error(folder)


def test_raster_without_a_place(folder):
    write(folder / "map.tif", np.full((1, 64, 64), 10, np.uint8), None, Affine.identity())
    assert "map.tif: does not say where it lies" in scan_error(folder)


def test_file_that_is_no_raster(folder):
    (folder / "map.tif").write_text("no raster")
    assert "map.tif: cannot be opened as a raster" in scan_error(folder)


def test_radar_that_nowhere_overlaps(folder):
    edit(folder, "s1_20220703.tif", lambda p: np.where(np.arange(SIDE) < 96, p, 0))
    for name in BANDS:
        side = SIDE // 2 if name == "B11" else SIDE
        edit(folder, f"{name}.tif", lambda p, side=side: np.where(np.arange(side) < side / 2, 0, p))
    assert "has no valid pixel where Sentinel-2 of here 2022-07-01 has one" in scan_error(folder)


def test_modality_and_level_that_are_not_there(folder):
    write_table(folder, "here,2022-07-01,s1_*.tif,map.tif", header="scene,date,s1,labels")
    with pytest.raises(errors.BuildError, match="has no column s2, which --modalities names"):
        build(folder, opts=dataclasses.replace(OPTIONS, modalities=("s2",)))
    pixels = np.full((13, SIDE, SIDE), 1000, np.uint16)
    write(folder / "all.tif", pixels, UTM33, utm_transform(10))
    write_table(folder, "here,2022-07-01,all.tif,map.tif", header="scene,date,s2,labels")
    with pytest.raises(errors.BuildError, match="has B10, which L2A has not"):
        build(folder, opts=dataclasses.replace(OPTIONS, s2_level="L2A"))


def test_date_in_the_name_of_imagery(folder):
    for name in BANDS:
        (folder / f"{name}.tif").rename(folder / f"T33UVT_20220704T102031_{name}.tif")
    write_table(folder, ROW.replace("B*", "T33*"))
    assert build(folder).report.counts["date differs"] == 1
    text = scan_error(folder, ROW.replace("B*", "T33*").replace("2022-07-01", "2022-01-01"))
    assert "is of 2022-07-04 by its name, its row of 2022-01-01: correct the date" in text


def test_mask_of_another_place(folder):
    far = moved(5000, 0)
    write(folder / "mask.tif", np.ones((1, 64, 64), np.uint8), UTM33, far)
    write_table(folder, ROW + ",mask.tif", header="scene,date,s2,s1,labels,mask")
    with pytest.raises(errors.BuildError, match="mask.tif: does not cover any tile of here"):
        build(folder)


def test_mask_of_everything(folder):
    write(folder / "mask.tif", np.ones((1, SIDE, SIDE), np.uint8), UTM33, utm_transform(10))
    write_table(folder, ROW + ",mask.tif", header="scene,date,s2,s1,labels,mask")
    with pytest.raises(errors.BuildError, match="season unlabelled: here_0_0 .*: 0.0% of the pix"):
        build(folder)


def test_imagery_much_coarser_than_the_grid(tmp_path):
    pixels = np.full((1, 40, 40), 500, np.uint16)
    write(tmp_path / "B4.tif", pixels, UTM33, utm_transform(60))
    write_labels(tmp_path)
    write_table(tmp_path, "here,2022-07-01,B4.tif,map.tif", header="scene,date,s2,labels")
    with pytest.raises(errors.BuildError, match="would have 10 m: give --resolution=60, or finer"):
        build(tmp_path)


def test_labels_that_are_a_picture(folder):
    picture = np.random.default_rng(0).choice([10, 20], (3, SIDE, SIDE)).astype(np.uint8)
    write(folder / "map.tif", picture, UTM33, utm_transform(10))
    assert "map.tif: has 3 bands, as a picture of a map has" in scan_error(folder)
    # Dynamic World is exported so, with probabilities in the other bands.
    write(folder / "map.tif", picture, UTM33, utm_transform(10), ("label", "water", "trees"))
    rasters._open_for.cache_clear()
    assert acquisition(folder).labels[0].index == 1


def test_imagery_that_is_a_picture(folder):
    for name in BANDS:
        edit(folder, f"{name}.tif", lambda p: (p / p.max() * 255).astype(np.uint16))
    assert "has values of 0 to 255 in all bands, as a picture" in scan_error(folder)


def test_twelve_bands_without_names(folder):
    pixels = np.random.default_rng(0).integers(20, 4000, (12, SIDE, SIDE)).astype(np.uint16)
    write(folder / "all.tif", pixels, UTM33, utm_transform(10))
    row = ROW.replace("B*", "all")
    assert "all.tif: has 12 bands without names, as L2A has" in scan_error(folder, row)
    build(folder, opts=dataclasses.replace(OPTIONS, s2_level="L2A"))
    assert [band.name for band in open_split(folder).bands][-1] == "B12"


def test_scaled_imagery_is_refused(folder):
    write(folder / "B4.tif", np.ones((1, SIDE, SIDE), np.uint8), UTM33, utm_transform(10))
    assert "B4.tif: dtype uint8, but raw values are needed" in scan_error(folder)


# Products


def write_product(folder, zipped=False):
    """A tiny .SAFE of L2A: B04 at 10 and 20 m, B11 and SCL at 20 m, with the offset."""
    name = "S2A_MSIL2A_20220701T102031_N0400_R065_T33UVT_20220701T164454.SAFE"
    data = folder / name / "GRANULE/L2A_T33UVT/IMG_DATA"
    rng = np.random.default_rng(0)
    for metres, names in ((10, ["B04"]), (20, ["B04", "B11", "SCL"])):
        (data / f"R{metres}m").mkdir(parents=True)
        side = SIDE * 10 // metres
        for band in names:
            pixels = rng.integers(1100, 4000, (1, side, side)).astype(np.uint16)
            if band == "SCL":
                pixels = rng.choice([0, 4, 6, 9], (1, side, side)).astype(np.uint8)
            path = data / f"R{metres}m/T33UVT_20220701T102031_{band}_{metres}m.jp2"
            with rasterio.open(
                path, "w", driver="JP2OpenJPEG", height=side, width=side, count=1,
                dtype=pixels.dtype, crs=UTM33, transform=utm_transform(metres), QUALITY="100",
                REVERSIBLE="YES",
            ) as file:  # fmt: skip
                file.write(pixels)
    (folder / name / "MTD_MSIL2A.xml").write_text(
        '<BOA_ADD_OFFSET band_id="0">-1000</BOA_ADD_OFFSET>'
    )
    if not zipped:
        return name
    with zipfile.ZipFile(folder / (name + ".zip"), "w") as archive:
        for path in sorted((folder / name).rglob("*.*")):
            archive.write(path, path.relative_to(folder))
    return name + ".zip"


@pytest.mark.parametrize("zipped", [False, True])
def test_product(tmp_path, zipped):
    name = write_product(tmp_path, zipped)
    write_table(tmp_path, f"a,2022-07-01,{name},{name}", header="scene,date,s2,labels")
    build(tmp_path, opts=options.Options(legend=presets.SCL))
    dataset = open_split(tmp_path)
    assert [band.name for band in dataset.bands] == ["B4", "B11"]
    assert dataset.bands[0].unit == "reflectance * 10000 (L2A)"
    record = dataset.source[0]
    (path,) = tmp_path.rglob("*B04_10m.jp2")
    pixels = rasterio.open(path).read(1)[:64, :64].astype(int) - 1000
    mean, std = sensors.S2_STATISTICS["L2A"]["B4"]
    want = np.clip((pixels - (mean - 2 * std)) / (4 * std) * 255, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(record["s2"][..., 0], want)
    (path,) = tmp_path.rglob("*SCL_20m.jp2")
    scl = rasterio.open(path).read(1)[:32, :32].repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(record["labels"][0], np.select([scl == 4, scl == 6], [0, 2], 255))


@pytest.mark.skipif(not SCENE.exists(), reason="no real scene beside the checkout")
def test_real_scene():
    (path,) = SCENE.iterdir()
    files = {"s2": (path,), "labels": (path,), "s1": (), "truth": (), "mask": ()}
    row = scene_table.Row(2, "T29UNU", datetime.datetime(2022, 10, 5), files)
    opts = options.Options(legend=presets.SCL)
    found = scene_table.acquisition(row, opts)
    laid = scenes._grid(found, cutting(resolution=60.0))
    assert (laid.height, laid.width) == (1830, 1830)
    # At the edge of the swath.
    tile = laid.window(1056, 792, 264, 264)
    scanned = scene_scan.scan(found, [tile], opts)
    assert scanned.units.s2_offset == 1000
    read = scene_tiles.read_tile(
        scene_tiles.SceneTile("a", tile, (scanned,), 0),
        band_list=dataclasses.replace(
            opts, modalities=("s2",), s2_level="L2A", s2_bands=found.s2_bands
        ).described_bands(is_native=False),
        max_seasons=1,
        min_labelled=0.0,
        options=dataclasses.replace(opts, max_invalid=1.0),
    )
    (example,) = read.examples
    (b4,) = path.rglob("*B04_60m.jp2")
    raw = rasterio.open(b4).read(1)[1056:1320, 792:1056]
    assert 0.1 < (raw == 0).mean() < 0.3
    assert (example["labels"][0][raw == 0] == 255).all()
    assert (example["s2"][raw == 0] == 127).all()
    assert example["labels"][0].min() < 4


def test_registration_of_a_known_shift():
    correlation = registration.Correlation()
    for seed in (3, 5, 6):
        image = random_fields(seed)
        first, second = np.random.default_rng(seed).normal(0, 0.1, (2, SIDE, SIDE)) + image
        # Where one is bright the other is dark.
        second = -np.roll(second, (3, -5), (0, 1))
        correlation.add(first, second, np.ones((SIDE, SIDE), bool))
    shift = correlation.shift()
    assert shift.is_clear
    assert (shift.rows, shift.columns) == (-3, 5)
    unrelated = registration.Correlation()
    unrelated.add(first, random_fields(77), np.ones((SIDE, SIDE), bool))
    assert not unrelated.shift().is_clear


def test_geotiff_of_gcps_is_refused(tmp_path):
    path = tmp_path / "s1.tif"
    gcps = [
        rasterio.control.GroundControlPoint(r, c, 13 + c, 50 - r) for r in (0, 9) for c in (0, 9)
    ]
    with (
        warnings.catch_warnings(action="ignore"),
        rasterio.open(path, "w", driver="GTiff", height=9, width=9, count=2, dtype="float32") as f,
    ):
        f.gcps = (gcps, rasterio.CRS.from_string(DEGREES))
    with pytest.raises(errors.BadFileError, match="in radar geometry"):
        rasters.layers(str(path))


def test_command(folder):
    write_table(folder)
    (folder / "legend.csv").write_text("value,name,colour\n10,water,#0000ff\n20,trees,#00ff00\n")
    flags = {
        "dataset": "scenes", "table": folder / "scenes.csv", "legend": folder / "legend.csv",
        "data_dir": folder / "data", "tile_size": 64, "test_fraction": 0, "num_workers": 1,
    }  # fmt: skip

    def run(**more):
        return commands.run_flags("data_prep.build", **(flags | more))

    built = run()
    assert built.stdout.startswith("9 locations written, 0 skipped, 9 records, "), built.stderr
    assert "exists, nothing was done: 9 records" in run().stdout
    assert "was built with --stride=64: delete it, or choose another" in run(stride=32).stderr
