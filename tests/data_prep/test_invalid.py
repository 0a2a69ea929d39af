"""Nodata, values that are not dB, and label maps that are off by pixels."""

import shutil

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine

from cromss_jax import sensors
from cromss_jax.data import input_pipeline
from data_prep import errors
from data_prep.options import Options
from data_prep.reading import bands, geotiff, nodata
from tests.data_prep import trees

NEUTRAL = 127


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    made = {}
    for name, locations in (("nol", 2), ("dfc2020", 2)):
        root = tmp_path_factory.mktemp(name)
        tree = trees.sample(name, root / "tree", locations)
        made[name] = (tree, trees.records(trees.build(name, tree, root / "data")))
    return made


@pytest.fixture
def nol(templates, tmp_path):
    """A tree of two locations with two seasons, and its records by then."""
    return shutil.copytree(templates["nol"][0], tmp_path / "tree"), templates["nol"][1]


@pytest.fixture
def dfc2020(templates, tmp_path):
    tree = shutil.copytree(templates["dfc2020"][0], tmp_path / "dfc2020")
    return tree, templates["dfc2020"][1]


def granules(tree, component):
    """The granules of location 1, by date."""
    return sorted(
        (tree / component / "0000001").iterdir(), key=lambda p: p.name.split("_1SDV_")[-1]
    )


def set_pixels(window, value):
    def change(pixels):
        pixels = pixels.copy()
        pixels[:, window[0], window[1]] = value
        return pixels

    return change


WINDOW = (slice(6, 18), slice(12, 24))
MASK = np.zeros((36, 36), bool)
MASK[WINDOW] = True


def assert_masked(records, before, mask, arrays):
    """The first season of location 1 (record 2) lost the masked pixels, and nothing else did."""
    assert len(records) == len(before) == 4
    for index, (record, old) in enumerate(zip(records, before, strict=True)):
        labels = old["labels"].copy()
        if index >= 2:  # Both records hold the labels of all seasons.
            labels[0][mask] = 255
        np.testing.assert_array_equal(record["labels"], labels)
        for name in ("s1", "s2_10m", "s2_20m", "s2_60m"):
            expected = old[name].copy()
            if index == 2 and name in arrays:
                step = len(mask) // len(expected)
                for band in arrays[name]:
                    expected[..., band][mask[::step, ::step]] = NEUTRAL
            np.testing.assert_array_equal(record[name], expected, err_msg=f"{index} {name}")


S1_NODATA = {
    "0 with a tag": (0, {"nodata": 0}),
    "0 without a tag": (0, {}),
    "-9999 with a tag": (-9999, {"nodata": -9999}),
    "-9999 without a tag": (-9999, {}),
    "NaN with a tag": (np.nan, {"nodata": np.nan}),
    "NaN without a tag": (np.nan, {}),
    "-inf": (-np.inf, {}),
    "inf": (np.inf, {}),
    "another value with a tag": (-3.5, {"nodata": -3.5}),
}


@pytest.mark.parametrize("case", S1_NODATA)
def test_nodata_of_s1(nol, tmp_path, case):
    tree, before = nol
    value, options = S1_NODATA[case]
    file = granules(tree, "s1")[0] / "VH.tif"
    trees.rewrite(file, set_pixels(WINDOW, value), **options)
    built = trees.build("nol", tree, tmp_path / "data")
    assert_masked(trees.records(built), before, MASK, {"s1": [1]})
    assert built.report.counts == {"S1 invalid": 1}
    assert "11.1% of the pixels" in built.report.summary_path.read_text()
    assert "| S1 invalid | 1 | 11.11% | 11.11% |" in built.report.summary_path.read_text()


def test_one_pixel_of_nan_loses_one_pixel(nol, tmp_path):
    tree, before = nol
    window = (slice(5, 6), slice(7, 8))
    mask = np.zeros((36, 36), bool)
    mask[window] = True
    trees.rewrite(granules(tree, "s1")[0] / "VV.tif", set_pixels(window, np.nan))
    built = trees.build("nol", tree, tmp_path / "data")
    assert_masked(trees.records(built), before, mask, {"s1": [0]})


