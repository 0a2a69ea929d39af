"""Weights on their way to PyTorch and back: layouts, files, cards, lies, and starting from them."""

import argparse
import dataclasses
import json
import os
import pathlib
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from configs import pretrain
from cromss_jax import convert, presets, sensors
from cromss_jax.networks import resnet
from cromss_jax.training import pretrain_step
from cromss_jax.training.state import start_from
from cromss_jax.weights import cards, folders, torch_keys
from cromss_jax.weights import files as weight_files
from cromss_jax.weights.layouts import find_network, from_layout, to_layout
from cromss_jax.weights.network import Network, Weights, WeightsError, part_of
from cromss_jax.weights.transfer import transfer
from tests import commands

S1, S2 = sensors.S1_BANDS, sensors.S2_BANDS
ROOT = pathlib.Path(__file__).parents[2]


def random_weights(fusion, depth, bands, num_classes=9, seed=0) -> Weights:
    """A network whose every number is drawn, so that none can be mistaken for another."""
    network = Network(fusion, depth, bands, num_classes)
    rng = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: rng.random(x.shape, np.float32).astype(x.dtype), network.abstract_state()
    )
    return Weights(network, torch_keys.to_torch_state(state))


def recognised(arrays, bands=None) -> Weights:
    """The network among the arrays of a file, with all notes."""
    network, _, notes = find_network(arrays)
    found = from_layout(network, bands)
    return dataclasses.replace(found, notes=(*notes, *found.notes))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype, key
        np.testing.assert_array_equal(found[key], array, err_msg=key)


@pytest.fixture(scope="module")
def mid():
    return random_weights("mid", 10, {"s1": S1, "s2": S2})


@pytest.fixture(scope="module")
def folder(mid, tmp_path_factory):
    """Converted weights, as good as a run's checkpoint, with what is known of a run."""
    path = tmp_path_factory.mktemp("weights") / "mid"
    config_json = path.parent / "config.json"
    config_json.write_text(pretrain.get_config("sample").to_json())
    card = cards.of_run(epath.Path(path.parent / "checkpoints" / "1"), mid.network)
    folders.write_folder(epath.Path(path), dataclasses.replace(mid, card=card))
    return str(path)


# Layouts.


@pytest.mark.parametrize(
    ("depth", "fusion", "bands"),
    [(10, "mid", 12), (34, "late", 3), pytest.param(50, "mid", 9, marks=pytest.mark.slow)],
)
def test_a_lightning_file_tells_what_it_is(parity, torch, depth, fusion, bands):
    with torch.device("meta"):
        network = parity.torch_network(fusion, depth, {"s1": 2, "s2": bands}, 9, seed=0)
    rng = np.random.default_rng(0)
    arrays = {
        f"net.{key}": (
            np.resize(rng.random(4099, np.float32), tuple(tensor.shape))  # drawn anew: seconds
            if tensor.dtype == torch.float32
            else np.asarray(rng.integers(0, 100), np.int64)
        )
        for key, tensor in network.state_dict().items()
    }
    found = recognised(arrays)
    expected = Network(fusion, depth, {"s1": S1, "s2": sensors.S2_BAND_SUBSETS[bands]}, 9)
    assert found.network == expected
    # Through our own axes and back, bit for bit.
    state = torch_keys.to_torch_state(found.state())
    _, back = to_layout(Weights(expected, state), "lightning", None)
    assert_same(back, arrays)


@pytest.mark.parametrize("fusion", ["mid", "late"])
@pytest.mark.parametrize("modality", ["s1", "s2"])
def test_published_finetuning_finds_its_encoder(fusion, modality):
    """It picks keys by these prefixes and renames them to `encoder.`."""
    prefixes = {
        ("mid", "s1"): "net.encoder1.",
        ("mid", "s2"): "net.encoder.",
        ("late", "s1"): "net.model1.encoder.",
        ("late", "s2"): "net.model2.encoder.",
    }
    source = random_weights(fusion, 10, {"s1": S1, "s2": S2})
    _, arrays = to_layout(source, "lightning", None)
    prefix = prefixes[fusion, modality]
    picked = {k.replace(prefix, "encoder."): v for k, v in arrays.items() if k.startswith(prefix)}
    network, encoder = to_layout(source, "encoder", modality)
    assert_same(picked, {f"encoder.{key}": array for key, array in encoder.items()})
    assert network.bands == {modality: source.network.bands[modality]}


