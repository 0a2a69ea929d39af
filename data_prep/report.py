"""The report of a build: what was found in the files, and which locations were skipped."""

import csv
import dataclasses
import io
import os
from collections.abc import Iterable, Sequence

from etils import epath

from data_prep.errors import BadFileError, BuildError

# What the kinds of findings mean, in the order of the report.
KINDS = {
    "season skipped": "Share of invalid pixels above --max_invalid; no record was written.",
    "tile skipped": "Share of invalid pixels above --max_invalid; no record was written.",
    "S1 invalid": "Nodata in Sentinel-1. These pixels have label 255 and the neutral value 127.",
    "S2 invalid": "Nodata or saturated in Sentinel-2. These pixels have label 255 and value 127.",
    "labels invalid": "Nodata in the label file. These pixels have label 255.",
    "labels resized": "Label maps cropped or padded with 255 at the bottom and the right.",
    "offset subtracted": "Sentinel-2 seasons with an offset that was detected and subtracted.",
    "offset disagrees": "Metadata and pixels disagree on the Sentinel-2 offset; the pixels count.",
    "scale applied": "Files with scale and offset tags, which were applied.",
    "turned": "Files stored from south to north or east to west; they were turned.",
    "grids shifted": "Images or labels a few pixels off the grid of Sentinel-2; used as they are.",
    "not georeferenced": "Files without georeference; their grids could not be compared.",
    "bands reordered": "Files whose band descriptions give another order or more bands; followed.",
    "not paired": "Images of a location without a partner of a near date. They were not read.",
    "not read": "Files and folders that are no part of the data set. They were not read.",
}
# Files named for each kind of finding. Those that were not read are listed, the others counted.
_EXAMPLES = 10
_UNREAD = 1000


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
      summary_path: the Markdown file with the counts of all findings.
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
        self.count = 0
        self.limit = limit
        self._name = name
        self._first: list[str] = []
        self._text = io.StringIO()
        self._findings: dict[str, list[Finding]] = {}
        self._counts: dict[str, int] = {}
        self._shares: dict[str, list[float]] = {}
        data_dir.mkdir(parents=True, exist_ok=True)
        self._write(["location_id", "file", "reason"])
        self.summary_path.unlink(missing_ok=True)

    def skip(self, location_id: str, bad: BadFileError) -> None:
        """Reports one skipped location.

        Raises:
          BuildError: if more are skipped than the limit allows.
        """
        self.count += 1
        self._write([location_id, bad.file, bad.reason])
        if len(self._first) < 3:
            self._first.append(f"{bad.file}: {bad.reason}")
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

    def write_summary(self) -> None:
        """Writes the Markdown file."""
        lines = [f"# Report of {self._name}", ""]
        lines += [
            f"Locations skipped because of bad files: {self.count} (see {self.path.name}).",
            "",
        ]
        if self._counts:
            lines += [
                "| finding | count | mean share of pixels | largest share |",
                "|---|---|---|---|",
            ]
            lines += [self._row(kind) for kind in self.counts]
        else:
            lines.append("Nothing else was found.")
        for kind in self.counts:
            lines += ["", f"## {kind}: {self._counts[kind]}", "", KINDS[kind], ""]
            lines += [f"- `{f.file}`: {f.detail}" for f in self._findings[kind]]
            more = self._counts[kind] - len(self._findings[kind])
            if more:
                lines.append(f"- and {more} more")
        _write_whole(self.summary_path, "\n".join(lines) + "\n")

    def _row(self, kind: str) -> str:
        shares: Sequence[float] = self._shares.get(kind, ())
        shown = (f"{sum(shares) / len(shares):.2%}", f"{max(shares):.2%}") if shares else ("", "")
        return f"| {kind} | {self._counts[kind]} | {' | '.join(shown)} |"

    def _write(self, row: list[str]) -> None:
        csv.writer(self._text).writerow(row)
        # The whole file each time: a file in a bucket cannot be appended to.
        _write_whole(self.path, self._text.getvalue())


def _write_whole(path: epath.Path, text: str) -> None:
    """Writes a file whole or not at all, also on a disk that becomes full."""
    if "://" in os.fspath(path):  # a bucket, where every write is atomic
        path.write_bytes(text.encode())
        return
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        unfinished.write_bytes(text.encode())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
