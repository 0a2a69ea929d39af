"""Scenes on a grid: values of several CRSs that can be worked out by hand."""

import numpy as np
import pytest
import rasterio
import rasterio.warp
from affine import Affine
from rasterio.enums import Resampling

from data_prep.datasets import (
    scene_images,
    scene_labels,
)
from data_prep.reading import rasters, warping
from tests.data_prep.scene_files import (
    BANDS,
    DEGREES,
    EUROPE,
    LEFT,
    LEGEND,
    SIDE,
    TOP,
    UTM32,
    UTM33,
    acquisition,
    cover,
    grid,
    moved,
    pixel_centres,
    utm_transform,
    wkt,
    write,
    write_s2,
)


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


@pytest.mark.parametrize(("west", "is_eastern"), [(179.95, False), (179.85, True)])
def test_a_tile_across_the_antimeridian_reads_a_small_window(west, is_eastern):
    """Not the globe between its edges, but the side of the layer that has more of it."""
    place = rasterio.warp.transform(DEGREES, "EPSG:32660", [west], [-16.8])
    transform = (100.0, 0.0, place[0][0], 0.0, -100.0, place[1][0])
    tile = warping.Grid(wkt("EPSG:32660"), transform, 200, 200)
    degrees = (0.01, 0.0, -180.0, 0.0, -0.01, 90.0)
    globe = rasters.Layer("", "globe.tif", 1, wkt(DEGREES), degrees, 18000, 36000, "uint8")
    window = warping.source_window(globe, tile)
    assert window.width < 60
    assert (window.col_off > 35_000) == is_eastern
