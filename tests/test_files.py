"""Which paths are taken, and what they mean."""

import pytest

from cromss_jax import files
from cromss_jax.data import input_pipeline
from cromss_jax.training import pretrain
from cromss_jax.weights import files as weight_files
from cromss_jax.weights.network import WeightsError
from tests import runs


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