@pytest.mark.parametrize("fusion", ["mid", "late"])
@pytest.mark.parametrize(("modality", "channels"), [("s1", 2), ("s2", 13)])
def test_layouts_load_strictly_in_smp(parity, torch, fusion, modality, channels):
    import segmentation_models_pytorch as smp

    source = random_weights(fusion, 18, {"s1": S1, "s2": S2})
    unet = parity.torch_model(18, channels, 9)
    encoder = smp.encoders.get_encoder("resnet18", in_channels=channels, weights=None)
    for layout, module in (("unet", unet), ("encoder", encoder)):
        network, arrays = to_layout(source, layout, modality)
        module.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()}, strict=True)
        found = recognised(parity.torch_arrays(module))
        assert found.network == network
        assert_same(to_layout(found, layout, modality)[1], arrays)


@pytest.mark.parametrize("library", ["torchvision", pytest.param("timm", marks=pytest.mark.slow)])
def test_features_of_other_libraries_resnet50(parity, torch, library):
    """torchgeo's ResNet-50 is timm's of 13 channels."""
    theirs = parity.torch_network("none", 50, {"s2": 13}, 9, seed=0)
    parity.randomise_norms(theirs, seed=1)
    source = recognised(parity.torch_arrays(theirs))
    network, arrays = to_layout(source, "torchvision", "s2")
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    if library == "torchvision":
        torchvision = pytest.importorskip("torchvision")
        other = torchvision.models.resnet50()
        other.conv1 = torch.nn.Conv2d(13, 64, 7, stride=2, padding=3, bias=False)
        other.fc = torch.nn.Identity()
        layers = [other.layer1, other.layer2, other.layer3, other.layer4]
        stem = [other.conv1, other.bn1, other.relu]
        stages = [stem, [other.maxpool, layers[0]], *([layer] for layer in layers[1:])]

        def features(x):
            found = []
            for stage in stages:
                for module in stage:
                    x = module(x)
                found.append(x)
            return found
    else:
        timm = pytest.importorskip("timm")
        other = timm.create_model("resnet50", in_chans=13, num_classes=0)

        def features(x):
            return other.forward_intermediates(x, intermediates_only=True)

    other.load_state_dict(tensors, strict=True)
    other.eval()
    image = np.random.default_rng(2).random((1, 64, 96, 13), np.float32)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: nnx.Dict(encoder=resnet.ResNetEncoder(50, 13))))
    state = Weights(network, {f"encoder.{k}": v for k, v in arrays.items()}).state()
    ours = jax.jit(
        lambda state: nnx.merge(graphdef, state)["encoder"](image, train=False),
        compiler_options={"xla_backend_optimization_level": 0},
    )(state)
    with torch.no_grad():
        expected = features(parity.to_torch_image(image))
    assert len(ours) == len(expected) == 5
    for found, theirs in zip(ours, expected, strict=True):
        assert parity.scaled_error(found, parity.from_torch_image(theirs)) < 1e-4


@pytest.mark.parametrize(
    ("decoder", "depth", "modality", "name"),
    [
        ("pspnet", 10, "s1", "ResNet-10 PSPNet of S1 VV VH, 11 classes"),
        ("deeplabv3plus", 10, "s2", "ResNet-10 DeepLabV3+ of S2 B1 "),
        pytest.param(
            *("deeplabv3plus", 34, "s2", "ResNet-34 DeepLabV3+ of S2 B1 "), marks=pytest.mark.slow
        ),
        ("fpn", 10, "s2", "ResNet-10 FPN of S2 B1 "),
    ],
)
def test_files_of_other_decoders_and_back(parity, torch, tmp_path, decoder, depth, modality, name):
    channels = {"s1": 2, "s2": 13}[modality]
    theirs = parity.torch_network("none", depth, {modality: channels}, 11, seed=0, decoder=decoder)
    parity.randomise_norms(theirs, seed=1)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    assert name in convert.from_torch(str(tmp_path / "theirs.pt"), str(tmp_path / "ours"))
    found = weight_files.load(str(tmp_path / "ours"))
    assert found.network.decoder == decoder
    convert.to_torch(str(tmp_path / "ours"), str(tmp_path / "back.pt"), "unet", None)
    card = json.loads((tmp_path / "back.pt.json").read_text())
    stride = {"pspnet": 8, "deeplabv3plus": 16, "fpn": 32}[decoder]
    assert card["axes"].endswith(f"multiples of {stride}")
    # Nobody told how these were trained.
    assert card["input"] is card["recipe"] is card["classes"] is card["licence"] is None
    assert card["source"] == str(tmp_path / "theirs.pt")
    other = parity.torch_network("none", depth, {modality: channels}, 11, seed=2, decoder=decoder)
    other.load_state_dict(torch.load(tmp_path / "back.pt"), strict=True)
    assert_same(parity.torch_arrays(other), parity.torch_arrays(theirs))


def test_a_decoder_that_is_unknown(mid):
    arrays = {k.replace("decoder.blocks", "decoder.steps"): v for k, v in mid.arrays.items()}
    with pytest.raises(WeightsError, match=r"psp\. \(PSPNet\) .*found steps.0.conv1.0.w"):
        recognised(arrays)


def test_classifier_is_left_out_and_named():
    source = random_weights("encoder", 50, {"s2": sensors.S2_BAND_SUBSETS[3]}, None)
    _, arrays = to_layout(source, "torchvision", None)
    arrays |= {"fc.weight": np.zeros((1000, 2048), np.float32), "fc.bias": np.zeros(1000)}
    found = recognised(arrays)
    assert any(n.startswith("skipped fc.bias, fc.weight: a classifier") for n in found.notes)
    assert_same(found.arrays, source.arrays)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"encoder.bn1.bias": None}, "missing encoder.bn1.bias"),
        ({"encoder.bn1.extra": np.zeros(3)}, "unexpected encoder.bn1.extra"),
        (
            {"decoder.blocks.0.conv1.0.weight": np.zeros((64, 192, 1, 1), np.float32)},
            r"has shape \(64, 192, 1, 1\), needs \(64, 192, 3, 3\)",
        ),
        ({"encoder.bn1.bias": np.zeros(16, np.int64)}, "encoder.bn1.bias holds int64, needs float"),
        ({"encoder.bn1.bias": np.zeros(16, bool)}, "encoder.bn1.bias holds bool, needs float"),
        ({"encoder.bn1.bias": np.full(16, 1e300)}, "NaN or infinite.*encoder.bn1.bias"),
        ({"encoder.bn1.num_batches_tracked": np.int64(2**31)}, "holds 2147483648, too large"),
        ({"encoder.bn1.bias": np.full(16, np.nan, np.float32)}, "NaN or infinite.*encoder.bn1.b"),
        ({"encoder.layer3.5.conv1.weight": np.zeros(1)}, "encoder of 1, 1, 2, 1 BasicBlocks"),
        ({"segmentation_head.0.weight": np.zeros(9)}, r"segmentation_head.0.weight has shape \(9"),
    ],
)
def test_arrays_that_lie(mid, change, match):
    arrays = {k: v for k, v in {**mid.arrays, **change}.items() if v is not None}
    with pytest.raises(WeightsError, match=match):
        recognised(arrays)


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        ("module.encoder_q.", ("module.encoder_k.conv1.weight", "module.queue")),  # MoCo v2
        ("module.base_encoder.", ("module.momentum_encoder.conv1.weight",)),  # MoCo v3
        ("module.backbone.", ("module.head.mlp.0.weight",)),  # DINO
    ],
)
def test_encoders_of_other_methods(prefix, others):
    source = random_weights("encoder", 50, {"s2": S2}, None)
    _, plain = to_layout(source, "torchvision", None)
    arrays = {prefix + key: array for key, array in plain.items()}
    arrays |= {f"{prefix}fc.0.weight": np.zeros((8, 8), np.float32)}
    arrays |= {key: np.zeros(3, np.float32) for key in others}
    found = recognised(arrays)
    assert found.network == source.network
    assert_same(found.arrays, dict(source.arrays))
    for key in (*others, "fc.0.weight"):
        assert any(key.removeprefix("module.") in note for note in found.notes)


def test_both_encoders_of_decur(torch, tmp_path):
    """The one of two bands is Sentinel-1's, whichever stands first."""
    bands = {"s1": S1, "s2": S2}
    encoders = {m: random_weights("encoder", 10, {m: b}, None) for m, b in bands.items()}
    for first, second in (("s1", "s2"), ("s2", "s1")):
        arrays = {"module.projector.0.weight": torch.zeros(2)}
        for name, m in (("backbone_1", first), ("backbone_2", second)):
            part = to_layout(encoders[m], "torchvision", None)[1]
            arrays |= {f"module.{name}.{k}": torch.from_numpy(v) for k, v in part.items()}
        torch.save({"model": arrays, "epoch": 3}, tmp_path / "decur.pth.tar")
        found = weight_files.load(str(tmp_path / "decur.pth.tar"))
        assert found.network == Network("encoders", 10, bands, None)
        for m, encoder in encoders.items():
            expected = to_layout(encoder, "torchvision", m)[1]
            assert_same(to_layout(found, "torchvision", m)[1], expected)
    fresh = random_weights("none", 10, {"s1": S1}, seed=5)
    started, _ = transfer(found, fresh)
    assert_same(part_of(started.arrays, "encoder."),
                part_of(encoders["s1"].arrays, "encoder."))  # fmt: skip


# Files.


@pytest.mark.parametrize(
    ("layout", "suffix"),
    [
        ("lightning", ".ckpt"),
        ("lightning", ".safetensors"),
        ("unet", ".pt"),
        ("encoder", ".safetensors"),
        ("torchvision", ".pt"),
    ],
)
def test_files_and_back(torch, mid, folder, tmp_path, layout, suffix):
    file, back = tmp_path / f"weights{suffix}", tmp_path / "back"
    modality = None if layout == "lightning" else "s1"
    convert.to_torch(folder, str(file), layout, modality)
    convert.from_torch(str(file), str(back))
    found = weight_files.load(str(back))
    network, arrays = to_layout(mid, layout, modality)
    assert found.network == network
    assert_same(to_layout(found, layout, modality)[1], arrays)


def test_released_lightning_files(torch, mid, tmp_path):
    """Distributed wrappers, other attributes of the module, settings in a Namespace."""
    state_dict = {f"net.module.{k}": torch.from_numpy(v) for k, v in mid.arrays.items()}
    state_dict["criterion.weight"] = torch.ones(9)
    settings = argparse.Namespace(
        backbone="resnet18", lr=0.005, out=pathlib.PurePosixPath("x").name
    )
    torch.save(
        {
            "epoch": 99,
            "state_dict": state_dict,
            "hyper_parameters": settings,
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
            "pytorch-lightning_version": "1.6.0",
        },
        tmp_path / "released.ckpt",
    )
    found = weight_files.load(str(tmp_path / "released.ckpt"))
    assert found.network == mid.network
    assert_same(found.arrays, mid.arrays)
    assert found.notes == (
        "took the tensors under `state_dict.net.`",
        "skipped state_dict.criterion.weight: not part of the network",
        "S1 has 2 bands, assumed to be VV VH",
        f"S2 has 13 bands, assumed to be {' '.join(S2)}",
    )


def test_shorter_floats_on_request(torch, folder, mid, tmp_path):
    for dtype, digits in (("float16", 11), ("bfloat16", 8)):
        for suffix in (".pt", ".safetensors"):
            file = tmp_path / f"{dtype}{suffix}"
            convert.to_torch(folder, str(file), "lightning", None, dtype)
            found = weight_files.load(str(file)).arrays
            key = "encoder.layer1.0.conv1.weight"
            assert found[key].dtype == np.float32
            np.testing.assert_allclose(found[key], mid.arrays[key], rtol=2.0**-digits)
            assert not np.array_equal(found[key], mid.arrays[key])
        assert file.stat().st_size < 0.51 * sum(a.nbytes for a in mid.arrays.values())
    assert torch.load(tmp_path / "bfloat16.pt", weights_only=True).keys() == {
        "state_dict", "hyper_parameters",
    }  # fmt: skip


class Hostile:
    """Pickles as a call that writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_runs_nothing(torch, tmp_path, suffix, zipped):
    victim, file = tmp_path / "victim", tmp_path / f"hostile{suffix}"
    content = {"state_dict": {"net.encoder1.conv1.weight": torch.ones(1)}, "x": Hostile(victim)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="contains getattr, which is not weights"):
        weight_files.load(str(file))
    bare = tmp_path / f"bare{suffix}"
    bare.write_bytes(pickle.dumps(content["x"], protocol=2))
    with pytest.raises(WeightsError, match=r"bare\.(pt|ckpt)"):
        weight_files.load(str(bare))
    assert not victim.exists()
    torch.load(file, weights_only=False)
    assert victim.exists()  # as it would have


@pytest.mark.parametrize("suffix", weight_files.SUFFIXES)
@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_truncated_files(torch, folder, tmp_path, suffix, kept):
    file = tmp_path / f"weights{suffix}"
    convert.to_torch(folder, str(file), "encoder", "s1")
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(WeightsError, match=f"weights{suffix} is damaged"):
        weight_files.load(str(file))


def test_other_things_in_files(torch, tmp_path):
    for content, match in (
        ([1, 2], "expected a dict of tensors, found list"),
        ({"state_dict": {"a": 1}}, "not a supported network.*found no tensors"),
        ({"a": torch.ones(1)}, "not a supported network.*found a"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(WeightsError, match=match):
            weight_files.load(str(tmp_path / "x.pt"))
    for name, match in (("x.bin", "must end in .safetensors"), ("y.pt", "y.pt does not exist")):
        with pytest.raises(WeightsError, match=match):
            weight_files.load(str(tmp_path / name))
    with pytest.raises(WeightsError, match="neither a run"):
        weight_files.load(str(tmp_path))


# Cards.


def test_card_says_what_a_user_needs(folder, tmp_path):
    convert.to_torch(folder, str(tmp_path / "s1.safetensors"), "encoder", "s1")
    card = json.loads((tmp_path / "s1.safetensors.json").read_text())
    assert card["modality"] == ["s1"]
    assert card["bands"] == {"s1": ["VV", "VH"]}
    # A pixel of -10 dB by the card's formula, as the data are prepared.
    vv = card["input"]["by_band"]["VV"]
    by_card = np.floor(np.clip((-10.0 - vv["low"]) / (vv["high"] - vv["low"]) * 255, 0, 255)) / 255
    assert by_card == sensors.scale_to_uint8(np.array([-10.0]), "VV")[0] / 255
    text = (tmp_path / "s1.safetensors.md").read_text()
    for part in ("VV", "VH", "-23.062427", "Apache-2.0", "ResNet-10 encoder"):
        assert part in text


def test_bands_travel_in_the_file_or_beside_it(torch, tmp_path):
    """Nothing else tells B2 B3 B4 from the published B4 B3 B2."""
    bands = {"s2": ("B2", "B3", "B4")}
    source = random_weights("none", 10, bands)
    folders.write_folder(epath.Path(tmp_path / "ours"), source)
    for name, layout, needs_card in (
        ("a.safetensors", "encoder", False),
        ("a.ckpt", "lightning", False),
        ("a.pt", "unet", True),
    ):
        convert.to_torch(str(tmp_path / "ours"), str(tmp_path / name), layout, None)
        found = weight_files.load(str(tmp_path / name))
        assert found.network.bands == bands
        assert not any("assumed" in note for note in found.notes)
        (tmp_path / f"{name}.json").unlink()
        alone = weight_files.load(str(tmp_path / name))
        assert (alone.network.bands != bands) == needs_card
        assert any("assumed to be B4 B3 B2" in note for note in alone.notes) == needs_card


def test_cards_of_others_are_not_believed(torch, folder, tmp_path):
    file, card = tmp_path / "x.pt", tmp_path / "x.pt.json"
    convert.to_torch(folder, str(file), "encoder", "s2")
    ours = json.loads(card.read_text())
    card.write_text(json.dumps({**ours, "format": "other", "bands": {"s2": S2[::-1]}}))
    assert weight_files.load(str(file)).network.bands == {"s2": S2}
    for bands in (["B1"], {"s2": 4}, {"S2": list(S2)}, {"s2": ["B02"] * 13}, {"s2": "B2B8"}, None):
        card.write_text(json.dumps({**ours, "bands": bands}))
        with pytest.raises(WeightsError, match="bands"):
            weight_files.load(str(file))
    card.write_text("{")
    with pytest.raises(WeightsError, match=r"card of x\.pt, is damaged"):
        weight_files.load(str(file))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"network": {"format": "x"}, "card": {}}'])
def test_a_damaged_description(folder, tmp_path, content):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "network.json").write_text(content)
    with pytest.raises(WeightsError, match=r"network\.json is damaged or was written by another"):
        weight_files.load(str(copy))


@pytest.mark.parametrize(
    "change", [{"depth": 51}, {"depth": "10"}, {"depth": [10]}, {"num_classes": "9"}]
)
def test_a_description_of_no_network(folder, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "network.json").read_text())
    content["network"] |= change
    (copy / "network.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"network\.json is damaged or was written by another"):
        weight_files.load(str(copy))


def test_damaged_pickles_are_told_in_a_sentence(torch, tmp_path):
    """A storage that nothing names, of an old file; and an archive that lies on several disks."""
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    tensors = {"conv1.weight": torch.ones(3)}
    torch.save(tensors, old, _use_new_zipfile_serialization=False)
    content = old.read_bytes()
    key = str(tensors["conv1.weight"].untyped_storage()._cdata).encode()
    at = content.rindex(key)
    old.write_bytes(content[:at] + key[::-1] + content[at + len(key) :])
    torch.save(tensors, new)
    content = bytearray(new.read_bytes())
    content[content.rindex(b"PK\x06\x07") + 16] = 5  # of the locator: how many disks
    new.write_bytes(content)
    for path in (old, new):
        with pytest.raises(WeightsError, match=rf"{path.name} is damaged"):
            weight_files.load(str(path))


def test_a_flipped_bit_of_a_checkpoint_is_found_and_its_file_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    found = [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    largest = max(found, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{largest} is not as it was saved"):
        weight_files.load(str(tmp_path / "copy"))


def test_cards_of_runs(tmp_path):
    """Scores of the checkpoint's own step, whatever a kill left at the end of the log."""
    run_folder = tmp_path / "run"
    step_folder = run_folder / "checkpoints" / "7"
    step_folder.mkdir(parents=True)
    (run_folder / "config.json").write_text(pretrain.get_config("sample").to_json())
    lines = [{"step": s, "split": "validation", "loss": s / 10, "s2/iou/water": 1} for s in (7, 9)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11, "spl'
    (run_folder / "metrics.jsonl").write_text(text)
    network = Network.of_config(json.loads((run_folder / "config.json").read_text()))
    card = cards.of_run(epath.Path(step_folder), network)
    assert card["metrics"] == {"step": 7, "split": "validation", "loss": 0.7}
    assert card["classes"] == list(presets.DYNAMIC_WORLD.names)
    assert card["recipe"]["network"]["depth"] == 18


def test_command_line(folder, tmp_path):
    def run_command(*arguments):
        return commands.run("cromss_jax.convert", *arguments)

    output, relative = tmp_path / "e.safetensors", os.path.relpath(folder, commands.ROOT)
    choice = (f"--checkpoint={relative}", "--layout=encoder", "--modality=s2")
    good = run_command("to_torch", f"--output={output}", *choice)
    assert good.returncode == 0, good.stderr
    assert "ResNet-10 encoder of S2 B1" in good.stdout
    assert output.exists()
    for arguments, match in (
        ((), "the arguments are []; use to_torch or from_torch"),
        (
            ("from_torch", f"--input={output}", "--output=x", "--modality=s2"),
            "from_torch does not use --modality: remove it",
        ),
    ):
        bad = run_command(*arguments)
        assert bad.returncode == 1
        assert match in bad.stderr
        assert "Traceback" not in bad.stderr


def test_a_modality_is_chosen_where_there_are_two(folder, tmp_path):
    with pytest.raises(WeightsError, match="choose one by --modality=s1 or --modality=s2"):
        convert.to_torch(folder, str(tmp_path / "x.pt"), "unet", None)
    with pytest.raises(WeightsError, match="remove --modality"):
        convert.to_torch(folder, str(tmp_path / "x.pt"), "lightning", "s1")
    assert not list(tmp_path.iterdir())


# Starting from them.


@pytest.fixture(scope="module")
def nine_bands():
    return random_weights("mid", 10, {"s1": S1, "s2": sensors.S2_BAND_SUBSETS[9]}, seed=1)


def test_transfer_adapts_the_first_convolution_by_band_name(mid, nine_bands):
    key = "encoder.conv1.weight"
    started, report = transfer(mid, nine_bands)
    for index, band in enumerate(sensors.S2_BAND_SUBSETS[9]):
        theirs = mid.arrays[key][:, S2.index(band)]
        np.testing.assert_array_equal(started.arrays[key][:, index], theirs)
    assert any("by band name; not used: B1 B8A B9 B10" in sentence for sentence in report)
    rest = {k: v for k, v in mid.arrays.items() if k != key}
    assert_same({k: v for k, v in started.arrays.items() if k != key}, rest)

    wider, report = transfer(nine_bands, mid)
    np.testing.assert_array_equal(wider.arrays[key][:, 0], mid.arrays[key][:, 0])  # B1: as it was
    np.testing.assert_array_equal(wider.arrays[key][:, 1], nine_bands.arrays[key][:, 0])
    assert any("randomly initialised for B1 B8A B9 B10" in sentence for sentence in report)


def test_transfer_between_fusions(mid):
    late = random_weights("late", 10, {"s1": S1, "s2": S2}, seed=2)
    to_late, _ = transfer(mid, late)
    assert_same(part_of(to_late.arrays, "model1.encoder."),
                part_of(mid.arrays, "encoder1."))  # fmt: skip
    for model in ("model1.", "model2."):  # both from the shared one
        assert_same(part_of(to_late.arrays, f"{model}decoder."),
                    part_of(mid.arrays, "decoder."))  # fmt: skip
    to_mid, report = transfer(late, mid)
    assert_same(part_of(to_mid.arrays, "encoder."),
                part_of(late.arrays, "model2.encoder."))  # fmt: skip
    # Two decoders for one place: neither.
    assert_same(part_of(to_mid.arrays, "decoder."),
                part_of(mid.arrays, "decoder."))  # fmt: skip
    assert "decoder of S1 and S2: randomly initialised, the weights have 2 of them" in report


def test_transfer_to_another_decoder_takes_the_encoder(mid):
    network = Network("none", 10, {"s2": S2}, 9, "pspnet")
    target = Weights(
        network,
        torch_keys.to_torch_state(
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), network.abstract_state())
        ),
    )
    started, report = transfer(mid, target)
    assert_same(part_of(started.arrays, "encoder."),
                part_of(mid.arrays, "encoder."))  # fmt: skip
    for part in ("decoder.", "segmentation_head."):
        assert_same(part_of(started.arrays, part), part_of(target.arrays, part))
    assert "decoder of S2: randomly initialised, the weights are a ResNet-10 mid" in report[1]


