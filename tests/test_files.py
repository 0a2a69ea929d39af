"""Which paths are taken, and what they mean."""

import re

import pytest

import cromss_jax
from cromss_jax import compare, files
from cromss_jax.data import input_pipeline
from cromss_jax.training import pretrain
from cromss_jax.weights import files as weight_files
from cromss_jax.weights.network import WeightsError
from tests import commands, runs


def test_paths_are_absolute_and_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    given = ("runs/a", "~/runs/a", "/runs/~", "a:/b", "gs://bucket/a")
    expected = (
        *(f"{tmp_path}/runs/a", "/home/someone/runs/a", "/runs/~", f"{tmp_path}/a:/b"),
        "gs://bucket/a",
    )
    assert tuple(str(files.absolute(path)) for path in given) == expected
    assert tuple(str(files.absolute(files.absolute(path))) for path in given) == expected
    with pytest.raises(input_pipeline.DataError, match="found: /home/someone/data/dfc2020/"):
        input_pipeline.open_dataset("~/data", "dfc2020")
    with pytest.raises(WeightsError, match="/home/someone/a.safetensors does not exist"):
        weight_files.load("~/a.safetensors")


@pytest.mark.parametrize("address", ["s3://b/run", "az://b", "hf://b/c", "file:///b", "GS://b"])
def test_other_storage_is_refused(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scheme = address.partition("://")[0]
    sentence = f"^{address}: {scheme}:// is not supported: use a local folder or gs://BUCKET"
    with pytest.raises(files.PathError, match=sentence):
        files.absolute(address)
    with pytest.raises(files.PathError, match=sentence):
        input_pipeline.open_dataset(address, "dfc2020")
    with pytest.raises(files.PathError, match=sentence):
        pretrain.pretrain(runs.tiny_config("data"), address)
    with pytest.raises(WeightsError, match=sentence):
        weight_files.load(address)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("a\\b/run", r"\\ in a path is taken for / by TensorStore: rename"),
        ("gs:/bucket/run", "gs:/ in a path is taken for a bucket by Orbax: write gs://BUCKET/PATH"),
        ("/gs/run", "/gs in a path is taken for a bucket by epath: use a folder of another name"),
        ("/s3", "/s3 in a path is taken for a bucket by epath"),
        ("run\udcff", "\udcff in a path is no character in UTF-8: rename"),
        ("~nobody_here/run", "there is no user nobody_here; write ./~nobody_here for a folder"),
    ],
)
def test_what_would_be_another_path_is_refused_before_anything_is_written(
    path, sentence, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(files.PathError, match=f"^{re.escape(path)}: {sentence}"):
        pretrain.pretrain(runs.tiny_config("data"), path)
    with pytest.raises(ValueError, match=sentence):
        cromss_jax.load(path)
    with pytest.raises(files.PathError, match=sentence):
        compare.table([path])
    assert not list(tmp_path.iterdir())


def test_a_folders_own_name_is_no_pattern(tmp_path):
    for name in ("br[1]", "br1", "a*", "ab"):
        (tmp_path / name / "below").mkdir(parents=True)
    for name in ("br[1]", "a*"):
        (found,) = (files.absolute(tmp_path) / name).glob("b*")
        assert found == tmp_path / name / "below"
        assert type(found) is type(files.absolute(tmp_path))


def test_an_empty_path_is_not_the_current_folder():
    """As of --workdir=$UNSET."""
    with pytest.raises(files.PathError, match="a path is empty: name a folder"):
        files.absolute("")


def test_a_config_whose_path_holds_a_colon_is_refused(tmp_path):
    path = tmp_path / "a:b" / "own.py"
    path.parent.mkdir()
    path.write_text("")
    flags = dict(config=f"{path}:sample", workdir=tmp_path / "run")
    done = commands.run_flags("cromss_jax.main", **flags)
    assert done.returncode == 1
    assert f"{path} holds a colon, which separates the file from its variants" in done.stderr
    assert not (tmp_path / "run").exists()
