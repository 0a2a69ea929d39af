"""Data sets as their publishers release them: other folders, archives in slices, other tables."""

import os
import pathlib
import shutil
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest

from data_prep import errors
from data_prep.datasets import nol_table
from data_prep.finding import archives, sources
from data_prep.options import Options
from tests import commands
from tests.data_prep import trees


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """A tree of each data set by the sample command, and the data set built from it."""
    made = {}
    for name in trees.BUILDERS:
        root = tmp_path_factory.mktemp(name)
        tree = trees.sample(name, root / "tree")
        made[name] = (tree, trees.build(name, tree, root / "data"))
    return made


def test_dfc2020_of_the_contest(templates, tmp_path):
    tree, expected = templates["dfc2020"]
    released = trees.contest(tree, tmp_path / "released")
    assert (released / "ROIs0000_test" / "s1_0" / "ROIs0000_test_s1_0_p3.tif").is_file()
    built = trees.build("dfc2020", released, tmp_path / "data")
    assert trees.digests(built) == trees.digests(expected)
    assert built.report.counts == {}


@pytest.mark.parametrize("form", ["doubled", "zips", "zips in wrapping folders", "one zip"])
def test_dfc2020_in_other_wrappings(templates, tmp_path, form):
    tree, expected = templates["dfc2020"]
    released = tmp_path / "released"
    for folder in tree.iterdir():
        if form == "doubled":
            shutil.copytree(folder, released / folder.name / folder.name)
        elif form == "zips":
            trees.zip_folder(folder, released / f"{folder.name}.zip")
        else:
            trees.zip_folder(folder, released / f"{folder.name}.zip", f"a/b/{folder.name}/")
    if form == "one zip":
        trees.zip_folder(tree, tmp_path / "dfc.zip", "home/me/")
        released = tmp_path / "dfc.zip"
    built = trees.build("dfc2020", released, tmp_path / "data")
    assert trees.digests(built) == trees.digests(expected)


def test_dfc2020_public_bundle_is_split_by_city(templates, tmp_path):
    tree, expected = templates["dfc2020"]
    released = trees.public_bundle(tree, tmp_path / "released")
    with pytest.raises(errors.BuildError) as error:
        trees.build("dfc2020", released, tmp_path / "none")
    assert "no --test_cities was given" in str(error.value)
    assert "--test_cities=BlackForest,KippaRing,Mumbai; the others" in str(error.value)
    for cities in (("Berlin",), ("BlackForest", "KippaRing", "Mumbai")):
        options = Options(test_cities=cities)
        with pytest.raises(errors.BuildError, match="choose some, not all"):
            trees.build("dfc2020", released, tmp_path / "none", options=options)
    options = Options(test_cities=("Mumbai", "KippaRing"))
    built = trees.build("dfc2020", released, tmp_path / "data", options=options)
    ids = {
        split: [record["location_id"].decode() for record in trees.records(built, split)]
        for split in ("train", "test")
    }
    assert ids == {
        "train": ["spring_BlackForest_p1", "spring_BlackForest_p4"],
        "test": ["autumn_Mumbai_p0", "autumn_Mumbai_p3", "winter_KippaRing_p2"],
    }
    # The same command finds it, another one does not.
    flags = dict(dataset="dfc2020", source_dir=released, data_dir=tmp_path / "data")
    again = commands.run_flags("data_prep.build", **flags, test_cities="Mumbai,KippaRing")
    assert "exists, nothing was done" in again.stdout + again.stderr
    other = commands.run_flags("data_prep.build", **flags, test_cities="BlackForest")
    assert "was built with --test_cities=Mumbai,KippaRing: delete it" in other.stderr
    by_number = {key.rpartition("_")[2]: value for key, value in trees.pixels(expected).items()}
    found = {key.rpartition("_")[2]: value for key, value in trees.pixels(built).items()}
    assert found == by_number
    assert built.report.counts == {"not read": 5}
    assert "lc_Mumbai/ROIs0000_autumn_lc_Mumbai_p0.tif" in built.report.summary_path.read_text()


