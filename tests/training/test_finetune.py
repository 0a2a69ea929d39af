"""Finetuning on tiny tiles: whole runs, what a frozen encoder is, scoring, tables."""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import rasterio
from etils import epath
from flax import nnx

from configs import finetune as finetune_config
from cromss_jax import compare, files, lock, presets, sensors
from cromss_jax.data import input_pipeline
from cromss_jax.legend import Legend
from cromss_jax.method import metrics, schedules
from cromss_jax.results import pictures
from cromss_jax.training import finetune, finetune_step, run, scoring, sharding
from cromss_jax.weights import files as weight_files
from cromss_jax.weights import torch_keys
from cromss_jax.weights.network import WeightsError
from data_prep.datasets import downstream
from data_prep.sample import downstream as sample_downstream
from tests import runs, steps

VARIANT = "task=dfc2020,input=s2,sample"
TILE_SIZE, SHORT, NUM_TRAIN, NUM_TEST = 36, 29, 6, 6


@pytest.fixture(scope="module", autouse=True)
def _shared_steps():
    with steps.shared():
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Tiles, the last one smaller than the others."""
    folder = tmp_path_factory.mktemp("tiles")
    tiles = folder / "tiles"
    count = NUM_TRAIN + NUM_TEST
    sample_downstream.write_sample(tiles, "dfc2020", count, TILE_SIZE, seed=3)
    for path in tiles.glob(f"*_test/*_p{count - 1}.tif"):
        with rasterio.open(path) as file:
            pixels, profile = file.read(), file.profile
        path.unlink()
        with rasterio.open(path, "w", **{**profile, "height": SHORT}) as file:
            file.write(pixels[:, :SHORT])
    downstream.Dfc2020(source_dir=tiles, data_dir=folder / "data").build()
    return str(folder / "data")


def tiny_config(data_dir: str, variant: str = VARIANT, **more) -> ml_collections.ConfigDict:
    config = finetune_config.get_config(variant)
    changes = {
        "data.dir": data_dir,
        "data.crop_size": 32,
        "network.depth": 10,
        "batch_size": 4,
        "num_devices": 1,
        "num_epochs": 4,
        "checkpoint_every_epochs": 2,
        "log_every_steps": 2,
        "optimizer.learning_rate": 0.01,
    }
    config.update_from_flattened_dict({**changes, **more})
    return config


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """Two seeds from start to end."""
    workdir = tmp_path_factory.mktemp("finished")
    config = tiny_config(data_dir, save_predictions=True)
    config.seeds = (0, 1)
    finetune.finetune(config, str(workdir))
    return workdir


def saved_results(workdir) -> dict:
    return json.loads((workdir / "results.json").read_text())


def test_a_run_leaves_its_results(finished):
    results = saved_results(finished)
    assert results["seeds"] == [0, 1]
    assert results["classes"] == list(presets.DFC2020.names)
    text = (finished / "results.md").read_text()
    for part in ("| seed 0 |", "| seed 1 |", "| mean ± standard deviation |", "weights random",
                 "6 test tiles"):  # fmt: skip
        assert part in text
    assert (finished / "confusion.png").stat().st_size > 1000
    lines = files.read_metrics(finished / "seed_0" / "metrics.jsonl")
    # 6 tiles, 4 a batch: epochs 2 and 4 end with the batches 3 and 6.
    assert [line["step"] for line in lines if line["split"] == "train"] == [2, 3, 4, 6]
    # As in pretraining; the first step, which compiles, has no speed.
    assert all({"samples_per_second", "wait_for_data"} <= line.keys() for line in lines)
    assert runs.saved_steps(finished / "seed_0") == [3, 6]
    assert runs.final_digest(finished / "seed_0") != runs.final_digest(finished / "seed_1")


def test_saved_maps_are_what_was_scored_and_lie_where_the_tiles_do(finished, data_dir):
    test = input_pipeline.open_dataset(data_dir, "dfc2020", "test")
    confusion = np.zeros((8, 8), int)
    for record in test.source:
        name = record["location_id"].decode()
        with rasterio.open(finished / "seed_1" / "predictions" / f"{name}.tif") as file:
            predicted = file.read(1)
            assert file.crs == rasterio.CRS.from_wkt(record["crs"].decode())
            assert tuple(file.transform[:6]) == tuple(record["transform"])
            assert file.colormap(1)[0] == (0x1C, 0x0D, 0xFF, 255)
            assert file.tags()["class_7"] == "barren"
        assert predicted.shape == ((SHORT if name == "test_p11" else TILE_SIZE), TILE_SIZE)
        labels = record["labels"][0, : len(predicted)]
        valid = labels < 8
        np.add.at(confusion, (labels[valid], predicted[valid]), 1)
    np.testing.assert_array_equal(saved_results(finished)["confusions"][1], confusion)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 6}, {"batch_size": 5}, {"num_devices": 8, "batch_size": 8}]
)
def test_scores_of_a_checkpoint_depend_neither_on_batch_size_nor_on_devices(
    finished, data_dir, tmp_path, changes
):
    config = tiny_config(data_dir, f"{VARIANT},mode=evaluate", **changes)
    config.init_from = str(finished / "seed_1")
    scoring.evaluate(config, str(tmp_path))
    assert saved_results(tmp_path)["confusions"] == saved_results(finished)["confusions"][1:]
    assert "| scored |" in (tmp_path / "results.md").read_text()


def test_another_network_is_not_scored(finished, data_dir, tmp_path):
    config = tiny_config(data_dir, f"{VARIANT},mode=evaluate")
    config.init_from = str(finished / "seed_1")
    config.network.decoder = "fpn"
    with pytest.raises(WeightsError, match=r"PSPNet.*the configuration describes.*FPN"):
        scoring.evaluate(config, str(tmp_path))


def test_a_run_goes_on_with_the_same_bits(finished, data_dir, tmp_path):
    half = tiny_config(data_dir, num_epochs=2)
    half.seeds = (0,)
    finetune.finetune(half, str(tmp_path))
    assert runs.saved_steps(tmp_path / "seed_0") == [3]
    half.num_epochs = 4
    finetune.finetune(half, str(tmp_path))
    assert runs.final_digest(tmp_path / "seed_0") == runs.final_digest(finished / "seed_0")


def test_seeds_of_a_folder_are_trained_beside_each_other(finished, data_dir, tmp_path):
    """As jobs of an array do; none of them by two processes."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    config = tiny_config(data_dir)
    with lock.held(epath.Path(workdir / "seed_1" / lock.NAME)):
        config.seeds = (0,)
        finetune.finetune(config, str(workdir))
        config.seeds = (0, 1)
        with pytest.raises(lock.LockedError, match="run/seed_1 is being written by process"):
            finetune.finetune(config, str(workdir))
    assert saved_results(workdir)["seeds"] == [0]


