"""Paths with any character in the flags of the commands, and the processors that they use."""

import os
import pathlib
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_prep import cpus
from tests import commands, runs
from tests.data_prep import trees

NAMES = [
    "br[1]",
    "a b",
    "ü",
    "x*y",
    "w?",
    "{a,b}",
    "#1",
    "100%41",
    "new\nline",
    "at@8",
    "q'\"",
    "a&b;c",
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    made = {}
    for name in ("nol", "dfc2020"):
        tree = trees.sample(name, root / name, 2)
        made[name] = (tree, trees.build(name, tree, root / "data"))
    return made


@pytest.mark.parametrize("name", NAMES)
def test_any_character_in_paths(expected, tmp_path, name):
    """Folders, archives and data sets; a decoy matches each name taken as a pattern."""
    for decoy in ("br1", "xzy", "wz", "a", "b", "100A", "new"):
        (tmp_path / decoy).mkdir()
    for dataset in ("nol", "dfc2020"):
        tree, plain = expected[dataset]
        source = tmp_path / name / dataset
        source.mkdir(parents=True)
        with zipfile.ZipFile(source / f"{name}.zip", "w") as archive:
            for file in sorted(tree.rglob("*")):
                archive.write(file, file.relative_to(tree))
        built = trees.build(dataset, source, tmp_path / name / "data", num_workers=1)
        assert trees.digests(built) == trees.digests(plain)
        again = tfds.builder_from_directory(built.data_path)
        assert len(trees.records(again)) == len(trees.records(plain))


@pytest.mark.parametrize("name", ["br[1]", "new\nline", "100%41"])
def test_any_character_in_flags(tmp_path, name):
    root = tmp_path / name
    made = commands.run_flags(
        "data_prep.sample", output_dir=root / "tree", locations=2, seasons=1, tile_size=24,
        num_workers=1,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    with tarfile.open(root / "s1.tar.gz", "w:gz") as archive:
        archive.add(root / "tree" / "s1", "s1")
    for folder in ("s2c", "dw_noisy_labels", "dw_complete_ids.csv"):
        (root / "tree" / folder).rename(root / folder)
    (root / "tree").rename(tmp_path / "elsewhere")
    built = commands.run_flags(
        "data_prep.build", dataset="ssl4eo_s12_nol", source_dir=root, data_dir=root / "data",
        num_workers=2,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert built.stdout.startswith("2 locations written, 0 skipped, 2 records")
    assert (root / "data" / "ssl4eo_s12_nol.archives.sqlite").is_file()
    again = commands.run_flags(
        "data_prep.build", dataset="ssl4eo_s12_nol", source_dir=root, data_dir=root / "data"
    )
    assert "exists, nothing was done: 2 records" in again.stdout
    data_set = tfds.builder_from_directory(root / "data" / "ssl4eo_s12_nol" / "1.1.0")
    assert len(trees.records(data_set)) == 2


def test_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    for module, flags in (
        ("data_prep.sample", {"output_dir": "~/tree", "format": "dfc2020", "locations": 2}),
        ("data_prep.build", {"dataset": "dfc2020", "source_dir": "~/tree", "data_dir": "~/data"}),
    ):
        if module == "data_prep.sample":
            flags |= {"tile_size": 24}
        result = subprocess.run(
            runs.command(module, num_workers=1, **flags),
            cwd=tmp_path / "work",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "data" / "dfc2020" / "1.0.0").is_dir()
    assert list((tmp_path / "work").iterdir()) == []
    built = trees.build("dfc2020", "~/tree", "~/more")
    assert pathlib.Path(built.data_path) == tmp_path / "more" / "dfc2020" / "1.0.0"


def test_affinity_limits_the_workers():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpus.available() == 1
        line = runs.command("data_prep.build", help=True)
        result = subprocess.run(line, cwd=runs.ROOT, capture_output=True, text=True)
        flag = result.stdout.split("--num_workers: ")[1].split("--patch_size")[0]
        assert "(default: '1')" in flag
    finally:
        os.sched_setaffinity(0, before)
    assert cpus.available() <= len(before)


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({"cpu.max": "max 100000"}, "0::/", np.inf),
        ({"cpu.max": "250000 100000"}, "0::/", 2.5),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, "0::/a/b", 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/", np.inf),
        (
            {
                "cpu,cpuacct/d/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/d/cpu.cfs_period_us": "100000",
            },
            "4:cpu,cpuacct:/d\n5:memory:/d",
            3,
        ),
        ({}, "", np.inf),
    ],
)
def test_quota_of_cgroups(tmp_path, files, own, expected):
    write(tmp_path, files)
    (tmp_path / "own").write_text(own)
    folders = cpus._cgroup_folders(tmp_path, tmp_path / "own")
    assert min(cpus._quota(folder) for folder in folders) == expected
