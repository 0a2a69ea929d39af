"""What a data set says reaches networks, losses, scores, exports: 44 classes, other bands."""

import dataclasses
import json
import pathlib

import jax
import ml_collections
import numpy as np
import pytest
from etils import epath

import cromss_jax
from configs import finetune as finetune_config
from configs import pretrain as pretrain_config
from cromss_jax import convert, presets, sensors
from cromss_jax.data import description, input_pipeline, preprocess
from cromss_jax.legend import Legend
from cromss_jax.training import objective, pretrain, pretrain_step, run
from cromss_jax.weights import cards
from cromss_jax.weights.network import Network
from data_prep.datasets import ssl4eo_s12_nol
from data_prep.options import Options
from data_prep.reading import legends
from tests import runs, steps
from tests.data_prep import trees

C = 44
BANDS = sensors.S2_BAND_CHOICES[10]


def code(label: np.ndarray) -> np.ndarray:
    """Codes with gaps, as CORINE's: 111, 118, ... 412."""
    return 111 + 7 * label


@pytest.fixture(scope="module")
def legend(tmp_path_factory) -> Legend:
    rows = [f"{code(i)},class {i},#{i:02x}{255 - i:02x}{5 * i:02x}" for i in range(C)]
    path = tmp_path_factory.mktemp("legend") / "map.csv"
    path.write_text("\n".join(["value,name,colour", *rows]))
    return legends.read_legend(str(path))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, legend) -> str:
    """A map of 44 classes on L2A imagery of ten bands, built from GeoTIFFs."""
    folder = tmp_path_factory.mktemp("data")
    tree = trees.sample("nol", folder / "tree", 8)
    rows, columns = np.indices((36, 36)) // 9
    for path in tree.glob("dw_noisy_labels/*/*/*.tif"):

        def recode(pixels: np.ndarray) -> np.ndarray:
            return np.where(
                pixels == 255, 255, code((5 * pixels.astype(int) + 4 * rows + columns) % C)
            ).astype(np.int16)

        trees.rewrite(path, recode)
    options = Options(legend=legend, s2_level="L2A", s2_bands=BANDS, s2_offset=0)
    builder = ssl4eo_s12_nol.Ssl4eoS12Nol(
        source_dir=tree, data_dir=folder / "built", options=options
    )
    builder.build()
    return str(folder / "built")


@pytest.fixture(scope="module", params=["s2", "s1,s2"])
def modalities(request) -> tuple[str, ...]:
    return tuple(request.param.split(","))


