"""Images and labels of a location agree: grids, CRS, offsets of Sentinel-2, and dates."""

import datetime
import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import rasterio

from cromss_jax import sensors
from data_prep import errors
from data_prep.options import Options
from data_prep.reading import geotiff, offsets, pairing
from tests import commands, runs
from tests.data_prep import trees


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    made = {}
    for name in ("nol", "dfc2020", "osm"):
        root = tmp_path_factory.mktemp(name)
        tree = trees.sample(name, root / "tree", 2)
        made[name] = (tree, trees.records(trees.build(name, tree, root / "data")))
    return made


@pytest.fixture
def nol(templates, tmp_path):
    """A tree of two locations with two seasons, and its records by then."""
    return shutil.copytree(templates["nol"][0], tmp_path / "tree"), templates["nol"][1]


def granules(tree, component, location="0000001"):
    """The granules of a location, by date."""
    folder = tree / component / location
    return sorted(folder.iterdir(), key=lambda p: p.name.split("_1SDV_")[-1])


def label_file(tree):
    return tree / "dw_noisy_labels" / "0000001" / granules(tree, "s2c")[0].name / "label.tif"


def turn(path, rows=True, columns=False):
    """Stores a file from south to north, or east to west: the same pixels at the same points."""
    with rasterio.open(path) as file:
        a, b, c, d, e, f = file.transform[:6]
        height, width = file.shape
    step = (
        slice(None),
        slice(None, None, -1 if rows else 1),
        slice(None, None, -1 if columns else 1),
    )
    if rows:
        e, f = -e, f + height * e
    if columns:
        a, c = -a, c + width * a
    trees.rewrite(
        path, lambda p: np.ascontiguousarray(p[step]), transform=rasterio.Affine(a, b, c, d, e, f)
    )


def assert_same(records, before):
    assert len(records) == len(before)
    for record, old in zip(records, before, strict=True):
        assert set(record) == set(old)
        for name, value in old.items():
            np.testing.assert_array_equal(record[name], value, err_msg=name)


@pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("which", ["s1", "s2c", "labels"])
def test_south_up_files_are_turned(nol, tmp_path, which, rows, columns):
    tree, before = nol
    files = [label_file(tree)] if which == "labels" else granules(tree, which)[0].iterdir()
    count = 0
    for file in files:
        turn(file, rows, columns)
        count += 1
    built = trees.build("nol", tree, tmp_path / "data")
    assert_same(trees.records(built), before)
    assert built.report.counts == {"turned": count}


def test_south_up_tiles_are_turned(templates, tmp_path):
    tree = shutil.copytree(templates["dfc2020"][0], tmp_path / "tree")
    for file in tree.rglob("*_p0.tif"):
        turn(file)
    built = trees.build("dfc2020", tree, tmp_path / "data")
    assert_same(trees.records(built), templates["dfc2020"][1])
    assert built.report.counts == {"turned": 3}


def relocate(path, **profile):
    """Moves the georeference of a file."""
    with rasterio.open(path) as file:
        east, north = profile.pop("shift", (0, 0))
        transform = rasterio.Affine.translation(east, north) @ file.transform
    trees.rewrite(path, transform=transform, **profile)


@pytest.mark.parametrize(
    ("which", "shift", "pixels"),
    [("s1", (30, 0), "3.0"), ("labels", (-20, 70), "7.0"), ("s1", (0, -80), "8.0")],
)
def test_a_few_pixels_are_accepted_and_reported(nol, tmp_path, which, shift, pixels):
    tree, before = nol
    files = [label_file(tree)] if which == "labels" else list(granules(tree, "s1")[0].iterdir())
    for file in files:
        relocate(file, shift=shift)
    built = trees.build("nol", tree, tmp_path / "data")
    for record, old in zip(trees.records(built), before, strict=True):
        for name in ("s1", "s2_10m", "labels"):
            np.testing.assert_array_equal(record[name], old[name])
    assert built.report.counts == {"grids shifted": len(files)}
    assert f"{pixels} pixels of 10 m" in built.report.summary_path.read_text()


