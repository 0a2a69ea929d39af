"""`cromss_jax.load` against the commands' own numbers, and what it refuses."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import rasterio
import safetensors.numpy
from etils import epath
from flax import nnx

import cromss_jax
from configs import finetune as finetune_config
from cromss_jax import convert, presets, sensors
from cromss_jax.data import input_pipeline, preprocess, validation_split
from cromss_jax.method import metrics
from cromss_jax.training import finetune
from cromss_jax.weights import files as weight_files
from cromss_jax.weights import folders, torch_keys
from cromss_jax.weights.network import Network, Weights
from data_prep.datasets import downstream
from data_prep.reading import bands as raw_bands
from data_prep.sample import downstream as sample_downstream
from tests import runs

S1, S2 = sensors.S1_BANDS, sensors.S2_BANDS
TILE_SIZE, NUM_TILES = 36, 6  # 36: no multiple of PSPNet's stride of 8
# References compile in a third of the time.
FAST = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def pretrained(tiny_run):
    return cromss_jax.load(tiny_run[0])


@pytest.fixture(scope="module")
def finetuning(tmp_path_factory):
    """Tiles as GeoTIFFs, and the folder of a run on them that wrote its maps."""
    folder = tmp_path_factory.mktemp("finetuning")
    sample_downstream.write_sample(folder / "tiles", "dfc2020", 2 * NUM_TILES, TILE_SIZE, seed=3)
    downstream.Dfc2020(source_dir=folder / "tiles", data_dir=folder / "data").build()
    config = finetune_config.get_config("task=dfc2020,input=s2,sample")
    changes = {
        "data.dir": str(folder / "data"),
        "data.crop_size": 32,
        "network.depth": 10,
        "batch_size": 4,
        "num_devices": 1,
        "num_epochs": 2,
        "optimizer.learning_rate": 0.01,
        "save_predictions": True,
    }
    config.update_from_flattened_dict(changes)
    config.seeds = (0,)
    finetune.finetune(config, str(folder / "run"))
    return folder / "tiles", folder / "run"


@pytest.fixture(scope="module")
def finetuned(finetuning):
    return cromss_jax.load(finetuning[1] / "seed_0")


def random_images(bands, *shape, seed=0):
    rng = np.random.default_rng(seed)
    return {m: rng.random((*shape, len(names)), np.float32) for m, names in bands.items()}


def zeros(network: Network, card=None) -> Weights:
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), network.abstract_state())
    return Weights(network, torch_keys.to_torch_state(state), card=card or {})


def random_weights(network: Network) -> Weights:
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.uniform(0.5, 1, x.shape) if x.dtype.kind == "f" else x
        for name, x in zeros(network).arrays.items()
    }
    return Weights(network, arrays)


def saved(folder, weights: Weights) -> str:
    folders.write_folder(epath.Path(folder), weights)
    return str(folder)


@pytest.mark.parametrize("decoder", [pytest.param("unet", marks=pytest.mark.slow), "pspnet"])
def test_a_process_with_x64_gets_the_same_float32(decoder, tmp_path):
    bands = {"s1": S1}
    images = random_images(bands, 1, 20, 36)
    with jax.enable_x64(True):  # first: descriptions of networks are cached
        folder = saved(tmp_path / "weights", random_weights(Network("none", 10, bands, 5, decoder)))
        model = cromss_jax.load(folder)
        wide = model.predict({"s1": images["s1"].astype(np.float64)})["s1"]
        assert jax.config.jax_enable_x64
    dtypes = {str(x.dtype) for x in jax.tree.leaves(nnx.state(model.network))}
    assert dtypes <= {"float32", "int32", "uint32"}
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, cromss_jax.load(folder).predict(images)["s1"])


# The commands' own numbers.


def test_a_pretraining_runs_scores_come_from_its_predictions(tiny_run, pretrained):
    workdir, config = tiny_run
    dataset = input_pipeline.open_dataset(config.data.dir, config.data.name)
    _, held_back = validation_split.split_locations(
        dataset.num_locations, config.data.validation_fraction, config.seed
    )
    (rows,) = input_pipeline.validation_records(dataset, held_back, 4)
    records = input_pipeline.read_batch(dataset, config.modalities, rows)
    batch = preprocess.examples(
        records,
        preprocess.centre_geometry(4, dataset.tile_size - config.data.crop_size),
        modalities=config.modalities,
        s2_bands=config.s2_bands,
        crop_size=config.data.crop_size,
        num_classes=9,
        prior_kind=None,
    )
    predicted = pretrained.predict({m: batch[m] for m in config.modalities})
    *_, logged = [line for line in runs.logged(workdir) if line["split"] == "validation"]
    for m, probabilities in predicted.items():
        assert probabilities.shape == (4, 32, 32, 9)
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-6)
        classes = probabilities.argmax(-1)
        for prefix, labels in (("", "labels"), ("truth/", "truth")):
            scores = metrics.scores(metrics.confusion_matrix(batch[labels], classes, 9))
            for name in ("oa", "miou", "mf1"):
                assert logged[f"{prefix}{m}/{name}"] == scores[name]


def test_a_finetuning_runs_maps_come_from_raw_tiles(finetuning, finetuned):
    """Raw GeoTIFFs to maps as in a notebook: scaling, padding and classes are the command's."""
    tiles, workdir = finetuning
    assert finetuned.legend == dict(presets.DFC2020.pairs())
    assert finetuned.bands == {"s2": S2}
    paths = sorted(tiles.glob("s2_test/*.tif"))
    assert len(paths) == NUM_TILES
    for path in paths:
        with rasterio.open(path) as file:
            tile = np.moveaxis(file.read(), 0, -1)
        image = finetuned.preprocess(tile, bands=S2)
        probabilities = finetuned.predict({"s2": image[None]})["s2"]
        name = f"test_{path.stem.split('_')[-1]}.tif"
        with rasterio.open(workdir / "seed_0" / "predictions" / name) as file:
            np.testing.assert_array_equal(probabilities[0].argmax(-1), file.read(1))