@pytest.mark.parametrize("name", ["dw", "osm"])
@pytest.mark.parametrize("form", ["folders", "zips"])
def test_tiles_of_ssl4eo_s12(templates, tmp_path, name, form):
    tree, expected = templates[name]
    released = trees.released_tiles(tree, tmp_path / "released", name)
    assert not any("." in file.stem for file in (released / f"{name}_test").rglob("*.tif"))
    if form == "zips":
        for split in ("train", "test"):
            folder = released / f"{name}_{split}"
            trees.zip_folder(folder, released / f"{name}_{split}.zip")
            shutil.rmtree(folder)
    built = trees.build(name, released, tmp_path / "data")
    assert trees.digests(built) == trees.digests(expected)


def test_large_training_set_of_osm(templates, tmp_path):
    tree, expected = templates["osm"]
    released = trees.released_tiles(tree, tmp_path / "released", "osm")
    shutil.move(released / "osm_train", released / "osm_train_large")
    alone = trees.build("osm", released, tmp_path / "alone")
    assert trees.digests(alone) == trees.digests(expected)
    shutil.copytree(released / "osm_train_large", released / "osm_train")
    both = trees.build("osm", released, tmp_path / "both")
    assert set(both.info.splits) == {"train", "test", "train_large"}


def test_data_sets_beside_each_other_are_kept_apart(templates, tmp_path):
    for name in ("dw", "osm", "dfc2020"):
        tree, _ = templates[name]
        if name == "dfc2020":
            trees.contest(tree, tmp_path / "all" / "dfc2020")
        else:
            trees.released_tiles(tree, tmp_path / "all", name)
    for name in ("dw", "osm", "dfc2020"):
        built = trees.build(name, tmp_path / "all", tmp_path / "data")
        assert trees.digests(built) == trees.digests(templates[name][1])


def test_twelve_bands_are_named(templates, tmp_path):
    tree, _ = templates["dw"]
    shutil.copytree(tree, tmp_path / "tree")
    file = next((tmp_path / "tree" / "train" / "image_s2").iterdir())
    trees.rewrite(file, lambda pixels: np.delete(pixels, 10, axis=0))
    with pytest.raises(errors.BuildError, match="has 12 bands, 13 are needed: B10 is missing"):
        trees.build("dw", tmp_path / "tree", tmp_path / "data")


def pack_nol(tree, released, parts):
    """SSL4EO-S12 v1 on Hugging Face: a tar.gz in slices for each sensor, a zip of labels."""
    for folder, name, path in (("s1", "s1_grd", "s1_grd"), ("s2c", "s2_l1c", "s2_l1c")):
        (released / path).mkdir(parents=True)
        packed = released / path / f"{name}.tar.gz"
        with tarfile.open(packed, "w:gz") as archive:
            # Locations without labels in NoL.
            for member in sorted((tree / folder).iterdir(), reverse=True):
                archive.add(member, f"{folder}/{int(member.name) + 100:07d}")
            archive.add(tree / folder, folder)
        trees.slice_file(packed, parts)
    with zipfile.ZipFile(released / "ssl4eo_s12_nol.zip", "w") as archive:
        for file in sorted(tree.rglob("*")):
            if file.relative_to(tree).parts[0] not in ("s1", "s2c"):
                archive.write(file, pathlib.Path("ssl4eo_s12_nol") / file.relative_to(tree))
    return released


@pytest.mark.parametrize("num_workers", [1, 2])
def test_archives_in_slices_are_read_as_one_stream(templates, tmp_path, num_workers):
    tree, expected = templates["nol"]
    released = pack_nol(tree, tmp_path / "released", parts=7)
    names = sorted(file.name for file in (released / "s1_grd").iterdir())
    assert names == [f"s1_grd.tar.gz.parta{letter}" for letter in "abcdefg"]
    built = trees.build("nol", released, tmp_path / "data", num_workers=num_workers)
    assert trees.digests(built) == trees.digests(expected)
    # Two locations with 2 x 2 and 2 x 13 files each are in the archives twice.
    assert built.report.counts == {"not read": 2}
    text = built.report.summary_path.read_text()
    assert "`s1_grd.tar.gz`: 20 files are no part of the data set: s1/0000104/" in text


