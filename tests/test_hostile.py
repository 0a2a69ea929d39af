"""Input that would take all memory or time: refused in a sentence, before anything is unpacked."""

import gzip
import io
import json
import pathlib
import re
import struct
import tarfile
import time
import zipfile

import pytest
import rasterio

from cromss_jax.weights import files as weight_files
from cromss_jax.weights.network import WeightsError
from data_prep import errors
from data_prep.datasets import nol_table
from data_prep.datasets.ssl4eo_s12_nol import find_source
from data_prep.finding import archives, file_tree, sources
from data_prep.reading import geotiff, legends
from tests import hostile

TERABYTE = 1 << 40


@pytest.fixture(autouse=True)
def quickly():
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 20  # seconds where it should take one, on a busy machine


def make_zip(path: pathlib.Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name.replace("__", "/"), content)


def declare(path: pathlib.Path, true: int, size: int) -> None:
    """Lets a zip declare another size of the member that has that size."""
    content = path.read_bytes()
    assert content.count(struct.pack("<I", true)) == 2  # of the member and of the directory
    path.write_bytes(content.replace(struct.pack("<I", true), struct.pack("<I", size)))


def test_a_file_in_a_zip_that_unpacks_to_more_than_a_gigabyte(tmp_path):
    path = tmp_path / "labels.zip"
    make_zip(path, tile=bytes(1_234_567))
    declare(path, 1_234_567, 1_500_000_000)
    tree = file_tree.FileTree(tmp_path)
    tree.index(None)
    with pytest.raises(
        sources.UnreadableError, match="has 1,500,000,000 bytes unpacked, more than"
    ):
        tree.read("labels.zip/tile")
    # One that declares less than it unpacks to is not unpacked further.
    declare(path, 1_500_000_000, 1000)
    tree = file_tree.FileTree(tmp_path)
    tree.index(None)
    with pytest.raises(sources.UnreadableError, match="Bad CRC-32"):
        tree.read("labels.zip/tile")


def test_a_table_in_a_zip_that_unpacks_to_more_than_a_gigabyte(tmp_path):
    path = tmp_path / "ssl4eo_s12_nol.zip"
    make_zip(path, **{nol_table.TABLE: bytes(1_234_567)})
    declare(path, 1_234_567, 1_500_000_000)
    with pytest.raises(
        errors.BuildError, match=f"{nol_table.TABLE} cannot be read: .*1,500,000,00"
    ):
        find_source(tmp_path, None)


def test_tables_that_are_none(monkeypatch):
    with pytest.raises(errors.BuildError, match="damaged or no table: field larger than"):
        nol_table.read_table(b"ids,sub1\n1," + b"x" * 200_000 + b"\n")
    monkeypatch.setattr(nol_table, "MAX_BYTES", 10)
    with pytest.raises(errors.BuildError, match="has 11 bytes, more than the 10 that it may have"):
        nol_table.read_table(b"ids,sub1\n1,")


@pytest.mark.parametrize("bomb", ["member", "tail"])
def test_a_tar_gz_bomb(tmp_path, bomb, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1 << 20)
    monkeypatch.setattr(archives, "_MAX_PADDING", 1 << 20)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        member = tarfile.TarInfo("tile.tif")
        member.size = (64 << 20) if bomb == "member" else 100
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    tail = bytes(64 << 20) if bomb == "tail" else b""
    path = tmp_path / "s1.tar.gz"
    path.write_bytes(gzip.compress(plain.getvalue() + tail, 9))
    said = (
        "and tile.tif in it 67,108,864" if bomb == "member" else "goes on after the end of the tar"
    )
    with pytest.raises(sources.SourceError, match=said):
        file_tree.FileTree(tmp_path).index(None)


def test_a_geotiff_that_declares_more_pixels_than_memory_has(tmp_path):
    path = tmp_path / "x.tif"
    transform = rasterio.Affine(10, 0, 0, 0, -10, 0)
    with rasterio.open(
        path, "w", driver="GTiff", width=100_000, height=100_000, count=1, dtype="uint8",
        transform=transform, sparse_ok=True, tiled=True, compress="deflate",
    ):  # fmt: skip
        pass
    with pytest.raises(
        geotiff.GeotiffError, match="declares 100000 x 100000 pixels in 1 bands, 10,0"
    ):
        geotiff.read_bands(path.read_bytes())


