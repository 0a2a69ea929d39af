"""From ArrayRecord to batches of uint8 on the host. Decodes and stacks, nothing else; no jax.

A data set holds one record per (location, season), the seasons of a location next to each other,
so that a record's index is the location's start plus the season.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Sequence

import grain
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from cromss_jax import files, sensors

# What the device needs of a record (preprocess.py), by modality; a data set has S2 in one array at
# 10 m or at native sizes.
IMAGE_FEATURES = {"s1": ("s1",), "s2": ("s2", "s2_10m", "s2_20m", "s2_60m")}


class DataError(ValueError):
    """A data set is missing or does not fit the configuration."""


@dataclasses.dataclass(frozen=True)
class TileDataset:
    """A prepared data set.

    Attributes:
      source: random access to records: name of feature to array, number or bytes.
      features: names of what a record holds.
      tile_size: T, pixels at 10 m.
      season_counts: [locations] int, how many seasons each location has.
      has_truth: whether records hold the true classes beside the noisy labels.
      legend: the classes in label order, each with its colour.
    """

    source: Sequence[dict]
    features: tuple[str, ...]
    tile_size: int
    season_counts: np.ndarray
    has_truth: bool
    legend: sensors.Legend

    @property
    def num_locations(self) -> int:
        """Number of places."""
        return len(self.season_counts)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """[locations] int, index of each location's first record."""
        return np.concatenate([[0], np.cumsum(self.season_counts)[:-1]])

    @property
    def by_record(self) -> "TileDataset":
        """The same records, each a place of its own, so that an epoch visits all of them."""
        return dataclasses.replace(self, season_counts=np.ones(len(self.source), int))

    @property
    def identity(self) -> dict[str, int | str]:
        """What must not change under a run, since the order of visits follows from it."""
        digest = hashlib.sha256(np.asarray(self.season_counts, np.int64).tobytes())
        return {"tile_size": self.tile_size, "season_counts": digest.hexdigest()}

    def location_of(self, records: np.ndarray) -> np.ndarray:
        """Indices of the locations that records belong to."""
        return np.searchsorted(self.starts, records, side="right") - 1


class _Records(Sequence):
    """The records of a split, decoded. TFDS's own decoding copies each array once more."""

    def __init__(self, serialized: Sequence[bytes], features: tfds.features.FeaturesDict):
        self._serialized = serialized
        self._features = features

    def __len__(self) -> int:
        return len(self._serialized)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | bytes]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        stored = tf_example_pb2.Example.FromString(self._serialized[index]).features.feature
        record = {}
        # Arrays are stored as their bytes (data_prep), numbers and texts as themselves.
        for name, form in self._features.items():
            if isinstance(form, tfds.features.Text):
                record[name] = stored[name].bytes_list.value[0]
            elif form.shape:
                pixels = np.frombuffer(stored[name].bytes_list.value[0], form.np_dtype)
                record[name] = pixels.reshape(form.shape)
            else:
                record[name] = np.asarray(stored[name].int64_list.value[0], form.np_dtype)
        return record