def test_internal_mask_of_s1(nol, tmp_path):
    tree, before = nol
    file = granules(tree, "s1")[0] / "VV.tif"
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(file, "r+") as dataset:
        dataset.write_mask(~MASK)
    built = trees.build("nol", tree, tmp_path / "data")
    assert_masked(trees.records(built), before, MASK, {"s1": [0]})


def test_alpha_band_of_s1(nol, tmp_path):
    tree, before = nol
    file = granules(tree, "s1")[0] / "VV.tif"
    alpha = np.where(MASK, 0, 255).astype(np.float32)
    trees.rewrite(file, lambda pixels: np.concatenate([pixels, alpha[None]]), alpha="YES")
    with rasterio.open(file) as dataset:
        assert dataset.colorinterp[1] == rasterio.enums.ColorInterp.alpha
    built = trees.build("nol", tree, tmp_path / "data")
    assert_masked(trees.records(built), before, MASK, {"s1": [0]})


def test_second_label_band_that_is_called_alpha(templates, tmp_path):
    """Of two bands, software calls the second one alpha; here it holds the labels."""
    tree = trees.sample("dw", tmp_path / "tree", 2)
    before = trees.records(trees.build("dw", tree, tmp_path / "before"))
    for file in tree.rglob("dw_*.tif"):
        trees.rewrite(file, alpha="YES")
        with rasterio.open(file) as dataset:
            assert dataset.colorinterp[1] == rasterio.enums.ColorInterp.alpha
    built = trees.build("dw", tree, tmp_path / "data")
    np.testing.assert_array_equal(trees.records(built)[0]["labels"], before[0]["labels"])
    assert built.report.counts == {}


S2_NODATA = {
    "0 in all bands": (0, {}, sensors.S2_BANDS),
    "0 in the bands of one resolution": (0, {}, sensors.S2_BANDS_BY_RESOLUTION[20]),
    "0 with a tag": (0, {"nodata": 0}, ("B3",)),
    "saturated": (65535, {}, ("B8", "B12")),
    "another value with a tag": (77, {"nodata": 77}, ("B1",)),
}


