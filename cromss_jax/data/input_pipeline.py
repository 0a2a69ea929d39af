"""From ArrayRecord files to batches of uint8 on the host: decoding and stacking only, without jax.

A data set holds one record per (location, season). The seasons of a location are adjacent, so a
record's index is the index of the location's first record plus the season.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import logging
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence

import grain
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf import json_format
from tensorflow_datasets.proto import tf_example_pb2

from cromss_jax import files, presets, sensors
from cromss_jax.errors import UserError
from cromss_jax.legend import Legend, LegendError

_log = logging.getLogger(__name__)

# The features of a record that the device needs (see preprocess.py), by modality. A data set has S2
# either as one array at 10 m or as one array per native resolution.
IMAGE_FEATURES = {"s1": ("s1",), "s2": ("s2", "s2_10m", "s2_20m", "s2_60m")}

# What stands for the records of a data set whose metadata has no digest of them: the end of each
# file, where ArrayRecord writes the positions of its records, and some whole records.
_TAIL_BYTES = 128 << 10
_SAMPLED_RECORDS = 16


class DataError(UserError):
    """The data set is missing or damaged, or does not fit the configuration."""


class BadRecordError(DataError):
    """A record cannot be read. The message names it and its file."""


@dataclasses.dataclass(frozen=True)
class TileDataset:
    """A prepared data set.

    Attributes:
      source: random access to records; a record maps feature names to arrays, numbers or bytes.
      features: names of a record's features.
      tile_size: T, pixels at 10 m; smaller records are padded to it at the bottom and the right,
        images by repeating their edge, labels by 255.
      season_counts: [locations] int, number of seasons of each location.
      has_truth: whether records hold the true classes in addition to the noisy labels.
      legend: the classes.
      bands: of the imagery, with their scaling, in the order of the records' arrays.
      blocks: [locations] int, the block of the earth's surface in which each lies, so that those
        held back for validation are not beside others; None if the data set does not say.
    """

    source: Sequence[dict]
    features: tuple[str, ...]
    tile_size: int
    season_counts: np.ndarray
    has_truth: bool
    legend: Legend
    bands: tuple[sensors.Band, ...]
    blocks: np.ndarray | None = None

    @property
    def num_locations(self) -> int:
        """Number of locations."""
        return len(self.season_counts)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Index of each location's first record, [locations] int."""
        return np.concatenate([[0], np.cumsum(self.season_counts)[:-1]])

    def padded_to(self, size: int) -> "TileDataset":
        """The same data set with tiles of at least `size` pixels, whole numbers in all bands."""
        return dataclasses.replace(self, tile_size=padded_size(self.tile_size, size, self.bands))

    @property
    def by_record(self) -> "TileDataset":
        """The same data set with one location per record, so that an epoch visits every record."""
        ones = np.ones(len(self.source), int)
        return dataclasses.replace(self, season_counts=ones, blocks=None)

    @property
    def identity(self) -> dict[str, int | str | dict[str, str]]:
        """Values that must not change during a run, as JSON.

        `tile_size` and `season_counts` determine the order of visits. `records` stands for the
        content: `{"built": digest}` if `data_prep` wrote a digest of all records into the metadata,
        else `{"sample": digest}`, see `_Records.sample_digest`.
        """
        digest = hashlib.sha256(np.asarray(self.season_counts, np.int64).tobytes())
        built = self.source.built_digest
        records = {"built": built} if built else {"sample": self.source.sample_digest}
        return {
            "tile_size": self.tile_size,
            "season_counts": digest.hexdigest(),
            "records": records,
        }

    def has_records_of(self, saved: Mapping[str, str] | None) -> bool | None:
        """Whether the records are those that a run began with.

        Args:
          saved: `identity["records"]` of that time; None if it was not saved.

        Returns:
          None if `saved` is None.
        """
        if saved is None:
            return None
        if "sample" in saved:
            return saved["sample"] == self.source.sample_digest
        return saved["built"] == self.source.built_digest

    def read(self, index: int) -> tuple[dict, bool]:
        """Reads a record, and whether it is that one.

        In the place of a damaged one comes the next that is not, if some may be damaged.

        Raises:
          BadRecordError: if more records are damaged than may be.
        """
        for offset in range(len(self.source)):
            position = (index + offset) % len(self.source)
            try:
                return self.source[position], offset == 0
            except BadRecordError as error:
                self.source.skip(position, error)
        raise DataError("no record of the split can be read; build the data set again")

    def location_of(self, records: np.ndarray) -> np.ndarray:
        """Indices of the locations that records belong to."""
        return np.searchsorted(self.starts, records, side="right") - 1


