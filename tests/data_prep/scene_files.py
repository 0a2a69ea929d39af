"""Small scenes of random fields, in several CRSs."""

import pathlib
import warnings

import numpy as np
import rasterio
import rasterio.warp
from affine import Affine
from scipy import ndimage

from cromss_jax.data import input_pipeline
from cromss_jax.legend import Legend
from data_prep import options
from data_prep.datasets import (
    scene_table,
    scenes,
)
from data_prep.reading import warping

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
