"""Scenes, their tables and maps that are refused, in a sentence each."""

import dataclasses
import datetime
import pathlib
import zipfile

import numpy as np
import pytest
import rasterio
import rasterio.warp
from affine import Affine

from cromss_jax import sensors
from data_prep import errors
from data_prep.datasets import (
    scene_images,
    scene_scan,
    scene_table,
)
from data_prep.reading import rasters, safe
from tests.data_prep.scene_files import (
    BANDS,
    OPTIONS,
    ROW,
    SIDE,
    UTM33,
    acquisition,
    build,
    cutting,
    grid,
    moved,
    open_split,
    random_fields,
    utm_transform,
    write,
    write_labels,
    write_s1,
    write_s2,
    write_table,
)


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


def test_float_bands_of_two_units(folder):
    """Reflectance beside reflectance * 10000."""
    for i, name in enumerate(BANDS):
        metres, factor = (20, 1e-4) if name == "B11" else (10, 1)
        fields = random_fields(i)[:: metres // 10, :: metres // 10]
        pixels = (factor * (100 + 3000 * fields)).astype(np.float32)
        write(folder / f"{name}.tif", pixels[None], UTM33, utm_transform(metres))
    text = scan_error(folder)
    assert "B11.tif: holds Sentinel-2 as reflectance, other bands of the scene are" in text


def test_a_product_whose_metadata_are_damaged(tmp_path):
    path = tmp_path / "S2A_MSIL2A_1.SAFE.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("S2A_MSIL2A_1.SAFE/MTD_MSIL2A.xml", "<metadata of a product>")
    path.write_bytes(path.read_bytes().replace(b"<metadata of", b"<metadata oF", 1))
    with pytest.raises(errors.BadFileError, match=r"MTD_MSIL2A.xml cannot be read: Bad CRC"):
        safe.metadata(path)
