"""Which files belong together: tiles of a Sentinel-1, a Sentinel-2 and a label file each."""

import collections
import dataclasses
import datetime
import re
from collections.abc import Iterable, Mapping, Sequence

from data_prep.datasets.tile_layouts import Layout, TileFile
from data_prep.reading import pairing
from data_prep.report import Finding

_GEOTIFF = re.compile(r".*\.tiff?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile, or the files of a location that cannot form one.

    Attributes:
      location_id: its name, unique in its split.
      paths: of its file of each kind (`Layout.paths`); empty if there is a fault.
      fault: the file, and the reason why it cannot be used; empty if there is none.
      size: height and width in pixels, 0 where unknown.
    """

    location_id: str
    paths: Mapping[str, str]
    fault: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)


def sort_files(paths: Iterable[str], layout: Layout) -> tuple[dict[str, list[TileFile]], list[str]]:
    """Recognises the files of a data set.

    Returns:
      The files of each split, and the paths of files that are no part of a tile.
    """
    found: dict[str, list[TileFile]] = collections.defaultdict(list)
    unread = []
    for path in paths:
        file = layout.recognise(path)
        if file is None or file.kind not in layout.paths:
            unread.append(path)
        else:
            found[file.split].append(file)
    # Another data set has images with the same names: its folders hold other labels.
    for split, files in found.items():
        roots = {file.root for file in files if file.kind == "labels"}
        if roots:
            unread += [file.path for file in files if file.root not in roots]
            found[split] = [file for file in files if file.root in roots]
    return dict(found), sorted(unread)


def missing_folders(files: Mapping[str, Sequence[TileFile]], layout: Layout) -> list[str]:
    """The usual folders of files that were not found, in splits that must exist or are begun."""
    missing = []
    for split in layout.splits:
        kinds = {file.kind for file in files.get(split, ())}
        if split in layout.optional_splits and not kinds:
            continue
        missing += [folder for kind, folder in layout.folders(split).items() if kind not in kinds]
    return missing


def find_tiles(
    files: Sequence[TileFile], unread: Sequence[str], layout: Layout, split: str, max_days: float
) -> tuple[list[Tile], list[Finding]]:
    """Lists the tiles of a split, in the order of their locations and dates.

    Each label file is paired with the Sentinel-1 and the Sentinel-2 file of the nearest date. Where
    there is none, and for images beside the split's files whose names do not match, the `Tile` has
    a fault.

    Args:
      files: of one split.
      unread: paths of files that were not recognised.
      layout: of the data set.
      split: by our name.
      max_days: see `Options`.

    Returns:
      The tiles, and findings on files that were not paired.
    """
    folders = {file.path.rpartition("/")[0] for file in files}
    tiles = []
    for path in unread:
        folder, _, name = path.rpartition("/")
        is_known = layout.recognise(path) is not None
        if folder in folders and _GEOTIFF.fullmatch(name) and not is_known:
            known = [file.kind for file in files if file.path.rpartition("/")[0] == folder]
            expected = " or ".join(
                layout.paths[kind].rpartition("/")[2].replace("{split}", layout.splits[split])
                for kind in dict.fromkeys(known)
            )
            tiles.append(Tile(name, {}, (path, f"the name is not {expected}")))
    # One file of each kind, which shows where the others are.
    shown = {file.kind: file for file in reversed(files)}
    locations: dict[tuple, list[TileFile]] = collections.defaultdict(list)
    for file in files:
        locations[(file.order, file.location_id)].append(file)
    findings = []
    for key in sorted(locations):
        found, unpaired = _tiles_of_location(locations[key], shown, tuple(layout.paths), max_days)
        tiles += found
        findings += unpaired
    return tiles, findings


def _tiles_of_location(
    files: Sequence[TileFile],
    shown: Mapping[str, TileFile],
    names: Sequence[str],
    max_days: float,
) -> tuple[list[Tile], list[Finding]]:
    """The tiles of one location with files of these kinds, or the reason why there are none."""
    location_id = files[0].location_id
    kinds = {kind: _sorted_by_date(files, kind) for kind in names}
    if fault := _fault_of_location(kinds, shown):
        return [Tile(location_id, {}, fault)], []
    labels = kinds["labels"]
    pairs: dict[str, list[int | None]] = {"labels": list(range(len(labels)))}
    days = {kind: _dates(kinds[kind]) for kind in names}
    imaged = days["labels"]
    for kind in ("truth", "s2", "s1"):
        if kind not in names:
            continue
        pairs[kind] = pairing.nearest(imaged, days[kind], max_days)
        if kind == "s2":
            # The date of the Sentinel-2 file counts: it is the image that the labels were drawn on.
            imaged = [
                days["labels"][row] if index is None else days["s2"][index]
                for row, index in enumerate(pairs["s2"])
            ]
    tiles, used = [], set()
    for row in range(len(labels)):
        indexes = {kind: pairs[kind][row] for kind in names}
        far = [kind for kind in ("s2", "s1", "truth") if indexes.get(kind, 0) is None]
        if far:
            reason = (
                f"no {far[0]} file of its own within {max_days:g} days: found "
                f"{', '.join(file.date for file in kinds[far[0]])}; raise --max_days to pair them"
            )
            tiles.append(Tile(f"{location_id}-{labels[row].date}", {}, (labels[row].path, reason)))
            continue
        paths = {kind: kinds[kind][index].path for kind, index in indexes.items()}
        used |= set(paths.values())
        dated = "s2" if "s2" in names else "s1"
        date = kinds[dated][indexes[dated]].date
        tiles.append(Tile(f"{location_id}-{date}" if date else location_id, paths))
    unpaired = [
        Finding("not paired", file.path, "no label file of a near date")
        for file in files
        if file.path not in used and file.kind != "labels"
    ]
    return tiles, unpaired


def _fault_of_location(
    kinds: Mapping[str, Sequence[TileFile]], shown: Mapping[str, TileFile]
) -> tuple[str, str] | tuple[()]:
    """A file that is missing or found twice, and the reason; empty if there is none."""
    for kind in kinds:
        if not kinds[kind]:
            sibling = next(file for files in kinds.values() for file in files).sibling
            folder = shown[kind].path.rpartition("/")[0]
            return "/".join(
                [*([folder] if folder else []), sibling.format(shown[kind].token)]
            ), "missing"
        for first, second in zip(kinds[kind], kinds[kind][1:], strict=False):
            if first.date == second.date:
                return second.path, f"was found twice, also as {first.path}: remove one of them"
        if len(kinds[kind]) < len(kinds["labels"]):
            counts = ", ".join(f"{len(kinds[other])} of {other}" for other in kinds)
            return kinds["labels"][0].path, f"the files cannot be paired: {counts}"
    return ()


def _sorted_by_date(files: Sequence[TileFile], kind: str) -> list[TileFile]:
    return sorted((f for f in files if f.kind == kind), key=lambda f: (f.date, f.path))


def _dates(files: Sequence[TileFile]) -> list[datetime.datetime]:
    """The days of files; the same day for all where names have no date."""
    days = [file.date.replace("-", "")[:8] for file in files]
    return [datetime.datetime.strptime(day or "20000101", "%Y%m%d") for day in days]