def test_preprocess_gives_the_data_sets_bits(finetuning, finetuned):
    tiles, workdir = finetuning
    config = json.loads((workdir / "seed_0" / "config.json").read_text())
    test = input_pipeline.open_dataset(config["data"]["dir"], "dfc2020", "test")
    batch = input_pipeline.read_batch(test, ("s2",), np.arange(NUM_TILES))
    expected = jax.jit(lambda x: preprocess.stack_bands(x, "s2", S2) / 255.0)(batch)
    names = [record["location_id"].decode().split("_")[-1] for record in test.source]
    raw = []
    for name in names:
        (path,) = tiles.glob(f"s2_test/*_{name}.tif")
        with rasterio.open(path) as file:
            raw.append(np.moveaxis(file.read(), 0, -1))
    found = finetuned.preprocess(np.stack(raw), bands=S2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_preprocess_scales_s1_as_data_prep_in_its_own_dtype(pretrained, dtype):
    rng = np.random.default_rng(0)
    raw = rng.normal(-15, 8, (64, 48, 2)).astype(dtype)
    valid = np.ones(raw.shape[:2], bool)
    expected = [raw_bands.scale(band, raw[..., i], valid) for i, band in enumerate(S1)]
    found = pretrained.preprocess(raw, bands=S1)
    np.testing.assert_array_equal(np.rint(found * 255), np.stack(expected, -1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_preprocess_scales_s2_as_data_prep_whatever_the_dtype(pretrained, dtype):
    """With the raw values next to every border between grey levels, and the offset taken off."""
    borders = [raw_bands.sensors.values_of_uint8(np.arange(256), band) for band in S2]
    raw = np.stack([np.floor(b)[:, None] + [0, 1] for b in borders], -1).clip(0) + 1000
    raw[0, 0] = 0  # no data: below the offset
    valid = np.ones(raw.shape[:2], bool)
    expected = [
        raw_bands.scale_s2(b, raw[..., i].astype(np.int32), valid, offset=1000)
        for i, b in enumerate(S2)
    ]
    offset = 0 if dtype == np.uint16 else 1000  # without sign there is no subtracting
    if offset == 0:
        raw = np.maximum(raw - 1000, 0)
    found = pretrained.preprocess(raw.astype(dtype) - dtype(offset), bands=S2)
    np.testing.assert_array_equal(np.rint(found * 255), np.stack(expected, -1))


def test_bands_are_taken_by_name(tmp_path):
    network = Network("encoder", 18, {"s2": sensors.S2_BAND_SUBSETS[3]}, None)
    model = cromss_jax.load(saved(tmp_path / "rgb", zeros(network)))
    raw = np.random.default_rng(0).integers(0, 4000, (2, 5, 6, 13))
    found = model.preprocess(raw, bands=S2)
    assert found.shape == (2, 5, 6, 3)
    order = np.random.default_rng(1).permutation(13)
    shuffled = model.preprocess(raw[..., order], bands=[S2[i] for i in order])
    np.testing.assert_array_equal(shuffled, found)
    red = sensors.scale_to_uint8(raw[..., S2.index("B4")], "B4")
    np.testing.assert_array_equal(np.rint(found[..., 0] * 255), red)


# What holds the weights.


@pytest.mark.parametrize(
    ("layout", "modality", "suffix"),
    [
        ("lightning", None, ".safetensors"),
        ("unet", "s1", ".pt"),
        ("encoder", "s2", ".safetensors"),
        ("torchvision", "s1", ".safetensors"),
    ],
)
def test_converted_files_hold_the_same_network(
    tiny_run, pretrained, tmp_path, layout, modality, suffix
):
    if suffix != ".safetensors":
        pytest.importorskip("torch")
    path = tmp_path / f"weights{suffix}"
    convert.to_torch(str(tiny_run[0]), str(path), layout, modality)
    model = cromss_jax.load(path)
    modalities = (modality,) if modality else sensors.MODALITIES
    assert model.bands == {m: pretrained.bands[m] for m in modalities}
    assert model.notes == ()
    assert model.card["recipe"]["network"]["depth"] == 10
    is_whole = layout in ("lightning", "unet")
    assert model.legend == (dict(presets.DYNAMIC_WORLD.pairs()) if is_whole else None)
    images = random_images(pretrained.bands, 1, 32, 64)
    expected = pretrained.features(images)
    found = model.features({m: images[m] for m in modalities})
    for m in modalities:
        assert len(found[m]) == 5
        for ours, theirs in zip(found[m], expected[m], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    if not is_whole:
        with pytest.raises(ValueError, match="holds a ResNet-10 encoder of S.*use features"):
            model.predict(images)


def test_a_run_a_checkpoint_and_a_folder_are_the_same(finetuning, finetuned, tmp_path):
    step = max(runs.saved_steps(finetuning[1] / "seed_0"))
    path = finetuning[1] / "seed_0" / "checkpoints" / str(step)
    source = weight_files.load(str(path))
    for model in (cromss_jax.load(path), cromss_jax.load(saved(tmp_path / "copy", source))):
        assert model.card == finetuned.card
        assert model.legend == finetuned.legend
        assert repr(model).startswith("Pretrained(ResNet-10 PSPNet of S2 B1 B2")
        kernel = model.network.encoder.conv1.weight[...]
        np.testing.assert_array_equal(kernel, finetuned.network.encoder.conv1.weight[...])


@pytest.mark.parametrize(("fusion", "num_classes"), [("encoders", None), ("late", 9)])
def test_two_encoders_without_a_card(tmp_path, fusion, num_classes):
    network = Network(fusion, 18, {"s1": S1, "s2": S2}, num_classes)
    model = cromss_jax.load(saved(tmp_path / "both", zeros(network)))
    assert model.card == {}
    assert model.legend is None
    assert "assumes this program's own scaling" in repr(model)
    found = model.features(random_images(model.bands, 1, 32, 64))
    assert {m: x[-1].shape for m, x in found.items()} == dict.fromkeys(("s1", "s2"), (1, 1, 2, 512))


def test_bands_that_nothing_tells(tmp_path):
    network = Network("encoder", 18, {"s2": ("B2", "B3", "B4", "B8")}, None)
    path = tmp_path / "four.safetensors"
    safetensors.numpy.save_file(dict(zeros(network).arrays), path)
    with pytest.raises(cromss_jax.WeightsError, match="takes 4 bands, whose names are not known"):
        cromss_jax.load(path)
    expected = {"s2": ("B2", "B3", "B4", "B8")}
    assert cromss_jax.load(path, bands=expected["s2"]).bands == expected
    assert cromss_jax.load(path, bands={"s2": list(expected["s2"])}).bands == expected


def test_the_card_says_scaling_and_classes(tmp_path):
    network = Network("none", 18, {"s1": S1}, 3)
    scaling = {"VV": {"low": -25.0, "high": 0.0}, "VH": {"low": -32.5, "high": -5.0}}
    legend = [["sea", "#0000ff"], ["ice", "#ffffff"], ["ship", "#ff0000"]]
    card = {"input": {"by_band": scaling}, "classes": ["sea", "ice", "ship"]}
    with_colours = zeros(network, {**card, "recipe": {"legend": legend}})
    model = cromss_jax.load(saved(tmp_path / "colours", with_colours))
    assert list(model.legend.items()) == [("sea", "#0000ff"), ("ice", "#ffffff"),
                                          ("ship", "#ff0000")]  # fmt: skip
    raw = np.array([[[-12.5, -40.0], [-25.1, -5.0]]])
    found = model.preprocess(raw, bands=S1)
    np.testing.assert_array_equal(np.rint(found * 255), [[[127, 0], [0, 255]]])
    model = cromss_jax.load(saved(tmp_path / "none", zeros(network, card)))
    assert model.legend == {"sea": None, "ice": None, "ship": None}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"classes": ["sea", "ice"]}, "names 2 classes, the network has 3"),
        ({"input": {"by_band": {"VV": {"low": 0, "high": 1}}}}, "not say how each band.*'VH'"),
        ({"input": {"by_band": {b: {"low": 1, "high": 1} for b in S1}}}, "VV from 1.0 to 1.0"),
    ],
)
def test_cards_that_cannot_be(tmp_path, change, sentence):
    path = saved(tmp_path / "bad", zeros(Network("none", 18, {"s1": S1}, 3), change))
    with pytest.raises(cromss_jax.WeightsError, match=sentence):
        cromss_jax.load(path)