def open_dataset(data_dir: str, name: str, split: str = "train") -> TileDataset:
    """Opens a split of the newest version of a data set that `data_prep.build` wrote.

    Raises:
      DataError: if there is none; says what was looked for and how to make it.
      files.PathError: if `data_dir` lies where nothing can be read from.
    """
    root = files.absolute(data_dir) / name
    # Not `incomplete.*`, what a killed build leaves.
    versions = sorted(
        (tuple(map(int, info.parent.name.split("."))), info.parent)
        for info in root.glob("*.*.*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
    )
    if not versions:
        raise DataError(
            f"no data set found: looked for {root}/VERSION/dataset_info.json. Make it with "
            f"`python -m data_prep.build --dataset={name} --source_dir=GEOTIFFS "
            f"--data_dir={data_dir}`; `python -m data_prep.sample` makes GeoTIFFs to try it with"
        )
    builder = tfds.builder_from_directory(versions[-1][1])
    metadata = builder.info.metadata
    if split not in builder.info.splits:
        raise DataError(
            f"{versions[-1][1]} has no split {split!r}; it has {', '.join(builder.info.splits)}"
        )
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return TileDataset(
        source=_Records(
            builder.as_data_source(split, deserialize_method=raw), builder.info.features
        ),
        features=tuple(builder.info.features),
        tile_size=int(metadata["tile_size"]),
        season_counts=np.asarray(metadata["season_counts"][split]),
        has_truth=bool(metadata["has_truth"]),
        legend=dict(metadata["legend"]),
    )


def split_locations(
    num_locations: int, validation_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Holds back a share of the locations, at least one if the share is above 0.

    Returns:
      Indices of the training and of the validation locations, both sorted.

    Raises:
      DataError: if no location would be left to train on.
    """
    num_validation = round(num_locations * validation_fraction)
    if validation_fraction > 0:
        num_validation = max(num_validation, 1)
    if num_validation >= num_locations:
        raise DataError(
            f"{num_locations} locations with a validation fraction of {validation_fraction} "
            "leave none to train on; use more locations or a smaller "
            "config.data.validation_fraction"
        )
    order = np.random.default_rng(seed).permutation(num_locations)
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])


def read_batch(dataset: TileDataset, modalities: Sequence[str], records: np.ndarray) -> dict:
    """Reads and stacks records.

    Args:
      dataset: where from.
      modalities: which imagery is wanted.
      records: [B] int record indices; -1 stands for padding.

    Returns:
      Arrays of the features that the device needs, [B, ...], and `is_real` [B] bool. A padding
      row repeats a record with all its labels ignored.
    """
    is_real = records >= 0
    names = [name for m in modalities for name in IMAGE_FEATURES[m] if name in dataset.features]
    names += ["labels", "season"] + (["truth"] if dataset.has_truth else [])
    batch = {}
    # One record at a time: the next one reuses the memory of the last. Held all at once, most of
    # the time goes to the kernel for fresh pages (1.1 ms against 4 ms a record of 0.9 MB).
    for row, record in enumerate(np.where(is_real, records, max(records[0], 0)).tolist()):
        decoded = dataset.source[record]
        for name in names:
            value = np.asarray(decoded[name])
            if row == 0:
                batch[name] = np.empty((len(records), *value.shape), value.dtype)
            batch[name][row] = value
    if not is_real.all():
        for name in ("labels", "truth"):
            if name in batch:
                batch[name][~is_real] = sensors.IGNORE_LABEL
    return {**batch, "is_real": is_real}


def training_records(
    dataset: TileDataset, locations: np.ndarray, batch_size: int, seed: int
) -> grain.MapDataset:
    """Which records make which global batch: an endless, random-access sequence of [B] indices.

    Every epoch visits each location once, in an order of its own, with a season drawn for the
    visit. Batches run across the border of epochs, so nothing is dropped: batch k holds visits
    k B to (k + 1) B of the sequence.
    """

    def draw_season(location: int, rng: np.random.Generator) -> int:
        return int(dataset.starts[location] + rng.integers(dataset.season_counts[location]))

    return (
        grain.MapDataset.source(locations.tolist())
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(draw_season)
        .batch(batch_size)
    )


def training_batches(
    dataset: TileDataset,
    modalities: Sequence[str],
    records: grain.MapDataset,
    *,
    rows: np.ndarray | slice = slice(None),
    num_threads: int = 2,
) -> grain.DatasetIterator:
    """Rows of every global batch, read ahead by threads.

    The iterator's state is the number of batches taken, whatever the rows.

    Args:
      dataset: where from.
      modalities: which imagery is wanted.
      records: of `training_records`.
      rows: which of a batch's rows are this process's; all by default.
      num_threads: that read.
    """

    def read(batch: np.ndarray) -> dict:
        return read_batch(dataset, modalities, batch[rows])

    # Elements are whole batches of about 0.5 MB a sample: a short buffer is enough. Threads, not
    # processes: reading and copying release the GIL, and a killed run leaves no orphans behind.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 2)
    return iter(records.map(read).to_iter_dataset(options))


def validation_records(
    dataset: TileDataset, locations: np.ndarray, batch_size: int
) -> list[np.ndarray]:
    """Every season of the held-back locations, in batches of B indices, the last padded with -1."""
    records = np.concatenate(
        [dataset.starts[i] + np.arange(dataset.season_counts[i]) for i in locations]
        or [np.zeros(0, int)]
    )
    padding = -len(records) % batch_size
    padded = np.concatenate([records, np.full(padding, -1, records.dtype)])
    return list(padded.reshape(-1, batch_size))