def other_zone(path):
    with rasterio.open(path) as file:
        return rasterio.CRS.from_epsg(file.crs.to_epsg() + 1)


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ("s1", {"shift": (5000, 0)}, r"VV.tif: is 5.0 km off B2.tif|VH.tif: is 5.0 km off B2.tif"),
        ("s1", {"shift": (0, 90)}, "is 9 pixels of 10 m off B2.tif"),
        ("labels", {"crs": other_zone}, r"label.tif: is \S+ km off B2.tif \(EPSG:32\d+ and EPSG"),
        ("s2c", {"shift": (-300, 0)}, "is 30 pixels of 10 m off B2.tif"),
    ],
)
def test_other_grids_are_refused(nol, tmp_path, which, change, message):
    tree, _ = nol
    file = (
        label_file(tree)
        if which == "labels"
        else granules(tree, which)[0] / ("VV.tif" if which == "s1" else "B5.tif")
    )
    values = {k: v(file) if callable(v) else v for k, v in change.items()}
    relocate(file, **values)
    with pytest.raises(errors.BuildError, match=message):
        trees.build("nol", tree, tmp_path / "data")


def test_other_grids_of_tiles_are_refused(templates, tmp_path):
    tree = shutil.copytree(templates["osm"][0], tmp_path / "tree")
    file = next((tree / "train" / "label_osm").iterdir())
    relocate(file, shift=(0, 2000))
    with pytest.raises(
        errors.BuildError, match=r"is 2.0 km off s2_.*at most 8 pixels are accepted"
    ):
        trees.build("osm", tree, tmp_path / "data")


def test_the_same_grid_in_another_crs_is_accepted(nol, tmp_path):
    tree, before = nol
    file = label_file(tree)
    with rasterio.open(file) as dataset:
        # The same meridian and the same shift, but no EPSG code.
        zone = int(str(dataset.crs.to_epsg())[-2:])
        crs = rasterio.CRS.from_string(
            f"+proj=tmerc +lat_0=0 +lon_0={6 * zone - 183} +k=0.9996 +x_0=500000 "
            f"+y_0={0 if dataset.crs.to_epsg() < 32700 else 10_000_000} +datum=WGS84"
        )
    relocate(file, crs=crs)
    built = trees.build("nol", tree, tmp_path / "data")
    assert_same(trees.records(built), before)
    assert built.report.counts == {}


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_files_without_georeference_are_reported(nol, tmp_path):
    tree, before = nol
    trees.rewrite(label_file(tree), crs=None, transform=None)
    built = trees.build("nol", tree, tmp_path / "data")
    assert_same(trees.records(built), before)
    assert built.report.counts == {"not georeferenced": 1}


def test_radar_geometry_is_refused(tmp_path):
    gcps = [
        rasterio.control.GroundControlPoint(row, column, 10 + column / 10, 50 - row / 10)
        for row, column in itertools.product((0, 8), (0, 8))
    ]
    path = tmp_path / "grd.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=8, height=8, count=1, dtype="float32", gcps=gcps,
        crs="EPSG:4326",
    ) as file:  # fmt: skip
        file.write(np.full((1, 8, 8), -9, np.float32))
    with pytest.raises(geotiff.GeotiffError, match="ground control points and no grid"):
        geotiff.read_band(path.read_bytes())