def test_what_holds_no_weights(finetuning, tmp_path):
    with pytest.raises(cromss_jax.WeightsError, match="nowhere: no such file or folder; give"):
        cromss_jax.load(tmp_path / "nowhere")
    with pytest.raises(cromss_jax.WeightsError, match="such as one of the runs in it: seed_0"):
        cromss_jax.load(finetuning[1])
    with pytest.raises(cromss_jax.WeightsError, match="a folder states its own bands"):
        cromss_jax.load(finetuning[1] / "seed_0", bands=S2)


# Arrays in, arrays out.


def test_under_jit_in_a_batch_and_of_any_size(finetuned):
    """Sizes that are no multiples are what the network makes of the reflected image."""
    images = random_images(finetuned.bands, 3, 20, 37)
    found = finetuned.predict(images)["s2"]
    assert found.dtype == np.float32
    compiled = jax.jit(finetuned.predict, compiler_options=FAST)(images)["s2"]
    single = [finetuned.predict({"s2": image[None]})["s2"] for image in images["s2"]]
    padded = np.pad(images["s2"], ((0, 0), (0, 4), (0, 3), (0, 0)), mode="reflect")
    network = jax.jit(lambda x: finetuned.network({"s2": x}, train=False), compiler_options=FAST)
    expected = jax.nn.softmax(network(padded)["s2"])[:, :20, :37]
    # Another program or batch may sum in another order: 20 layers of sums of up to 4608 products
    # that differ by 2^-24 each in relative terms leave a few 1e-6 in probabilities.
    for other in (compiled, np.concatenate(single), expected):
        np.testing.assert_allclose(found, other, atol=1e-5)
    assert float(found.max() - found.min()) > 0.1  # not the same everywhere


