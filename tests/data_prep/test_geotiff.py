import io

import numpy as np
import pytest
import rasterio
import rasterio.errors

from data_prep.reading import geotiff

PIXELS = np.random.default_rng(0).integers(500, 900, (48, 48)).astype(np.uint16)
TRANSFORM = rasterio.Affine(10, 0, 5e5, 0, -10, 6e6)


def geotiff_bytes(pixels=PIXELS, **options) -> bytes:
    file = io.BytesIO()
    profile = {"driver": "GTiff", "crs": "EPSG:32632", "transform": TRANSFORM}
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    profile |= {"width": 48, "height": 48, "count": len(pixels), "dtype": pixels.dtype}
    with rasterio.open(file, "w", **(profile | options)) as dataset:
        dataset.write(pixels)
    return file.getvalue()


def georeferenced_at_end(path, **options) -> bytes:
    """A file whose tags lie behind its pixels, where cutting loses the georeference first."""
    path.write_bytes(geotiff_bytes(**options))
    with rasterio.open(path, "r+") as dataset:
        dataset.crs = "EPSG:32633"
        dataset.update_tags(note="x" * 60)
    return path.read_bytes()


def test_band_and_georeference():
    band = geotiff.read_band(geotiff_bytes())
    np.testing.assert_array_equal(band.pixels, PIXELS[None])
    assert band.pixels.dtype == np.uint16
    assert rasterio.CRS.from_wkt(band.crs) == rasterio.CRS.from_epsg(32632)
    assert tuple(band.transform[:6]) == (10, 0, 5e5, 0, -10, 6e6)


def test_no_georeference():
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        data = geotiff_bytes(crs=None, transform=None)
    band = geotiff.read_band(data)
    assert band.crs == ""
    assert band.transform == rasterio.Affine.identity()


STACK = np.stack([PIXELS, PIXELS // 2, PIXELS + 7])


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_all_bands_of_a_file(interleave):
    data = geotiff_bytes(STACK, interleave=interleave)
    bands = geotiff.read_bands(data)
    np.testing.assert_array_equal(bands.pixels, STACK)
    assert bands.pixels.dtype == np.uint16
    assert rasterio.CRS.from_wkt(bands.crs) == rasterio.CRS.from_epsg(32632)
    assert tuple(bands.transform[:6]) == (10, 0, 5e5, 0, -10, 6e6)
    np.testing.assert_array_equal(geotiff.read_bands(geotiff_bytes()).pixels, PIXELS[None])


def test_size_without_pixels():
    data = geotiff_bytes(STACK[:, :36], height=36)
    assert geotiff.read_size(data) == (36, 48)
    assert geotiff.read_size(data[:-100]) == (36, 48)
    with pytest.raises(geotiff.GeotiffError, match="empty file"):
        geotiff.read_size(b"")


def test_written_file_is_read_back(tmp_path):
    geotiff.write(tmp_path / "a.tif", STACK, "EPSG:32632", TRANSFORM, compress="deflate")
    bands = geotiff.read_bands((tmp_path / "a.tif").read_bytes())
    np.testing.assert_array_equal(bands.pixels, STACK)
    assert rasterio.CRS.from_wkt(bands.crs) == rasterio.CRS.from_epsg(32632)
    assert bands.transform == TRANSFORM


@pytest.mark.parametrize("tags_at_end", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blockysize": 1},
        {"compress": "deflate", "BIGTIFF": "YES"},
        {"tiled": True, "blockxsize": 16, "blockysize": 16, "ENDIANNESS": "BIG"},
        {"pixels": STACK, "interleave": "pixel"},
        {"pixels": STACK, "interleave": "band", "blockysize": 4},
        {"pixels": STACK, "interleave": "band", "compress": "deflate", "blockysize": 4},
    ],
    ids=lambda value: str(value) if isinstance(value, bool) else "-".join(value) or "plain",
)
def test_cut_file_is_never_read_wrongly(tmp_path, options, tags_at_end):
    if tags_at_end:
        data = georeferenced_at_end(tmp_path / "a.tif", **options)
    else:
        data = geotiff_bytes(**options)
    whole = geotiff.read_bands(data)
    # Denser where the tables lie, at either end.
    end = len(data)
    lengths = {*range(0, 700, 7), *range(0, end, 89), *range(end - 300, end, 7), end - 1}
    refused = 0
    for length in lengths:
        try:
            bands = geotiff.read_bands(data[:length])
        except geotiff.GeotiffError:
            refused += 1
        else:
            np.testing.assert_array_equal(bands.pixels, whole.pixels)
            assert (bands.crs, bands.transform) == (whole.crs, whole.transform)
    assert refused > 0.9 * len(lengths)


def test_sparse_file_is_refused():
    """GDAL gives zeros for blocks that were never written."""
    data = geotiff_bytes(np.zeros_like(PIXELS), SPARSE_OK=True)
    with pytest.raises(geotiff.GeotiffError, match="no pixels stored at row 0"):
        geotiff.read_band(data)


def test_file_with_one_sparse_band_is_refused():
    stack = np.stack([PIXELS, np.zeros_like(PIXELS), PIXELS])
    data = geotiff_bytes(stack, SPARSE_OK=True, interleave="band")
    with pytest.raises(geotiff.GeotiffError, match="no pixels stored at row 0"):
        geotiff.read_bands(data)


def test_more_bands_than_one_are_refused():
    data = geotiff_bytes(np.stack([PIXELS, PIXELS]))
    with pytest.raises(geotiff.GeotiffError, match="has 2 bands, one is needed"):
        geotiff.read_band(data)


@pytest.mark.parametrize("data", [b"", b"II", b"no GeoTIFF at all", bytes(1000)])
def test_other_bytes_are_refused(data):
    with pytest.raises(geotiff.GeotiffError):
        geotiff.read_band(data)
