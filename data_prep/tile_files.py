"""Which files belong together: tiles of a Sentinel-1, a Sentinel-2 and a label file each.

File names and the folders above them say what a file is, however deep it lies: publishers wrap the
folders of the same data set in other ones, or leave them out of their zip files.
"""

import collections
import dataclasses
import datetime
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from data_prep import archives, pairing
from data_prep.report import Finding

KINDS = ("s1", "s2", "labels")
_GEOTIFF = re.compile(r".*\.tiff?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class TileFile:
    """A file that is part of a tile.

    Attributes:
      path: its path.
      split: the split by our names, or a city for data sets that are split by city.
      kind: of `KINDS`.
      location_id: the name of its location.
      order: by which locations are sorted.
      date: as in its name; empty for data sets without dates.
      root: the folder of its split, in which the other files of its tile are.
      token: what stands for the kind in file names.
      sibling: the names of the other files of its tile, with {} for the token.
    """

    path: str
    split: str
    kind: str
    location_id: str
    order: tuple
    date: str
    root: str
    token: str
    sibling: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the files of a data set are.

    Attributes:
      splits: the name in the data set of each of our splits.
      optional_splits: our splits that may be absent.
      paths: for each of `KINDS`, the path of a tile's file as it is usually published, with fields
        such as `{split}` and `{lon}`.
      recognise: from a path to a `TileFile`, or None if the file is no part of a tile.
      forms: one sentence for people on other forms that are read.
    """

    splits: Mapping[str, str]
    optional_splits: frozenset[str]
    paths: Mapping[str, str]
    recognise: Callable[[str], TileFile | None]
    forms: str

    def folders(self, split: str) -> dict[str, str]:
        """The usual folder of each kind of file in one of our splits."""
        name = self.splits[split]
        return {
            kind: path.rpartition("/")[0].format(split=name) for kind, path in self.paths.items()
        }


_DEGREES = r"-?\d+(?:[.p]\d+)?"
_SPLIT_FOLDER = re.compile(
    r"(?:.*[_-])?(?P<split>train_large|train|test|validation|valid|val)", re.IGNORECASE
)


def _split_of_folders(folders: Sequence[str]) -> tuple[str, str] | None:
    """The split that the nearest folder or archive says, and its path; None if none does."""
    for depth in range(len(folders), 0, -1):
        name = folders[depth - 1]
        if archives.is_archive(name):
            name = archives.base_name(name).split(".")[0]
        if match := _SPLIT_FOLDER.fullmatch(name):
            split = match["split"].lower()
            split = "val" if split.startswith("val") else split
            return split, "/".join(folders[:depth])
    return None


@dataclasses.dataclass(frozen=True)
class _ByCoordinates:
    """Recognises `s1_LON_LAT-DATE.tif` in the folder of a split, also with p as decimal point.

    Attributes:
      labels: how names of label files begin.
    """

    labels: str

    def __call__(self, path: str) -> TileFile | None:
        *folders, name = path.split("/")
        match = re.fullmatch(
            rf"(?P<kind>s1|s2|{self.labels})_(?P<lon>{_DEGREES})_(?P<lat>{_DEGREES})"
            r"-(?P<date>\d{4}-?\d{2}-?\d{2}.*)\.tiff?",
            name,
            re.IGNORECASE,
        )
        split = _split_of_folders(folders)
        if match is None or split is None:
            return None
        lon, lat = (match[field].lower().replace("p", ".") for field in ("lon", "lat"))
        token = match["kind"].lower()
        return TileFile(
            path=path,
            split=split[0],
            kind="labels" if token == self.labels else token,
            location_id=f"{lon}_{lat}",
            order=(float(lon), float(lat)),
            date=match["date"],
            root=split[1],
            token=token,
            sibling=f"{{}}_{match['lon']}_{match['lat']}-*.tif",
        )


def _dfc2020(path: str) -> TileFile | None:
    """Recognises `ROIs0000_test_s1_0_p7.tif`, and `ROIs0000_autumn_s1_CITY_p7.tif`.

    The latter is of the public bundle, whose split is a city.
    """
    match = re.fullmatch(
        r"ROIs\d+_(?P<part>[a-z]+)_(?P<kind>s1|s2|dfc)_(?P<scene>[a-z0-9]+)_p(?P<number>\d+)\.tiff?",
        path.rpartition("/")[2],
        re.IGNORECASE,
    )
    if match is None:
        return None
    part, kind, scene, number = (match[name] for name in ("part", "kind", "scene", "number"))
    token = kind.lower()
    kind = "labels" if token == "dfc" else token
    splits = {"validation": "train", "test": "test"}
    if (split := splits.get(part.lower())) is not None:
        location_id, order = f"{part}_p{number}", (int(number),)
        if scene != "0":
            location_id, order = f"{part}_{scene}_p{number}", (scene, int(number))
    else:
        split, location_id, order = scene, f"{part}_{scene}_p{number}", (part, int(number))
    sibling = f"ROIs0000_{part}_{{}}_{scene}_p{number}.tif"
    return TileFile(path, split, kind, location_id, order, "", "", token, sibling)


def _ssl4eo_s12(labels: str) -> Layout:
    return Layout(
        splits={"train": "train", "test": "test", "val": "val", "train_large": "train_large"},
        optional_splits=frozenset({"val", "train_large"}),
        paths={
            "s1": "{split}/image_s1/s1_{lon}_{lat}-{date}.tif",
            "s2": "{split}/image_s2/s2_{lon}_{lat}-{date}.tif",
            "labels": f"{{split}}/label_{labels}/{labels}_{{lon}}_{{lat}}-{{date}}.tif",
        },
        recognise=_ByCoordinates(labels),
        forms=f"The folder of a split may also be called {labels}_SPLIT.",
    )


SSL4EO_S12_DW = _ssl4eo_s12("dw")
SSL4EO_S12_OSM = _ssl4eo_s12("osm")
DFC2020 = Layout(
    # Its makers train on what they call validation.
    splits={"train": "validation", "test": "test"},
    optional_splits=frozenset(),
    paths={
        "s1": "s1_{split}/ROIs0000_{split}_s1_0_p{number}.tif",
        "s2": "s2_{split}/ROIs0000_{split}_s2_0_p{number}.tif",
        "labels": "dfc_{split}/ROIs0000_{split}_dfc_0_p{number}.tif",
    },
    recognise=_dfc2020,
    forms=(
        "Folders may have other names. The public bundle by season and city is read with "
        "--test_cities."
    ),
)


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile, or the files of a location that cannot form one.

    Attributes:
      location_id: its name, unique in its split.
      paths: of its file of each of `KINDS`; empty if there is a fault.
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
        if file is None:
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
        if folder in folders and _GEOTIFF.fullmatch(name):
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
        found, unpaired = _tiles_of_location(locations[key], shown, max_days)
        tiles += found
        findings += unpaired
    return tiles, findings


def _tiles_of_location(
    files: Sequence[TileFile], shown: Mapping[str, TileFile], max_days: float
) -> tuple[list[Tile], list[Finding]]:
    """The tiles of one location, or one with the reason why there are none."""
    location_id = files[0].location_id
    kinds = {kind: _sorted_by_date(files, kind) for kind in KINDS}
    if fault := _fault_of_location(kinds, shown):
        return [Tile(location_id, {}, fault)], []
    labels = kinds["labels"]
    pairs = {"labels": list(range(len(labels)))}
    for kind in ("s2", "s1"):
        pairs[kind] = pairing.nearest(_dates(labels), _dates(kinds[kind]), max_days)
    tiles, used = [], set()
    for row in range(len(labels)):
        indexes = {kind: pairs[kind][row] for kind in KINDS}
        far = [kind for kind, index in indexes.items() if index is None]
        if far:
            reason = (
                f"no {far[0]} file of its own within {max_days:g} days: found "
                f"{', '.join(file.date for file in kinds[far[0]])}; raise --max_days to pair them"
            )
            tiles.append(Tile(f"{location_id}-{labels[row].date}", {}, (labels[row].path, reason)))
            continue
        paths = {kind: kinds[kind][index].path for kind, index in indexes.items()}
        used |= set(paths.values())
        date = kinds["s2"][indexes["s2"]].date
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
    for kind in KINDS:
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
            counts = ", ".join(f"{len(kinds[other])} of {other}" for other in KINDS)
            return kinds["labels"][0].path, f"the files cannot be paired: {counts}"
    return ()


def _sorted_by_date(files: Sequence[TileFile], kind: str) -> list[TileFile]:
    return sorted((f for f in files if f.kind == kind), key=lambda f: (f.date, f.path))


def _dates(files: Sequence[TileFile]) -> list[datetime.datetime]:
    """The days of files; the same day for all where names have no date."""
    days = [file.date.replace("-", "")[:8] for file in files]
    return [datetime.datetime.strptime(day or "20000101", "%Y%m%d") for day in days]
