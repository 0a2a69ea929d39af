"""Reads Zarr stores (version 2) of one sample, as they lie in the shards of published data sets.

A store is a zip file of a few hundred kilobytes with a handful of arrays, of which each is read
once. Its metadata are JSON and its chunks compressed bytes, which numcodecs decodes; opening it
with zarr takes half as long again.
"""

import dataclasses
import io
import itertools
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep import errors
from data_prep.reading import geotiff

# What the zip file, its JSON and the codecs raise where a store is damaged.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, KeyError, ValueError),
    *(AttributeError, TypeError, ZeroDivisionError),
)


class ZarrError(ValueError):
    """A store that cannot be read; the message is for the user."""


def check_installed() -> None:
    """Refuses to begin without the library that decodes chunks.

    Raises:
      errors.BuildError: saying what to install.
    """
    try:
        import numcodecs  # noqa: F401
    except ModuleNotFoundError as error:
        raise errors.BuildError(
            "Zarr stores need numcodecs, which is not installed: pip install -e .[zarr]"
        ) from error


@dataclasses.dataclass(frozen=True)
class Store:
    """The arrays of a store that were asked for.

    Attributes:
      arrays: by name.
      attributes: of each array that the store has, by its name; those of the store under "".
    """

    arrays: Mapping[str, np.ndarray]
    attributes: Mapping[str, Mapping[str, Any]]


def read(data: bytes, names: tuple[str, ...]) -> Store:
    """Reads arrays of a store.

    Args:
      data: the whole zip file.
      names: of arrays; those that the store does not have are left out.

    Raises:
      ZarrError: if it is damaged, or of another version of the format.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            metadata = _metadata(archive)
            arrays = {
                name: _array(archive, name, metadata[f"{name}/.zarray"])
                for name in names
                if f"{name}/.zarray" in metadata
            }
    except _DAMAGE as error:
        raise ZarrError(f"no Zarr store, or damaged: {error}") from error
    attributes = {
        key.removesuffix(".zattrs").rstrip("/"): value
        for key, value in metadata.items()
        if key.endswith(".zattrs")
    }
    return Store(arrays, attributes)


def _metadata(archive: zipfile.ZipFile) -> dict[str, Any]:
    """The JSON files of a store, together in one or each by itself."""
    names = set(archive.namelist())
    if ".zmetadata" in names:
        return json.loads(archive.read(".zmetadata"))["metadata"]
    if "zarr.json" in names:
        raise ValueError("version 3 of Zarr, version 2 is needed")
    return {
        name: json.loads(archive.read(name))
        for name in names
        if name.rpartition("/")[2] in (".zarray", ".zattrs", ".zgroup")
    }


def _array(archive: zipfile.ZipFile, name: str, form: Mapping[str, Any]) -> np.ndarray:
    """Decodes an array."""
    from numcodecs import registry

    shape, chunks = tuple(form["shape"]), tuple(form["chunks"])
    dtype = np.dtype(form["dtype"])
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects")
    size = math.prod(shape) * dtype.itemsize
    if size > geotiff.MAX_PIXEL_BYTES:
        raise ValueError(f"{name} declares {size:,} bytes, more than {geotiff.MAX_PIXEL_BYTES:,}")
    codecs = [registry.get_codec(config) for config in form["filters"] or ()]
    if form["compressor"]:
        codecs.append(registry.get_codec(form["compressor"]))
    fill = form["fill_value"]
    array = np.full(shape, 0 if fill is None else fill, dtype)
    present = set(archive.namelist())
    counts = [math.ceil(size / chunk) for size, chunk in zip(shape, chunks, strict=True)]
    separator = form.get("dimension_separator", ".")
    for index in itertools.product(*map(range, counts)):
        member = f"{name}/{separator.join(map(str, index)) or '0'}"
        if member not in present:
            # Chunks that hold the fill value alone are not stored.
            continue
        encoded = archive.read(member)
        for codec in reversed(codecs):
            encoded = codec.decode(encoded)
        chunk = np.frombuffer(encoded, dtype).reshape(chunks, order=form["order"])
        place = tuple(
            slice(i * size, min((i + 1) * size, whole))
            for i, size, whole in zip(index, chunks, shape, strict=True)
        )
        array[place] = chunk[tuple(slice(0, part.stop - part.start) for part in place)]
    return array