def test_index_is_kept_and_holds_what_the_table_names(templates, tmp_path, monkeypatch):
    tree, expected = templates["nol"]
    released = pack_nol(tree, tmp_path / "released", parts=3)
    table = tree / "dw_complete_ids.csv"
    shutil.copy(table, released)
    trees.build("nol", released, tmp_path / "data")
    index = tmp_path / "data" / "ssl4eo_s12_nol.archives.sqlite"
    with sources.archive_index.archive_indexing.sqlite3.connect(index) as connection:
        ((count,),) = connection.execute("SELECT count(*) FROM members")
        names = {name for (name,) in connection.execute("SELECT name FROM folders")}
    connection.close()
    # S1 and S2 bands, label and truth of two seasons of five locations.
    assert count == 5 * 2 * (2 + 13 + 2)
    assert "0000004" in names
    assert "0000104" not in names

    def fail(self):
        raise AssertionError("read again")

    monkeypatch.setattr(archives.TarGz, "members", fail)
    shutil.rmtree(tmp_path / "data" / "ssl4eo_s12_nol")
    again = trees.build("nol", released, tmp_path / "data")
    assert trees.digests(again) == trees.digests(expected)
    # A changed archive is indexed again.
    shutil.rmtree(tmp_path / "data" / "ssl4eo_s12_nol")
    os.utime(released / "s1_grd" / "s1_grd.tar.gz.partab", (1, 1))
    with pytest.raises(AssertionError, match="read again"):
        trees.build("nol", released, tmp_path / "data")


def test_archives_that_begin_with_locations(templates, tmp_path):
    tree, expected = templates["nol"]
    for name in ("s1", "s2c"):
        with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(tree / name, ".")
    trees.zip_folder(tree / "dw_noisy_labels", tmp_path / "dw_noisy_labels.zip", "x/")
    shutil.copy(tree / "dw_complete_ids.csv", tmp_path)
    built = trees.build("nol", tmp_path, tmp_path / "data")
    assert trees.digests(built) == trees.digests(expected)


def test_archives_in_an_extracted_folder_hide_nothing(templates, tmp_path):
    tree, expected = templates["nol"]
    shutil.copytree(tree, tmp_path / "tree")
    (tmp_path / "tree" / "s1" / "docs.zip").write_bytes(b"")
    built = trees.build("nol", tmp_path / "tree", tmp_path / "data")
    assert trees.digests(built) == trees.digests(expected)
    assert "`s1/docs.zip`: no location" in built.report.summary_path.read_text()


def test_slow_archives_are_not_read_where_zips_are_complete(templates, tmp_path, monkeypatch):
    tree, expected = templates["dfc2020"]
    trees.zip_folder(tree, tmp_path / "dfc.zip")
    for i in range(3):
        (tmp_path / f"s2_l1c.tar.gz.parta{'abc'[i]}").write_bytes(b"hundreds of gigabytes")
    built = trees.build("dfc2020", tmp_path, tmp_path / "data")
    assert trees.digests(built) == trees.digests(expected)


@pytest.mark.parametrize("missing", [0, 2])
def test_missing_slice_is_named(templates, tmp_path, missing):
    released = pack_nol(templates["nol"][0], tmp_path / "released", parts=4)
    slices = sorted((released / "s2_l1c").iterdir())
    slices[missing].unlink()
    with pytest.raises(sources.SourceError, match=r"slices of .*s2_l1c.tar.gz are missing: found"):
        trees.build("nol", released, tmp_path / "data")


def test_missing_last_slice_is_damage(templates, tmp_path):
    released = pack_nol(templates["nol"][0], tmp_path / "released", parts=4)
    sorted((released / "s2_l1c").iterdir())[-1].unlink()
    with pytest.raises(sources.SourceError, match=r"s2_l1c.tar.gz.partaa is damaged or cut short"):
        trees.build("nol", released, tmp_path / "data")


@pytest.mark.parametrize("name", ["{}.part{}", "{}.{}", "{}.part-{}"])
def test_names_of_slices(tmp_path, name):
    (tmp_path / "a.zip").write_bytes(bytes(range(99)))
    parts = trees.slice_file(tmp_path / "a.zip", 9, name)
    (group,) = archives.group_slices(reversed(parts))
    assert (group.name, group.stem, group.parts) == ("a.zip", "a", tuple(parts))
    for other in ("a.tar.gz", "a.tar.bz2", "a.tar", "a.zip", "a.tgz", "a.tar.gz.md5"):
        assert archives.base_name(other) == other
    assert [archives.is_archive(f"x.zip.{n}") for n in ("001", "z01", "txt")] == [
        True,
        False,
        False,
    ]


