"""The granules of a location of SSL4EO-S12 + NoL: their dates, their band files, their pairs."""

import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence

from data_prep import errors
from data_prep.datasets.nol_table import TABLE, Location
from data_prep.finding import component_tree
from data_prep.options import Options
from data_prep.reading import bands, geotiff, pairing
from data_prep.report import Finding

# Files beside the bands that are part of the data set.
_METADATA = re.compile(r"metadata\.json|(?!.*\.aux\.xml).*\.xml", re.IGNORECASE)


def acquisition_time(granule: str) -> datetime.datetime:
    """The first date in a granule's name (UTC).

    Raises:
      ValueError: if there is none.
    """
    match = re.search(r"\d{8}T\d{6}", granule)
    if match is None:
        raise ValueError(f"no date (YYYYMMDDThhmmss) in the name {granule}")
    return datetime.datetime.strptime(match[0], "%Y%m%dT%H%M%S")


@dataclasses.dataclass(frozen=True)
class Granule:
    """The band files of a granule.

    Attributes:
      folder: its path.
      names: the file of each band.
      images: the bands.
      metadata: texts of metadata files.
      findings: files that were not read.
    """

    folder: str
    names: Mapping[str, str]
    images: Mapping[str, geotiff.Image]
    metadata: tuple[str, ...]
    findings: tuple[Finding, ...]

    def path(self, band: str) -> str:
        """The path of a band's file."""
        return f"{self.folder}/{self.names[band]}"


def band_of_file(name: str) -> str | None:
    """The band that a file name stands for, in any case and as B2 or B02; None for other files."""
    match = re.fullmatch(r"(VV|VH|B0?([1-9]\d?A?))\.TIFF?", name.upper())
    if match is None:
        return None
    return f"B{match[2]}" if match[2] else match[1]


def read_granule(
    source: component_tree.ComponentTree, folder: str, band_names: Sequence[str]
) -> Granule:
    """Reads the bands of a granule, and finds out which of its files are no bands.

    Raises:
      errors.BadFileError: if a band is missing or damaged.
    """
    files = source.files(folder)
    names: dict[str, str] = {}
    metadata, unread = [], []
    # `B2.tif` comes before `B2.TIF` and `B02.tif`, should there be several.
    for name in sorted(files, key=lambda name: (band_of_file(name) != name[:-4], name)):
        band = band_of_file(name)
        if band in band_names and band not in names:
            names[band] = name
        elif _METADATA.fullmatch(name):
            metadata.append(name)
        else:
            unread.append(name)
    images = {}
    for band in band_names:
        if band not in names:
            similar = [name for name in unread if name.upper().startswith(f"{band}.")]
            reason = f"missing, found {', '.join(similar)}" if similar else "missing"
            raise errors.BadFileError(f"{folder}/{band}.tif", reason)
        images[band] = bands.read_band(source, f"{folder}/{names[band]}")
    texts = [source.read(f"{folder}/{name}").decode(errors="replace") for name in metadata]
    found = tuple(Finding("not read", f"{folder}/{name}", "no band") for name in unread)
    return Granule(folder, names, images, tuple(texts), found)


def pair_granules(
    location: Location, source: component_tree.ComponentTree, options: Options
) -> tuple[list[tuple[str, str]], tuple[Finding, ...]]:
    """(S1 granule, S2 granule) of each season of the table, by date, and what was not used.

    Without S1 its granules are "". Labels are those of the S2 granule, also without its images.
    """
    s1_folder = f"s1/{location.location_id}"
    s1_granules = source.folders(s1_folder)
    if not location.granules:
        raise errors.BadFileError(TABLE, "no season listed for this location")
    if len(set(location.granules)) < len(location.granules):
        raise errors.BadFileError(TABLE, "a season of this location is listed twice")
    if "s1" not in options.modalities:
        s1_granules = list(location.granules)
    if len(s1_granules) < len(location.granules):
        raise errors.BadFileError(
            s1_folder,
            f"{len(s1_granules)} S1 granules for the {len(location.granules)} seasons in {TABLE}",
        )
    dated = []
    for folder, granules in ((s1_folder, s1_granules), (TABLE, location.granules)):
        try:
            dated.append(sorted((acquisition_time(granule), granule) for granule in granules))
        except ValueError as error:
            raise errors.BadFileError(folder, str(error)) from error
    s1, s2 = dated
    nearest = pairing.nearest([time for time, _ in s2], [time for time, _ in s1], options.max_days)
    for (time, granule), index in zip(s2, nearest, strict=True):
        if index is None:
            days = min(pairing.days_between(time, other) for other, _ in s1)
            raise errors.BadFileError(
                s1_folder,
                f"no S1 granule of its own within {options.max_days:g} days of {granule}, the "
                f"nearest is {days:.0f} days away: raise --max_days to pair them",
            )
    unused = [granule for i, (_, granule) in enumerate(s1) if i not in nearest]
    found = [Finding("not paired", f"{s1_folder}/{granule}", "no season") for granule in unused]
    has_s1 = "s1" in options.modalities
    other = set(source.folders(f"s2c/{location.location_id}")) - set(location.granules)
    found += [
        Finding("not read", f"s2c/{location.location_id}/{granule}", f"not in {TABLE}")
        for granule in sorted(other)
    ]
    pairs = [
        (s1[i][1] if has_s1 else "", granule) for i, (_, granule) in zip(nearest, s2, strict=True)
    ]
    return pairs, tuple(found)
