"""What becomes of files that GDAL's commands write; skipped where GDAL is not installed."""

import pathlib
import shutil
import subprocess

import numpy as np
import pytest
import rasterio
import rasterio.warp
from affine import Affine

from cromss_jax import presets, sensors
from data_prep import errors
from data_prep.datasets import scene_labels
from data_prep.reading import rasters, warping
from tests.data_prep import trees

pytestmark = pytest.mark.skipif(
    shutil.which("gdal_translate") is None, reason="GDAL's commands are not installed: gdal-bin"
)

S1 = [f"s1/{band}" for band in sensors.S1_BANDS]
S2 = [f"s2c/{band}" for band in sensors.S2_BANDS]
LABEL = ["dw_noisy_labels/label"]
TRANSLATE = "gdal_translate -q {options} {old} {new}"
WARP = "gdalwarp -q {options} {old} {new}"

# Files, command, options; what the report counts, or the error; whether records are as before.
CASES = {
    "tiled": (S2, TRANSLATE, "-co TILED=YES -co COMPRESS=LZW -co PREDICTOR=2", {}, True),
    "cloud optimised": (S2, TRANSLATE, "-of COG", {}, True),
    "zstd floats": (S1, TRANSLATE, "-co COMPRESS=ZSTD", {}, True),
    "big endian": (S1, TRANSLATE, "-co BIGTIFF=YES -co ENDIANNESS=BIG", {}, True),
    "int16": (S2, TRANSLATE, "-ot Int16", {}, True),
    "nodata tag": (S2, TRANSLATE, "-a_nodata 0", {}, True),
    "floats of S2": (S2[:1], TRANSLATE, "-ot Float32", "dtype float32, but reflectance", None),
    "dB x 100": (
        S1, TRANSLATE, "-ot Int16 -scale -40 10 -4000 1000", "looks like dB \\* 100", None,
    ),
    "dB x 100 with its scale": (
        S1, TRANSLATE, "-ot Int16 -scale -40 10 -4000 1000 -a_scale 0.01", {"scale applied": 2},
        False,
    ),
    "cut label": (LABEL, TRANSLATE, "-srcwin 0 0 35 34", {"labels resized": 1}, False),
    "degrees": (LABEL, WARP, "-t_srs EPSG:4326", "pixels, 36x36 needed", None),
    "another zone": (LABEL, TRANSLATE, "-a_srs EPSG:32601", "km off B2.tif", None),
    "cubic labels": (
        LABEL, WARP, "-r cubic -ot Float32 -ts 36 36 {shift}", "no whole numbers", None,
    ),
    "warped with nodata": (
        S1, WARP, "-ts 36 36 -dstnodata -9999 {shift}", {"S1 invalid": 1, "grids shifted": 2},
        False,
    ),
    "warped with alpha": (
        S1, WARP, "-ts 36 36 -dstalpha {shift}", {"S1 invalid": 1, "grids shifted": 2}, False,
    ),
    "internal mask": (
        S2[1:2], TRANSLATE, "--config GDAL_TIFF_INTERNAL_MASK YES -mask 1", {}, True,
    ),
    "mask beside": (
        S2[1:2], TRANSLATE, "--config GDAL_TIFF_INTERNAL_MASK NO -mask 1", {"not read": 1}, True,
    ),
    "statistics": (S1, "gdalinfo -stats {old} {options}", "", {"not read": 2}, True),
    "overviews": (S2[1:2], "gdaladdo -q -ro {old} 2 {options}", "", {"not read": 1}, True),
    "jpeg 2000": (
        S2[3:4], "gdal_translate -q {options} {old} {old}.jp2 && rm {old}",
        "-of JP2OpenJPEG -co REVERSIBLE=YES", "B4.tif: missing, found B4.tif.jp2", None,
    ),
    "virtual": (
        S2[3:4], "gdalbuildvrt -q {options} {old}.vrt {old} && rm {old}", "",
        "B4.tif: missing, found B4.tif.vrt", None,
    ),
    "sparse": (
        S1, "gdal_create -q -if {old} {options} {new}", "-co SPARSE_OK=TRUE -a_nodata 0",
        "cut short, or sparse", None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    root = tmp_path_factory.mktemp("nol")
    tree = trees.sample("nol", root / "tree", 2)
    return tree, trees.digests(trees.build("nol", tree, root / "data"))


def shifted_extent(path):
    """An extent 2.5 pixels to the east."""
    with rasterio.open(path) as file:
        west, south, east, north = file.bounds
    return f"-te {west + 25} {south} {east + 25} {north}"


def apply(command, options, path):
    new = path.with_name("new.tif")
    options = options.format(shift=shifted_extent(path))
    line = command.format(options=options, old=f"'{path}'", new=f"'{new}'")
    subprocess.run(line, shell=True, check=True, capture_output=True)
    for file in path.parent.glob("new.tif*"):
        file.replace(path.parent / file.name.replace("new.tif", path.name))


@pytest.mark.parametrize("case", CASES)
def test_files_of_gdal(template, tmp_path, case):
    tree, before = template
    tree = pathlib.Path(shutil.copytree(tree, tmp_path / "tree"))
    names, command, options, expected, is_same = CASES[case]
    for name in names:
        component, band = name.split("/")
        granule = sorted((tree / component / "0000001").iterdir())[0]
        apply(command, options, granule / f"{band}.tif")
    if isinstance(expected, str):
        with pytest.raises(errors.BuildError, match=expected):
            trees.build("nol", tree, tmp_path / "data")
        return
    built = trees.build("nol", tree, tmp_path / "data")
    assert built.report.counts == expected
    assert (trees.digests(built) == before) is is_same


@pytest.mark.skipif(shutil.which("gdal_calc.py") is None, reason="gdal_calc.py is not installed")
@pytest.mark.parametrize(
    ("names", "formula", "kind", "expected"),
    [
        (S2, "A+1000", "UInt16", {"offset subtracted": 1}),
        (S1, "10**(A/10)", "Float32", "looks like linear power"),
        (S1, "numpy.where(A<-28,-9999,A)", "Float32", {"S1 invalid": 1}),
    ],
)
def test_files_of_gdal_calc(template, tmp_path, names, formula, kind, expected):
    tree, before = template
    tree = pathlib.Path(shutil.copytree(tree, tmp_path / "tree"))
    for name in names:
        component, band = name.split("/")
        path = sorted((tree / component / "0000001").iterdir())[0] / f"{band}.tif"
        line = f"gdal_calc.py --quiet -A {{old}} --calc='{formula}' --type={kind} --outfile={{new}}"
        apply(line, "", path)
    if isinstance(expected, str):
        with pytest.raises(errors.BuildError, match=expected):
            trees.build("nol", tree, tmp_path / "data")
        return
    built = trees.build("nol", tree, tmp_path / "data")
    assert built.report.counts == expected
    assert (trees.digests(built) == before) is ("S1 invalid" not in expected)


def write_map(path, bounds, side=700):
    """A map of WorldCover's values, in degrees and without a pattern."""
    values = [group[0] for group in presets.WORLDCOVER.values] + [0]
    pixels = np.random.default_rng(0).choice(values, (side, side)).astype(np.uint8)
    west, south, east, north = bounds
    transform = Affine((east - west) / side, 0, west, 0, (south - north) / side, north)
    with rasterio.open(
        path, "w", driver="GTiff", height=side, width=side, count=1, dtype="uint8",
        crs="EPSG:4326", transform=transform, nodata=0,
    ) as file:  # fmt: skip
        file.write(pixels, 1)
    return path


def check_warped(path, bounds, work_dir, tile):
    """Labels read tile by tile on a UTM grid are what gdalwarp writes for all of it."""
    crs = "EPSG:32632"
    left, bottom, right, top = rasterio.warp.transform_bounds("EPSG:4326", crs, *bounds)
    left, top = 10 * np.floor(left / 10), 10 * np.ceil(top / 10)
    height, width = int((top - bottom) // 10), int((right - left) // 10)
    extent = f"-te {left} {top - 10 * height} {left + 10 * width} {top} -ts {width} {height}"
    # Exact coordinates for each pixel: gdalwarp by default accepts an eighth of a pixel.
    options = f"-r near -et 0 -dstnodata 0 -t_srs {crs} {extent}"
    subprocess.run(
        f"gdalwarp -q {options} '{path}' '{work_dir}/warped.tif'", shell=True, check=True
    )
    with rasterio.open(work_dir / "warped.tif") as file:
        expected = file.read(1)
    wkt = rasterio.CRS.from_string(crs).to_wkt()
    grid = warping.Grid(wkt, (10.0, 0.0, left, 0.0, -10.0, top), height, width)
    layers = rasters.layers(str(path))
    value_of = np.zeros(256, np.uint8)
    value_of[: len(presets.WORLDCOVER.names)] = [v[0] for v in presets.WORLDCOVER.values]
    found = np.empty((height, width), np.uint8)
    for row in range(0, height, tile):
        for column in range(0, width, tile):
            part = grid.window(row, column, min(tile, height - row), min(tile, width - column))
            labels, _ = scene_labels.read(layers, part, presets.WORLDCOVER)
            found[row : row + tile, column : column + tile] = value_of[labels]
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 5


def test_labels_are_warped_as_by_gdalwarp(tmp_path):
    bounds = (6.5, 0.1, 6.56, 0.16)
    path = write_map(tmp_path / "map.tif", bounds)
    # The grid goes over the map's edge, where there is no label.
    check_warped(path, (6.52, 0.12, 6.57, 0.17), tmp_path, 97)


def test_worldcover_is_warped_as_by_gdalwarp(shared, tmp_path):
    (path,) = (shared / "real/worldcover").glob("*.tif")
    # The south of the island.
    check_warped(path, (6.45, 0.0, 6.55, 0.1), tmp_path, 264)
