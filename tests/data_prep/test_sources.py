import gzip
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import pytest

from data_prep.finding import archives, component_tree, sources

COMPONENTS = ("images", "labels", "table.csv")
FILES = {
    "images/0001/a.bin": np.random.default_rng(1).bytes(3000),
    "images/0001/b.bin": np.random.default_rng(2).bytes(2000),
    "images/0002/a.bin": np.random.default_rng(3).bytes(1000),
    "labels/0001/c.bin": b"label",
    "table.csv": b"ids\n1\n",
}


def open_source(path, components):
    source = component_tree.ComponentTree(path, components)
    source.index()
    return source


def write_folders(root, keep=lambda path: True):
    for path, data in FILES.items():
        if keep(path):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)


def write_archive(path, tmp_path, keep=lambda path: True, prefix=""):
    folder = tmp_path / "to_pack"
    write_folders(folder / prefix, keep)
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder))
            archive.writestr("__MACOSX/images/0001/._a.bin", b"shadow")
    else:
        mode = "w" if path.name.endswith(".tar") else "w:gz"
        with tarfile.open(path, mode) as archive:
            archive.add(folder, ".")
    shutil.rmtree(folder)


def assert_holds_all(source):
    assert source.found == set(COMPONENTS)
    assert source.folders("images") == ["0001", "0002"]
    assert source.folders("images/0001") == []
    assert source.folders("images/0003") == []
    assert source.files("images/0001") == ["a.bin", "b.bin"]
    for path in ("images", "images/0003", "images/0001/a.bin", "table.csv"):
        assert source.files(path) == []
    for path, data in FILES.items():
        assert source.has_file(path)
        assert source.read(path) == data
    assert not source.has_file("images/0001")
    for path in ("images/0009/a.bin", "images/0001", "table.csv/x"):
        with pytest.raises(sources.UnreadableError, match=r"missing|directory"):
            source.read(path)


@pytest.mark.parametrize("prefix", ["", "some/folder"])
@pytest.mark.parametrize("name", ["folder", "all.zip", "all.tar", "all.tar.gz", "all.tgz"])
def test_folder_or_archive(tmp_path, name, prefix):
    path = tmp_path / name
    if name == "folder":
        write_folders(path / prefix)
    else:
        write_archive(path, tmp_path, prefix=prefix)
    source = open_source(path, COMPONENTS)
    assert_holds_all(source)
    # What a worker gets.
    assert_holds_all(pickle.loads(pickle.dumps(source)))


def test_mixture(tmp_path):
    root = tmp_path / "root"
    write_folders(root / "here", lambda path: path == "table.csv")
    write_archive(root / "a.zip", tmp_path, lambda path: "labels" in path)
    write_archive(root / "0001.tar.gz", tmp_path, lambda path: "images/0001" in path, "x")
    write_archive(root / "0002.tar", tmp_path, lambda path: "images/0002" in path)
    assert_holds_all(open_source(root, COMPONENTS))


def test_archive_beside_its_extracted_folder_is_not_opened(tmp_path):
    write_folders(tmp_path, lambda path: "images" in path)
    (tmp_path / "images.tar.gz").write_bytes(b"not even an archive")
    assert open_source(tmp_path, COMPONENTS).found == {"images"}


def test_gzip_index_of_many_points(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "GZIP_SPACING", 1 << 16)
    files = {f"images/{i:04d}": np.random.default_rng(i).bytes(50_000) for i in range(40)}
    path = tmp_path / "images.tar.gz"
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "images", "images")
    original = open_source(path, COMPONENTS)
    source = pickle.loads(pickle.dumps(original))
    for name in np.random.default_rng(0).permutation(list(files)):
        assert source.read(str(name)) == files[name]


@pytest.mark.parametrize("name", ["all.zip", "all.tar", "all.tar.gz"])
def test_cut_archive_is_an_error(tmp_path, name):
    path = tmp_path / name
    write_archive(path, tmp_path)
    data = path.read_bytes()
    # Behind the content of the last member lie zeros alone, 60 bytes when compressed.
    end = data.index(b"ids\n1\n") + 6 if name == "all.tar" else len(data) - 60
    for length in (0, 1, 100, end // 3, end // 2, end - 600, end - 1):
        path.write_bytes(data[:length])
        with pytest.raises(sources.SourceError, match="damaged or cut short"):
            open_source(path, COMPONENTS)


@pytest.mark.parametrize("position", [30, 3000, -6])
def test_flipped_byte_in_gzip_is_an_error(tmp_path, position):
    path = tmp_path / "all.tar.gz"
    write_archive(path, tmp_path)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(sources.SourceError, match="damaged or cut short"):
        open_source(path, COMPONENTS)


def test_flipped_byte_in_zip_is_unreadable(tmp_path):
    path = tmp_path / "all.zip"
    write_archive(path, tmp_path)
    data = bytearray(path.read_bytes())
    # Random bytes do not compress: the member holds them as they are.
    data[data.index(FILES["images/0001/a.bin"][1000:1020])] ^= 1
    path.write_bytes(data)
    source = open_source(path, COMPONENTS)
    with pytest.raises(sources.UnreadableError, match="CRC"):
        source.read("images/0001/a.bin")
    assert source.read("images/0001/b.bin") == FILES["images/0001/b.bin"]


def test_component_found_twice_is_an_error(tmp_path):
    write_folders(tmp_path / "a")
    write_folders(tmp_path / "b")
    with pytest.raises(sources.SourceError, match="was found twice"):
        open_source(tmp_path, COMPONENTS)
    write_archive(tmp_path / "one.zip", tmp_path)
    write_archive(tmp_path / "two.tar", tmp_path)
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(sources.SourceError, match="is in two archives"):
        open_source(tmp_path, COMPONENTS)


def test_no_such_folder(tmp_path):
    with pytest.raises(sources.SourceError, match="neither a folder nor an archive"):
        open_source(tmp_path / "nowhere", COMPONENTS)


@pytest.mark.parametrize("name", ["all.tar", "all.tar.gz"])
def test_an_archive_cut_anywhere_before_its_end_is_named(tmp_path, name):
    write_archive(tmp_path / "all.tar", tmp_path)
    plain = (tmp_path / "all.tar").read_bytes()
    (tmp_path / "all.tar").unlink()
    path = tmp_path / name
    end = len(plain.rstrip(b"\0"))
    blocks = -(-end // tarfile.BLOCKSIZE)
    # At the border of every block: tarfile itself takes most of these for the end.
    for length in [*range(0, blocks * tarfile.BLOCKSIZE, tarfile.BLOCKSIZE), 700, end - 1]:
        cut = plain[:length]
        path.write_bytes(gzip.compress(cut, 1) if name.endswith("gz") else cut)
        with pytest.raises(sources.SourceError, match=f"{name} is damaged or cut short"):
            open_source(tmp_path, COMPONENTS)
    path.write_bytes(gzip.compress(plain, 1) if name.endswith("gz") else plain)
    assert_holds_all(open_source(tmp_path, COMPONENTS))