@pytest.mark.slow
def test_each_seed_starts_from_its_own_encoder_which_is_unfrozen_late(finished, data_dir, tmp_path):
    config = tiny_config(
        data_dir, f"{VARIANT},encoder=late", unfreeze_epoch=2, init_from=f"{finished}/seed_{{seed}}"
    )
    config.seeds = (0, 1)
    finetune.finetune(config, str(tmp_path))
    for seed in config.seeds:
        source = weight_files.load(str(finished / f"seed_{seed}")).arrays
        at_epoch_2, at_end = (
            weight_files.load(str(tmp_path / f"seed_{seed}" / "checkpoints" / step)).arrays
            for step in ("3", "6")
        )
        encoder = [key for key in source if key.startswith("encoder.conv1.")]
        for key in encoder:
            np.testing.assert_array_equal(at_epoch_2[key], source[key])
            assert not np.array_equal(at_end[key], source[key])
        head = "segmentation_head.0.weight"  # randomly initialised
        assert not np.array_equal(at_epoch_2[head], source[head])
    config.seeds = (0, 7)
    with pytest.raises(WeightsError, match="seed_7 does not exist"):
        finetune.finetune(config, str(tmp_path))


@pytest.fixture(scope="module")
def stepping(data_dir, tmp_path_factory):
    """Configuration, state, batch, and the training step with the encoder frozen and not."""
    config = tiny_config(data_dir, **{"optimizer.layer_decay": 0.5})
    task = scoring.prepare(config, str(tmp_path_factory.mktemp("stepping")))
    train = input_pipeline.open_dataset(data_dir, "dfc2020")
    batch = input_pipeline.read_batch(train, ("s2",), np.arange(4))
    steps = {
        train_encoder: jax.jit(
            finetune_step.make_train_step(task.config, task.definition, 4, train_encoder),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        for train_encoder in (False, True)
    }
    return scoring.init_state(task, 0), sharding.to_devices(batch, task.mesh), steps


def moved(before, after) -> set[str]:
    """Keys of what a step changed."""
    found = set()
    for part in ("params", "batch_stats"):
        old = torch_keys.to_torch_state(getattr(before, part))
        new = torch_keys.to_torch_state(getattr(after, part))
        found |= {key for key in old if not np.array_equal(old[key], new[key])}
    return found


def test_a_frozen_encoder_stays_statistics_included(stepping):
    state, batch, steps = stepping
    after, _ = steps[False](state, batch)
    changed = moved(state, after)
    assert changed
    assert not {key for key in changed if key.startswith("encoder.")}
    # All of the decoder moves: weights, and statistics of its BatchNorms.
    keys = {k for part in (state.params, state.batch_stats) for k in torch_keys.keys(part)}
    assert changed == {key for key in keys if not key.startswith("encoder.")}


def test_an_encoder_unfrozen_late_begins_with_its_own_count(stepping):
    """Adam's first step is the learning rate in each parameter, whenever it comes."""
    state, batch, steps = stepping
    after, _ = steps[False](state, batch)
    last, report_ = steps[True](after, batch)
    key = "encoder.layer1.0.conv1.weight"
    way = torch_keys.to_torch_state(last.params)[key] - torch_keys.to_torch_state(after.params)[key]
    # A batch is an epoch here, and this stage the fourth from the end.
    rate = 0.5**4 * float(report_["learning_rate"])
    assert float(report_["learning_rate"]) == schedules.cosine(1, 0.01, 1e-5, 30)
    # Adam's epsilon shortens the steps of tiny gradients; none is longer.
    assert np.abs(way).max() < 1.001 * rate
    assert np.median(np.abs(way)) > 0.9 * rate
    assert "encoder.layer1.0.bn1.running_mean" in moved(after, last)


def test_rates_decay_by_stage(stepping):
    state, _, _ = stepping
    flat = nnx.to_flat_state(finetune_step.rate_factors(state.params, 0.5))
    found = {".".join(map(str, path)): variable.get_value() for path, variable in flat}

    def factors(start: str) -> set[float]:
        return {value for key, value in found.items() if key.startswith(start)}

    assert factors("encoder.layer4.") == {0.5}
    assert factors("encoder.layer3.") == {0.25}
    assert factors("encoder.layer1.") == {0.0625}
    assert factors("encoder.conv1.") == factors("encoder.bn1.") == {0.03125}
    assert factors("decoder.") == factors("segmentation_head.") == {1.0}


def test_counts_are_exact_beyond_what_an_int32_holds():
    counts = metrics.no_counts(2)
    confusion = jnp.array([[2**29 + 1, 3], [0, 2**20]], jnp.int32)
    add = jax.jit(metrics.add_counts)
    for _ in range(100):
        counts = add(counts, confusion)
    np.testing.assert_array_equal(metrics.counted(counts), 100 * np.asarray(confusion, np.int64))


def test_the_cosine_is_torchs_and_then_stays():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, 1e-5)
    for epoch in range(41):
        expected = schedule.get_last_lr()[0]
        assert float(schedules.cosine(epoch, 5e-4, 1e-5, 40)) == pytest.approx(expected, rel=1e-5)
        optimizer.step()
        schedule.step()
    assert float(schedules.cosine(50, 5e-4, 1e-5, 40)) == pytest.approx(1e-5, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 7}, "batch_size 7, but there are 6 training tiles"),
        ({"data.num_train_tiles": 7}, "num_train_tiles is 7"),
        ({"data.crop_size": 40}, "tiles have 36 pixels"),
        ({"data.crop_size": 30}, "multiple of 8, such as 24"),
        ({"network.decoder": "segformer"}, "choose from unet, pspnet"),
        ({"encoder": "thawed"}, "choose from frozen, trained, late"),
        ({"modalities": ("s1", "s2")}, "fine-tuning takes one"),
        ({"seeds": ()}, "name at least one"),
        ({"seeds": (1, 1)}, "none twice"),
        ({"seeds": (1e3,)}, r"seeds is \(1000.0,\); name at least one, from 0"),
        ({"seeds": ("a",)}, r"seeds is \('a',\); name at least one, from 0"),
        ({"unfreeze_epoch": -1}, "unfreeze_epoch is -1; it must be at least 0"),
        ({"optimizer.learning_rate": 1e-6}, "learning_rate is 1e-06; make both positive"),
        ({"network.fusion": "mid"}, "choose from none"),
        ({"augmentation.flip_probability": 50.0}, "is 50.0; it must be from 0 to 1"),
        ({"optimizer.layer_decay": 0.0}, "is 0.0; it must be above 0 and at most 1"),
        ({"data.num_train_tiles": -1}, "is -1; it must be at least 0"),
        ({"data.test_split": "exam"}, "no split 'exam': choose one of"),
        ({"data.name": "ssl4eo_s12_dw"}, "--dataset=ssl4eo_s12_dw"),
    ],
)
def test_what_cannot_run_is_refused(data_dir, tmp_path, changes, sentence):
    config = tiny_config(data_dir, **{k: v for k, v in changes.items() if k != "seeds"})
    if "seeds" in changes:
        config.seeds = changes["seeds"]
    with pytest.raises((run.ConfigError, input_pipeline.DataError), match=sentence):
        finetune.finetune(config, str(tmp_path / "run"))


