"""Scenes that are built: records, seasons, blocks, products."""

import dataclasses
import datetime
import json
import shutil
import warnings
import zipfile

import numpy as np
import pytest
import rasterio
import rasterio.warp
from affine import Affine

from cromss_jax import blocks, presets, sensors
from data_prep import errors, options
from data_prep.datasets import (
    scene_scan,
    scene_table,
    scene_tiles,
    scenes,
)
from data_prep.reading import rasters, registration, safe
from tests import commands
from tests.data_prep.scene_files import (
    BANDS,
    DEGREES,
    EUROPE,
    LEFT,
    LEGEND,
    OPTIONS,
    ROW,
    SCENE,
    SIDE,
    UTM33,
    acquisition,
    build,
    cover,
    cutting,
    open_split,
    random_fields,
    utm_transform,
    write,
    write_s2,
    write_table,
)

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


def test_grid_of_labels_in_several_files(folder):
    """As WorldCover's: the grid is that of one file."""
    transform, height, width = cover(EUROPE, 20, margin=0)
    values = np.random.default_rng(0).choice([10, 20], (1, height, width)).astype(np.uint8)
    write(folder / "map.tif", values, EUROPE, transform)
    write(folder / "map_1.tif", values[:, :, :60], EUROPE, transform)
    right = [Affine(20, 0, transform.c + 20 * x, 0, -20, transform.f) for x in (60, 0.5)]
    write(folder / "map_2.tif", values[:, :, 60:], EUROPE, right[0])
    laid = [
        scenes._grid(acquisition(folder, ROW.replace("map.tif", name)), cutting(grid="labels"))
        for name in ("map.tif", "map_?.tif")
    ]
    assert laid[0] == laid[1]
    write(folder / "map_3.tif", values, EUROPE, right[1])
    with pytest.raises(errors.BuildError, match=r"map_3.tif: has other pixels than .*map_1.tif"):
        scenes._grid(
            acquisition(folder, ROW.replace("map.tif", "map_?.tif")), cutting(grid="labels")
        )


def test_image_whose_rows_go_north_is_laid_out_alike(tmp_path):
    """As xarray writes what has its y coordinates ascending."""
    pixels = (100 + 3000 * random_fields(0)).astype(np.uint16)[None]
    transform = utm_transform(10)
    flipped = Affine(10, 0, transform.c, 0, 10, transform.f - 10 * SIDE)
    laid = []
    for name, place, values in (("a", transform, pixels), ("b", flipped, pixels[:, ::-1])):
        write(tmp_path / f"{name}_B4.tif", values, UTM33, place)
        row = f"a,20220701,{name}_B4.tif,{name}_B4.tif"
        found = acquisition(tmp_path, row, header="scene,date,s2,labels")
        laid.append(scenes._grid(found, cutting()))
    assert laid[0] == laid[1]
    assert laid[0].height == SIDE


@pytest.mark.parametrize(
    ("bounds", "zone"),
    [
        ((8.9, 50.0, 9.1, 50.2), 32632),
        ((179.7, -17.0, -179.9, -16.8), 32760),
        ((179.9, 66.0, -179.7, 66.1), 32601),
    ],
)
def test_zone_of_the_middle_of_a_scene(bounds, zone):
    assert rasterio.CRS.from_wkt(scenes._utm(bounds)).to_epsg() == zone


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


def test_a_band_in_an_archive_is_a_file_on_disk(tmp_path):
    """Whose size and time say whether it was replaced."""
    path = tmp_path / "S2A_MSIL2A_1.SAFE.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("S2A_MSIL2A_1.SAFE/GRANULE/L2A/IMG_DATA/T32_B02_10m.jp2", b"")
    (opened,) = safe.band_files(path)
    assert safe.file_of(opened) == safe.file_of(str(path)) == path


def test_levels_that_rows_state_must_agree(folder):
    """Whichever rows come first say none."""
    product = "S2A_MSIL{}_20220701T102031_N0{}00_R065_T33UVT_20220701T164454_{}.tif"
    for level, baseline in (("1C", 3), ("2A", 3)):
        for name in BANDS:
            shutil.copy(folder / f"{name}.tif", folder / product.format(level, baseline, name))
    names = [f"S2A_MSIL{level}*" for level in ("1C", "2A")]
    rows = [ROW, *(ROW.replace("here", f"at{i}").replace("B*.tif", x) for i, x in enumerate(names))]
    write_table(folder, *rows)
    with pytest.raises(errors.BuildError, match=r"is L2A, .* is L1C, whose values differ"):
        build(folder)


def test_the_same_command_finds_its_data_set(folder):
    """Also where it names what the files do not have."""
    write_table(folder, "here,2022-07-01,B*.tif,map.tif", header="scene,date,s2,labels")
    (folder / "map.csv").write_text("value,name,colour\n10,water,#0000ff\n20,trees,#00ff00\n")
    flags = dict(dataset="scenes", table=folder / "scenes.csv", data_dir=folder / "data")
    flags |= dict(legend=folder / "map.csv", tile_size=64, test_fraction=0.0)
    flags |= dict(modalities="s1,s2", max_invalid=0.5)
    for sentence in ("records", "exists, nothing was done"):
        done = commands.run_flags("data_prep.build", **flags)
        assert done.returncode == 0, done.stderr
        assert sentence in done.stdout + done.stderr
    other = commands.run_flags("data_prep.build", **flags | {"modalities": "s2"})
    assert other.returncode == 1
    assert "was built with --modalities=s1,s2" in other.stderr
