"""Labels that an audit found wrong, replaced or ignored while a data set is built.

The maps of `cromss_jax.audit` say for each date of each location what the labels were
(`given.tif`), how probably each is wrong (`wrong_probability.tif`), and what it should be
(`suggested.tif`).
"""

import dataclasses
import functools
import os
from collections.abc import Callable

import numpy as np

from cromss_jax import files
from cromss_jax.sensors import IGNORE_LABEL
from data_prep import errors
from data_prep.options import Cleaning
from data_prep.reading import proj  # noqa: F401 - chooses the database of reference systems
from data_prep.report import Finding
from data_prep.writing.records import Location, Reading

# After `proj`.
import rasterio  # isort: skip
import rasterio.errors  # isort: skip


def check(cleaning: Cleaning) -> None:
    """Refuses a folder that is not of a finished audit with maps.

    Raises:
      errors.BuildError: naming what is missing.
    """
    folder = files.absolute(cleaning.audit)
    for name in ("report.json", "maps"):
        if not (folder / name).exists():
            raise errors.BuildError(
                f"--{cleaning.how}_labels={cleaning.audit}: {folder / name} is missing; give the "
                "--output of a finished cromss_jax.audit of a data set, with maps"
            )


def cleaned(
    read: Callable[[Location], Reading], cleaning: Cleaning | None
) -> Callable[[Location], Reading]:
    """The function that reads a location, and cleans its labels if asked; picklable."""
    return functools.partial(_read_cleaned, read=read, cleaning=cleaning) if cleaning else read


def _read_cleaned(
    location: Location, *, read: Callable[[Location], Reading], cleaning: Cleaning
) -> Reading:
    """What was read of a location, with other labels.

    Raises:
      errors.BadFileError: if the audit is of other labels.
    """
    reading = read(location)
    by_name: dict[str, np.ndarray] = {}
    measures, findings = [], []
    for example in reading.examples:
        name, season = example["location_id"], int(example["season"])
        folder = files.absolute(cleaning.audit) / "maps" / name
        if name not in by_name:
            by_name[name] = example["labels"].copy()
            if not folder.is_dir():
                findings.append(Finding("not audited", os.fspath(folder), "labels are kept"))
        if folder.is_dir():
            share = _clean(by_name[name][season], os.fspath(folder / f"season_{season}"), cleaning)
            measures.append((f"percent of labels {cleaning.past}", 100 * share))
    examples = [{**e, "labels": by_name[e["location_id"]]} for e in reading.examples]
    return dataclasses.replace(
        reading,
        examples=examples,
        findings=(*reading.findings, *findings),
        measures=(*reading.measures, *measures),
    )


def _clean(labels: np.ndarray, folder: str, cleaning: Cleaning) -> float:
    """Changes the labels [T, T] of a date in place; returns the share that was changed."""
    given, percent, suggested = (
        _read_map(os.path.join(folder, f"{name}.tif"), labels.shape)
        for name in ("given", "wrong_probability", "suggested")
    )
    differ = int((given != labels).sum())
    if differ:
        raise errors.BadFileError(
            os.path.join(folder, "given.tif"),
            f"{differ} of {labels.size} labels differ from those that were audited: give the audit "
            "of the data set that these files build",
        )
    known = labels != IGNORE_LABEL
    changed = known & (percent >= round(100 * cleaning.above)) & (suggested != labels)
    labels[changed] = suggested[changed] if cleaning.how == "replace" else IGNORE_LABEL
    return float(changed.sum() / max(known.sum(), 1))


def _read_map(path: str, shape: tuple[int, int]) -> np.ndarray:
    try:
        with rasterio.open(path) as file:
            pixels = file.read(1)
    except rasterio.errors.RasterioIOError as error:
        raise errors.BadFileError(path, f"cannot be read ({error}): audit again") from error
    if pixels.shape != shape:
        raise errors.BadFileError(
            path,
            f"has {pixels.shape[0]} x {pixels.shape[1]} pixels, the labels {shape[0]} x "
            f"{shape[1]}: give the audit of the data set that these files build",
        )
    return pixels