def write_safetensors(path: pathlib.Path, dtype: str, order: str = "<", **more) -> pathlib.Path:
    header = json.dumps({"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4], **more}})
    path.write_bytes(struct.pack(f"{order}Q", len(header)) + header.encode() + bytes(4))
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dtype": "F8_E4M3"}, "has float8 tensors, such as a: save them as float32"),
        ({"dtype": "F8_E5M2"}, "has float8 tensors, such as a: save them as float32"),
        ({"dtype": "U8", "order": ">"}, "is damaged or not a safetensors file"),
        ({"dtype": "U8", "data_offsets": [4, 0]}, "is damaged or not a safetensors file"),
        ({"dtype": "U8", "shape": [TERABYTE]}, "is damaged or not a safetensors file"),
        ({"dtype": "F32", "shape": [1 << 62, 4]}, "is damaged or not a safetensors file"),
    ],
)
def test_safetensors_that_lie(tmp_path, arguments, said):
    path = write_safetensors(tmp_path / "x.safetensors", **arguments)
    with pytest.raises(WeightsError, match=said):
        weight_files.load(str(path))


def test_a_reversed_safetensors_file(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", "U8")
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(WeightsError, match="is damaged or not a safetensors file"):
        weight_files.load(str(path))


def test_pickles_that_ask_for_terabytes(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e .[torch]")
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(1, dtype=torch.bfloat16).expand(TERABYTE, 5)}, path)
    with pytest.raises(WeightsError, match="a declares 10,995,116,277,760 bytes, and the file hol"):
        weight_files.load(str(path))
    # Of the older format, where the pickle states the size of each storage: 1000 values.
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    short, long = (
        b"M" + struct.pack("<H", 1000),
        b"\x8a\x06" + (10 * TERABYTE).to_bytes(6, "little"),
    )
    path.write_bytes(path.read_bytes().replace(short, long))
    with pytest.raises(WeightsError, match="is damaged: .*"):
        weight_files.load(str(path))


def test_a_compressed_pickle(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e .[torch]")
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored:
        content = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for name, part in content.items():
            file.writestr(name, part)
    with pytest.raises(
        WeightsError, match=r"bytes and would unpack to 4,\d+,\d+: PyTorch writes no"
    ):
        weight_files.load(str(tmp_path / "x.pt"))


def test_a_file_of_weights_larger_than_any(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "_MAX_BYTES", 10)
    path = write_safetensors(tmp_path / "x.safetensors", "U8")
    with pytest.raises(WeightsError, match="more than the 10 that a file of weights may have"):
        weight_files.load(str(path))


CORPUS = sorted(path for path in hostile.CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_a_fuzzer_found_is_read_or_refused_in_a_sentence(path):
    hostile.check(hostile.READERS[path.parent.name], path)


def test_the_corpus_is_small_and_has_readable_and_damaged_files():
    assert sum(path.stat().st_size for path in CORPUS) < 100_000
    assert {path.parent.name for path in CORPUS} == hostile.READERS.keys()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scene_table/carriage_return", "is damaged or no table: new-line character"),
        ("scene_table/long_path", r"which is no path \(.*too long"),
        ("scene_table/nul", r"names '\\x00/\*', which"),
        ("legend_csv/foreign_digits", "is not a whole number"),
        ("legend_tif/no_interpretation", "the raster cannot be read"),
        ("legend_json/triples", "has no classes with name, colour and values"),
        ("legend_json/nested", "nested too deeply"),
        ("card/nested", "nested too deeply"),
        ("card/input", "the card is damaged, its entry input is '5'"),
        ("card/by_band", "the card is damaged, its entry input is "),
        ("card/classes", "the card is damaged, its entry classes is "),
        ("geotiff/many_bands", "has 20,993 bands, more than 1,000"),
    ],
)
def test_what_is_said_of_them(name, said):
    (path,) = hostile.CORPUS.glob(f"{name}.*")
    assert re.search(said, hostile.check(hostile.READERS[path.parent.name], path))


def test_a_table_of_a_gigabyte_of_cells():
    with pytest.raises(errors.BuildError, match="has 4,000,000 columns, more than the 1,000"):
        nol_table.read_table(b"ids,sub1\n" + b"," * 4_000_000)


def test_a_legend_of_too_many_bytes_or_a_too_long_cell(tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    path.write_text("value,name,colour\n1," + "x" * 140_000 + ",#397d49\n")
    with pytest.raises(errors.BuildError, match="is damaged or no table .field larger than"):
        legends.read_legend(str(path))
    monkeypatch.setattr(legends, "MAX_BYTES", 10)
    with pytest.raises(errors.BuildError, match="bytes, more than the 10 that a legend may have"):
        legends.read_legend(str(path))


def test_a_geotiff_of_too_many_blocks(monkeypatch):
    monkeypatch.setattr(geotiff, "MAX_BLOCKS", 3)
    content = (hostile.CORPUS / "geotiff" / "deflate.tif").read_bytes()
    with pytest.raises(geotiff.GeotiffError, match="has 8 blocks, more than the 3 that a file may"):
        geotiff.read_bands(content)
