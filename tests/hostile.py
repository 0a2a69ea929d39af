"""Readers of files that strangers send, and what they may raise: for tests and the fuzzer."""

import contextlib
import dataclasses
import pathlib
import resource
import time
import types
from collections.abc import Callable, Mapping

import pytest

from cromss_jax import files
from cromss_jax.legend import Legend, LegendError
from cromss_jax.weights import cards
from cromss_jax.weights import files as weight_files
from cromss_jax.weights.network import Network, WeightsError
from data_prep import errors
from data_prep.datasets import nol_table, scene_table
from data_prep.reading import geotiff, legends

# Found by the fuzzer, and what it starts from: a folder for each reader.
CORPUS = pathlib.Path(__file__).with_name("corpus")

# No file of the corpus or of the fuzzer has more than some kilobytes.
SECONDS, BYTES = 5, 1 << 30


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader.

    Attributes:
      suffix: of the files that it reads.
      read: reads a file.
      errors: what it may raise.
      tokens: what a file has that matters, for the fuzzer to put anywhere.
    """

    suffix: str
    read: Callable[[pathlib.Path], object]
    errors: tuple[type[Exception], ...]
    tokens: tuple[bytes, ...] = ()


def _read_card(path: pathlib.Path) -> None:
    """The card beside a file of weights, and all that is made of it."""
    card = weight_files.parse_card(path.read_bytes(), path, "x.safetensors")
    network = Network("encoder", 10, {"s1": ("VV", "VH")}, None)
    cards.text(cards.make(types.SimpleNamespace(card=card), network, "encoder"), "x")


def _read_weights(path: pathlib.Path) -> None:
    """The tensors of a file, and a network if there is one in them."""
    weight_files.read(files.absolute(path))
    with contextlib.suppress(WeightsError):
        weight_files.load(str(path))


def _read_saved_legend(path: pathlib.Path) -> None:
    """The legend in a data set's or a run's description."""
    Legend.from_dict(files.parse_json(path.read_bytes()))


_NUMBERS = tuple(
    value.to_bytes(size, order)
    for size in (2, 4, 8)
    for value in (0, 1, 2**15, 2**16 - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
    for order in ("little", "big")
    if value < 2 ** (8 * size)
)
_TEXT = (b'"', b"'", b",", b";", b"\t", b"\n", b"\r", b"\0", b"\xff", b"0", b"-", b"9" * 5000)
_TEXT += ("٣".encode(), "ü".encode(), b"~", b"*", b"[", b"x" * 300, b"x" * 140_000, b"\xef\xbb\xbf")
_JSON = (b"{", b"}", b"[", b"]", b":", b"null", b"1e999", b"NaN", b"[" * 2000, b'"\\ud800"')

READERS: Mapping[str, Reader] = {
    "table": Reader(
        ".csv",
        lambda path: nol_table.read_table(path.read_bytes()),
        (errors.BuildError,),
        (*_TEXT, b"ids", b"sub1", b"20200604T100000"),
    ),
    "scene_table": Reader(
        ".csv",
        scene_table.read,
        (errors.BuildError,),
        (*_TEXT, b"scene", b"date", b"labels", b"*.csv", b"2022-10-05", b"/", b".."),
    ),
    "legend_csv": Reader(
        ".csv",
        lambda path: legends.read_legend(str(path)),
        (errors.BuildError,),
        (*_TEXT, b"value", b"name", b"colour", b"class", b"#419bdf", b"255"),
    ),
    "legend_qml": Reader(
        ".qml",
        lambda path: legends.read_legend(str(path)),
        (errors.BuildError,),
        (*_TEXT, b"<", b">", b"/", b"=", b"&amp;", b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;"),
    ),
    "legend_tif": Reader(
        ".tif",
        lambda path: legends.read_legend(str(path)),
        (errors.BuildError,),
        _NUMBERS,
    ),
    "legend_json": Reader(".json", _read_saved_legend, (LegendError, ValueError), (*_TEXT, *_JSON)),
    "card": Reader(".json", _read_card, (WeightsError,), (*_TEXT, *_JSON)),
    "safetensors": Reader(
        ".safetensors",
        _read_weights,
        (WeightsError,),
        (*_NUMBERS, *_JSON, b"F8_E4M3", b"BF16", b"__metadata__"),
    ),
    "geotiff": Reader(
        ".tif",
        lambda path: geotiff.read_bands(path.read_bytes()),
        (geotiff.GeotiffError,),
        _NUMBERS,
    ),
}


def check(reader: Reader, path: pathlib.Path) -> str:
    """Reads a file. Anything but its content or a sentence is an error, and so is taking too much.

    Returns:
      What the reader said; empty if the file can be read.
    """
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = ""
    try:
        reader.read(path)
    except reader.errors as error:
        said = str(error)
        assert said, "no sentence"
        assert len(said.splitlines()) == 1, f"not one line: {said!r}"
    seconds = time.process_time() - started
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if seconds > SECONDS or grown > BYTES:
        pytest.fail(f"took {seconds:.1f} s and {grown:,} bytes")
    return said