def test_mode_evaluate_needs_a_checkpoint(data_dir, tmp_path):
    with pytest.raises(run.ConfigError, match="name it by --config.init_from"):
        scoring.evaluate(tiny_config(data_dir, f"{VARIANT},mode=evaluate"), str(tmp_path))


def test_the_table_of_several_runs_is_laid_out_like_the_papers(tmp_path):
    def write(name, weights_, encoder, *confusions, num_train_tiles=8, **more):
        folder = tmp_path / name
        folder.mkdir()
        content = {"dataset": "dfc2020", "input": "s2", "weights": weights_, "encoder": encoder}
        content |= {"resnet": 50, "num_train_tiles": num_train_tiles, "num_bands": 13}
        content["confusions"] = confusions
        (folder / "results.json").write_text(json.dumps(content | more))
        return str(folder)

    perfect, half = [[2, 0], [0, 2]], [[1, 1], [1, 1]]  # mIoU 1 and 1/3
    folders = [
        write("a", "random", "frozen", half),
        write("b", "CromSS", "frozen", half, perfect),
        write("c", "CromSS", "trained", perfect),
    ]
    assert compare.table(folders).splitlines() == [
        "| | S2 random 13B | S2 CromSS 13B |",
        "|---|---|---|",
        "| dfc2020 | 33.3 / – | 66.7 ± 47.1 / 100.0 |",
    ]
    with pytest.raises(compare.CompareError, match="a second run"):
        compare.table([*folders, write("d", "random", "frozen", half)])
    with pytest.raises(compare.CompareError, match="'num_train_tiles': 4"):
        compare.table([*folders, write("e", "CromSS", "frozen", half, num_train_tiles=4)])
    # Another data set has as many tiles as it has.
    other = write("g", "CromSS", "frozen", half, num_train_tiles=4, dataset="dw")
    assert "| dw | – / – | 33.3 / – |" in compare.table([*folders, other])
    bar = compare.table([write("i", "a|b", "frozen", half)])
    assert bar.splitlines()[0] == r"| | S2 a\|b 13B |"
    with pytest.raises(compare.CompareError, match="'decoder': 'unet'} and .* 'decoder': None}"):
        compare.table([*folders, write("h", "CromSS", "frozen", half, decoder="unet")])
    with pytest.raises(compare.CompareError, match="encoder is 'late'; the table needs"):
        compare.table([write("f", "CromSS", "late", half)])
    with pytest.raises(compare.CompareError, match="results.json not found"):
        compare.table([str(tmp_path)])
    saved = json.loads((tmp_path / "a" / "results.json").read_text())
    for content, fault in (
        *(('{"dataset": ', "Expecting value"), ("{}", "confusions"), ("[]", "")),
        *((json.dumps(saved | {"confusions": c}), "") for c in (None, [], [[1, 2]], [[[1], [2]]])),
        (json.dumps(saved | {"weights": None}), "weights"),
    ):
        (tmp_path / "a" / "results.json").write_text(content)
        with pytest.raises(compare.CompareError, match=rf"a/results.json is damaged \(.*{fault}"):
            compare.table(folders)