@pytest.fixture(scope="module")
def finished(modalities, data_dir, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("run")
    variant = "sample,bands=10" + (",modality=s2" if modalities == ("s2",) else "")
    config = runs.tiny_config(data_dir, variant, batch_size=4, num_epochs=1)
    config.eval_every_epochs = 1
    with steps.shared():  # compiled quickly
        pretrain.pretrain(config, str(workdir))
    return workdir


@pytest.mark.slow
def test_44_classes_with_gaps_train_and_are_scored(finished, modalities, data_dir, legend):
    dataset = input_pipeline.open_dataset(data_dir, "ssl4eo_s12_nol")
    assert dataset.legend == legend
    for record in dataset.source:
        assert set(np.unique(record["labels"])) <= {*range(C), 255}
    *_, last = runs.logged(finished)
    assert last["split"] == "validation"
    assert np.isfinite(last["loss"])
    for modality in modalities:
        assert {f"{modality}/iou/class {i}" for i in range(C)} <= last.keys()
        assert f"truth/{modality}/iou/class 43" in last
    header = (finished / "results.md").read_text().splitlines()[0]
    assert header.count("|") == 1 + 5 + C
    config = json.loads((finished / "config.json").read_text())
    assert config["network"]["num_classes"] == C
    assert config["legend"] == [list(pair) for pair in legend.pairs()]
    assert (finished / "samples.png").stat().st_size > 10_000


@pytest.mark.slow
def test_44_classes_are_exported(finished, legend, tmp_path):
    """The card's names, colours and scaling are the data set's; smp takes the weights strictly."""
    pytest.importorskip("segmentation_models_pytorch")
    from tests import torch_parity

    safetensors_torch = pytest.importorskip("safetensors.torch")
    path = tmp_path / "s2.safetensors"
    convert.to_torch(str(finished), str(path), "unet", "s2")
    net = torch_parity.torch_model(10, in_channels=10, num_classes=C)
    net.load_state_dict(safetensors_torch.load_file(path), strict=True)
    for source in (path, finished):
        model = cromss_jax.load(source)
        assert model.legend == dict(legend.pairs())
        assert model.bands["s2"] == BANDS
        scaling = model.card["input"]["by_band"]["B2"]
        mean, std = sensors.S2_STATISTICS["L2A"]["B2"]
        assert (scaling["mean"], scaling["low"]) == (mean, mean - 2 * std)
        assert scaling["unit"] == "reflectance * 10000 (L2A)"
        raw = np.random.default_rng(0).integers(0, 6000, (1, 32, 32, 10))
        expected = [
            sensors.scale_to_uint8(raw[..., i], band, sensors.S2_STATISTICS["L2A"])
            for i, band in enumerate(BANDS)
        ]
        found = model.preprocess(raw, bands=BANDS)
        np.testing.assert_array_equal(np.rint(found * 255), np.stack(expected, axis=-1))
    assert "`" in (tmp_path / "s2.safetensors.md").read_text()
    assert "43 class 43" in (tmp_path / "s2.safetensors.md").read_text()


def test_bands_are_taken_by_name(data_dir):
    """Any order of the configuration, from records of another one; native sizes and 10 m."""
    dataset = input_pipeline.open_dataset(data_dir, "ssl4eo_s12_nol")
    batch = input_pipeline.read_batch(dataset, ("s2",), np.arange(2))
    assert batch["s2_20m"].shape == (2, 18, 18, 6)
    wanted = ("B12", "B2", "B8A", "B4")
    stacked = preprocess.stack_bands(batch, "s2", wanted, bands=dataset.bands)
    np.testing.assert_array_equal(stacked[..., 1], batch["s2_10m"][..., 0])
    np.testing.assert_array_equal(stacked[..., 3], batch["s2_10m"][..., 2])
    one = preprocess.upsample(batch["s2_20m"][..., [5, 3]], 2)
    np.testing.assert_array_equal(stacked[..., [0, 2]], one)
    at_10 = sensors.preset_bands(("s2",), ("B4", "B3", "B11"))
    pixels = np.random.default_rng(0).integers(0, 255, (2, 6, 6, 3), np.uint8)
    stacked = preprocess.stack_bands({"s2": pixels}, "s2", ("B11", "B3"), bands=at_10)
    np.testing.assert_array_equal(stacked, pixels[..., [2, 0]])


def described(variant="", data=description._PUBLISHED, **fields):
    config = pretrain_config.get_config(variant)
    config.update_from_flattened_dict(fields)
    return run.describe_data(ml_collections.FrozenConfigDict(config), data)


def test_what_a_data_set_lacks():
    """The configuration asks for a modality or band that is not there."""

    class Data:
        legend = presets.WORLDCOVER
        bands = sensors.preset_bands(s2_level="L2A")

    config = described("bands=12", Data)
    assert config.network.num_classes == 11
    assert objective.stored_bands(config) == Data.bands
    assert dict(config.legend)["Mangroves"] == "#00cf75"
    with pytest.raises(run.ConfigError, match="has no S2 band B10, only B1, B2.*: set config"):
        described("", Data)
    Data.bands = sensors.preset_bands(("s1",))
    with pytest.raises(run.ConfigError, match="has no S2, only S1: choose modality=s1"):
        described("", Data)
    assert described("modality=s1", Data).modalities == ("s1",)
    config = finetune_config.get_config()
    with pytest.raises(run.ConfigError, match="has no S2, only S1: choose input=s1"):
        run.describe_data(config, Data)


def test_without_a_description_there_are_dynamic_worlds_nine_classes():
    """Metadata and configurations of earlier versions."""
    assert input_pipeline.legend_of({}) == presets.DYNAMIC_WORLD
    pairs = [list(pair) for pair in presets.DFC2020.pairs()]
    assert input_pipeline.legend_of({"legend": pairs}).names == presets.DFC2020.names
    for features, is_native in ((("s1", "s2_10m", "s2_20m"), True), (("s1", "s2"), False)):
        assert input_pipeline.bands_of({}, features) == sensors.preset_bands(is_native=is_native)
    config = pretrain_config.get_config()
    assert objective.num_classes(config) == 9
    assert objective.stored_bands(config) is None
    assert Network.of_config(json.loads(config.to_json())).num_classes == 9


@pytest.mark.parametrize("modality", ["s1", "s2"])
def test_data_of_one_modality_suit_the_step(modality):
    """Shapes alone: four bands at 10 m or radar, 11 classes, an odd tile size, one date."""
    s2_bands = ("B2", "B3", "B4", "B8")
    data = dataclasses.replace(
        description._PUBLISHED,
        tile_size=101,
        seasons=1,
        features=(modality, "labels", "season"),
        legend=presets.WORLDCOVER,
        bands=sensors.preset_bands((modality,), s2_bands),
    )
    fields = {"s2_bands": s2_bands, "network.depth": 10, "data.crop_size": 96}
    config = described(f"sample,modality={modality}", data, **fields)
    records = description.record_shapes(data, config.modalities, config.batch_size)
    channels = {"s1": 2, "s2": 4}[modality]
    assert records[modality].shape == (8, 101, 101, channels)
    definition = pretrain_step.network_definition(config)
    step = pretrain_step.make_train_step(config, definition, 100)
    state = jax.eval_shape(lambda: pretrain_step.init_state(config, jax.random.key(0)))
    _, metrics = jax.eval_shape(step, state, records)
    assert metrics["loss"].shape == ()
    shown = jax.eval_shape(pretrain_step.make_picture_step(config, definition, 100), state, records)
    assert shown[modality].shape == (4, 96, 96, channels)
    scored = jax.eval_shape(pretrain_step.make_eval_step(config, definition), state, records)
    assert scored[f"confusion/{modality}"].shape == (11, 11)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"legend": {"classes": [{}]}}, "the legend in metadata.json is damaged"),
        ({"legend": [["one", "#000000"]]}, "is damaged: the legend has 1 classes"),
        ({"bands": [["B2", "s2"]]}, "the bands in metadata.json are damaged"),
        ({"bands": [["B99", "s2", 1.0, 1.0, ""]]}, "B99'.* are not in the records"),
        ({"bands": [["B2", "s2_10m", 1.0, 1.0, ""]]}, "s2_10m'.* are not in the records"),
    ],
)
def test_damaged_metadata(metadata, message):
    with pytest.raises(input_pipeline.DataError, match=message):
        (input_pipeline.legend_of(metadata), input_pipeline.bands_of(metadata, ("s2",)))


class NineOthers:
    """A data set of nine classes that are not Dynamic World's."""

    legend = Legend.of({f"class {i}": "#000000" for i in range(9)})
    bands = sensors.preset_bands(is_native=True)


def test_runs_of_earlier_versions(tmp_path):
    """Their configurations say no legend and no bands: they continue, and have cards."""
    folder = epath.Path(tmp_path)
    saved = json.loads(described().to_json())
    del saved["legend"], saved["imagery"], saved["network"]["num_classes"]
    (folder / "config.json").write_text(json.dumps(saved))
    (folder / "checkpoints" / "1").mkdir(parents=True)
    card = cards.of_run(folder / "checkpoints" / "1", Network.of_config(saved))
    assert card["classes"] == list(presets.DYNAMIC_WORLD.names)
    assert card["input"]["by_band"]["B10"]["mean"] == 22.10351321
    with pytest.raises(run.ConfigError, match="changed legend from .*water"):
        run.record_config(described("", NineOthers), folder)
    run.record_config(described(), folder)
    assert json.loads((folder / "config.json").read_text())["network"]["num_classes"] == 9
