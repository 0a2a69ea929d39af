"""The report of a build: what was found in the files, and which locations were skipped."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from cromss_jax import files
from cromss_jax.legend import IGNORE_LABEL
from data_prep.errors import BadFileError, BuildError

# What the kinds of findings mean, in the order of the report.
KINDS = {
    "season skipped": "Share of invalid pixels above --max_invalid; no record was written.",
    "season unlabelled": "Share of labelled pixels below --min_labelled; no record was written.",
    "tile skipped": "Share of invalid pixels above --max_invalid; no record was written.",
    "S1 invalid": "Nodata in Sentinel-1. These pixels have label 255 and the neutral value 127.",
    "S2 invalid": "Nodata or saturated in Sentinel-2. These pixels have label 255 and value 127.",
    "labels invalid": "No label map, or nodata in it. These pixels have label 255.",
    "labels without class": "Values of the label map that are no class. They have label 255.",
    "masked": "Pixels that the mask says to ignore. They have label 255.",
    "tile cropped": "Tiles cropped at the bottom and the right, to whole pixels of all bands.",
    "labels resized": "Label maps cropped or padded with 255 at the bottom and the right.",
    "offset subtracted": "Sentinel-2 seasons with an offset that was detected and subtracted.",
    "offset disagrees": "Metadata and pixels disagree on the Sentinel-2 offset; the pixels count.",
    "date differs": "Sentinel-2 files with another date in their name than their row. It counts.",
    "scale applied": "Files with scale and offset tags, which were applied.",
    "turned": "Files stored from south to north or east to west; they were turned.",
    "grids shifted": "Images or labels a few pixels off the grid of Sentinel-2; used as they are.",
    "S1 shifted": "Sentinel-1 lies off Sentinel-2 by what both show; used as it is.",
    "not georeferenced": "Files without georeference; their grids could not be compared.",
    "bands reordered": "Files whose band descriptions give another order or more bands; followed.",
    "found twice": "Samples that are in two shards. The first of them is used.",
    "shards differ": "Shards of one name with other keys, or in another order; matched by key.",
    "not paired": "Images of a location without a partner of a near date. They were not read.",
    "not audited": "Locations without maps in the audit; their labels were kept.",
    "not read": "Files and folders that are no part of the data set. They were not read.",
}
# Files named for each kind of finding. Those that were not read are listed, the others counted.
_EXAMPLES = 10
_UNREAD = 1000
# Kinds that say why pixels are ignored.
_IGNORED = ("S1 invalid", "S2 invalid", "labels invalid", "labels without class", "masked")


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a user should know about a file, but that does not prevent its use.

    Attributes:
      kind: a key of `KINDS`.
      file: the path of the file, or of the folder of a season.
      detail: what was found, in a few words.
      share: of the pixels, for kinds that concern pixels.
    """

    kind: str
    file: str
    detail: str
    share: float | None = None


