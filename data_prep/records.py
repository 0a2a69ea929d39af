"""What the builders share: parallel reading, setting bad locations aside, writing ArrayRecord."""

import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_module
from etils import epath
from tensorflow_datasets.core import dataset_builder, example_serializer
from tensorflow_datasets.proto import tf_example_pb2

from data_prep import parallel, sources

# One record a group: random access. On real tiles zstd:-1 takes 0.64 of the raw size and reads as
# fast as no compression; the default (zstd:3) takes 0.54 and reads at less than half the speed.
ARRAY_RECORD_OPTIONS = "group_size:1,zstd:-1"
# Raw size of the records of one file.
SHARD_BYTES = 512 << 20

Example = dict[str, Any]
# What a subclass of LocationBuilder reads as one; has an attribute `location_id`.
Location = Any


def array_feature(*shape: int, dtype: type = np.uint8) -> tfds.features.Tensor:
    """An array of a record, stored as its bytes."""
    # The default encoding takes a hundred times as long to read.
    encoding = tfds.features.Encoding.BYTES
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=encoding)


class BuildError(ValueError):
    """The dataset cannot be built; the message is for the user."""


class BadFileError(ValueError):
    """A file that makes its location unusable.

    Attributes:
      file: its path from the component on.
      reason: what is wrong with it.
    """

    def __init__(self, file: str, reason: str):
        super().__init__(file, reason)
        self.file = file
        self.reason = reason


class BadLocations:
    """Counts the locations set aside and writes each at once to a CSV file.

    Attributes:
      count: locations set aside so far.
      limit: how many may be.
      path: the CSV file: `location_id,file,reason`.
    """

    def __init__(self, path: epath.Path, limit: int):
        """Starts an empty report.

        Args:
          path: where; what an earlier build left there is replaced.
          limit: how many locations may be set aside.
        """
        self.path = path
        self.count = 0
        self.limit = limit
        self._first: list[str] = []
        self._text = io.StringIO()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write(["location_id", "file", "reason"])

    def add(self, location_id: str, bad: BadFileError) -> None:
        """Sets one location aside.

        Raises:
          BuildError: if that is one too many.
        """
        self.count += 1
        self._write([location_id, bad.file, bad.reason])
        if len(self._first) < 3:
            self._first.append(f"{bad.file}: {bad.reason}")
        if self.count > self.limit:
            raise BuildError(
                f"bad locations: {self.count}, --max_bad_locations={self.limit} allowed; "
                f"nothing was written. First: {'; '.join(self._first)}. Mend the files that "
                f"{self.path} lists, or raise --max_bad_locations to go on without them"
            )

    def _write(self, row: list[str]) -> None:
        csv.writer(self._text).writerow(row)
        # As a whole: nothing can be added to a file in a bucket.
        self.path.write_bytes(self._text.getvalue().encode())


# What became of a location: how many records it has, or why none.
Outcome = int | BadFileError


def attempt(
    read: Callable[[Location], list[Example]], location: Location
) -> list[Example] | BadFileError:
    """`read(location)`, or the reason why it cannot be read."""
    try:
        return read(location)
    except BadFileError as bad:
        return bad


def first_readable(
    read: Callable[[Location], list[Example]],
    locations: Sequence[Location],
    bad_locations: BadLocations,
) -> Example:
    """The first record of the first location that can be read.

    Raises:
      BuildError: if more than the allowed number of locations, or all, are bad.
    """
    for location in locations:
        result = attempt(read, location)
        if not isinstance(result, BadFileError):
            return result[0]
        bad_locations.add(location.location_id, result)
    raise BuildError(
        f"none of the {len(locations)} locations can be read; {bad_locations.path} lists why"
    )


@contextlib.contextmanager
def _write_errors() -> Iterator[None]:
    """Tells what ArrayRecord reports, a full disk for one."""
    try:
        yield
    except RuntimeError as error:
        raise BuildError(f"cannot write the records: {error}") from error


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records.

    Attributes:
      split: to which it belongs.
      path: where it is written.
      locations: whose records it holds, in order.
    """

    split: str
    path: epath.Path
    locations: Sequence[Location]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What it takes to write the files of a dataset, in whatever process. Picklable.

    Attributes:
      shards: the files, in order.
      read: a function from a location to its records; raises BadFileError.
      features: of a record.
      max_bad_locations: how many locations may be set aside.
    """

    shards: Sequence[Shard]
    read: Callable[[Location], list[Example]]
    features: tfds.features.FeaturesDict
    max_bad_locations: int


@contextlib.contextmanager
def _local(path: epath.Path) -> Iterator[str]:
    """The name of a local file, which ends up at `path`: ArrayRecord knows no buckets."""
    if not sources.is_remote(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = epath.Path(folder) / path.name
        yield os.fspath(local)
        local.copy(path, overwrite=True)


def write_shard(
    path: epath.Path,
    results: Iterable[list[Example] | BadFileError],
    features: tfds.features.FeaturesDict,
) -> Iterator[Outcome]:
    """Writes one file of records.

    Args:
      path: where.
      results: of `attempt` for each of its locations.
      features: of a record.

    Yields:
      What became of each location. The file is whole once there are no more.

    Raises:
      BuildError: if the records cannot be written.
    """
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    with _local(path) as file:
        with _write_errors():
            writer = array_record_module.ArrayRecordWriter(file, ARRAY_RECORD_OPTIONS)
        for result in results:
            if isinstance(result, BadFileError):
                yield result
                continue
            for example in result:
                serialized = serializer.serialize_example(features.encode_example(example))
                # TFDS leaves the order of the features to chance, another in each process.
                message = tf_example_pb2.Example.FromString(serialized)
                with _write_errors():
                    writer.write(message.SerializeToString(deterministic=True))
            yield len(result)
        with _write_errors():
            writer.close()


def write_here(plan: Plan, num_workers: int) -> Iterator[tuple[Shard, Location, Outcome]]:
    """Writes all files of a dataset from this process.

    Args:
      plan: of the dataset.
      num_workers: processes that read.

    Yields:
      The locations of all files in order, each with its file and what became of it. The files are
      whole once there are no more.

    Raises:
      BuildError: if the records cannot be written.
    """
    locations = [location for shard in plan.shards for location in shard.locations]
    read = functools.partial(attempt, plan.read)
    results = parallel.map_in_order(read, locations, num_workers)
    # No bar where nobody looks at it (disable=None).
    progress = tqdm.tqdm(
        results, total=len(locations), unit=" locations", disable=None, leave=False
    )
    with contextlib.closing(results), progress:
        shown = iter(progress)
        for shard in plan.shards:
            outcomes = write_shard(
                shard.path, itertools.islice(shown, len(shard.locations)), plan.features
            )
            for location, outcome in zip(shard.locations, outcomes, strict=True):
                yield shard, location, outcome


class LocationBuilder(dataset_builder.FileReaderBuilder, skip_registration=True):
    """Writes the records of each location in the order of the locations.

    A subclass has the name of the dataset and a VERSION.
    """

    # Nothing is downloaded. Looking for a list of downloads would need a package we do without.
    url_infos: Mapping[str, Any] = {}

    def __init__(
        self,
        *,
        data_dir: epath.Path,
        splits: Mapping[str, Sequence[Location]],
        read: Callable[[Location], list[Example]],
        features: tfds.features.FeaturesDict,
        metadata: dict[str, Any],
        location_bytes: int,
        num_workers: int,
        bad_locations: BadLocations,
    ):
        """Describes a build.

        Args:
          data_dir: where TFDS datasets live.
          splits: the locations of each split, with an attribute `location_id`; picklable.
          read: a picklable function from a location to its records; raises BadFileError.
          features: of a record.
          metadata: saved with the dataset, to which `season_counts` (by split, the records of
            each location written, in order) and `num_bad_locations` are added.
          location_bytes: raw size of a location's records in memory.
          num_workers: processes that read.
          bad_locations: where to report locations that cannot be read.
        """
        self._splits = splits
        self._read = read
        self._features = features
        self._metadata = tfds.core.MetadataDict(
            metadata, season_counts={split: [] for split in splits}, num_bad_locations=0
        )
        self._locations_per_shard = max(1, SHARD_BYTES // location_bytes)
        self._write = functools.partial(write_here, num_workers=num_workers)
        self.bad_locations = bad_locations
        super().__init__(data_dir=data_dir, file_format="array_record")

    def build(
        self, write: Callable[[Plan], Iterator[tuple[Shard, Location, Outcome]]] | None = None
    ) -> None:
        """Builds the dataset; a failed build leaves nothing of it behind.

        Args:
          write: what writes the files in place of `write_here`.

        Raises:
          BuildError: if too many locations are bad, or a split is left without records.
        """
        self._write = write or self._write
        parent = self.data_path.parent
        try:
            with (
                tempfile.TemporaryDirectory() as download_dir,
                # TFDS announces a download, which this is not.
                contextlib.redirect_stdout(io.StringIO()),
            ):
                self.download_and_prepare(download_dir=download_dir)
        except BaseException:
            # A bucket has no folders to rename: the files are moved one by one.
            if sources.is_remote(self.data_path) and self.data_path.exists():
                self.data_path.rmtree()
            raise
        finally:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=self._features,
            metadata=self._metadata,
            # The index of a record is its place in the source.
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Writes the files where TFDS says, a folder that it removes if this fails."""
        del dl_manager, download_config
        templates = {split: self._get_filename_template(split) for split in self._splits}
        shards = [
            shard
            for split, template in templates.items()
            for shard in self._shards_of(split, template)
        ]
        plan = Plan(shards, self._read, self._features, self.bad_locations.limit)
        lengths = {shard.path: 0 for shard in shards}
        with contextlib.closing(self._write(plan)) as written:
            for shard, location, outcome in written:
                self._note(shard.split, location, outcome)
                if not isinstance(outcome, BadFileError):
                    lengths[shard.path] += outcome
        infos = []
        for split, template in templates.items():
            paths = [shard.path for shard in shards if shard.split == split]
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[lengths[path] for path in paths],
                    num_bytes=sum(path.stat().length for path in paths),
                    filename_template=template,
                )
            )
        self.info.set_splits(tfds.core.SplitDict(infos))

    def _shards_of(self, split: str, template: tfds.core.ShardedFileTemplate) -> list[Shard]:
        locations, size = self._splits[split], self._locations_per_shard
        starts = range(0, len(locations), size)
        return [
            Shard(
                split,
                template.sharded_filepath(shard_index=index, num_shards=len(starts)),
                locations[start : start + size],
            )
            for index, start in enumerate(starts)
        ]

    def _note(self, split: str, location: Location, outcome: Outcome) -> None:
        """Reports a location that was set aside, counts the records of the others.

        Raises:
          BuildError: if too many locations are bad, or the split is left without records.
        """
        if isinstance(outcome, BadFileError):
            self.bad_locations.add(location.location_id, outcome)
            self._metadata["num_bad_locations"] = self.bad_locations.count
        else:
            self._count(split, location, outcome)
        locations = self._splits[split]
        # The last: what reads the dataset could not open a split without records.
        if location is locations[-1] and not any(self._metadata["season_counts"][split]):
            raise BuildError(
                f"split {split} is left without records: its {len(locations)} locations are bad "
                "or have no labels; nothing was written. Mend the files that "
                f"{self.bad_locations.path} lists"
            )

    def _count(self, split: str, location: Location, num_records: int) -> None:
        """Notes in the metadata how many records a location was given."""
        del location
        self._metadata["season_counts"][split].append(num_records)