def test_transfer_refuses_what_does_not_fit(mid):
    deeper = random_weights("mid", 34, {"s1": S1, "s2": S2})
    with pytest.raises(WeightsError, match="config.network.depth is 10: set it to 34"):
        transfer(deeper, mid)
    s1 = random_weights("encoder", 10, {"s1": S1}, None)
    s2 = random_weights("none", 10, {"s2": S2})
    with pytest.raises(WeightsError, match="has no part in common"):
        transfer(s1, s2)
    classes = random_weights("mid", 10, {"s1": S1, "s2": S2}, num_classes=8)
    started, report = transfer(classes, mid)
    head = "segmentation_head.0.weight"
    np.testing.assert_array_equal(started.arrays[head], mid.arrays[head])
    assert any("the weights have 8 classes" in sentence for sentence in report)


def test_a_head_moves_where_the_classes_are_the_same(mid):
    """Same names in the same order; an unnamed head by its number of classes."""
    target = random_weights("mid", 10, {"s1": S1, "s2": S2}, seed=4)
    names = list(presets.DYNAMIC_WORLD.names)
    head, encoder = "segmentation_head.0.weight", "encoder.layer1.0.conv1.weight"
    for theirs, ours, is_taken, said in (
        (names, names, True, "segmentation_head of S1 and S2: from the weights"),
        (names, names[::-1], False, "class 0 of the weights is 'water', not 'snow & ice'"),
        ([], names, True, "which do not name their classes: their number is the same"),
    ):
        source = dataclasses.replace(mid, card={"classes": theirs})
        started, report = transfer(source, dataclasses.replace(target, card={"classes": ours}))
        expected = mid if is_taken else target
        np.testing.assert_array_equal(started.arrays[head], expected.arrays[head])
        np.testing.assert_array_equal(started.arrays[encoder], mid.arrays[encoder])
        assert any(said in sentence for sentence in report)


def test_a_run_starts_from_weights(folder, mid):
    config = pretrain.get_config("sample")
    config.network.depth = 10
    state = jax.eval_shape(lambda: pretrain_step.init_state(config, jax.random.key(0)))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    placement = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    network = Network.of_config(config)
    started = start_from(folder, network, state, placement)
    found = torch_keys.to_torch_state(started.params)
    found |= torch_keys.to_torch_state(started.batch_stats)
    assert_same(found, dict(mid.arrays))
    assert jax.tree.structure(started) == jax.tree.structure(state)
