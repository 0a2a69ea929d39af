"""Which files belong together: tiles of a Sentinel-1, a Sentinel-2 and a label file each."""

import collections
import dataclasses
import re
from collections.abc import Mapping

from data_prep import sources

KINDS = ("s1", "s2", "labels")
# Regular expressions for the fields of a path. Dates are sorted as text.
_FIELDS = {
    "lon": r"-?\d+(?:\.\d+)?",
    "lat": r"-?\d+(?:\.\d+)?",
    "date": r"\d{4}-?\d{2}-?\d{2}.*",
    "number": r"\d+",
}
# The fields of a path that identify a location, with their values.
LocationFields = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the files of a data set are.

    Attributes:
      splits: the name in the data set of each of our splits.
      optional_splits: our splits that may be absent.
      paths: for each of `KINDS`, the path of a tile's file from the component on, with fields
        `{split}` and those of `_FIELDS`; only `{split}` in its folders. A `{date}` may differ
        between the files of a tile; the other fields, which identify its location, may not.
      location_id: the name of a location, with the same fields.
    """

    splits: Mapping[str, str]
    optional_splits: frozenset[str]
    paths: Mapping[str, str]
    location_id: str

    def folders(self, split: str) -> dict[str, str]:
        """The folder of each kind of file in one of our splits."""
        name = self.splits[split]
        return {
            kind: path.rpartition("/")[0].format(split=name) for kind, path in self.paths.items()
        }

    @property
    def components(self) -> tuple[str, ...]:
        """What `sources.Source` must look for."""
        folders = [folder for split in self.splits for folder in self.folders(split).values()]
        return tuple(dict.fromkeys(folder.split("/")[0] for folder in folders))


def _ssl4eo_s12(labels: str) -> Layout:
    return Layout(
        splits={"train": "train", "test": "test", "val": "val"},
        optional_splits=frozenset({"val"}),
        paths={
            "s1": "{split}/image_s1/s1_{lon}_{lat}-{date}.tif",
            "s2": "{split}/image_s2/s2_{lon}_{lat}-{date}.tif",
            "labels": f"{{split}}/label_{labels}/{labels}_{{lon}}_{{lat}}-{{date}}.tif",
        },
        location_id="{lon}_{lat}",
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
    location_id="{split}_p{number}",
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


def find_tiles(source: sources.Source, layout: Layout, split: str) -> list[Tile]:
    """Lists the tiles of one of our splits, in the order of their locations and dates.

    Several dates of a location are paired by rank. If they cannot be paired, or the name of a
    GeoTIFF does not match the layout, the `Tile` has a fault.
    """
    folders = layout.folders(split)
    names = {kind: source.files(folder) for kind, folder in folders.items()}
    locations: dict[LocationFields, dict[str, list[tuple[str, str]]]] = collections.defaultdict(
        lambda: {kind: [] for kind in KINDS}
    )
    tiles = []
    for kind in KINDS:
        pattern, expected = _name_pattern(layout, kind, split)
        for name in names[kind]:
            match = re.fullmatch(pattern, name)
            if match is not None:
                fields = match.groupdict()
                date = fields.pop("date", "")
                locations[tuple(fields.items())][kind].append((date, name))
            # macOS adds a file `._NAME` for every file.
            elif name.endswith((".tif", ".tiff")) and not name.startswith("."):
                fault = (f"{folders[kind]}/{name}", f"the name is not {expected}")
                tiles.append(Tile(name, {}, fault))
    for location in sorted(locations, key=_numbers):
        tiles += _tiles_of_location(layout, split, location, locations[location])
    return tiles


def _name_pattern(layout: Layout, kind: str, split: str) -> tuple[str, str]:
    """The regular expression of a kind's file names, and the same for people to read."""
    name = layout.paths[kind].rpartition("/")[2].replace("{split}", layout.splits[split])
    pattern = re.escape(name)
    for field, values in _FIELDS.items():
        pattern = pattern.replace(rf"\{{{field}\}}", f"(?P<{field}>{values})")
    return pattern, name


def _numbers(location: LocationFields) -> list[float]:
    """The sort key of locations."""
    return [float(value) for _, value in location]


def _tiles_of_location(
    layout: Layout,
    split: str,
    location: LocationFields,
    files: Mapping[str, list[tuple[str, str]]],
) -> list[Tile]:
    """The tiles of one location, or one with the reason why there are none."""
    fields = dict(location, split=layout.splits[split])
    location_id = layout.location_id.format(**fields)
    for kind in KINDS:
        if not files[kind]:
            wanted = layout.paths[kind].format(**fields, date="*")
            return [Tile(location_id, {}, (wanted, "missing"))]
    counts = {kind: len(files[kind]) for kind in KINDS}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{count} of {kind}" for kind, count in counts.items())
        wanted = layout.paths["labels"].format(**fields, date="*")
        return [Tile(location_id, {}, (wanted, f"the files cannot be paired: {shown}"))]
    folders = layout.folders(split)
    tiles = []
    for ranked in zip(*(sorted(files[kind]) for kind in KINDS), strict=True):
        paths = {
            kind: f"{folders[kind]}/{name}" for kind, (_, name) in zip(KINDS, ranked, strict=True)
        }
        date = ranked[KINDS.index("s2")][0]
        tiles.append(Tile(f"{location_id}-{date}" if date else location_id, paths))
    return tiles
