"""Writes the procedural world in the layouts of the downstream data sets, with clean labels.

A location has one date. All Sentinel-2 bands are at 10 m; those of 20 and 60 m are repeated.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from affine import Affine

from cromss_jax.errors import UserError
from cromss_jax.sensors import S2_BANDS, S2_BANDS_BY_RESOLUTION
from data_prep import parallel
from data_prep.datasets import tile_layouts
from data_prep.reading import geotiff
from data_prep.sample import world
from data_prep.sample.output import new_directory


@dataclasses.dataclass(frozen=True)
class Format:
    """How a downstream data set stores a tile.

    Attributes:
      layout: where its files lie.
      tile_size: pixels along a side in the published files.
      label_values: the value in its label files for each class of the world.
      label_bands: bands of a label file; the labels are the last.
      s1_dtype: dtype of its Sentinel-1 files (dB).
    """

    layout: tile_layouts.Layout
    tile_size: int
    label_values: Sequence[int]
    label_bands: int
    s1_dtype: type


# The classes of the world: water, trees, grass, flooded vegetation, crops, shrub & scrub, built
# area, bare ground, snow & ice.
FORMATS = {
    "dw": Format(tile_layouts.SSL4EO_S12_DW, 510, range(1, 10), 2, np.float32),
    # OSM has no snow & ice: it becomes open space, as bare ground does.
    "osm": Format(tile_layouts.SSL4EO_S12_OSM, 510, (9, 3, 7, 12, 2, 11, 1, 10, 10), 1, np.float32),
    # Snow & ice is 8 in DFC2020's files. It is not one of the eight classes, and is ignored.
    "dfc2020": Format(tile_layouts.DFC2020, 256, (10, 1, 4, 5, 6, 2, 7, 9, 8), 1, np.float64),
}

# Values of MODIS land cover (IGBP) for the classes of the world.
IGBP_VALUES = (17, 5, 10, 11, 12, 7, 13, 16, 15)
_MODIS_METRES = 500


def coarse_labels(truth: np.ndarray, easting: float, northing: float) -> np.ndarray:
    """Land cover as a sensor with pixels of 500 m maps it: in each the most common class.

    Args:
      truth: [T,T] uint8, classes of the world at 10 m.
      easting: of the left edge in m; the coarse pixels begin at multiples of 500.
      northing: of the upper edge.

    Returns:
      [T,T] uint8, values of `IGBP_VALUES`. Of a coarse pixel only what lies in the tile counts.
    """
    side = np.arange(len(truth)) * 10 + 5
    rows = (northing - side) // _MODIS_METRES
    columns = (easting + side) // _MODIS_METRES
    found = np.zeros_like(truth)
    for row in np.unique(rows):
        for column in np.unique(columns):
            block = np.ix_(rows == row, columns == column)
            found[block] = np.bincount(truth[block].ravel()).argmax()
    return np.array(IGBP_VALUES, np.uint8)[found]


def num_training(locations: int) -> int:
    """Number of locations in the training split, which is the first half."""
    return (locations + 1) // 2


def stack_s2(location: world.Location, tile_size: int) -> np.ndarray:
    """All bands of the first season at 10 m: [13,T,T] uint16, in the order of `S2_BANDS`."""
    stacked = {}
    for metres, bands in S2_BANDS_BY_RESOLUTION.items():
        images = location.s2(metres)[0].repeat(metres // 10, axis=0).repeat(metres // 10, axis=1)
        stacked |= {band: images[:tile_size, :tile_size, i] for i, band in enumerate(bands)}
    return np.stack([stacked[band] for band in S2_BANDS])


def write_tile(
    location: world.Location,
    index: int,
    *,
    format_name: str,
    split: str,
    tile_size: int,
    output_dir: pathlib.Path,
    coarse: bool = False,
) -> None:
    """Writes the first season of a location as one tile, with the truth for its labels.

    Args:
      location: what to write, at least `tile_size` pixels along a side.
      index: its number.
      format_name: a name of `FORMATS`.
      split: "train" or "test", by our names.
      tile_size: T, pixels along a side; the upper left of the location.
      output_dir: root of the tree.
      coarse: DFC2020 only: whether `coarse_labels` are written, too.

    Raises:
      OSError: if a file cannot be written.
    """
    file_format = FORMATS[format_name]
    layout = tile_layouts.DFC2020_LC if coarse else file_format.layout
    values = np.array(file_format.label_values, np.uint8)
    labels = np.zeros((file_format.label_bands, tile_size, tile_size), np.uint8)
    truth = location.truth[0, :tile_size, :tile_size]
    labels[-1] = values[truth]
    easting, northing = location.origin
    images = {
        "s1": location.s1[0, :tile_size, :tile_size]
        .transpose(2, 0, 1)
        .astype(file_format.s1_dtype),
        "s2": stack_s2(location, tile_size),
        "labels": labels,
    }
    if coarse:
        images |= {"truth": labels, "labels": coarse_labels(truth, easting, northing)[None]}
    dates = dict.fromkeys(images, location.s2_times[0]) | {"s1": location.s1_times[0]}
    for kind, pixels in images.items():
        path = output_dir / layout.paths[kind].format(
            split=layout.splits[split],
            lon=f"{location.longitude:.4f}",
            lat=f"{location.latitude:.4f}",
            date=f"{dates[kind]:%Y%m%d}",
            number=index,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        # Maps compress to a tenth. Noisy images do not, and would take twice the time.
        options = {"compress": "deflate"} if kind in ("labels", "truth") else {}
        transform = Affine(10, 0, easting, 0, -10, northing)
        geotiff.write(path, pixels, f"EPSG:{location.epsg}", transform, **options)


def make_and_write(
    index: int,
    *,
    format_name: str,
    locations: int,
    seed: int,
    tile_size: int,
    output_dir: pathlib.Path,
    coarse: bool,
) -> None:
    """Makes one of the locations and writes it in the split that its index belongs to."""
    # Bands at 20 and 60 m need a multiple of 6, which 256 is not: make more and crop.
    made_size = -(-tile_size // 6) * 6
    write_tile(
        world.make_location(seed, index, 1, made_size),
        index,
        format_name=format_name,
        split="train" if index < num_training(locations) else "test",
        tile_size=tile_size,
        output_dir=output_dir,
        coarse=coarse,
    )


def write_sample(
    output_dir: str | os.PathLike,
    format_name: str,
    locations: int,
    tile_size: int | None = None,
    seed: int = 0,
    num_workers: int = 1,
    coarse: bool = False,
) -> None:
    """Writes a sample of a downstream data set, with clean labels.

    Args:
      output_dir: a new or an empty directory.
      format_name: a name of `FORMATS`.
      locations: how many, 2 or more, a tile each; the first half is the training split.
      tile_size: pixels of 10 m along a side; None takes the real data set's.
      seed: of the world; other seeds give other locations.
      num_workers: processes; the files are the same for any number.
      coarse: DFC2020 only: see `write_tile`.

    Raises:
      FileExistsError: if `output_dir` holds anything.
      UserError: if there are too few locations for two splits.
    """
    if locations < 2:
        raise UserError(
            f"--locations={locations} leaves no tile for the test split: 2 or more are needed"
        )
    make = functools.partial(
        make_and_write,
        format_name=format_name,
        locations=locations,
        seed=seed,
        tile_size=tile_size or FORMATS[format_name].tile_size,
        output_dir=new_directory(output_dir),
        coarse=coarse,
    )
    for _ in parallel.map_in_order(make, range(locations), num_workers):
        pass