class _Records(Sequence):
    """The decoded records of a split. TFDS's own decoding would copy each array once more.

    Attributes:
      built_digest: digest of all records from the metadata, None where it has none.
    """

    def __init__(
        self,
        serialized: Sequence[bytes],
        features: tfds.features.FeaturesDict,
        paths: Sequence[epath.Path],
        lengths: Sequence[int],
        built_digest: str | None,
        max_bad_records: int,
    ):
        self._serialized = serialized
        self._features = features
        self._paths = paths
        self._ends = np.cumsum(lengths)
        self._max_bad_records = max_bad_records
        self._bad: set[int] = set()
        self.built_digest = built_digest

    @functools.cached_property
    def sample_digest(self) -> str:
        """Digest of the files' sizes and ends and of some records: 0.3 s for 700 files.

        It differs if most records do, as after a build with other labels, and if the compressed
        size of any record does. It does not differ for a change of single records that leaves their
        compressed sizes alone, unless these records are among the sampled ones.
        """

        def read_end(path: epath.Path) -> bytes:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - _TAIL_BYTES, 0))
                return size.to_bytes(8, "little") + file.read()

        sampled = np.linspace(0, len(self) - 1, min(_SAMPLED_RECORDS, len(self)), dtype=int)
        digest = hashlib.sha256()
        # Not as many as there are cores: they wait for the disk or the bucket.
        with concurrent.futures.ThreadPoolExecutor(16) as threads:
            for part in threads.map(read_end, self._paths):
                digest.update(part)
        for index in sampled.tolist():
            try:
                digest.update(self._read(index))
            except BadRecordError as error:
                self.skip(index, error)
                digest.update(b"damaged")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._serialized)

    def _read(self, index: int) -> bytes:
        """A record as it is stored; BadRecordError if it is damaged."""
        try:
            return self._serialized[index]
        except (RuntimeError, OSError) as error:  # of ArrayRecord
            file = int(np.searchsorted(self._ends, index, side="right"))
            start = self._ends[file - 1] if file else 0
            raise BadRecordError(
                f"record {index - start} of {self._paths[file]} cannot be read "
                f"({files.first_line(error)}): restore the file, build the data set again, or go "
                "on without such records by --config.data.max_bad_records"
            ) from error

    def __getitem__(self, index: int) -> dict[str, np.ndarray | bytes]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} does not exist: the split has {len(self)} records")
        stored = tf_example_pb2.Example.FromString(self._read(index)).features.feature
        record = {}
        # data_prep stores arrays as bytes, and numbers and texts as they are.
        for name, form in self._features.items():
            if isinstance(form, tfds.features.Text):
                record[name] = stored[name].bytes_list.value[0]
            elif form.shape:
                pixels = np.frombuffer(stored[name].bytes_list.value[0], form.np_dtype)
                record[name] = pixels.reshape(form.shape)
            else:
                record[name] = np.asarray(stored[name].int64_list.value[0], form.np_dtype)
        return record

    def skip(self, index: int, error: BadRecordError) -> None:
        """Notes a damaged record, and logs it; raises its error if there are too many."""
        if index in self._bad:
            return
        if len(self._bad) >= self._max_bad_records:
            raise error
        self._bad.add(index)
        _log.warning(
            "skipped, %d of %d that may be: %s", len(self._bad), self._max_bad_records, error
        )