class Report:
    """Counts skipped locations and findings. Skipped locations are written to a CSV file at once.

    Attributes:
      path: the CSV file of skipped locations: `location_id,file,reason`.
      summary_path: the Markdown file with all that was found.
      json_path: the same for programs.
      count: locations skipped so far.
      limit: number of locations that may be skipped.
    """

    def __init__(self, data_dir: epath.Path, name: str, limit: int):
        """Starts an empty report.

        Args:
          data_dir: the folder of the data set; the report of an earlier build is replaced.
          name: of the data set.
          limit: number of locations that may be skipped.
        """
        self.path = data_dir / f"{name}.bad_locations.csv"
        self.summary_path = data_dir / f"{name}.report.md"
        self.json_path = data_dir / f"{name}.report.json"
        self.class_names: Sequence[str] = ()
        self.count = 0
        self.limit = limit
        self._name = name
        self._first: list[str] = []
        self._text = io.StringIO()
        self._findings: dict[str, list[Finding]] = {}
        self._counts: dict[str, int] = {}
        self._shares: dict[str, list[float]] = {}
        self._tables: dict[str, Sequence[Mapping[str, Any]]] = {}
        self._measures: dict[str, list[float]] = {}
        self._num_records: dict[str, int] = {}
        self._classes: dict[str, np.ndarray] = {}
        data_dir.mkdir(parents=True, exist_ok=True)
        self._write(["location_id", "file", "reason"])
        self.summary_path.unlink(missing_ok=True)
        self.json_path.unlink(missing_ok=True)

    def skip(self, location_id: str, bad: BadFileError) -> None:
        """Reports one skipped location.

        Raises:
          BuildError: if more are skipped than the limit allows.
        """
        self.count += 1
        self._write([location_id, bad.file, bad.reason])
        if len(self._first) < 3:
            self._first.append(str(bad))
        if self.count > self.limit:
            self.write_summary()
            raise BuildError(
                f"bad locations: {self.count}, --max_bad_locations={self.limit} allowed; "
                f"nothing was written. First: {'; '.join(self._first)}. Correct the files "
                f"that {self.path} lists, or raise --max_bad_locations to skip them"
            )

    def add(self, findings: Iterable[Finding]) -> None:
        """Counts findings."""
        for finding in findings:
            examples = self._findings.setdefault(finding.kind, [])
            if len(examples) < (_UNREAD if finding.kind == "not read" else _EXAMPLES):
                examples.append(finding)
            self._counts[finding.kind] = self._counts.get(finding.kind, 0) + 1
            if finding.share is not None:
                self._shares.setdefault(finding.kind, []).append(finding.share)

    @property
    def counts(self) -> dict[str, int]:
        """The number of findings of each kind."""
        return {kind: self._counts[kind] for kind in KINDS if kind in self._counts}

    def why_skipped(self) -> str:
        """An example of a season or tile that was skipped; empty if none was."""
        for kind in ("season skipped", "season unlabelled", "tile skipped"):
            if kind in self._findings:
                example = self._findings[kind][0]
                return f"{kind}: {example.file}: {example.detail}"
        return ""

    def add_table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds a table, a row for each mapping from column to value."""
        self._tables[title] = rows

    def count_classes(self, split: str, num_records: int, classes: np.ndarray) -> None:
        """Counts the labels of records; see `records.Written`."""
        self._num_records[split] = self._num_records.get(split, 0) + num_records
        self._classes[split] = self._classes.get(split, np.zeros((2, 256), np.int64)) + classes

    def add_measures(self, measures: Iterable[tuple[str, float]]) -> None:
        """Adds values by name, of which the report gives the range; see `records.Reading`."""
        for name, value in measures:
            self._measures.setdefault(name, []).append(value)

    def measures(self, name: str) -> Sequence[float]:
        """The values of a measure so far."""
        return self._measures.get(name, ())

    def _measure_rows(self) -> list[dict[str, Any]]:
        """The range of each measure."""
        return [
            {
                "measure": name,
                "count": len(values),
                "smallest": f"{min(values):g}",
                "median": f"{np.median(values):g}",
                "largest": f"{max(values):g}",
            }
            for name, values in sorted(self._measures.items())
        ]

    def _class_rows(self) -> list[dict[str, Any]]:
        """The records and the share of the pixels of each class, and of ignored pixels."""
        used = np.zeros(256, bool)
        used[: len(self.class_names)] = True
        for classes in self._classes.values():
            used |= classes[1] > 0
        rows = []
        for label in np.flatnonzero(used).tolist():
            name = self.class_names[label] if label < len(self.class_names) else ""
            row: dict[str, Any] = {"label": label, "class": name}
            if label == IGNORE_LABEL:
                row["class"] = "(ignored)"
            for split, (pixels, with_class) in self._classes.items():
                row[f"records, {split}"] = int(with_class[label])
                row[f"share of pixels, {split}"] = float(pixels[label] / max(pixels.sum(), 1))
            rows.append(row)
        return rows

    def _finding_rows(self) -> list[dict[str, Any]]:
        """The count and the shares of each kind of finding."""
        total = sum(self._num_records.values())
        rows = []
        for kind, count in self.counts.items():
            row: dict[str, Any] = {"finding": kind, "count": count}
            if shares := self._shares.get(kind):
                row["mean share of pixels"] = sum(shares) / len(shares)
                row["largest share"] = max(shares)
                if kind in _IGNORED and total:
                    # Of skipped seasons and tiles, these kinds are not reported.
                    row["share of all pixels"] = sum(shares) / total
            rows.append(row)
        return rows

    def write_summary(self) -> None:
        """Writes the Markdown and the JSON file."""
        tables = dict(self._tables)
        if self._classes:
            tables["Classes"] = self._class_rows()
        if self._measures:
            tables["Measures"] = self._measure_rows()
        if self._counts:
            tables["Findings"] = self._finding_rows()
        lines = [f"# Report of {self._name}", ""]
        lines += [
            f"Locations skipped because of bad files: {self.count} (see {self.path.name}).",
        ]
        for split, number in self._num_records.items():
            lines.append(f"Records in {split}: {number}.")
        for title, rows in tables.items():
            lines += ["", f"## {title}", "", *_markdown(rows)]
        if not self._counts:
            lines += ["", "Nothing else was found."]
        for kind in self.counts:
            lines += ["", f"## {kind}: {self._counts[kind]}", "", KINDS[kind], ""]
            lines += [f"- `{f.file}`: {f.detail}" for f in self._findings[kind]]
            more = self._counts[kind] - len(self._findings[kind])
            if more:
                lines.append(f"- and {more} more")
        files.write_whole(self.summary_path, ("\n".join(lines) + "\n").encode())
        content = {
            "name": self._name,
            "skipped": self.count,
            "records": self._num_records,
            "tables": tables,
            "examples": {
                kind: [dataclasses.asdict(finding) for finding in self._findings[kind]]
                for kind in self.counts
            },
        }
        files.write_whole(self.json_path, (json.dumps(content, indent=1) + "\n").encode())

    def _write(self, row: list[str]) -> None:
        csv.writer(self._text).writerow(row)
        # The whole file each time: a file in a bucket cannot be appended to.
        files.write_whole(self.path, self._text.getvalue().encode())


def _markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a table; shares are shown in percent."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [
            f"{value:.2%}" if isinstance(value := row.get(column, ""), float) else str(value)
            for column in columns
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines
