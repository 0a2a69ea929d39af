"""The paper's recipe, number by number, and the variants of it."""

import pytest

from configs import pretrain
from cromss_jax import command_line, package, sensors


def test_the_papers_recipe():
    config = pretrain.get_config()
    assert (config.batch_size, config.num_epochs) == (128, 200)
    assert (config.data.crop_size, config.data.validation_fraction) == (256, 0.01)
    augmentation = config.augmentation.to_dict()
    assert augmentation == dict(flip_probability=0.5, rotation_probability=0.2, max_angle=90.0)
    assert config.modalities == ("s1", "s2")
    assert config.s2_bands == sensors.S2_BANDS
    assert (config.network.fusion, config.network.depth) == ("mid", 50)
    assert config.loss.to_dict() == dict(
        segmentation=("cross_entropy", "dice"),
        consistency="ce",
        consistency_weight=1.0,
        prior="ts",
        prior_weight=0.15,
        uniform_weight=0.05,
    )
    assert config.selection.to_dict() == dict(
        enabled=True,
        confidence="entropy",
        final_keep_fraction=0.5,
        ramp="exp",
        ramp_epochs=80,
        scope="global",
    )
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.l2) == ("adam", 0.005, 1e-8)
    schedule = config.schedule
    assert (schedule.name, schedule.factor, schedule.patience) == ("plateau", 0.5, 30)


def test_variants():
    late = pretrain.get_config("fusion=late,bands=9")
    assert (late.network.fusion, len(late.s2_bands)) == ("late", 9)
    single = pretrain.get_config("modality=s1")
    assert single.modalities == ("s1",)
    assert (single.network.fusion, single.loss.consistency) == ("none", "none")
    assert not pretrain.get_config("selection=off").selection.enabled
    small = pretrain.get_config("sample,fusion=late")
    assert (small.network.depth, small.network.fusion) == (18, "late")


@pytest.mark.parametrize("argument", ["sampel", "fusion=early", "bands=4", "selection", "sample=1"])
def test_unknown_variants_are_refused(argument):
    with pytest.raises(ValueError, match=r"has no variant .*: choose from sample, fusion=mid"):
        pretrain.get_config(argument)


def test_a_file_of_the_current_folder_is_preferred_to_the_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = package.ROOT / "configs/pretrain.py"
    assert command_line.find_config("configs/pretrain.py") == packaged
    own = tmp_path / "configs/pretrain.py"
    own.parent.mkdir()
    own.touch()
    assert command_line.find_config("configs/pretrain.py").absolute() == own
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command_line.find_config("~/configs/pretrain.py") == own


@pytest.mark.parametrize(
    ("path", "looked_for"),
    [
        ("configs/pretrian.py", "HERE/configs/pretrian.py and PACKAGE/configs/pretrian.py"),
        ("pretrain.py", "HERE/pretrain.py"),
        ("cromss_jax/main.py", "HERE/cromss_jax/main.py"),
        ("/none/pretrain.py", "/none/pretrain.py"),
    ],
)
def test_a_missing_file_says_where_it_was_looked_for(path, looked_for, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    looked_for = looked_for.replace("HERE", str(tmp_path)).replace("PACKAGE", str(package.ROOT))
    with pytest.raises(ValueError) as error:
        command_line.find_config(path)
    assert str(error.value) == (
        f"no such file, looked for {looked_for}; name a file of your own or one of the package's: "
        "configs/finetune.py, configs/pretrain.py"
    )