def test_slices_of_a_zip_by_number(templates, tmp_path):
    tree, expected = templates["dw"]
    trees.zip_folder(tree, tmp_path / "dw.zip")
    data = (tmp_path / "dw.zip").read_bytes()
    (tmp_path / "dw.zip").unlink()
    for i, start in enumerate(range(0, len(data), 50_000)):
        (tmp_path / f"dw.zip.{i + 1:03d}").write_bytes(data[start : start + 50_000])
    built = trees.build("dw", tmp_path / "dw.zip.002", tmp_path / "data")
    assert trees.digests(built) == trees.digests(expected)


@pytest.mark.skipif(shutil.which("zip") is None, reason="the command zip is not installed")
def test_spanned_zip_names_the_remedy(templates, tmp_path):
    (tmp_path / "released").mkdir()
    command = ["zip", "-q", "-r", "-0", "-s", "64k", str(tmp_path / "released" / "nol.zip"), "."]
    subprocess.run(command, cwd=templates["nol"][0], check=True)
    assert (tmp_path / "released" / "nol.z01").is_file()
    with pytest.raises(sources.SourceError, match=r"volumes .*: join them with zip -s 0 nol.zip"):
        trees.build("nol", tmp_path / "released", tmp_path / "data")
    line = "zip -q -s 0 nol.zip --out joined.zip && rm nol.z*"
    subprocess.run(line, shell=True, cwd=tmp_path / "released", check=True)
    built = trees.build("nol", tmp_path / "released", tmp_path / "data")
    assert trees.digests(built) == trees.digests(templates["nol"][1])


def test_volumes_of_a_zip_without_the_command(tmp_path):
    for name in ("nol.z01", "nol.zip"):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(sources.SourceError, match=r"zip -s 0 nol.zip --out joined.zip"):
        trees.build("nol", tmp_path, tmp_path / "data")