def padded_size(tile_size: int, size: int, bands: Sequence[sensors.Band]) -> int:
    """Side of tiles that are padded to at least `size` pixels, whole numbers in all bands."""
    step = math.lcm(*(band.metres // 10 for band in bands))
    return max(tile_size, -(-size // step) * step)


def legend_of(metadata: Mapping) -> Legend:
    """The legend in the metadata of a data set; Dynamic World's where there is none.

    Raises:
      DataError: if it is damaged.
    """
    saved = metadata.get("legend")
    try:
        return presets.DYNAMIC_WORLD if saved is None else Legend.from_dict(saved)
    except LegendError as error:
        raise DataError(f"the legend in metadata.json is damaged: {error}") from error


def bands_of(metadata: Mapping, features: Sequence[str]) -> tuple[sensors.Band, ...]:
    """The bands in the metadata of a data set; SSL4EO-S12's of L1C where there are none.

    Args:
      metadata: of the data set.
      features: names of a record's features.

    Raises:
      DataError: if they are damaged.
    """
    saved = metadata.get("bands")
    if saved is None:
        modalities = [m for m, names in IMAGE_FEATURES.items() if {*names} & {*features}]
        return sensors.preset_bands(modalities, is_native="s2" not in features)
    try:
        bands = sensors.bands_of_rows(saved)
        known = {"s1": sensors.S1_BANDS, "s2": sensors.S2_BANDS}
        if not all(b.name in known[b.modality] and b.array in features for b in bands):
            raise ValueError(f"{[(b.array, b.name) for b in bands]} are not in the records")
        if not bands:
            raise ValueError("there are none")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"the bands in metadata.json are damaged: {error}") from error
    return bands


def _not_found(root: epath.Path, data_dir: str) -> DataError:
    """The error for a data set that does not exist, naming those that do."""
    others = {info.parent.parent.name for info in root.parent.glob("*/*.*.*/dataset_info.json")}
    advice = "Build"
    if others:
        advice = f"Choose {' or '.join(sorted(others))} by --config.data.name, or build"
    return DataError(
        f"no data set found: {root}/VERSION/dataset_info.json does not exist. {advice} it with "
        f"`python -m data_prep.build --dataset={root.name} --source_dir=GEOTIFFS "
        f"--data_dir={shlex.quote(os.fspath(data_dir))}`; `python -m data_prep.sample` makes "
        "GeoTIFFs to try it with"
    )


def open_dataset(
    data_dir: str, name: str, split: str = "train", max_bad_records: int = 0
) -> TileDataset:
    """Opens a split of the newest version of a data set written by `data_prep.build`.

    Args:
      data_dir: the folder of data sets.
      name: of the data set.
      split: which part of it.
      max_bad_records: number of damaged records that each process may do without.

    Raises:
      DataError: if it does not exist; says where it was expected and how to build it. If what
        describes it is damaged, or was written by another program.
      files.PathError: if the program cannot read from the storage of `data_dir`.
    """
    root = files.absolute(data_dir) / name
    # Excludes `incomplete.*`, which a killed build leaves behind.
    versions = sorted(
        (tuple(map(int, info.parent.name.split("."))), info.parent)
        for info in root.glob("*.*.*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
    )
    if not versions:
        raise _not_found(root, data_dir)
    folder = versions[-1][1]
    try:
        return _open(folder, split, max_bad_records)
    except DataError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, json_format.ParseError) as error:
        raise DataError(
            f"{folder} is damaged, or data_prep did not build it ({error!r:.200}): restore its "
            "JSON files, or build it again"
        ) from error


def _open(folder: epath.Path, split: str, max_bad_records: int) -> TileDataset:
    """Opens a split of a version of a data set; any error of Python if its JSON is damaged."""
    builder = tfds.builder_from_directory(folder)
    metadata = builder.info.metadata
    if split not in builder.info.splits:
        raise DataError(
            f"{folder} has no split {split!r}: choose one of {', '.join(builder.info.splits)}"
        )
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    blocks = metadata.get("blocks")
    # Tiles that were skipped have no records.
    counts = np.asarray(metadata["season_counts"][split])
    num_records, num_locations = builder.info.splits[split].num_examples, (counts > 0).sum()
    if counts.sum() != num_records:
        raise ValueError(f"season_counts are {counts.sum()} records of {split}, not {num_records}")
    if blocks and len(blocks[split]) != num_locations:
        raise ValueError(f"blocks are of {len(blocks[split])} locations, not {num_locations}")
    return TileDataset(
        source=_Records(
            builder.as_data_source(split, deserialize_method=raw),
            builder.info.features,
            [files.absolute(path) for path in builder.info.splits[split].filepaths],
            builder.info.splits[split].shard_lengths,
            metadata.get("records_digest", {}).get(split),
            max_bad_records,
        ),
        features=tuple(builder.info.features),
        tile_size=int(metadata["tile_size"]),
        season_counts=counts[counts > 0],
        has_truth=bool(metadata["has_truth"]),
        legend=legend_of(metadata),
        bands=bands_of(metadata, tuple(builder.info.features)),
        blocks=np.asarray(blocks[split]) if blocks else None,
    )


def _pad(name: str, value: np.ndarray, factor: float) -> np.ndarray:
    """An array of a record, padded so that its sides are `factor` times as long."""
    if name in ("labels", "truth"):
        missing = round(value.shape[-1] * factor) - value.shape[-1]
        padding = ((0, 0),) * (value.ndim - 2) + ((0, missing),) * 2
        return np.pad(value, padding, constant_values=sensors.IGNORE_LABEL)
    missing = round(value.shape[0] * factor) - value.shape[0]
    return np.pad(value, ((0, missing), (0, missing), (0, 0)), mode="edge")


def read_batch(dataset: TileDataset, modalities: Sequence[str], records: np.ndarray) -> dict:
    """Reads and stacks records.

    Args:
      dataset: the data set to read from.
      modalities: the imagery to read.
      records: [B] int record indices; -1 means padding.

    Returns:
      Arrays of the features that the device needs, [B, ...], and `is_real` [B] bool. A padding
      row repeats a record and has all its labels set to 255, ignored. So has the row of a damaged
      record, if `open_dataset` allows some.

    Raises:
      BadRecordError: if a record is damaged that must not be.
    """
    is_real = records >= 0
    names = [name for m in modalities for name in IMAGE_FEATURES[m] if name in dataset.features]
    names += ["labels", "season"] + (["truth"] if dataset.has_truth else [])
    batch = {}
    # One record at a time, so that the next record reuses the memory of the last one: 1.1 ms per
    # record of 0.9 MB. With all records in memory at once it is 4 ms, mostly spent by the operating
    # system on new memory pages.
    for row, record in enumerate(np.where(is_real, records, max(records[0], 0)).tolist()):
        decoded, is_read = dataset.read(record)
        is_real[row] &= is_read
        stored_size = decoded["labels"].shape[-1]
        for name in names:
            value = np.asarray(decoded[name])
            if stored_size < dataset.tile_size and value.ndim:
                value = _pad(name, value, dataset.tile_size / stored_size)
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
    """The records of each global batch: an endless random-access sequence of [B] indices.

    Every epoch visits each location once, in a new random order, and draws a season for the visit.
    Batches continue across the end of an epoch, so no visit is dropped: batch k holds the visits
    from k B up to (k + 1) B of the sequence.
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
    """This process's rows of every global batch, prefetched by threads.

    The iterator's state is the number of batches taken; it does not depend on `rows`.

    Args:
      dataset: the data set to read from.
      modalities: the imagery to read.
      records: sequence from `training_records`.
      rows: the rows of a batch that belong to this process; all rows by default.
      num_threads: number of reading threads.
    """

    def read(batch: np.ndarray) -> dict:
        return read_batch(dataset, modalities, batch[rows])

    # An element is a batch of about 0.5 MB per sample, so a short buffer is enough. Threads are
    # enough because reading and copying release the GIL; processes would outlive a killed run.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 2)
    return iter(records.map(read).to_iter_dataset(options))


def validation_records(
    dataset: TileDataset, locations: np.ndarray, batch_size: int
) -> list[np.ndarray]:
    """All seasons of the validation locations in batches of B indices; the last is padded by -1."""
    records = np.concatenate(
        [dataset.starts[i] + np.arange(dataset.season_counts[i]) for i in locations]
        or [np.zeros(0, int)]
    )
    padding = -len(records) % batch_size
    padded = np.concatenate([records, np.full(padding, -1, records.dtype)])
    return list(padded.reshape(-1, batch_size))