@pytest.mark.parametrize("case", S2_NODATA)
def test_nodata_of_s2(nol, tmp_path, case):
    tree, before = nol
    value, options, names = S2_NODATA[case]
    folder = granules(tree, "s2c")[0]
    arrays = {}
    for name in names:
        metres, group = next((m, g) for m, g in sensors.S2_BANDS_BY_RESOLUTION.items() if name in g)
        window = tuple(slice(s.start * 10 // metres, s.stop * 10 // metres) for s in WINDOW)
        trees.rewrite(folder / f"{name}.tif", set_pixels(window, value), **options)
        arrays.setdefault(f"s2_{metres}m", []).append(group.index(name))
    built = trees.build("nol", tree, tmp_path / "data")
    assert_masked(trees.records(built), before, MASK, arrays)
    assert built.report.counts == {"S2 invalid": 1}


def test_dark_pixels_of_one_band_are_no_nodata(nol, tmp_path):
    tree, before = nol
    trees.rewrite(granules(tree, "s2c")[0] / "B12.tif", set_pixels(WINDOW, 0))
    built = trees.build("nol", tree, tmp_path / "data")
    assert built.report.counts == {}
    record, old = trees.records(built)[2], before[2]
    np.testing.assert_array_equal(record["labels"], old["labels"])
    darkest = sensors.scale_to_uint8(np.zeros(1), "B12")
    assert (record["s2_20m"][6:18, 12:18, 5] == darkest).all()


def test_empty_band_is_invalid(nol, tmp_path):
    tree, _ = nol
    trees.rewrite(granules(tree, "s2c")[0] / "B5.tif", lambda pixels: pixels * 0)
    built = trees.build("nol", tree, tmp_path / "data")
    assert built.report.counts == {"season skipped": 1, "S2 invalid": 1}


def test_int16_of_s2_is_read(nol, tmp_path):
    tree, before = nol
    folder = granules(tree, "s2c")[0]
    for file in folder.iterdir():
        trees.rewrite(file, lambda pixels: pixels.astype(np.int16))
    for value in (-9999, 32767):
        trees.rewrite(folder / "B2.tif", set_pixels(WINDOW, value))
        built = trees.build("nol", tree, tmp_path / str(value))
        assert_masked(trees.records(built), before, MASK, {"s2_10m": [0]})


@pytest.mark.parametrize(("max_invalid", "is_kept"), [(0.5, False), (0.6, True), (1, True)])
def test_season_is_skipped_only_past_max_invalid(nol, tmp_path, max_invalid, is_kept):
    tree, before = nol
    half = (slice(0, 20), slice(0, 36))
    trees.rewrite(granules(tree, "s1")[0] / "VV.tif", set_pixels(half, 0))
    built = trees.build("nol", tree, tmp_path / "data", options=Options(max_invalid=max_invalid))
    counts = built.info.metadata["season_counts"]["train"]
    records = trees.records(built)
    if is_kept:
        assert counts == [2, 2]
        assert built.report.counts == {"S1 invalid": 1}
        return
    # The labels of a skipped season are no part of the temporal prior.
    assert counts == [2, 1]
    assert built.report.counts == {"season skipped": 1, "S1 invalid": 1}
    assert int(records[2]["season"]) == 0
    np.testing.assert_array_equal(records[2]["s1"], before[3]["s1"])
    np.testing.assert_array_equal(records[2]["labels"][0], before[3]["labels"][1])
    assert (records[2]["labels"][1] == 255).all()


def test_location_without_a_season_left_has_no_records(nol, tmp_path):
    tree, _ = nol
    for folder in granules(tree, "s2c"):
        for file in folder.iterdir():
            trees.rewrite(file, lambda pixels: pixels * 0)
    built = trees.build("nol", tree, tmp_path / "data")
    # Training draws a season of every location that is counted.
    assert built.info.metadata["season_counts"]["train"] == [2]
    assert len(trees.records(built)) == 2
    dataset = input_pipeline.open_dataset(str(tmp_path / "data"), "ssl4eo_s12_nol")
    assert dataset.num_locations == 1
    shutil.rmtree(tmp_path / "data")
    for file in (tree / "s1" / "0000000").rglob("*.tif"):
        trees.rewrite(file, lambda pixels: pixels * np.nan)
    with pytest.raises(
        errors.BuildError, match=r"none of the 2 locations can be used .season skipped: .*report.md"
    ):
        trees.build("nol", tree, tmp_path / "data")
    text = (tmp_path / "data" / "ssl4eo_s12_nol.report.md").read_text()
    assert "| season skipped | 4 | 100.00% | 100.00% |" in text


def test_nodata_of_tiles(dfc2020, tmp_path):
    tree, before = dfc2020
    s1, s2 = (tree / f"{k}_validation" / f"ROIs0000_validation_{k}_0_p0.tif" for k in ("s1", "s2"))
    trees.rewrite(s1, set_pixels((slice(0, 3), slice(0, 36)), np.nan))
    trees.rewrite(s2, set_pixels((slice(0, 36), slice(33, 36)), 0))
    built = trees.build("dfc2020", tree, tmp_path / "data")
    (record,) = trees.records(built)
    mask = np.zeros((36, 36), bool)
    mask[:3] = mask[:, 33:] = True
    assert (record["labels"][0][mask] == 255).all()
    np.testing.assert_array_equal(record["labels"][0][~mask], before[0]["labels"][0][~mask])
    assert (record["s1"][:3] == NEUTRAL).all()
    assert (record["s2"][:, 33:] == NEUTRAL).all()
    np.testing.assert_array_equal(record["s1"][3:], before[0]["s1"][3:])
    assert built.report.counts == {"S1 invalid": 1, "S2 invalid": 1}
    with pytest.raises(errors.BuildError, match="none of the 2 locations can be used|left without"):
        trees.build("dfc2020", tree, tmp_path / "none", options=Options(max_invalid=0.1))


def test_neutral_value_is_the_mean_of_every_band():
    for band, (mean, _) in sensors.BAND_STATISTICS.items():
        assert abs(int(sensors.scale_to_uint8(np.array([mean]), band)[0]) - NEUTRAL) <= 1
    assert bands.NEUTRAL == NEUTRAL


def to_power(pixels):
    return (10 ** (pixels / 10)).astype(np.float32)


NOT_DECIBELS = {
    "linear power": (to_power, "looks like linear power, dB is needed: convert with 10 \\* log10"),
    "one negative pixel": (
        lambda a: set_pixels((slice(0, 1), slice(0, 1)), -0.001)(to_power(a)),
        "looks like linear power",
    ),
    "nodata -9999": (lambda a: set_pixels(WINDOW, -9999)(to_power(a)), "looks like linear power"),
    "noise removed": (lambda a: to_power(a) - np.float32(0.05), "looks like linear power"),
    "amplitude": (lambda a: 1000 * np.sqrt(to_power(a)), "looks like linear power"),
    "int16 dB x 100": (
        lambda a: np.rint(a * 100).astype(np.int16),
        "int16 with median -.*: looks like dB \\* 100, dB is needed: divide by 100",
    ),
    "float dB x 100": (lambda a: a * 100, "float32 with median -.*looks like dB \\* 100"),
    "int16 dB x 100, nodata": (
        lambda a: set_pixels(WINDOW, -9999)(np.rint(a * 100).astype(np.int16)),
        "looks like dB \\* 100",
    ),
    "uint16 digital numbers": (
        lambda a: np.rint(1000 * to_power(a)).astype(np.uint16),
        "dtype uint16, but float dB",
    ),
}


@pytest.mark.parametrize("case", NOT_DECIBELS)
def test_values_that_are_not_decibels_are_refused(nol, tmp_path, case):
    tree, _ = nol
    change, message = NOT_DECIBELS[case]
    trees.rewrite(granules(tree, "s1")[0] / "VV.tif", change)
    with pytest.raises(errors.BuildError, match=message):
        trees.build("nol", tree, tmp_path / "data")


def test_scale_tag_of_s1_is_applied(nol, tmp_path):
    tree, before = nol
    file = granules(tree, "s1")[0] / "VV.tif"
    # Of -9999, which the tag does not name either.
    change = lambda a: set_pixels(WINDOW, -9999)(np.rint(a * 100).astype(np.int16))
    trees.rewrite(file, change, scale=(0.01, 0), nodata=-9999)
    built = trees.build("nol", tree, tmp_path / "data")
    record = trees.records(built)[2]
    assert built.report.counts == {"S1 invalid": 1, "scale applied": 1}
    # Rounding to 0.01 dB may cross one of 255 steps of 0.08 dB.
    difference = record["s1"][..., 0].astype(int) - before[2]["s1"][..., 0]
    assert abs(difference[~MASK]).max() <= 1
    assert (record["s1"][..., 0][MASK] == NEUTRAL).all()


def test_real_backscatter_is_decibels(shared):
    for path in sorted((shared / "real").rglob("V[VH].tif")):
        values = bands.s1_values("x.tif", geotiff.read_band(path.read_bytes()))
        assert values.valid.all(), path


def label_file(tree):
    granule = granules(tree, "s2c")[0].name
    return tree / "dw_noisy_labels" / "0000001" / granule / "label.tif"


def grow(rows, columns):
    def change(pixels):
        height, width = (size + more for size, more in zip((36, 36), (rows, columns), strict=True))
        padding = ((0, 0), (0, max(0, rows)), (0, max(0, columns)))
        return np.pad(pixels, padding, mode="edge")[:, :height, :width]

    return change


@pytest.mark.parametrize(("rows", "columns"), [(1, 0), (-1, -1), (2, -2)])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_labels_off_by_pixels(nol, tmp_path, rows, columns, dtype):
    tree, before = nol
    trees.rewrite(label_file(tree), lambda pixels: grow(rows, columns)(pixels).astype(dtype))
    built = trees.build("nol", tree, tmp_path / "data")
    record = trees.records(built)[2]
    height, width = 36 + min(0, rows), 36 + min(0, columns)
    expected = np.full((36, 36), 255)
    expected[:height, :width] = before[2]["labels"][0][:height, :width]
    np.testing.assert_array_equal(record["labels"][0], expected)
    assert built.report.counts["labels resized"] == 1
    text = built.report.summary_path.read_text()
    assert f"{36 + rows}x{36 + columns} to 36x36" in text


@pytest.mark.parametrize(("rows", "columns"), [(3, 0), (0, -3)])
def test_labels_off_by_more_are_refused(nol, tmp_path, rows, columns):
    tree, _ = nol
    trees.rewrite(label_file(tree), grow(rows, columns))
    with pytest.raises(errors.BuildError, match="pixels, 36x36 needed, at most 2 more or fewer"):
        trees.build("nol", tree, tmp_path / "data")


@pytest.mark.parametrize("name", ["nol", "dfc2020"])
def test_fractions_of_labels_are_refused(nol, dfc2020, tmp_path, name):
    tree, _ = {"nol": nol, "dfc2020": dfc2020}[name]
    file = label_file(tree) if name == "nol" else next((tree / "dfc_test").iterdir())

    def change(pixels):
        pixels = pixels.astype(np.float32)
        pixels[:, 0, 0], pixels[:, 3, 3] = 1.5, 7.9
        return pixels

    trees.rewrite(file, change)
    with pytest.raises(errors.BuildError, match=r"labels 1.5, 7.9 are no whole numbers: resample"):
        trees.build(name, tree, tmp_path / "data")


def test_nodata_of_labels(nol, tmp_path):
    tree, before = nol
    # 0 is water. The file itself says that its zeros are none.
    trees.rewrite(label_file(tree), set_pixels(WINDOW, 0), nodata=0)
    built = trees.build("nol", tree, tmp_path / "data")
    record = trees.records(built)[2]
    mask = MASK | (before[2]["labels"][0] == 0)
    expected = np.where(mask, 255, before[2]["labels"][0])
    np.testing.assert_array_equal(record["labels"][0], expected)
    assert built.report.counts == {"labels invalid": 1}


def test_masks_of_resolutions():
    coarse = np.array([[True, False], [True, True]])
    fine = nodata.at_10_metres(coarse, 12)
    assert fine.shape == (12, 12)
    assert not fine[:6, 6:].any()
    assert fine.sum() == 3 * 36


def test_bands_described_as_others_are_not_taken_by_position():
    def described(*names):
        pixels, ones = np.zeros((len(names), 4, 4), np.uint16), (1.0,) * len(names)
        return geotiff.Image(
            pixels, None, "", Affine.identity(), scales=ones, offsets=ones, descriptions=names,
            tags={},
        )  # fmt: skip

    wanted = ("B2", "B3", "B4", "B8")
    for names in (wanted, ("", "", "", ""), ("blue", "green", "red", "nir")):
        found, _ = bands.pick_bands("x.tif", described(*names), wanted, sensors.S2_BANDS)
        assert len(found.pixels) == 4
    others = described("B5", "B6", "B7", "B8")
    sentence = "has the bands B5, B6, B7, B8, needed are B2, B3, B4, B8"
    with pytest.raises(errors.BadFileError, match=sentence):
        bands.pick_bands("x.tif", others, wanted, sensors.S2_BANDS)
