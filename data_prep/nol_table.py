"""The table of SSL4EO-S12 + NoL: the Sentinel-2 granules of each location."""

import csv
import dataclasses

from data_prep import errors

TABLE = "dw_complete_ids.csv"
LOCATION_ID_DIGITS = 7


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

    Args:
      data: the file: a column `ids`, then one S2 granule a column; empty cells are seasons that
        the location does not have.

    Raises:
      errors.BuildError: if it is not such a table, is empty, or lists a location twice.
    """
    rows = list(csv.reader(data.decode("utf-8-sig", errors="replace").splitlines()))
    if not rows or rows[0][0].strip() != "ids" or len(rows[0]) < 2:
        found = ",".join(rows[0]) if rows else "an empty file"
        raise errors.BuildError(
            f"{TABLE} begins with {found!r}, but the columns ids,sub1,sub2,... are needed"
        )
    locations: dict[str, Location] = {}
    for row in rows[1:]:
        cells = [cell.strip() for cell in row if cell.strip()]
        if not cells:
            continue
        if not cells[0].isdecimal():
            raise errors.BuildError(
                f"{TABLE} has the id {cells[0]!r}, but ids must be whole numbers"
            )
        location_id = cells[0].zfill(LOCATION_ID_DIGITS)
        if location_id in locations:
            raise errors.BuildError(f"{TABLE} lists location {location_id} twice")
        locations[location_id] = Location(location_id, tuple(cells[1:]))
    if not locations:
        raise errors.BuildError(f"{TABLE} lists no locations")
    return list(locations.values())
