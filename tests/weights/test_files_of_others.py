"""Files as other libraries write them: what wraps the weights, what lies beside them, the bands."""

import argparse
import collections
import datetime
import json
import pathlib
import re
import shlex
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from configs import finetune, pretrain
from cromss_jax import convert, sensors
from cromss_jax.training import pretrain_step, run
from cromss_jax.training.state import start_from
from cromss_jax.weights import cards, folders, torch_keys
from cromss_jax.weights import files as weight_files
from cromss_jax.weights.layouts import to_layout
from cromss_jax.weights.network import Network, WeightsError
from tests.weights.test_convert import assert_same, random_weights, recognised

S1, S2 = sensors.S1_BANDS, sensors.S2_BANDS
torch = pytest.importorskip("torch")


def tensors(weights, prefix="", layout=None) -> dict:
    arrays = to_layout(weights, layout, None)[1] if layout else weights.arrays
    return {prefix + key: torch.from_numpy(array) for key, array in arrays.items()}


@pytest.fixture(scope="module")
def unet():
    return random_weights("none", 10, {"s2": S2})


@pytest.fixture(scope="module")
def other():
    """The same network with other numbers: a moving average of `unet`."""
    return random_weights("none", 10, {"s2": S2}, seed=1)


@pytest.fixture
def load(tmp_path):
    def save_and_load(content, zipped=True, **arguments):
        path = tmp_path / "theirs.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        return weight_files.load(str(path), **arguments)

    return save_and_load


# What wraps them.

OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]}
TOOK = "took the tensors under `{}`"
ASSUMED = f"S2 has 13 bands, assumed to be {' '.join(S2)}"


def lightning(state_dict):
    return {
        "epoch": 9,
        "global_step": 90,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state_dict,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 10}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best": torch.tensor(0.5)}},
        "optimizer_states": [OPTIMIZER],
        "lr_schedulers": [{"best": 0.5}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"model": "unet", "class_weights": torch.ones(9)},
    }


CRITERION = {"criterion.weight": torch.ones(9)}
HYPER = "hyper_parameters.class_weights"
AUXILIARY = {"classification_head.3.weight": torch.ones(9)}
WRAPPED = {
    "torchgeo": (
        lambda w: lightning(tensors(w, "model.") | CRITERION),
        "state_dict.model.",
        (f"{HYPER}, state_dict.criterion.weight",),
    ),
    "terratorch": (
        lambda w: lightning(tensors(w, "model.smp_model.") | CRITERION),
        "state_dict.model.smp_model.",
        (f"{HYPER}, state_dict.criterion.weight",),
    ),
    "smp": (lambda w: tensors(w) | AUXILIARY, "", ("classification_head.3.weight",)),
    "PyTorch's tutorial": (
        lambda w: {"epoch": 3, "model_state_dict": tensors(w), "optimizer_state_dict": OPTIMIZER},
        "model_state_dict.",
        (),
    ),
    "model": (lambda w: {"model": tensors(w), "optimizer": OPTIMIZER}, "model.", ()),
    "net": (lambda w: {"net": tensors(w), "acc": 0.9}, "net.", ()),
    "network": (lambda w: {"network": tensors(w)}, "network.", ()),
    "nested": (lambda w: {"model": {"weights": tensors(w)}}, "model.weights.", ()),
    "DataParallel": (lambda w: {"model": tensors(w, "module.")}, "model.", ()),
    "DeepSpeed": (lambda w: {"module": tensors(w), "dp_world_size": 8}, "", ()),
    "torch.compile": (lambda w: tensors(w, "model._orig_mod.module."), "model.", ()),
    "FSDP": (lambda w: tensors(w, "_fsdp_wrapped_module.model."), "model.", ()),
    "a dict a part": (
        lambda w: {
            part: {
                key.removeprefix(f"{part}."): tensor
                for key, tensor in tensors(w).items()
                if key.startswith(f"{part}.")
            }
            for part in ("encoder", "decoder", "segmentation_head")
        },
        "",
        (),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_network_is_found_whatever_wraps_it(load, unet, name):
    content, prefix, skipped = WRAPPED[name]
    found = load(content(unet))
    assert found.network == unet.network
    assert_same(found.arrays, unet.arrays)
    took = (TOOK.format(prefix),) if prefix else ()
    left = tuple(f"skipped {keys}: not part of the network" for keys in skipped)
    assert found.notes == (*took, *left, ASSUMED)


AVERAGED = {
    # timm
    "state_dict_ema": lambda w, o: {"state_dict": tensors(w), "state_dict_ema": tensors(o)},
    # torchvision; `AveragedModel` counts its updates
    "model_ema": lambda w, o: {
        "model": tensors(w),
        "model_ema": tensors(o, "module.") | {"n_averaged": torch.tensor(7)},
    },
    # Lightning's WeightAveraging
    "state_dict.model": lambda w, o: {
        **lightning(tensors(o, "model.")),
        "current_model_state": tensors(w, "model."),
        "averaging_state": {"n_averaged": torch.tensor(7)},
    },
    # inside of a Lightning module
    "ema": lambda w, o: {"state_dict": tensors(w, "model.") | tensors(o, "ema.module.")},
    # beside a network without prefix
    "model_ema.net": lambda w, o: tensors(w) | tensors(o, "model_ema.net."),
}


@pytest.mark.parametrize("name", AVERAGED)
def test_a_moving_average_is_taken_only_if_asked(load, tmp_path, unet, other, name):
    content = AVERAGED[name](unet, other)
    found = load(content)
    assert_same(found.arrays, unet.arrays)
    (skipped,) = (note for note in found.notes if note.startswith("skipped the network"))
    assert f"{name}.`: `python -m cromss_jax.convert from_torch --take=" in skipped
    summary = convert.from_torch(
        str(tmp_path / "theirs.pth"), str(tmp_path / "averaged"), take=name
    )
    assert f"{name}.`" in summary
    assert_same(weight_files.load(str(tmp_path / "averaged")).arrays, other.arrays)


def test_a_moving_average_that_is_alone_is_taken(load, other):
    found = load({"state_dict_ema": tensors(other), "epoch": 9})
    assert_same(found.arrays, other.arrays)
    assert found.notes[0] == TOOK.format("state_dict_ema.")


SELF_SUPERVISED = {
    "MoCo v2": ("state_dict.module.encoder_q.", "state_dict.module.encoder_k."),
    "MoCo v3": ("state_dict.module.base_encoder.", "state_dict.module.momentum_encoder."),
    "DINO": ("teacher.module.backbone.", "student.module.backbone."),
    "lightly": ("state_dict.backbone.", "state_dict.backbone_momentum."),
    "BYOL": ("state_dict.model.backbone.", "state_dict.model.target_backbone."),
}


@pytest.mark.parametrize("name", SELF_SUPERVISED)
def test_encoders_of_self_supervised_methods(load, name):
    """The trained encoder is taken; of DINO the teacher, as DINO is used."""
    ours, copy = (random_weights("encoder", 10, {"s2": S2}, None, seed=s) for s in (0, 1))
    wanted, unwanted = SELF_SUPERVISED[name]
    content: dict = {"epoch": 99, "optimizer": OPTIMIZER}
    for prefix, weights in ((wanted, ours), (unwanted, copy)):
        outer, inner = prefix.split(".", 1)
        more = {f"{inner}fc.0.weight": torch.ones(2), "queue": torch.ones(3)}
        content.setdefault(outer, {}).update(tensors(weights, inner, "torchvision") | more)
    found = load(content)
    assert_same(found.arrays, ours.arrays)
    unwanted = unwanted.replace("module.", "")
    assert any(note.startswith(f"skipped the network under `{unwanted}`") for note in found.notes)
    assert any("fc.0.weight: a classifier" in note for note in found.notes)
    chosen = unwanted.rstrip(".").split(".")[0 if name == "DINO" else -1]
    assert_same(load(content, take=chosen).arrays, copy.arrays)


def test_an_encoder_of_smp_beside_heads_of_others(load, unet):
    """Without decoder and head of smp it is an encoder, not a broken network."""
    encoder = {k: v for k, v in tensors(unet, "model.").items() if ".encoder." in k}
    found = load({"state_dict": encoder | {"model.projector.weight": torch.ones(2)}})
    assert found.network == Network("encoder", 10, {"s2": S2}, None)
    assert "skipped state_dict.model.projector.weight: not part of the network" in found.notes
    with pytest.raises(WeightsError, match="segmentation_head.0.weight is missing"):
        load({k: v for k, v in tensors(unet).items() if not k.startswith("seg")})


def test_which_of_several_networks_must_be_clear(load, unet, other, tmp_path):
    several = {"generator": tensors(unet), "critic": tensors(other)}
    with pytest.raises(WeightsError, match="several networks: critic, generator; choose one by"):
        load(several)
    assert_same(load(several, take="critic").arrays, other.arrays)
    for name, count in (("discriminator", 0), ("model", 2)):
        with pytest.raises(
            WeightsError, match=f"--take={name} names {count} of .*from model.critic"
        ):
            load({"model": several}, take=name)
    folders.write_folder(epath.Path(tmp_path / "ours"), unet)
    with pytest.raises(WeightsError, match="a folder holds one network: remove --take"):
        weight_files.load(str(tmp_path / "ours"), take="critic")
    with pytest.raises(WeightsError, match="the same key but for a component such as `module.`"):
        load({"model": tensors(unet) | tensors(other, "module.")})


def test_tensors_that_are_no_arrays(load, unet):
    key = "encoder.conv1.weight"
    content = tensors(unet)
    content["optimizer.sparse"] = torch.ones(2, 2).to_sparse()  # no matter, it is not used
    assert_same(load(content).arrays, unet.arrays)
    content[key] = content[key].to_sparse()
    with pytest.raises(WeightsError, match=f"expected plain tensors, .*: {key}$"):
        load(content)
    content: dict = {"state_dict": tensors(unet)}
    content["itself"] = content
    assert_same(load(content).arrays, unet.arrays)


# What lies beside them.


class Named:
    """Pickles as a call of something that a file may name."""

    def __init__(self, called, *arguments):
        self.called, self.arguments = called, arguments

    def __reduce__(self):
        return self.called, self.arguments


def beside() -> dict:
    return {
        "best_miou": np.float64(0.51),
        "steps": [np.int64(3), np.bool_(True), np.float32(1)],
        "confusion": np.eye(3),
        "numpy_rng": np.random.default_rng(0).integers(0, 9, 4),
        "dirpath": pathlib.Path("/runs/x"),
        pathlib.PurePosixPath("as/a/key"): 1,
        "there": Named(pathlib.WindowsPath, "C:\\runs"),
        "saved": datetime.datetime.now(datetime.UTC),
        "took": datetime.timedelta(hours=3),
        "args": argparse.Namespace(out=pathlib.Path("x"), lr=np.float64(0.1)),
        "history": collections.defaultdict(list, loss=[np.float64(1.0)]),
        "window": collections.deque([0.1, 0.2], maxlen=20),
        "torch": torch.__version__,
        "slice": slice(0, 3),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_harmless_beside_the_weights(load, unet, zipped):
    content = {**beside(), "state_dict": tensors(unet, "model."), "hyper_parameters": beside()}
    assert_same(load(content, zipped).arrays, unet.arrays)


def test_numpy_1_and_python_3_13_have_other_names(load, unet, tmp_path):
    load({"model": tensors(unet), **beside()}, zipped=False)
    path = tmp_path / "theirs.pth"
    content = path.read_bytes()
    for ours, theirs in (
        (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"),
        (b"cpathlib\n", b"cpathlib._local\n"),
    ):
        assert ours in content or theirs in content
        content = content.replace(ours, theirs)
    path.write_bytes(content)
    assert_same(weight_files.load(str(path)).arrays, unet.arrays)


def test_harmless_things_are_not_built(load, unet):
    """A stand-in takes their place: what these files ask for could not be built."""
    for named in (
        Named(np.float64(1).__reduce__()[0], "no dtype"),
        Named(np.dtype, "no dtype"),
        Named(pathlib.PurePosixPath, 3),
        Named(datetime.date, "yesterday"),
        Named(range, "x"),
    ):
        with pytest.raises((TypeError, ValueError)):
            named.called(*named.arguments)
        assert_same(load({"model": tensors(unet), "x": named}).arrays, unet.arrays)


def test_settings_of_libraries_that_are_not_installed(load, unet, monkeypatch):
    """Lightning's AttributeDict is a dict; Hydra's DictConfig keeps its content in attributes."""
    content: dict = {"state_dict": collections.defaultdict(list, tensors(unet))}
    for module, name, base in (
        ("omegaconf.dictconfig", "DictConfig", object),
        ("pytorch_lightning.utilities.parsing", "AttributeDict", dict),
        ("lightning.fabric.utilities.data", "AttributeDict", dict),
    ):
        cls = type(name, (base,), {"__module__": module})
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            package = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        setattr(sys.modules[module], name, cls)
        content[module] = cls() if base is object else cls(lr=0.1, out=pathlib.Path("x"))
        if base is object:
            content[module]._content = {"lr": np.float64(0.1), "type": dict}
    assert_same(load(content).arrays, unet.arrays)


def test_the_remedy_for_what_is_refused_works(load, unet, tmp_path, monkeypatch):
    """A class of the file's own library, such as torchgeo's enumerations of weights."""
    module = types.ModuleType("theirs")
    module.Weights = type("Weights", (), {"__module__": "theirs"})
    monkeypatch.setitem(sys.modules, "theirs", module)
    content = {"state_dict": tensors(unet, "model."), "hyper_parameters": {"w": module.Weights()}}
    with pytest.raises(
        WeightsError, match="contains theirs.Weights, which is not weights; none o"
    ) as e:
        load(content)
    assert "\n" not in str(e.value)
    assert "which runs the code in the file" in str(e.value)
    (command,) = re.findall(r"`python -c (.*?)`", str(e.value))
    (tmp_path / "theirs.py").write_text("class Weights: pass\n")
    line = [sys.executable, "-c", *shlex.split(command)]
    subprocess.run(line, check=True, cwd=tmp_path, capture_output=True)
    assert_same(weight_files.load(str(tmp_path / "weights.pt")).arrays, unet.arrays)


def test_whole_models_and_programs(tmp_path, unet):
    linear = torch.nn.Linear(2, 2)
    torch.save(linear, tmp_path / "model.pt")
    with pytest.raises(
        WeightsError, match=r"contains torch.nn.modules.linear.Linear.*\.state_dict"
    ):
        weight_files.load(str(tmp_path / "model.pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch is about to give it up
        torch.jit.save(torch.jit.script(linear), tmp_path / "script.pt")
    with pytest.raises(WeightsError, match="is a TorchScript program.*torch.jit.load"):
        weight_files.load(str(tmp_path / "script.pt"))


# Bands.

NINE, TWELVE = sensors.S2_BAND_SUBSETS[9], sensors.S2_BAND_SUBSETS[12]


@pytest.mark.parametrize("fusion", ["none", "encoder", "encoders"])
@pytest.mark.parametrize(
    ("bands", "candidates"),
    [
        (NINE, r"B2,B3,B4,B5,B6,B7,B8,B11,B12 \(CromSS\); or B2,.*,B8A and an index such as NDVI"),
        (TWELVE, r"B1,B2,.*,B9,B11,B12 \(Level-2A, CromSS\); or ten bands and S1"),
        (S2[1:11], r"candidates are B2,B3,B4,B5,B6,B7,B8,B8A,B11,B12 \(BigEarthNet\)"),
        (("B2", "B3", "B4", "B8"), "candidates are B2,B3,B4,B8; or B4,B3,B2,B8"),
        (S2[:5], "cromss_jax.load$"),
    ],
)
def test_bands_must_be_named_where_their_number_does_not_tell(fusion, bands, candidates):
    by_modality = {"s1": S1, "s2": bands} if fusion == "encoders" else {"s2": bands}
    source = random_weights(fusion, 10, by_modality, 9 if fusion == "none" else None)
    sentence = (
        rf"S2 takes {len(bands)} bands, whose names are not known: give .*--bands=B2,B3,\.\.\. "
    )
    sentence += r"of .*config.init_from_bands.*"
    with pytest.raises(WeightsError, match=sentence + candidates):
        recognised(source.arrays)
    found = recognised(source.arrays, {"s2": bands})
    assert found.network == source.network
    assert not any("S2" in note for note in found.notes)
    with pytest.raises(WeightsError, match=f"takes {len(bands)} bands, not B2 B3: give"):
        recognised(source.arrays, {"s2": ("B2", "B3")})


@pytest.mark.parametrize("fusion", ["mid", "late"])
@pytest.mark.parametrize("bands", [NINE, TWELVE])
def test_released_files_need_no_bands(load, fusion, bands):
    """Only the published code has such keys."""
    source = random_weights(fusion, 10, {"s1": S1, "s2": bands})
    found = load(lightning(tensors(source, "net.")))
    assert found.network == source.network
    assert f"S2 has {len(bands)} bands, assumed to be {' '.join(bands)}" in found.notes


@pytest.mark.parametrize(
    ("modality", "bands"), [("s1", S1), ("s2", ("B4", "B3", "B2")), ("s2", S2)]
)
def test_usual_numbers_of_bands_are_assumed_and_said(modality, bands):
    found = recognised(random_weights("encoder", 10, {modality: bands}, None).arrays)
    assert found.network.bands == {modality: bands}
    assert found.notes == (
        f"{modality.upper()} has {len(bands)} bands, assumed to be {' '.join(bands)}",
    )


def test_bands_of_the_command(load, tmp_path):
    order = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11")
    source = random_weights("none", 10, {"s2": order})
    path = tmp_path / "theirs.pth"
    torch.save({"model": tensors(source)}, path)
    with pytest.raises(
        WeightsError, match=r"theirs\.pth: the first convolution of S2 takes 9 bands"
    ):
        convert.from_torch(str(path), str(tmp_path / "ours"))
    convert.from_torch(str(path), str(tmp_path / "ours"), order)
    assert weight_files.load(str(tmp_path / "ours")).network == source.network
    with pytest.raises(WeightsError, match="B8A, NDVI: choose from B1, B2"):
        convert.from_torch(str(path), str(tmp_path / "x"), (*order[:8], "NDVI"))


def test_a_card_is_compared_with_the_bands_that_are_given(tmp_path):
    source = random_weights("mid", 10, {"s1": S1, "s2": NINE})
    path = tmp_path / "ours.safetensors"
    network, arrays = to_layout(source, "lightning", None)
    weight_files.write(epath.Path(path), arrays, cards.make(source, network, "lightning"))
    assert weight_files.load(str(path), {"s2": NINE}).network == network
    with pytest.raises(WeightsError, match="card states the bands .* do not set bands"):
        weight_files.load(str(path), {"s2": NINE[::-1]})


def test_a_run_starts_from_a_file_whose_bands_the_configuration_names(tmp_path):
    """The first convolution is copied band by band, by the names that are given."""
    order = NINE[::-1]
    theirs = random_weights("encoder", 10, {"s2": order}, None)
    path = tmp_path / "nine.pth"
    torch.save({"model": tensors(theirs)}, path)
    config = pretrain.get_config("sample")
    config.network.depth, config.init_from = 10, str(path)
    state = jax.eval_shape(lambda: pretrain_step.init_state(config, jax.random.key(0)))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    placement = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def started():
        bands = run.init_bands(config)
        network = Network.of_config(config)
        return start_from(config.init_from, network, state, placement, bands=bands)

    with pytest.raises(WeightsError, match="takes 9 bands, whose names are not known"):
        started()
    config.init_from_bands = order
    kernel = torch_keys.to_torch_state(started().params)["encoder.conv1.weight"]
    for index, band in enumerate(S2):
        expected = 0.0
        if band in order:
            expected = theirs.arrays["encoder.conv1.weight"][:, order.index(band)]
        np.testing.assert_array_equal(kernel[:, index], np.broadcast_to(expected, (16, 7, 7)))


@pytest.mark.parametrize("get_config", [pretrain.get_config, finetune.get_config])
def test_bands_of_the_configuration_are_checked(get_config):
    config = get_config()
    assert run.init_bands(config) is None
    config.init_from_bands = ("B2", "B3")
    with pytest.raises(run.ConfigError, match="config.init_from, which is empty; set both or"):
        run.init_bands(config)
    config.init_from = "x.pt"
    assert run.init_bands(config) == {"s2": ("B2", "B3")}
    config.init_from_bands = ("B2,B3",)  # what --config.init_from_bands=B2,B3 becomes
    assert run.init_bands(config) == {"s2": ("B2", "B3")}
    config.init_from_bands = ("VH", "VV")
    assert run.init_bands(config) == {"s1": ("VH", "VV")}
    for wrong in (("B2", "NDVI"), ("B2", "B2"), ("VV", "B2")):
        config.init_from_bands = wrong
        with pytest.raises(run.ConfigError, match="config.init_from_bands: the bands of S2 are"):
            run.init_bands(config)


@pytest.mark.parametrize("get_config", [pretrain.get_config, finetune.get_config])
def test_runs_of_earlier_versions_continue(tmp_path, get_config):
    """Their configuration has no init_from_bands; that is the same as none."""
    config, folder = get_config("sample"), epath.Path(tmp_path)
    recorded = json.loads(config.to_json())
    del recorded["init_from_bands"]
    (folder / "config.json").write_text(json.dumps(recorded))
    (folder / "checkpoints" / "1").mkdir(parents=True)
    run.record_config(config, folder)
    assert json.loads((folder / "config.json").read_text())["init_from_bands"] == []
    config.init_from_bands = ("B2", "B3")
    with pytest.raises(
        run.ConfigError, match=r"changed init_from_bands from \[\] to \['B2', 'B3'\]"
    ):
        run.record_config(config, folder)


def test_weights_of_a_bucket_are_read(tmp_path, monkeypatch):
    """The library opens files on disk only."""
    arrays = {"a": np.ones(3, np.float32)}
    content = safetensors.numpy.save(arrays)
    monkeypatch.setattr(weight_files.files, "in_bucket", lambda path: True)
    found, card = weight_files._read_safetensors(epath.Path("gs://none/x.safetensors"), content)
    np.testing.assert_array_equal(found["a"], arrays["a"])
    assert card == {}
