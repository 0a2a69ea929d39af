"""The table of SSL4EO-S12 + NoL: the Sentinel-2 granules of each location."""

import csv
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from data_prep import errors

TABLE = "dw_complete_ids.csv"
LOCATION_ID_DIGITS = 7
# 250,000 locations in four seasons take 75 MB.
MAX_BYTES = 128 << 20
_MAX_COLUMNS = 1000


@dataclasses.dataclass(frozen=True)
class Location:
    """A row of the table.

    Attributes:
      location_id: folder name, 7 digits.
      granules: its S2 granules, as listed.
    """

    location_id: str
    granules: tuple[str, ...]


def read_table(data: bytes) -> list[Location]:
    """Reads `dw_complete_ids.csv`.

    Columns are found by their names, `ids` and `sub1`, `sub2`, ...; without a header, by what the
    cells hold. A column of row numbers, called `ind` or without a name, is ignored.

    Args:
      data: the file; empty cells are seasons that the location does not have.

    Raises:
      errors.BuildError: if it is not such a table, is empty, or lists a location twice.
    """
    if len(data) > MAX_BYTES:
        raise errors.BuildError(
            f"{TABLE} has {len(data):,} bytes, more than the {MAX_BYTES:,} that it may have"
        )
    lines = data.decode("utf-8-sig", errors="replace").splitlines()
    delimiter = max(",;\t", key=lines[0].count) if lines else ","
    widest = max((line.count(delimiter) for line in lines), default=0)
    if widest > _MAX_COLUMNS:
        raise errors.BuildError(
            f"{TABLE} has {widest:,} columns, more than the {_MAX_COLUMNS:,} that it may have"
        )
    id_column, granule_columns, start = _find_columns(next(_rows(lines, delimiter), []))
    locations: dict[str, Location] = {}
    for row in itertools.islice(_rows(lines, delimiter), start, None):
        if not any(row):
            continue
        cell = row[id_column] if id_column < len(row) else ""
        if not (cell.isascii() and cell.isdecimal()):
            raise errors.BuildError(
                f"{TABLE} has the id {cell[:40]!r}, but ids must be whole numbers"
            )
        location_id = cell.zfill(LOCATION_ID_DIGITS)
        if location_id in locations:
            raise errors.BuildError(f"{TABLE} lists location {location_id[:40]} twice")
        granules = (row[column] for column in granule_columns if column < len(row))
        locations[location_id] = Location(location_id, tuple(filter(None, granules)))
    if not locations:
        raise errors.BuildError(f"{TABLE} lists no locations")
    return list(locations.values())


def _rows(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """The cells of each row, one row in memory at a time."""
    try:
        for row in csv.reader(lines, delimiter=delimiter):
            yield [cell.strip() for cell in row]
    except csv.Error as error:
        raise errors.BuildError(f"{TABLE} is damaged or no table: {error}") from error


def _find_columns(first: Sequence[str]) -> tuple[int, list[int], int]:
    """The column of ids, those of granules, and the first row of data, by the cells of the first.

    Raises:
      errors.BuildError: if there are no such columns.
    """
    header = [cell.lower() for cell in first]
    if "ids" in header and len(header) > 1:
        id_column = header.index("ids")
        named = [i for i, name in enumerate(header) if re.fullmatch(r"sub\d*", name)]
        # Other names: what follows the ids.
        return id_column, named or list(range(id_column + 1, len(header))), 1
    granules = [i for i, cell in enumerate(header) if re.match(r"\d{8}t\d{6}", cell)]
    if granules and granules[0] > 0 and all(cell.isdecimal() for cell in header[: granules[0]]):
        return granules[0] - 1, list(range(granules[0], len(header))), 0
    found = ",".join(first) if first else "an empty file"
    raise errors.BuildError(
        f"{TABLE} begins with {found[:80]!r}, but the columns ids,sub1,sub2,... are needed"
    )
