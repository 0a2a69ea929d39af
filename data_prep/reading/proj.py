"""Makes rasterio use the coordinate reference systems that it was built for.

QGIS, PostGIS and conda set `PROJ_DATA` (formerly `PROJ_LIB`) to the database of their own version
of PROJ. With it, rasterio reads CRSs without an authority, or as a LOCAL_CS. rasterio's wheels
contain the right database. It must be chosen before rasterio is imported, therefore importing this
module does it.
"""

import importlib.util
import os
import pathlib

from data_prep import errors

_VARIABLES = ("PROJ_DATA", "PROJ_LIB")


def _bundled() -> pathlib.Path | None:
    """The database folder in rasterio's wheel; None where rasterio was installed otherwise."""
    spec = importlib.util.find_spec("rasterio")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = pathlib.Path(folder) / "proj_data"
        if (path / "proj.db").is_file():
            return path
    return None


_BUNDLED = _bundled()
_FOUND = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
if _BUNDLED is not None and _FOUND:
    os.environ.pop("PROJ_LIB", None)
    os.environ["PROJ_DATA"] = os.fspath(_BUNDLED)


def check() -> None:
    """Refuses a PROJ database that rasterio cannot use.

    Raises:
      errors.BuildError: saying which variable to unset.
    """
    # After the choice of the database.
    import rasterio
    import rasterio.errors

    try:
        known = rasterio.CRS.from_wkt(rasterio.CRS.from_epsg(3035).to_wkt()).to_epsg() == 3035
        reason = "EPSG:3035 is not known"
    except rasterio.errors.CRSError as error:
        known, reason = False, str(error)
    if not known:
        found = ", ".join(f"{name}={value}" for name, value in _FOUND.items()) or "none set"
        raise errors.BuildError(
            f"rasterio cannot use the PROJ database ({found}): {reason}. Unset PROJ_DATA and "
            "PROJ_LIB, or set PROJ_DATA to the database of rasterio's version of PROJ"
        )