def test_a_confusion_matrix_is_drawn_in_its_colours():
    picture = pictures.draw_confusion(np.eye(8, dtype=int) * 5, presets.DFC2020)
    colours = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    for colour in presets.DFC2020.colours:
        assert tuple(bytes.fromhex(colour[1:])) in colours


@pytest.mark.parametrize("count", [100, pytest.param(250, marks=pytest.mark.slow)])
def test_a_confusion_matrix_of_many_classes_is_no_huge_picture(count):
    colours = {f"class {i}": f"#{i:02x}00{255 - i:02x}" for i in range(count)}
    picture = pictures.draw_confusion(np.eye(count, dtype=int), Legend.of(colours))
    assert max(picture.shape) < 3000


def test_maps_of_several_dates_have_a_file_each(tmp_path):
    """As of scenes, whose tiles are not cut to the size of their files."""
    place = {"crs": rasterio.CRS.from_epsg(32632).to_wkt().encode()}
    place["transform"] = np.array([10, 0, 5e5, 0, -10, 5e6])
    records = [{"location_id": b"a_0_0", "season": np.int32(s), **place} for s in range(2)]
    counts = np.array([2])
    test = types.SimpleNamespace(source=records, legend=presets.DFC2020, season_counts=counts)
    predictions = jnp.arange(3, dtype=jnp.uint8)[:, None, None] * jnp.ones((1, 4, 6), jnp.uint8)
    task = types.SimpleNamespace(test=test)
    scoring._write_maps(task, epath.Path(tmp_path), np.array([0, 1, -1]), predictions)
    assert {path.name for path in tmp_path.glob("*.tif")} == {"a_0_0_0.tif", "a_0_0_1.tif"}
    with rasterio.open(tmp_path / "a_0_0_1.tif") as file:
        np.testing.assert_array_equal(file.read(1), np.ones((4, 6)))


def test_weights_of_another_level_are_not_scored():
    config = finetune_config.get_config("task=dfc2020,input=s2,encoder=frozen,sample")
    config.init_from, config.data.name = "l2a.safetensors", "dfc2020"

    def card(level):
        mean, std = sensors.S2_STATISTICS[level]["B2"]
        return {"input": {"by_band": {"B2": {"mean": mean, "std": std}, "B3": {}}}}

    for known in ({}, {"input": None}, card("L1C")):
        scoring._check_scaling(config, known, "s2")
    config.imagery = tuple(
        b.to_row() for b in sensors.preset_bands(s2_level="L2A", s2_bands=("B2",))
    )
    scoring._check_scaling(config, card("L2A"), "s2")
    with pytest.raises(WeightsError, match=r"l2a.safetensors takes B2 scaled by mean .*: score on"):
        scoring._check_scaling(config, card("L1C"), "s2")
