"""ArrayRecord files: what a record may hold, and how files of records are written."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_module
from etils import epath
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.proto import tf_example_pb2

from cromss_jax import files, sensors
from data_prep import errors, parallel
from data_prep.report import Finding

# One record a group: random access. On real tiles zstd:-1 takes 0.64 of the raw size and reads as
# fast as no compression; the default (zstd:3) takes 0.54 and reads at less than half the speed.
ARRAY_RECORD_OPTIONS = "group_size:1,zstd:-1"
# Raw size of the records of one file.
SHARD_BYTES = 512 << 20

# The name of a measure of each record.
VV_MINUS_VH = "VV minus VH, dB"

Example = dict[str, Any]
# The unit that a builder reads at once; it has an attribute `location_id`.
Location = Any


def array_feature(*shape: int, dtype: type = np.uint8) -> tfds.features.Tensor:
    """An array of a record, stored as its bytes."""
    # The default encoding takes 100 times as long to read.
    encoding = tfds.features.Encoding.BYTES
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=encoding)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was read of a location.

    Attributes:
      examples: its records; none if too many of its pixels are invalid.
      findings: what a user should know about its files.
      measures: names and values for the report, such as ("days between S1 and S2", 2.0).
    """

    examples: list[Example]
    findings: tuple[Finding, ...] = ()
    measures: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written of a location.

    Attributes:
      num_records: how many.
      findings: see `Reading`.
      digest: SHA-256 of the records, as they are stored.
      classes: (2, 256) int64, for each label the number of its pixels, and of the records that have
        any of them.
      measures: see `Reading`.
      place: its CRS as WKT and the coordinates of its middle; None without records.
    """

    num_records: int
    findings: tuple[Finding, ...]
    digest: bytes
    classes: np.ndarray
    measures: tuple[tuple[str, float], ...] = ()
    place: tuple[str, float, float] | None = None


# The result of a location, or why it has none.
Outcome = Written | errors.BadFileError


def attempt(
    read: Callable[[Location], Reading], location: Location
) -> Reading | errors.BadFileError:
    """What was read of a location, or the reason why it cannot be read."""
    try:
        return read(location)
    except errors.BadFileError as bad:
        return bad


@contextlib.contextmanager
def _write_errors() -> Iterator[None]:
    """Turns errors of ArrayRecord, such as a full disk, into errors for the user."""
    try:
        yield
    except RuntimeError as error:
        raise errors.BuildError(f"cannot write the records: {error}") from error


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records.

    Attributes:
      split: the split that it belongs to.
      path: where it is written.
      locations: the locations whose records it holds, in order.
    """

    split: str
    path: epath.Path
    locations: Sequence[Location]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a process needs to write the files of a data set. Picklable.

    Attributes:
      shards: the files, in order.
      read: a function from a location to its records; raises errors.BadFileError.
      features: of a record.
      max_bad_locations: number of locations that may be skipped.
    """

    shards: Sequence[Shard]
    read: Callable[[Location], Reading]
    features: tfds.features.FeaturesDict
    max_bad_locations: int


@contextlib.contextmanager
def _local(path: epath.Path) -> Iterator[str]:
    """The name of a local file that is copied to `path`: ArrayRecord cannot write to buckets."""
    if not files.in_bucket(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = epath.Path(folder) / path.name
        yield os.fspath(local)
        local.copy(path, overwrite=True)


def write_shard(
    path: epath.Path,
    results: Iterable[Reading | errors.BadFileError],
    features: tfds.features.FeaturesDict,
) -> Iterator[Outcome]:
    """Writes one file of records.

    Args:
      path: where.
      results: of `attempt` for each of its locations.
      features: of a record.

    Yields:
      The result of each location. The file is complete after the last one.

    Raises:
      errors.BuildError: if the records cannot be written.
    """
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    with _local(path) as file:
        with _write_errors():
            writer = array_record_module.ArrayRecordWriter(file, ARRAY_RECORD_OPTIONS)
        for result in results:
            if isinstance(result, errors.BadFileError):
                yield result
                continue
            digest = hashlib.sha256()
            classes = np.zeros((2, 256), np.int64)
            measures = result.measures
            for example in result.examples:
                serialized = serializer.serialize_example(features.encode_example(example))
                # TFDS gives the features in another order in each process.
                message = tf_example_pb2.Example.FromString(serialized)
                stored = message.SerializeToString(deterministic=True)
                digest.update(stored)
                pixels = np.bincount(example["labels"][example["season"]].ravel(), minlength=256)
                classes += np.stack([pixels, pixels > 0])
                measures += _measures(example)
                with _write_errors():
                    writer.write(stored)
            yield Written(
                len(result.examples),
                result.findings,
                digest.digest(),
                classes,
                measures,
                _place(result.examples[0]) if result.examples else None,
            )
        with _write_errors():
            writer.close()


def _place(example: Example) -> tuple[str, float, float]:
    """The CRS of a record and the coordinates of its middle."""
    a, b, c, d, e, f = example["transform"].tolist()
    row, column = (side / 2 for side in example["labels"].shape[-2:])
    return example["crs"], a * column + b * row + c, d * column + e * row + f


def _measures(example: Example) -> tuple[tuple[str, float], ...]:
    """How much brighter VV is than VH, if the record has both."""
    if "s1" not in example or example["s1"].shape[-1] != len(sensors.S1_BANDS):
        return ()
    decibels = [
        mean - 2 * std + 4 * std * float(example["s1"][..., i].mean()) / 255
        for i, (mean, std) in enumerate(map(sensors.BAND_STATISTICS.get, sensors.S1_BANDS))
    ]
    return ((VV_MINUS_VH, round(decibels[0] - decibels[1], 3)),)


def write_here(plan: Plan, num_workers: int) -> Iterator[tuple[Shard, Location, Outcome]]:
    """Writes all files of a dataset from this process.

    Args:
      plan: of the dataset.
      num_workers: processes that read.

    Yields:
      The locations of all files in order, each with its file and its result. The files are
      complete after the last one.

    Raises:
      errors.BuildError: if the records cannot be written.
    """
    locations = [location for shard in plan.shards for location in shard.locations]
    read = functools.partial(attempt, plan.read)
    results = parallel.map_in_order(read, locations, num_workers)
    # No progress bar where the output is not a terminal (disable=None).
    progress = tqdm.tqdm(
        results, total=len(locations), unit=" locations", disable=None, leave=False
    )
    with contextlib.closing(results), progress:
        read_results = iter(progress)
        for shard in plan.shards:
            outcomes = write_shard(
                shard.path, itertools.islice(read_results, len(shard.locations)), plan.features
            )
            for location, outcome in zip(shard.locations, outcomes, strict=True):
                yield shard, location, outcome
