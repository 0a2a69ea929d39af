"""Tar files of Zarr stores, a folder for each modality: which stores are one sample.

```
train/S2L1C/majortom_shard_000001.tar    with KEY.zarr.zip for each sample
train/LULC/majortom_shard_000001.tar     the same keys
```

Shards are read in place. Those of one name belong together, and in them the stores of one key.
"""

import dataclasses
import os
import pathlib
import tarfile
from collections.abc import Sequence

from data_prep import errors
from data_prep.finding import sources
from data_prep.report import Finding

_SUFFIX = ".zarr.zip"


@dataclasses.dataclass(frozen=True)
class Sample:
    """The stores of a sample.

    Attributes:
      location_id: its key.
      stores: by folder, such as S2L1C: the path of the shard, and where in it the store begins, and
        its length in bytes.
    """

    location_id: str
    stores: dict[str, tuple[str, int, int]]

    @property
    def shard(self) -> str:
        """The name of its shards."""
        path, _, _ = next(iter(self.stores.values()))
        return path.rpartition("/")[2]

    def name(self, folder: str) -> str:
        """The path of a store, for errors."""
        return f"{self.stores[folder][0]}/{self.location_id}{_SUFFIX}"

    def read(self, folder: str) -> bytes:
        """The bytes of a store.

        Raises:
          errors.BadFileError: if the shard cannot be read.
        """
        path, offset, size = self.stores[folder]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise errors.BadFileError(self.name(folder), f"unreadable: {error}") from error
        if len(data) < size:
            raise errors.BadFileError(self.name(folder), "cut short")
        return data


def _members(path: pathlib.Path) -> dict[str, tuple[str, int, int]]:
    """The stores of a shard by key.

    Raises:
      errors.BuildError: if it is damaged, or has a key twice.
    """
    found: dict[str, tuple[str, int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key = member.name.rpartition("/")[2]
                if not member.isfile() or not key.endswith(_SUFFIX):
                    continue
                key = key.removesuffix(_SUFFIX)
                if key in found:
                    raise errors.BuildError(
                        f"{path} holds {key}{_SUFFIX} twice: download the shard again"
                    )
                found[key] = (os.fspath(path), member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise errors.BuildError(
            f"{path} is no tar file, or cut short: {error}; download the shard again"
        ) from error
    return found


def find(
    folder: pathlib.Path, needed: Sequence[str], either: Sequence[str], also: Sequence[str]
) -> tuple[list[Sample], list[Finding]]:
    """Finds the samples of a split.

    Args:
      folder: of the split.
      needed: folders of modalities that each sample must be in.
      either: folders of which each sample must be in one; may be empty.
      also: folders that are read where a sample is in them.

    Returns:
      The samples in the order of the shards; and what was left out.

    Raises:
      errors.BuildError: if a folder or a shard is missing, or a shard is damaged.
    """
    names = {
        kind: sorted(path.name for path in (folder / kind).glob("*.tar"))
        for kind in (*needed, *either, *also)
    }
    missing = [kind for kind in needed if not names[kind]]
    if either and not any(names[kind] for kind in either):
        missing.append(" or ".join(either))
    if missing and any(folder.glob("*/*_seasonal_data_*.zarr.zip")):
        raise errors.BuildError(
            f"{folder} holds the form of SSL4EO-S12 v1.1 without labels "
            "(*_seasonal_data_*.zarr.zip): download the other one, with shards (*.tar) in LULC, "
            "S2L1C and the others"
        )
    if missing:
        raise errors.BuildError(
            f"{folder} has no shards (*.tar) in {sources.listed(missing)}: download them, or leave "
            "the modality out with --modalities"
        )
    samples: list[Sample] = []
    findings: list[Finding] = []
    for shard in sorted(set().union(*names.values())):
        kinds = [kind for kind in names if shard in names[kind]]
        lacking = [kind for kind in needed if kind not in kinds]
        if either and not set(either) & set(kinds):
            lacking.append(" or ".join(either))
        if lacking:
            detail = f"there is no {lacking[0]}/{shard}: download it, too"
            findings.append(Finding("not read", f"{kinds[0]}/{shard}", detail))
            continue
        stores = {kind: _members(folder / kind / shard) for kind in kinds}
        found, unpaired = _match(shard, stores, needed, either)
        samples += found
        findings += unpaired
    if not samples:
        raise errors.BuildError(
            f"{folder} has no sample of which all of {', '.join(needed)} are there: are the "
            "shards of all folders the same ones?"
        )
    return samples, findings


def _match(
    shard: str,
    stores: dict[str, dict[str, tuple[str, int, int]]],
    needed: Sequence[str],
    either: Sequence[str],
) -> tuple[list[Sample], list[Finding]]:
    """The samples of shards of one name, and those that are not complete."""
    samples, findings = [], []
    keys = dict.fromkeys(key for kind in stores for key in stores[kind])
    for key in keys:
        own = {kind: stores[kind][key] for kind in stores if key in stores[kind]}
        lacking = [kind for kind in needed if kind not in own]
        if either and not set(either) & set(own):
            lacking.append(" or ".join(either))
        if lacking:
            findings.append(Finding("not paired", f"{shard}/{key}", f"not in {lacking[0]}"))
        else:
            samples.append(Sample(key, own))
    orders = {kind: [key for key in stores[kind]] for kind in stores}
    first = next(iter(orders))
    for kind, order in orders.items():
        if order != orders[first]:
            detail = f"other keys, or in another order, than {first}/{shard}; matched by key"
            findings.append(Finding("shards differ", f"{kind}/{shard}", detail))
    return samples, findings
