"""The TFDS builder that all data sets share: it writes the records of each location in order."""

import contextlib
import functools
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import dataset_builder

from cromss_jax import blocks, files
from cromss_jax.legend import Legend
from data_prep import errors, report
from data_prep.errors import BadFileError
from data_prep.reading import grids
from data_prep.writing import records
from data_prep.writing.records import Example, Location, Outcome, Plan, Reading, Shard

# In dB. Of land and water, VV is some 7 dB brighter.
_SWAPPED = -1.0


def first_readable(
    read: Callable[[Location], Reading],
    locations: Sequence[Location],
    skipped: report.Report,
) -> Example:
    """The first record of the first location that can be read.

    Raises:
      errors.BuildError: if more than the allowed number of locations cannot be read, or none can.
    """
    for location in locations:
        result = records.attempt(read, location)
        if isinstance(result, BadFileError):
            skipped.skip(location.location_id, result)
        elif result.examples:
            return result.examples[0]
        else:
            skipped.add(result.findings)
    skipped.write_summary()
    why = f" ({skipped.why_skipped()})" if skipped.why_skipped() else ""
    raise errors.BuildError(
        f"none of the {len(locations)} locations can be used{why}; {skipped.path} and "
        f"{skipped.summary_path} list all reasons"
    )


def _block(location_id: str, written: records.Written, size: float) -> blocks.Block:
    """The block of the earth in which the middle of a location lies.

    Raises:
      errors.BuildError: if it does not say where it is.
    """
    crs, x, y = written.place
    if not crs:
        raise errors.BuildError(
            f"{location_id} does not say where it lies, so that it is in no block: leave "
            "--block_size out"
        )
    longitude, latitude = grids.degrees(crs, x, y)
    return blocks.block_of_centre((longitude, latitude, longitude, latitude), size)


