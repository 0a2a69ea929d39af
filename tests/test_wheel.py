"""The wheel, installed where nothing else of the project is, in an empty folder."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tomllib

import pytest

from cromss_jax import package
from tests import environment, runs

# What belongs to the distribution, by the name it has there.
SOURCES = {"cromss_jax": "cromss_jax", "cromss_jax/configs": "configs", "data_prep": "data_prep"}


def version() -> str:
    """As pyproject.toml says."""
    return tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of packages that holds the wheel alone."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, as setuptools builds in the folder and takes what an earlier build left there.
    for name in SOURCES.values():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(runs.ROOT / name, folder / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(runs.ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, folder / "source"]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", wheel], check=True)
    return folder / "site"


def run(site: pathlib.Path, folder: pathlib.Path, *line: str) -> subprocess.CompletedProcess:
    """Runs Python in a folder, which is the home folder too, with the wheel and its dependencies.

    -S leaves out the .pth files, by which the checkout may be installed where the tests run.
    """
    paths = dict.fromkeys([str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, "-S", *line], cwd=folder, env=variables, capture_output=True, text=True
    )


def test_it_holds_every_module_and_no_other_top_level_name(site):
    info = f"cromss_jax-{version()}.dist-info"
    assert {path.name for path in site.iterdir()} == {"cromss_jax", "data_prep", info}
    expected = {
        f"{name}/{path.relative_to(runs.ROOT / source)}"
        for name, source in SOURCES.items()
        for path in (runs.ROOT / source).rglob("*.py")
    }
    assert {str(path.relative_to(site)) for path in site.rglob("*.py")} == expected


@pytest.mark.slow
def test_sample_build_and_training_run_in_an_empty_folder(site, tmp_path, monkeypatch):
    """The home folder's `~` is expanded, too, by the command line."""
    # No numbers are compared, so nothing need be compiled as users do.
    monkeypatch.setenv("XLA_FLAGS", environment.quick_flags())
    flags = {f"config.{name}": value for name, value in runs.tiny_flags("~/data/sample").items()}
    flags |= {"config.num_epochs": 1}
    training = dict(config="configs/pretrain.py:sample", workdir="~/runs/sample", **flags)
    sizes = dict(locations=16, seasons=2, tile_size=48, seed=0)
    building = dict(source_dir="geotiffs", data_dir="data/sample", dataset="ssl4eo_s12_nol")
    for line in (
        runs.command("data_prep.sample", output_dir="geotiffs", **sizes),
        runs.command("data_prep.build", **building),
        runs.command("cromss_jax.main", **training),
    ):
        done = run(site, tmp_path, *line[1:])
        assert done.returncode == 0, done.stderr
    found = site / "cromss_jax/configs/pretrain.py"
    assert f"--config=configs/pretrain.py: taken from the package, {found}\n" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"geotiffs", "data", "runs"}
    assert not (tmp_path / "~").exists()
    workdir = tmp_path / "runs/sample"
    assert "| S1 against truth |" in (workdir / "results.md").read_text()
    assert (
        json.loads((workdir / "config.json").read_text())["schedule"]["decay"] == 0.8
    )  # of :sample
    assert json.loads((workdir / "versions.json").read_text())["cromss_jax"] == version()


def test_mistakes_are_told_in_a_sentence(site, tmp_path):
    flags = dict(config="configs/pretrian.py:sample", workdir="runs")
    mistyped = run(site, tmp_path, *runs.command("cromss_jax.main", **flags)[1:])
    assert mistyped.returncode == 1
    assert mistyped.stderr == (
        "error: flag --config=configs/pretrian.py:sample: no such file, looked for "
        f"{tmp_path}/configs/pretrian.py and {site}/cromss_jax/configs/pretrian.py; name a file of "
        "your own or one of the package's: configs/finetune.py, configs/pretrain.py (--helpshort "
        "lists the flags)\n"
    )
    flags = dict(config="configs/finetune.py:task=osm", workdir="s3://bucket/run")
    stored = run(site, tmp_path, *runs.command("cromss_jax.main", **flags)[1:])
    assert stored.returncode == 1
    assert stored.stderr.splitlines()[1:] == [
        "error: s3://bucket/run: s3:// is not supported: use a local folder or gs://BUCKET/PATH"
    ]
    flags = dict(config="configs/pretrain.py", workdir="gs://b/mid", data_dir="gs://b/data")
    flags |= dict(name="mid", cluster="cluster", tpu_type="v5e:4x4")
    launched = run(site, tmp_path, *runs.command("cromss_jax.launch_tpu", **flags)[1:])
    assert launched.returncode == 1
    assert "is not a git checkout, and hosts get a commit" in launched.stderr
    flags |= dict(image="eu.gcr.io/a/b:1", dry_run=True)
    of_image = run(site, tmp_path, *runs.command("cromss_jax.launch_tpu", **flags)[1:])
    assert of_image.returncode == 0, of_image.stderr
    assert "cromss_jax.main --config=configs/pretrain.py --config.data" in of_image.stdout
    assert not {"runs", "s3:", "~"} & {path.name for path in tmp_path.iterdir()}


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch):
    def none_installed(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none_installed)
    assert package.version() == version()
