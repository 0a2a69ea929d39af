"""What the builders share: parallel reading, setting bad locations aside, writing ArrayRecord."""

import contextlib
import csv
import functools
import io
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from data_prep import parallel

# One record a group: random access. On real tiles zstd:-1 takes 0.64 of the raw size and reads as
# fast as no compression; the default (zstd:3) takes 0.54 and reads at less than half the speed.
ARRAY_RECORD_OPTIONS = "group_size:1,zstd:-1"
# Raw size of the records of one file. TFDS keeps a file's examples in memory while it writes them.
SHARD_BYTES = 512 << 20

Example = dict[str, Any]


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
      path: the CSV file: `location_id,file,reason`.
    """

    def __init__(self, path: pathlib.Path, limit: int):
        """Starts an empty report.

        Args:
          path: where; what an earlier build left there is replaced.
          limit: how many locations may be set aside.
        """
        self.path = path
        self.count = 0
        self._limit = limit
        self._first: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write(["location_id", "file", "reason"], "w")

    def add(self, location_id: str, bad: BadFileError) -> None:
        """Sets one location aside.

        Raises:
          BuildError: if that is one too many.
        """
        self.count += 1
        self._write([location_id, bad.file, bad.reason], "a")
        if len(self._first) < 3:
            self._first.append(f"{bad.file}: {bad.reason}")
        if self.count > self._limit:
            raise BuildError(
                f"bad locations: {self.count}, --max_bad_locations={self._limit} allowed; "
                f"nothing was written. First: {'; '.join(self._first)}. Mend the files that "
                f"{self.path} lists, or raise --max_bad_locations to go on without them"
            )

    def _write(self, row: list[str], mode: str) -> None:
        with self.path.open(mode, newline="") as file:
            csv.writer(file).writerow(row)


def attempt(
    read: Callable[[Any], list[tuple[int, Example]]], location: Any
) -> list[tuple[int, Example]] | BadFileError:
    """`read(location)`, or the reason why it cannot be read."""
    try:
        return read(location)
    except BadFileError as bad:
        return bad


def first_readable(
    read: Callable[[Any], list[tuple[int, Example]]],
    locations: Sequence[Any],
    bad_locations: BadLocations,
) -> Example:
    """The first record of the first location that can be read.

    Raises:
      BuildError: if more than the allowed number of locations, or all, are bad.
    """
    for location in locations:
        result = attempt(read, location)
        if not isinstance(result, BadFileError):
            return result[0][1]
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


class _ArrayRecordWriter(tfds.core.writer.ExampleWriter):
    """TFDS's own, with our compression, and the same bytes for the same records."""

    def write(self, path: Any, examples: Iterable[tuple[int, bytes]]) -> None:
        with _write_errors():
            writer = array_record_module.ArrayRecordWriter(str(path), ARRAY_RECORD_OPTIONS)
        for _, serialized in examples:
            # TFDS leaves the order of the features to chance, another in each process.
            example = tf_example_pb2.Example.FromString(serialized)
            with _write_errors():
                writer.write(example.SerializeToString(deterministic=True))
        with _write_errors():
            writer.close()


class LocationBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Writes the records of each location in the order of the locations.

    Based on TFDS's shard builder: its example shuffler would hold an unshuffled dataset in memory.
    A subclass has the name of the dataset and a VERSION.
    """

    # Nothing is downloaded. Looking for a list of downloads would need a package we do without.
    url_infos: Mapping[str, Any] = {}

    def __init__(
        self,
        *,
        data_dir: pathlib.Path,
        splits: Mapping[str, Sequence[Any]],
        read: Callable[[Any], list[tuple[int, Example]]],
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
        self._num_workers = num_workers
        self.bad_locations = bad_locations
        super().__init__(data_dir=data_dir, file_format="array_record")

    def build(self) -> None:
        """Builds the dataset; a failed build leaves nothing of it behind.

        Raises:
          BuildError: if too many locations are bad, or a split is left without records.
        """
        parent = pathlib.Path(self.data_dir).parent
        try:
            with (
                contextlib.ExitStack() as self._open_readers,
                tempfile.TemporaryDirectory() as download_dir,
                # TFDS announces a download, which this is not.
                contextlib.redirect_stdout(io.StringIO()),
            ):
                self.download_and_prepare(download_dir=download_dir)
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

    def _example_writer(self) -> tfds.core.writer.ExampleWriter:
        return _ArrayRecordWriter(self.info.file_format)

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable]]:
        del dl_manager
        shards = {}
        for split, locations in self._splits.items():
            results = self._read_all(split, locations)
            self._open_readers.enter_context(contextlib.closing(results))
            shards[split] = [
                functools.partial(self._take, results)
                for _ in range(0, len(locations), self._locations_per_shard)
            ]
        return shards

    def _take(self, results: Iterator[list[tuple[int, Example]]]) -> Iterator[tuple[int, Example]]:
        """The records of the next file."""
        for records in itertools.islice(results, self._locations_per_shard):
            yield from records

    def _read_all(
        self, split: str, locations: Sequence[Any]
    ) -> Iterator[list[tuple[int, Example]]]:
        """Yields the records of each location, none for those set aside."""
        read = functools.partial(attempt, self._read)
        results = parallel.map_in_order(read, locations, self._num_workers)
        # No bar where nobody looks at it (disable=None).
        progress = tqdm.tqdm(locations, unit=" locations", disable=None, leave=False)
        with contextlib.closing(results), progress:
            for location, result in zip(progress, results, strict=True):
                if isinstance(result, BadFileError):
                    self.bad_locations.add(location.location_id, result)
                    self._metadata["num_bad_locations"] = self.bad_locations.count
                    result = []
                else:
                    self._count(split, location, len(result))
                # The last: what reads the dataset could not open a split without records.
                if location is locations[-1] and not any(self._metadata["season_counts"][split]):
                    raise BuildError(
                        f"split {split} is left without records: its {len(locations)} locations "
                        "are bad or have no labels; nothing was written. Mend the files that "
                        f"{self.bad_locations.path} lists"
                    )
                yield result

    def _count(self, split: str, location: Any, num_records: int) -> None:
        """Notes in the metadata how many records a location was given."""
        del location
        self._metadata["season_counts"][split].append(num_records)
