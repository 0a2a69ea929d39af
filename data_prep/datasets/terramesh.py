"""TerraMesh and SSL4EO-S12 v1.1: shards of Zarr stores with LULC as noisy labels."""

import functools
import os

import tensorflow_datasets as tfds
from etils import epath

from cromss_jax import files, presets
from data_prep import report
from data_prep.datasets import zarr_samples, zarr_shards
from data_prep.finding import sources
from data_prep.options import DEFAULT, Options
from data_prep.reading import zarr_stores
from data_prep.writing import builder, cleaning

# 0 is nodata, 8 is cloud.
LULC = presets.ESRI.with_values({1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6, 9: 7}, ignored=(0, 8))
_SPLITS = ("train", "val")


class ZarrBuilder(builder.LocationBuilder, skip_registration=True):
    """A data set of shards of Zarr stores: a record for each date of each sample."""

    def __init__(
        self,
        *,
        source_dir: str | os.PathLike,
        data_dir: str | os.PathLike,
        num_workers: int = 1,
        max_bad_locations: int = 0,
        ignore_clouds: bool = False,
        options: Options = DEFAULT,
    ):
        """Finds the shards. The first sample gives the tile size and the number of dates.

        Args:
          source_dir: with folders train and val, or one of them.
          data_dir: the folder of TFDS data sets.
          num_workers: processes that read.
          max_bad_locations: number of samples that may be skipped.
          ignore_clouds: whether clouds and their shadows have no label.
          options: see `Options`.

        Raises:
          errors.BuildError: if shards are missing or damaged, or too many samples are.
        """
        zarr_stores.check_installed()
        data_dir = files.absolute(data_dir)
        found, unread = self._find(files.absolute(source_dir), options)
        legend = options.legend or LULC
        band_list = options.described_bands(is_native=False)
        read = functools.partial(
            zarr_samples.read_sample,
            band_list=band_list,
            legend=legend,
            ignore_clouds=ignore_clouds,
            options=options,
        )
        example = builder.first_readable(
            functools.partial(read, tile_size=0, max_seasons=0),
            [sample for split in found.values() for sample in split],
            report.Report(data_dir, self.name, max_bad_locations),
        )
        findings = report.Report(data_dir, self.name, max_bad_locations)
        findings.add(unread)
        max_seasons, tile_size = example["labels"].shape[:2]
        super().__init__(
            data_dir=data_dir,
            splits=found,
            read=cleaning.cleaned(
                functools.partial(read, tile_size=tile_size, max_seasons=max_seasons),
                options.cleaning,
            ),
            features=zarr_samples.features(tile_size, max_seasons, band_list),
            metadata={
                "tile_size": tile_size,
                "max_seasons": max_seasons,
                "has_truth": False,
                **options.metadata(legend, band_list, f"{self.name} in {source_dir}"),
                "ignore_clouds": ignore_clouds,
            },
            location_bytes=max_seasons * tile_size**2 * (len(band_list) + max_seasons),
            num_workers=num_workers,
            findings=findings,
            block_size=options.block_size,
        )

    def _find(
        self, source_dir: epath.Path, options: Options
    ) -> tuple[dict[str, list[zarr_shards.Sample]], list[report.Finding]]:
        """The samples of each split, and what of the shards is not read."""
        if files.in_bucket(source_dir):
            raise sources.SourceError(
                f"{source_dir} is in a bucket, and shards cannot be read there: give the path "
                "under which the bucket is mounted"
            )
        folders = {split: source_dir / split for split in _SPLITS}
        folders = {split: folder for split, folder in folders.items() if folder.is_dir()}
        if not folders:
            raise sources.SourceError(
                f"{source_dir} has no folder train or val: these hold a folder for each modality, "
                "such as train/S2L1C/*.tar"
            )
        samples, unread = {}, []
        needed = ["LULC"] + ([f"S2{options.s2_level}"] if "s2" in options.modalities else [])
        either = zarr_samples.FOLDERS["s1"]("") if "s1" in options.modalities else ()
        also = ["S2L1C"] if options.s2_level == "L2A" and "s2" in options.modalities else []
        known: dict[str, str] = {}
        for split, folder in folders.items():
            found, findings = zarr_shards.find(folder, needed, either, also)
            unread += findings
            samples[split] = []
            for sample in found:
                shard = f"{split}/{sample.shard}"
                first = known.setdefault(sample.location_id, shard)
                if first is shard:
                    samples[split].append(sample)
                else:
                    name = f"{shard}/{sample.location_id}"
                    unread.append(report.Finding("found twice", name, f"also in {first}"))
        return {split: found for split, found in samples.items() if found}, unread


class Terramesh(ZarrBuilder):
    """TerraMesh: Sentinel-1 and 2 of one date, noisy LULC labels of 8 classes."""

    VERSION = tfds.core.Version("1.0.0")


class Ssl4eoS12V11(ZarrBuilder):
    """SSL4EO-S12 v1.1: four seasons of Sentinel-1 and 2, noisy LULC labels of 8 classes."""

    name = "ssl4eo_s12_v1_1"
    VERSION = tfds.core.Version("1.0.0")