class LocationBuilder(dataset_builder.FileReaderBuilder, skip_registration=True):
    """Writes the records of each location, in the order of the locations.

    A subclass has the name of the data set and a VERSION.
    """

    # Nothing is downloaded. Without this, TFDS needs another package to look for URLs.
    url_infos: Mapping[str, Any] = {}

    def __init__(
        self,
        *,
        data_dir: epath.Path,
        splits: Mapping[str, Sequence[Location]],
        read: Callable[[Location], Reading],
        features: tfds.features.FeaturesDict,
        metadata: dict[str, Any],
        location_bytes: int,
        num_workers: int,
        findings: report.Report,
        block_size: float = 0.0,
    ):
        """Describes a build.

        Args:
          data_dir: the folder of TFDS data sets.
          splits: the locations of each split, with an attribute `location_id`; picklable.
          read: a picklable function from a location to its records. It raises BadFileError.
          features: of a record.
          metadata: saved with the data set, to which `season_counts` (by split, the records of
            each location written, in order) and `num_bad_locations` are added.
          location_bytes: raw size of a location's records in memory.
          num_workers: processes that read.
          findings: where to report locations that cannot be read, and findings.
          block_size: see `Options`; adds `blocks` to the metadata, by split the number of the block
            of each location that has records.
        """
        self._splits = splits
        self._read = read
        self._features = features
        self._metadata = tfds.core.MetadataDict(
            metadata, season_counts={split: [] for split in splits}, num_bad_locations=0
        )
        self._block_size = block_size
        self._blocks: dict[str, list[blocks.Block]] = {split: [] for split in splits}
        self._locations_per_shard = max(1, records.SHARD_BYTES // location_bytes)
        self._write = functools.partial(records.write_here, num_workers=num_workers)
        self.report = findings
        self.report.class_names = Legend.from_dict(metadata["legend"]).names
        super().__init__(data_dir=data_dir, file_format="array_record")

    def build(
        self, write: Callable[[Plan], Iterator[tuple[Shard, Location, Outcome]]] | None = None
    ) -> None:
        """Builds the data set. A build that fails leaves no part of it behind.

        Args:
          write: writes the files, instead of `records.write_here`.

        Raises:
          errors.BuildError: if too many locations are skipped, or a split has no records.
        """
        self._write = write or self._write
        parent = self.data_path.parent
        try:
            with (
                tempfile.TemporaryDirectory() as download_dir,
                # TFDS prints that it downloads, which it does not.
                contextlib.redirect_stdout(io.StringIO()),
            ):
                self.download_and_prepare(download_dir=download_dir)
        except BaseException:
            # A bucket has no folders to rename: files are already in the final folder.
            if files.in_bucket(self.data_path) and self.data_path.exists():
                self.data_path.rmtree()
            raise
        finally:
            self.report.write_summary()
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=self._features,
            metadata=self._metadata,
            # The index of a record follows the order of the source.
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Writes the files to the folder that TFDS gives, and removes if this fails."""
        del dl_manager, download_config
        templates = {split: self._get_filename_template(split) for split in self._splits}
        shards = [
            shard
            for split, template in templates.items()
            for shard in self._shards_of(split, template)
        ]
        plan = Plan(shards, self._read, self._features, self.report.limit)
        lengths = {shard.path: 0 for shard in shards}
        # A run that is continued compares them: the records must be those that it began with.
        digests = {split: hashlib.sha256() for split in templates}
        with contextlib.closing(self._write(plan)) as written:
            for shard, location, outcome in written:
                self._note(shard.split, location, outcome)
                if not isinstance(outcome, BadFileError):
                    lengths[shard.path] += outcome.num_records
                    digests[shard.split].update(outcome.digest)
        self._check_polarisations()
        if self._block_size:
            present = sorted({block for found in self._blocks.values() for block in found})
            numbers = {block: number for number, block in enumerate(present)}
            self._metadata["blocks"] = {
                split: [numbers[block] for block in found] for split, found in self._blocks.items()
            }
        self._metadata["records_digest"] = {s: digest.hexdigest() for s, digest in digests.items()}
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

    def _check_polarisations(self) -> None:
        """Refuses data whose bands of Sentinel-1 are swapped.

        A single image of calm water or noise may be wrong about it.

        Raises:
          errors.BuildError: if VH is brighter than VV in most records.
        """
        values = self.report.measures(records.VV_MINUS_VH)
        if values and (middle := float(np.median(values))) < _SWAPPED:
            raise errors.BuildError(
                f"VH is brighter than VV, by {-middle:.1f} dB at the median of all records, which "
                "never is so: the bands are swapped, nothing was written. Describe them in the "
                "files, or name the files after their bands"
            )

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
        """Reports a location that was skipped, or counts its records.

        Raises:
          BuildError: if too many locations are bad, the split is left without records, or blocks
            are wanted of a location that does not say where it is.
        """
        if isinstance(outcome, BadFileError):
            self.report.skip(location.location_id, outcome)
            self._metadata["num_bad_locations"] = self.report.count
        else:
            self._count(split, location, outcome.num_records)
            if self._block_size and outcome.place:
                self._blocks[split].append(_block(location.location_id, outcome, self._block_size))
            self.report.add(outcome.findings)
            self.report.count_classes(split, outcome.num_records, outcome.classes)
            self.report.add_measures(outcome.measures)
        locations = self._splits[split]
        # After the last location: a split without records cannot be opened.
        if location is locations[-1] and not any(self._metadata["season_counts"][split]):
            why = f", {example}" if (example := self.report.why_skipped()) else ""
            raise errors.BuildError(
                f"split {split} is left without records: its {len(locations)} locations are bad "
                f"or have no labels{why}; nothing was written. Correct the files that "
                f"{self.report.path} and {self.report.summary_path} list"
            )

    def _count(self, split: str, location: Location, num_records: int) -> None:
        """Adds the number of records of a location to the metadata, if it has any.

        Training visits every location that the metadata counts, and draws one of its records.
        """
        del location
        if num_records:
            self._metadata["season_counts"][split].append(num_records)
