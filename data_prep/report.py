"""The report of a build: which locations were skipped, and why."""

import csv
import io

from etils import epath

from data_prep.errors import BadFileError, BuildError


class BadLocations:
    """Counts the skipped locations, and writes each to a CSV file at once.

    Attributes:
      count: locations skipped so far.
      limit: number of locations that may be skipped.
      path: the CSV file: `location_id,file,reason`.
    """

    def __init__(self, path: epath.Path, limit: int):
        """Starts an empty report.

        Args:
          path: of the report; the report of an earlier build is replaced.
          limit: number of locations that may be skipped.
        """
        self.path = path
        self.count = 0
        self.limit = limit
        self._first: list[str] = []
        self._text = io.StringIO()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write(["location_id", "file", "reason"])

    def add(self, location_id: str, bad: BadFileError) -> None:
        """Reports one skipped location.

        Raises:
          BuildError: if more are skipped than the limit allows.
        """
        self.count += 1
        self._write([location_id, bad.file, bad.reason])
        if len(self._first) < 3:
            self._first.append(f"{bad.file}: {bad.reason}")
        if self.count > self.limit:
            raise BuildError(
                f"bad locations: {self.count}, --max_bad_locations={self.limit} allowed; "
                f"nothing was written. First: {'; '.join(self._first)}. Correct the files "
                f"that {self.path} lists, or raise --max_bad_locations to skip them"
            )

    def _write(self, row: list[str]) -> None:
        csv.writer(self._text).writerow(row)
        # The whole file each time: a file in a bucket cannot be appended to.
        self.path.write_bytes(self._text.getvalue().encode())