def test_zarr_stores_are_no_archives(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.zarr.zip").write_bytes(b"no zip")
    with pytest.raises(sources.SourceError, match=r"Found instead: .*0.zarr.zip"):
        trees.build("nol", tmp_path, tmp_path / "data")
    with pytest.raises(
        sources.SourceError, match=r"Found instead: 0.zarr.zip \(a Zarr store, as of"
    ):
        trees.build("dw", tmp_path, tmp_path / "data")


GRANULES = ("20200604T054639_20200604T054831_T43RCP", "20200823T054639_20200823T055618_T43RCP")


@pytest.mark.parametrize(
    "lines",
    [
        ["ids,sub1,sub2", f"200,{','.join(GRANULES)}", f"0000201,{GRANULES[0]},"],
        [f"200,{','.join(GRANULES)}", f"201,{GRANULES[0]},"],
        ["ind,ids,sub1,sub2", f"0,200,{','.join(GRANULES)}", f"1,201,{GRANULES[0]},"],
        [f"0,200,{','.join(GRANULES)}", f"1,201,{GRANULES[0]},"],
        [",ids,sub1,sub2", f"0,200,{','.join(GRANULES)}", f"1,201,{GRANULES[0]},"],
        ["Unnamed: 0,ids,sub1,sub2", f"0,200,{','.join(GRANULES)}", f"1,201,{GRANULES[0]},"],
        ["sub1,sub2,IDS", f"{','.join(GRANULES)},200", f"{GRANULES[0]},,201"],
        ["ids;sub1;sub2", f"200;{';'.join(GRANULES)}", f"201;{GRANULES[0]};"],
    ],
    ids=["plain", "no header", "ind", "ind, no header", "pandas", "pandas, read again", "order",
         "semicolons"],
)  # fmt: skip
def test_table_of_locations(lines):
    found = nol_table.read_table("\r\n".join(lines).encode())
    assert found == [
        nol_table.Location("0000200", GRANULES),
        nol_table.Location("0000201", GRANULES[:1]),
    ]


@pytest.mark.parametrize("name", ["nol", "dfc2020"])
def test_what_macos_adds_is_ignored(templates, tmp_path, name):
    tree, expected = templates[name]
    released = tmp_path / "released"
    shutil.copytree(tree, released / "data")
    shutil.copytree(tree, released / "__MACOSX")
    for file in list((released / "data").rglob("*.tif"))[::3]:
        file.with_name(f"._{file.name}").write_bytes(b"shadow")
        (file.parent / ".DS_Store").write_bytes(b"")
    built = trees.build(name, released, tmp_path / "data")
    assert trees.digests(built) == trees.digests(expected)
    assert built.report.counts == {}


def test_other_case_and_endings_of_tiles(templates, tmp_path):
    tree, expected = templates["dfc2020"]
    shutil.copytree(tree, tmp_path / "tree")
    for file in (tmp_path / "tree" / "s2_test").iterdir():
        file.rename(file.with_suffix(".TIFF"))
    for folder in ("readme.txt", "s1_test/preview.png", "s1_test/x.jp2", "more.7z", "notes.rar"):
        (tmp_path / "tree" / folder).write_bytes(b"")
    built = trees.build("dfc2020", tmp_path / "tree", tmp_path / "data")
    assert trees.digests(built) == trees.digests(expected)
    assert built.report.counts == {"not read": 5}
    text = built.report.summary_path.read_text()
    for name in ("readme.txt", "s1_test/preview.png", "s1_test/x.jp2", "more.7z", "notes.rar"):
        assert f"- `{name}`: " in text
    assert "`more.7z`: archives of this kind cannot be read in place: unpack it" in text


def test_other_case_and_names_of_bands(templates, tmp_path):
    tree, expected = templates["nol"]
    shutil.copytree(tree, tmp_path / "tree")
    for file in (tmp_path / "tree" / "s2c" / "0000001").rglob("*.tif"):
        band = file.stem if len(file.stem) > 2 else f"b0{file.stem[1:]}"
        file.rename(file.with_name(f"{band}.TIF"))
    folder = next((tmp_path / "tree" / "s1" / "0000002").iterdir())
    (folder / "VV.tif.aux.xml").write_text("<PAMDataset/>")
    (folder / "quicklook.png").write_bytes(b"")
    (tmp_path / "tree" / "s1" / "0000777").mkdir()
    built = trees.build("nol", tmp_path / "tree", tmp_path / "data")
    assert trees.digests(built) == trees.digests(expected)
    text = built.report.summary_path.read_text()
    assert f"`s1/0000002/{folder.name}/quicklook.png`: no band" in text
    assert "`s1`: 1 folders are not in dw_complete_ids.csv: 0000777" in text


def test_band_in_another_format_is_named(templates, tmp_path):
    shutil.copytree(templates["nol"][0], tmp_path / "tree")
    file = next((tmp_path / "tree" / "s2c" / "0000001").rglob("B4.tif"))
    file.rename(file.with_suffix(".jp2"))
    with pytest.raises(errors.BuildError, match=r"B4.tif: missing, found B4.jp2"):
        trees.build("nol", tmp_path / "tree", tmp_path / "data")


def test_archive_of_another_kind_is_named(templates, tmp_path):
    tree, _ = templates["nol"]
    for folder in ("s1", "dw_noisy_labels"):
        shutil.copytree(tree / folder, tmp_path / "tree" / folder)
    shutil.copy(tree / "dw_complete_ids.csv", tmp_path / "tree")
    with tarfile.open(tmp_path / "tree" / "s2c.tar.bz2", "w:bz2") as archive:
        archive.add(tree / "s2c", "s2c")
    with pytest.raises(
        sources.SourceError,
        match=r"^s2c not found .* instead: \S*s2c.tar.bz2 \(arch.*: unpack it\)",
    ):
        trees.build("nol", tmp_path / "tree", tmp_path / "data")


def test_index_forgets_archives_that_are_gone(templates, tmp_path):
    tree, _ = templates["nol"]
    released = pack_nol(tree, tmp_path / "released", parts=2)
    trees.build("nol", released, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "ssl4eo_s12_nol")
    shutil.rmtree(released / "s2_l1c")
    with pytest.raises(sources.SourceError, match="^s2c not found"):
        trees.build("nol", released, tmp_path / "data")