def test_features_of_any_size_under_jit(tiny_run, tmp_path):
    path = tmp_path / "s2.safetensors"
    convert.to_torch(str(tiny_run[0]), str(path), "encoder", "s2")
    model = cromss_jax.load(path)
    images = random_images(model.bands, 2, 33, 60)
    found = model.features(images)["s2"]
    sizes = [(17, 30), (9, 15), (5, 8), (3, 4), (2, 2)]
    channels = (16, 16, 32, 64, 128)
    assert [x.shape for x in found] == [
        (2, *size, c) for size, c in zip(sizes, channels, strict=True)
    ]
    padded = np.pad(images["s2"], ((0, 0), (0, 31), (0, 4), (0, 0)), mode="reflect")
    network = jax.jit(lambda x: model.network(x, train=False), compiler_options=FAST)
    expected = network(padded)
    compiled = jax.jit(model.features, compiler_options=FAST)(images)["s2"]
    for ours, whole, other in zip(found, expected, compiled, strict=True):
        _, height, width, _ = ours.shape
        scale = float(np.abs(whole).max())
        np.testing.assert_allclose(ours, whole[:, :height, :width], atol=1e-5 * scale)
        np.testing.assert_allclose(ours, other, atol=1e-5 * scale)


# Refusals.

DB = np.full((4, 4, 2), -12.0, np.float32)
DN = np.full((4, 4, 13), 1500, np.uint16)


def changed(values, dtype=np.float64, **cells):
    values = values.astype(dtype)
    values[1, 2, 0] = cells["to"]
    return values