def test_bands_are_ordered_by_their_descriptions(templates, tmp_path):
    tree = shutil.copytree(templates["dfc2020"][0], tmp_path / "tree")
    s1 = tree / "s1_validation" / "ROIs0000_validation_s1_0_p0.tif"
    s2 = tree / "s2_test" / "ROIs0000_test_s2_0_p1.tif"
    trees.rewrite(s1, lambda pixels: pixels[::-1], descriptions=("VH", "VV"))
    order = [4, 0, 12, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    names = [f"B{int(n[1:]):02d}" if n[1:].isdecimal() else n for n in sensors.S2_BANDS]
    trees.rewrite(s2, lambda p: p[order], descriptions=[names[i] for i in order])
    built = trees.build("dfc2020", tree, tmp_path / "data")
    assert_same(trees.records(built), templates["dfc2020"][1])
    assert built.report.counts == {"bands reordered": 2}


def test_more_bands_are_left_out_by_their_descriptions(templates, tmp_path):
    tree = shutil.copytree(templates["dfc2020"][0], tmp_path / "tree")
    s1 = tree / "s1_validation" / "ROIs0000_validation_s1_0_p0.tif"
    # What SNAP calls its bands, and the angle that Earth Engine exports.
    names = ("Sigma0_VH_db", "angle", "Sigma0_VV_db")
    trees.rewrite(s1, lambda pixels: pixels[[1, 1, 0]], descriptions=names)
    built = trees.build("dfc2020", tree, tmp_path / "data")
    assert_same(trees.records(built), templates["dfc2020"][1])
    assert built.report.counts == {"bands reordered": 1}


def add_offset(folder):
    for file in folder.iterdir():
        if file.suffix == ".tif":
            trees.rewrite(file, lambda pixels: pixels + np.uint16(1000))


def test_offset_of_some_seasons_is_subtracted(nol, tmp_path):
    tree, before = nol
    folder = granules(tree, "s2c")[1]
    add_offset(folder)
    built = trees.build("nol", tree, tmp_path / "data")
    assert_same(trees.records(built), before)
    assert built.report.counts == {"offset subtracted": 1}
    assert built.info.metadata["s2_offset"] == "auto"
    text = built.report.summary_path.read_text()
    assert f"`s2c/0000001/{folder.name}`: 1000: band 10 near 10" in text
    # A number is used for all seasons.
    forced = trees.build("nol", tree, tmp_path / "forced", options=Options(s2_offset=1000))
    assert forced.report.counts == {}
    records = trees.records(forced)
    np.testing.assert_array_equal(records[3]["s2_10m"], before[3]["s2_10m"])
    assert records[0]["s2_10m"].mean() < before[0]["s2_10m"].mean()


def test_offset_of_tiles_is_subtracted(templates, tmp_path):
    tree = shutil.copytree(templates["osm"][0], tmp_path / "tree")
    add_offset(tree / "train" / "image_s2")
    built = trees.build("osm", tree, tmp_path / "data")
    assert_same(trees.records(built), templates["osm"][1])
    assert built.report.counts == {"offset subtracted": 1}


@pytest.mark.parametrize(
    ("scale", "raw"),
    [
        ((1, -1000), lambda p: p + np.uint16(1000)),
        ((0.0001, -0.1), lambda p: p + np.uint16(1000)),
        ((0.0001, 0), lambda p: p),
        ((2, 0), lambda p: p // 2),
    ],
)
def test_scale_and_offset_tags_of_s2_are_applied(nol, tmp_path, scale, raw):
    tree, before = nol
    for file in granules(tree, "s2c")[0].iterdir():
        trees.rewrite(file, lambda p: p // 2 * 2 if scale[0] == 2 else p)
    expected = trees.records(trees.build("nol", tree, tmp_path / "without"))
    for file in granules(tree, "s2c")[0].iterdir():
        trees.rewrite(file, raw, scale=scale)
    built = trees.build("nol", tree, tmp_path / "data")
    assert_same(trees.records(built), expected)
    assert built.report.counts == {"scale applied": 13}
    if scale[0] != 2:
        assert_same(expected, before)


def test_zeros_of_files_with_a_scale_are_nodata(nol, tmp_path):
    tree, before = nol
    mask = np.zeros((36, 36), bool)
    mask[:12] = True

    def raw(pixels):
        pixels = pixels + np.uint16(1000)
        pixels[:, : pixels.shape[1] // 3] = 0
        return pixels

    for file in granules(tree, "s2c")[0].iterdir():
        trees.rewrite(file, raw, scale=(0.0001, -0.1))
    built = trees.build("nol", tree, tmp_path / "data")
    record = trees.records(built)[2]
    assert (record["s2_10m"][:12] == 127).all()
    np.testing.assert_array_equal(record["s2_10m"][12:], before[2]["s2_10m"][12:])
    assert (record["labels"][0][mask] == 255).all()


def test_metadata_that_disagrees_is_reported(nol, tmp_path):
    tree, before = nol
    first, second = granules(tree, "s2c")
    (first / "metadata.json").write_text(json.dumps({"PROCESSING_BASELINE": "05.09"}))
    # Agrees with its pixels.
    (second / "metadata.json").write_text(json.dumps({"PROCESSING_BASELINE": "02.09"}))
    built = trees.build("nol", tree, tmp_path / "data")
    assert_same(trees.records(built), before)
    assert built.report.counts == {"offset disagrees": 1}
    text = built.report.summary_path.read_text()
    assert "processing baseline 0509 but band 10 near" in text


def image(b10, others=1500):
    values = {name: np.full((6, 6), others) for name in sensors.S2_BANDS}
    values["B10"] = np.full((6, 6), b10)
    return {name: (v.astype(np.int32), np.ones((6, 6), bool)) for name, v in values.items()}


XML = """<n1:Level-1C_User_Product><PROCESSING_BASELINE>04.00</PROCESSING_BASELINE>
<Radiometric_Offset_List><RADIO_ADD_OFFSET band_id="0">-1000</RADIO_ADD_OFFSET>"""


@pytest.mark.parametrize(
    ("b10", "texts", "expected"),
    [
        (12, [], 0),
        (70, ["_S2A_MSIL1C_20220105T100411_N0301_R122_"], 0),
        (1012, [], 1000),
        (1012, [XML], 1000),
        # High clouds everywhere: the metadata decides.
        (2500, [XML], 1000),
        (700, [XML.replace("-1000", "0")], 0),
        (700, ['{"PROCESSING_BASELINE": "02.14"}'], 0),
        (700, ['{"PRODUCT_ID": "S2B_MSIL1C_20220823T054639_N0400_R048_T43RCP_20220823"}'], 1000),
        (700, [], None),
        (2500, ["no baseline"], None),
    ],
)
def test_evidence_of_an_offset(b10, texts, expected):
    if expected is None:
        with pytest.raises(errors.BadFileError, match="give --s2_offset=0 or --s2_offset=1000"):
            offsets.find("x", image(b10), texts)
    else:
        assert offsets.find("x", image(b10), texts).value == expected


def test_evidence_without_band_10():
    bands = image(0, others=1100)
    del bands["B10"]
    with pytest.raises(errors.BadFileError, match="neither band 10 nor metadata"):
        offsets.find("x", bands, [])
    assert offsets.find("x", bands, [XML]).value == 1000
    # A single band is no band 10, whose brightness tells the offset.
    alone = {"B8": bands["B8"]}
    with pytest.raises(errors.BadFileError, match="neither band 10 nor metadata"):
        offsets.find("x", alone, [])
    assert offsets.find("x", alone, [XML.replace("-1000", "0")]).value == 0
    bands["B12"] = (np.full((6, 6), 130), bands["B12"][1])
    assert offsets.find("x", bands, []).value == 0


def test_offsets_of_real_images(shared):
    """TerraMesh mixes images with and without the offset; those of SSL4EO-S12 have none."""
    found = {}
    for path in sorted((shared / "real" / "terramesh" / "S2L1C").glob("*.tif")):
        pixels = trees.read(path)
        bands = {
            name: (pixels[i].astype(np.int32), pixels[i] > 0)
            for i, name in enumerate(sensors.S2_BANDS)
        }
        found[path.stem] = offsets.find(path.name, bands, []).value
    assert found == {
        "282D_485L_3_3": 1000, "38D_378R_2_3": 0, "609U_541L_3_0": 1000, "637U_59R_1_3": 0,
    }  # fmt: skip
    for folder in sorted((shared / "real" / "ssl4eo_s12" / "s2c" / "0000200").iterdir()):
        bands = {}
        for name in sensors.S2_BANDS:
            pixels = trees.read(folder / f"{name}.tif")[0].astype(np.int32)
            bands[name] = (pixels, pixels > 0)
        offset = offsets.find(folder.name, bands, [(folder / "metadata.json").read_text()])
        assert (offset.value, offset.disagreement) == (0, "")


def days(*numbers):
    return [datetime.datetime(2020, 1, 1) + datetime.timedelta(days=int(n)) for n in numbers]


@pytest.mark.parametrize(
    ("wanted", "offered", "expected"),
    [
        ((10, 100), (8, 105), [0, 1]),
        # By rank, all would be a season off.
        ((90, 180, 270, 455), (0, 91, 179, 271), [1, 2, 3, None]),
        # The one too many is left.
        ((100,), (20, 98, 150), [1]),
        # Both ways take as many days: in order.
        ((30, 31), (20, 21), [0, 1]),
        ((30, 29), (20, 21), [1, 0]),
        ((10, 20), (12,), [0, None]),
        ((0,), (60,), [0]),
        ((0,), (61,), [None]),
    ],
)
def test_nearest_dates_are_paired(wanted, offered, expected):
    assert pairing.nearest(days(*wanted), days(*offered), 60) == expected


def test_any_pairing_of_many_is_the_best():
    rng = np.random.default_rng(0)
    for _ in range(20):
        wanted, offered = sorted(rng.integers(0, 300, 4)), sorted(rng.integers(0, 300, 4))
        found = pairing.nearest(days(*wanted), days(*offered), 1000)
        best = min(
            sum(abs(a - offered[i]) for a, i in zip(wanted, order, strict=True))
            for order in itertools.permutations(range(4))
        )
        assert sum(abs(a - offered[i]) for a, i in zip(wanted, found, strict=True)) == best
        assert found == [0, 1, 2, 3]


def shift_s1(tree, number_of_days):
    """Renames the first S1 granule as if it were taken so many days later."""
    folder = granules(tree, "s1")[0]
    old = folder.name.split("_")[4]
    date = datetime.datetime.strptime(old, "%Y%m%dT%H%M%S")
    new = (date + datetime.timedelta(days=number_of_days)).strftime("%Y%m%dT%H%M%S")
    folder.rename(folder.with_name(folder.name.replace(old, new)))


def test_pairs_of_far_dates_are_refused(nol, tmp_path):
    tree, _ = nol
    shift_s1(tree, -100)
    with pytest.raises(
        errors.BuildError,
        match=r"s1/0000001: no S1 granule of its own within 60 days of .* \d+ days away: raise",
    ):
        trees.build("nol", tree, tmp_path / "data")
    built = trees.build("nol", tree, tmp_path / "all", options=Options(max_days=120))
    assert built.info.metadata["max_days"] == 120
    assert len(trees.records(built)) == 4


def test_granules_without_a_season_are_reported(nol, tmp_path):
    tree, before = nol
    folder = granules(tree, "s1")[0]
    extra = folder.with_name(folder.name.replace("S1A_IW_GRDH_1SDV_2020", "S1A_IW_GRDH_1SDV_2018"))
    shutil.copytree(folder, extra)
    built = trees.build("nol", tree, tmp_path / "data")
    assert_same(trees.records(built), before)
    assert built.report.counts == {"not paired": 1}


@pytest.mark.parametrize("variable", ["PROJ_DATA", "PROJ_LIB"])
def test_proj_database_of_another_version_changes_nothing(nol, templates, tmp_path, variable):
    """QGIS, PostGIS and conda set these variables to databases that rasterio cannot use."""
    tree, _ = nol
    for file in tree.rglob("*.tif"):
        relocate(file, crs="EPSG:3035")
    other = tmp_path / "proj"
    other.mkdir()
    (other / "proj.db").write_bytes(b"of another version")
    command = runs.command(
        "data_prep.build", dataset="ssl4eo_s12_nol", source_dir=tree, data_dir=tmp_path / "data",
        num_workers=2,
    )  # fmt: skip
    result = subprocess.run(
        command,
        cwd=runs.ROOT,
        env=os.environ | {variable: str(other)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    builder = trees.ssl4eo_s12_nol.tfds.builder_from_directory(
        tmp_path / "data" / "ssl4eo_s12_nol" / "1.1.0"
    )
    for record in builder.as_data_source("train"):
        for name in ("crs", "s1_crs"):
            assert rasterio.CRS.from_wkt(record[name].decode()).to_epsg() == 3035
            assert 'AUTHORITY["EPSG","3035"]' in record[name].decode()


def test_proj_database_that_cannot_be_replaced_is_named(tmp_path):
    script = (
        "import rasterio\n"
        "from data_prep import errors\n"
        "from data_prep.reading import proj\n"
        "try:\n    proj.check()\nexcept errors.BuildError as error:\n    print(error)\n"
    )
    # rasterio is imported before data_prep, and has taken the wrong database.
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=runs.ROOT,
        env=os.environ | {"PROJ_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert f"cannot use the PROJ database (PROJ_DATA={tmp_path})" in result.stdout, result.stderr
    assert "Unset PROJ_DATA and PROJ_LIB" in result.stdout


@pytest.mark.parametrize("value", ["on", "-1000", "20000", "1e3"])
def test_offset_that_is_no_number_is_refused(tmp_path, value):
    result = commands.run_flags(
        "data_prep.build", dataset="dfc2020", source_dir=tmp_path, data_dir=tmp_path / "data",
        s2_offset=value,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == (
        f"Error: --s2_offset={value} is neither auto nor a whole number from 0 to 10000\n"
    )
