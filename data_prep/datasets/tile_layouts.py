"""The layouts of the downstream data sets: which file is what.

File names and the folders above them say what a file is, at any depth: publishers wrap the folders
of the same data set in other ones, or leave them out of their zip files.
"""

import dataclasses
import datetime
import functools
import re
from collections.abc import Callable, Mapping, Sequence

from data_prep.finding import archives


@dataclasses.dataclass(frozen=True)
class TileFile:
    """A file that is part of a tile.

    Attributes:
      path: its path.
      split: the split by our names, or a city for data sets that are split by city.
      kind: of `Layout.paths`.
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
      paths: for each kind of file ("s1", "s2", "labels", "truth"), the path of a tile's file as it
        is usually published, with fields such as `{split}` and `{lon}`.
      recognise: from a path to a `TileFile`, or None if the file is no part of a tile.
      forms: one sentence for people on other forms that are read.
      label_band: which band of label files that have several holds the labels, from 0.
    """

    splits: Mapping[str, str]
    optional_splits: frozenset[str]
    paths: Mapping[str, str]
    recognise: Callable[[str], TileFile | None]
    forms: str
    label_band: int = 1

    def of_kinds(self, kinds: Sequence[str]) -> "Layout":
        """The layout of a data set that needs these kinds of files only."""
        paths = {kind: path for kind, path in self.paths.items() if kind in kinds}
        return dataclasses.replace(self, paths=paths)

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


def _is_date(text: str) -> bool:
    """Whether a text begins with a day of the calendar."""
    try:
        datetime.datetime.strptime(text.replace("-", "")[:8], "%Y%m%d")
    except ValueError:
        return False
    return True


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
        if match is None or split is None or not _is_date(match["date"]):
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


def _dfc2020(path: str, kinds: Mapping[str, str] | None = None) -> TileFile | None:
    """Recognises `ROIs0000_test_s1_0_p7.tif`, and `ROIs0000_autumn_s1_CITY_p7.tif`.

    The latter is of the public bundle, whose split is a city. `kinds` says what files of other
    names than the kinds are; by default those called dfc are the labels.
    """
    kinds = {"dfc": "labels"} if kinds is None else kinds
    match = re.fullmatch(
        r"ROIs0000_(?P<part>[a-z]+)_(?P<kind>s1|s2|dfc|lc)_(?P<scene>[a-z0-9]+)_p(?P<number>\d+)\.tiff?",
        path.rpartition("/")[2],
        re.IGNORECASE,
    )
    if match is None:
        return None
    part, kind, scene, number = (match[name] for name in ("part", "kind", "scene", "number"))
    token = kind.lower()
    kind = kinds.get(token, token)
    splits = {"validation": "train", "test": "test"}
    split = splits.get(part.lower(), scene)
    name = part if scene == "0" else f"{part}_{scene}"
    location_id, order = f"{name}_p{number}", (name, int(number))
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
# MODIS land cover is the noisy label, the contest's labels are the truth.
DFC2020_LC = dataclasses.replace(
    DFC2020,
    paths={
        **DFC2020.paths,
        "labels": "lc_{split}/ROIs0000_{split}_lc_0_p{number}.tif",
        "truth": DFC2020.paths["labels"],
    },
    recognise=functools.partial(_dfc2020, kinds={"lc": "labels", "dfc": "truth"}),
    label_band=0,
)


def _sen12ms(path: str) -> TileFile | None:
    """Recognises `ROIs1158_spring_s1_1_p30.tif`."""
    match = re.fullmatch(
        r"(?P<season>ROIs\d+_[a-z]+)_(?P<kind>s1|s2|lc)_(?P<scene>\d+)_p(?P<number>\d+)\.tiff?",
        path.rpartition("/")[2],
        re.IGNORECASE,
    )
    if match is None:
        return None
    season, scene, number = match["season"], match["scene"], match["number"]
    token = match["kind"].lower()
    return TileFile(
        path=path,
        split="train",
        kind="labels" if token == "lc" else token,
        location_id=f"{season}_{scene}_p{number}",
        order=(season, int(scene), int(number)),
        date="",
        root="",
        token=token,
        sibling=f"{season}_{{}}_{scene}_p{number}.tif",
    )


SEN12MS = Layout(
    splits={"train": "all"},
    optional_splits=frozenset(),
    paths={
        kind: f"ROIs1158_spring/{token}_1/ROIs1158_spring_{token}_1_p30.tif"
        for kind, token in (("s1", "s1"), ("s2", "s2"), ("labels", "lc"))
    },
    recognise=_sen12ms,
    forms="All seasons and scenes are read.",
    # IGBP; after it other schemes.
    label_band=0,
)