@pytest.mark.parametrize(
    ("image", "bands", "sentence"),
    [
        (DN, (*S2[:12], "B02"), "unknown band names B02; name the channels as S1's VV, VH or S2's"),
        (DN, (), r"unknown band names \(none given\)"),
        (DN, (*S2[:12], "B4"), "repeated band names B4; name each"),
        (DN, (*S2[:12], "VV"), "are of two sensors; give S1 and S2 one after the other"),
        (DB[..., 0], "VV", "bands is the text 'VV'; give a list"),
        (DN[..., :11], S2[2:], "missing bands B1, B2; these weights need B1, B2.*add them"),
        (DN[..., :12], S2, r"shape \(4, 4, 12\); 13 bands are named.*\[..., H, W, 13\]$"),
        (np.moveaxis(DN, -1, 0), S2, r"\(13, 4, 4\).*first to last by np.moveaxis"),
        (DN[0], S2, r"shape \(4, 13\); 13 bands are named"),
        (DN[:0], S2, r"shape \(0, 4, 13\)"),
        (changed(DN, to=np.nan), S2, "band B1 holds 1 values that are NaN or infinite; fill them"),
        (changed(DB, to=np.inf), S1, "band VV holds 1 values that are NaN or infinite; fill them"),
        (changed(DN, to=-9999), S2, "band B1 holds -9999; .* never below -1000.*no-data"),
        (np.ma.masked_equal(changed(DN, np.uint16, to=0), 0), S2, "holds 1 masked values; fill"),
        (DN.astype(np.uint8), S2, "uint8, which looks already scaled; .*divide by 255"),
        (DN.astype(np.complex64), S2, "band B1 is complex64; S2 needs reflectance"),
        (DN.astype(str), S2, "band B1 is <U5; S2 needs"),
        (DN.astype(object), S2, "band B1 is object; S2 needs"),
        (DN > 0, S2, "band B1 is bool; S2 needs"),
        (DN / 1e4, S2, "no S2 value is above 0.15, which looks like reflectance from 0 to 1"),
        (DN.astype(np.float16), S2, "band B1 is float16; S2 needs"),
        (DB.astype(np.int16), S1, "band VV is int16; S1 needs dB as float32 or float64"),
        (10 ** (DB / 10), S1, "band VV has an image with no value below 0.*10 \\* log10"),
        (np.stack([DB, -DB]), S1, "band VV has an image with no value below 0"),
    ],
)
def test_preprocess_refuses(pretrained, image, bands, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        pretrained.preprocess(image, bands=bands)
    assert "\n" not in str(error.value)


def test_preprocess_refuses_another_sensor_and_jit(finetuned):
    with pytest.raises(ValueError, match="VV, VH are of S1; these weights need S2: choose"):
        finetuned.preprocess(DB, bands=S1)
    with pytest.raises(ValueError, match=r"called within jax.jit, but runs on the host"):
        jax.jit(lambda x: finetuned.preprocess(x, bands=S2))(DN)


GOOD = {"s1": np.zeros((1, 32, 32, 2), np.float32), "s2": np.zeros((1, 32, 32, 13), np.float32)}


@pytest.mark.parametrize("method", ["predict", "features"])
@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (
            GOOD["s2"],
            r'type ndarray; give a dict of arrays by modality, {"s1": .B, H, W, 2., "s2": .B, H, W',
        ),
        ({"s2": GOOD["s2"]}, "images are of s2; the network needs s1 and s2: give"),
        ({}, "images are of no modality; the network needs s1 and s2"),
        ({**GOOD, "dem": GOOD["s1"]}, "images are of s1, s2, dem; the network needs s1 and s2"),
        ({**GOOD, "s2": GOOD["s2"].tolist()}, r"of s2 are of type list; give .*\[B, H, W, 13\]"),
        ({**GOOD, "s2": DN[None]}, "s2 are uint16; the network needs float32.*preprocess"),
        ({**GOOD, "s1": GOOD["s2"]}, r"s1 have shape \(1, 32, 32, 13\); .*\[B, H, W, 2\].*VV VH$"),
        ({**GOOD, "s1": GOOD["s1"][0]}, r"shape \(32, 32, 2\); .*batch's axis by image\[None\]"),
    ],
)
def test_predict_and_features_refuse(pretrained, method, images, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        getattr(pretrained, method)(images)
    assert "\n" not in str(error.value)


def test_shapes_are_refused_under_jit_too(pretrained):
    with pytest.raises(ValueError, match=r"images of s1 have shape \(1, 32, 32, 13\); the network"):
        jax.jit(pretrained.predict)({**GOOD, "s1": GOOD["s2"]})


# The package.


def test_importing_the_package_alone_imports_no_jax():
    script = """
import sys
import cromss_jax
heavy = {"jax", "flax", "numpy", "etils"} & sys.modules.keys()
assert not heavy, heavy
assert {"Pretrained", "WeightsError", "load"} <= set(dir(cromss_jax)), dir(cromss_jax)
assert not hasattr(cromss_jax, "unload")
from cromss_jax import load
assert load is cromss_jax.load and "jax" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=runs.ROOT)
