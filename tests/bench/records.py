"""Records in the published data's form, made up: in memory, or as a data set without GeoTIFFs."""

import dataclasses
import functools
import pathlib

import numpy as np
import scipy.ndimage
import tensorflow_datasets as tfds
from etils import epath

from cromss_jax import presets, sensors
from data_prep import report
from data_prep.writing import builder, records

SEASONS = 4
NUM_CHANNELS = {"s1": len(sensors.S1_BANDS), "s2": len(sensors.S2_BANDS)}


def tile_size(crop: int) -> int:
    """Of records with bands at 60 m that leave room for a crop."""
    return -(-(crop + 1) // 6) * 6


def make_records(batch_size: int, crop: int) -> dict[str, np.ndarray]:
    """Parcels of classes, a fifth of the labels wrong, and noise for images."""
    rng = np.random.default_rng(0)
    size = tile_size(crop)
    fields = rng.normal(size=(batch_size, len(presets.DYNAMIC_WORLD), size, size)).astype(
        np.float32
    )
    truth = scipy.ndimage.gaussian_filter(fields, (0, 0, 5, 5)).argmax(1)
    labels = np.repeat(truth[:, None], SEASONS, 1).astype(np.uint8)
    wrong = rng.random(labels.shape) < 0.2
    labels[wrong] = rng.integers(0, len(presets.DYNAMIC_WORLD), wrong.sum())

    def image(metres: int, num_bands: int) -> np.ndarray:
        side = size * 10 // metres
        return rng.integers(0, 256, (batch_size, side, side, num_bands), np.uint8)

    return {
        "s1": image(10, NUM_CHANNELS["s1"]),
        **{f"s2_{m}m": image(m, len(b)) for m, b in sensors.S2_BANDS_BY_RESOLUTION.items()},
        "labels": labels,
        "season": rng.integers(0, SEASONS, batch_size).astype(np.int32),
    }


@dataclasses.dataclass(frozen=True)
class Location:
    """A made-up location."""

    location_id: str


def _read(location: Location, crop: int, num_seasons: int) -> records.Reading:
    """Records of smooth fields with noise of 5 bits, which compress about as real tiles do."""
    rng = np.random.default_rng(int(location.location_id))
    size = tile_size(crop)
    fields = rng.normal(size=(len(presets.DYNAMIC_WORLD), size, size)).astype(np.float32)
    labels = scipy.ndimage.gaussian_filter(fields, (0, 5, 5)).argmax(0).astype(np.uint8)

    def image(metres: int, num_bands: int) -> np.ndarray:
        ground = 20.0 * labels[:: metres // 10, :: metres // 10, None]
        noise = rng.normal(40, 10, (*ground.shape[:2], num_bands))
        return np.clip(ground + noise, 0, 255).astype(np.uint8)

    examples = [
        {
            "s1": image(10, NUM_CHANNELS["s1"]),
            **{f"s2_{m}m": image(m, len(b)) for m, b in sensors.S2_BANDS_BY_RESOLUTION.items()},
            "labels": np.repeat(labels[None], num_seasons, 0),
            "season": season,
            "location_id": location.location_id,
            "crs": "EPSG:32631",
            "transform": np.array([10, 0, 5e5, 0, -10, 5e6], np.float64),
        }
        for season in range(num_seasons)
    ]
    return records.Reading(examples)


class MadeUp(builder.LocationBuilder):
    """Made-up records in the form of SSL4EO-S12 with noisy labels."""

    VERSION = tfds.core.Version("1.0.0")


def write_dataset(
    folder: pathlib.Path, crop: int, num_locations: int, num_seasons: int, num_workers: int
) -> str:
    """Writes a data set named `made_up`, for which no file has to be read.

    Args:
      folder: the folder of TFDS data sets.
      crop: size of the crops that its tiles leave room for, pixels.
      num_locations: number of locations.
      num_seasons: records of each location.
      num_workers: processes that make them.

    Returns:
      The folder.
    """
    size = tile_size(crop)
    array = records.array_feature
    features = {
        "s1": array(size, size, NUM_CHANNELS["s1"]),
        "labels": array(num_seasons, size, size),
        "season": np.int32,
        "location_id": tfds.features.Text(),
        "crs": tfds.features.Text(),
        "transform": array(6, dtype=np.float64),
    }
    for metres, bands in sensors.S2_BANDS_BY_RESOLUTION.items():
        side = size * 10 // metres
        features[f"s2_{metres}m"] = array(side, side, len(bands))
    MadeUp(
        data_dir=epath.Path(folder),
        splits={"train": [Location(f"{i:07d}") for i in range(num_locations)]},
        read=functools.partial(_read, crop=crop, num_seasons=num_seasons),
        features=tfds.features.FeaturesDict(features),
        metadata={
            "tile_size": size,
            "max_seasons": num_seasons,
            "has_truth": False,
            "legend": presets.DYNAMIC_WORLD.to_dict(),
        },
        location_bytes=num_seasons * 20 * size**2,
        num_workers=num_workers,
        findings=report.Report(epath.Path(folder), "made_up", 0),
    ).build()
    return str(folder)
