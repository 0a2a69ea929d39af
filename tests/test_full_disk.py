"""Full, read-only and vanished disks: an error of ours, nothing half-written under its name."""

import json
import pathlib
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rasterio

from cromss_jax import files, presets, sensors
from cromss_jax.results import maps, pictures, report
from cromss_jax.training import checkpoint, run
from cromss_jax.weights import cards, folders, torch_keys
from cromss_jax.weights import files as weight_files
from cromss_jax.weights.network import Network, Weights, WeightsError
from data_prep.sample import nol
from tests import commands, disks, runs

# Of threads of Orbax and futures of TensorStore, on a full disk.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


@pytest.fixture
def disk(tmp_path):
    try:
        with disks.small(tmp_path / "disk", "2m") as folder:
            yield files.absolute(folder)
    except disks.NoMountError as error:
        pytest.skip(str(error))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape, np.uint8)


def state(step: int) -> dict:
    return {"x": jax.random.normal(jax.random.key(step), (100_000,)), "step": jnp.int32(step)}


def until_full(write) -> Exception:
    for number in range(1, 10_000):
        try:
            write(number)
        except Exception as error:
            return error
    raise AssertionError("the disk is not full")


def test_checkpoints_on_a_full_disk(disk):
    with checkpoint.Checkpoints(disk / "run", keep=100) as checkpoints:
        checkpoints.check_space(state(0))
        with pytest.raises(
            checkpoint.CheckpointError, match=r"step \d could not be saved in .*No s"
        ):
            raise until_full(lambda step: checkpoints.save(step, state(step), {}))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )
    with checkpoint.Checkpoints(disk / "run", keep=100) as checkpoints:
        step, restored, _ = checkpoints.restore(abstract)
        assert step == checkpoints.latest_step == restored["step"] >= 3
        np.testing.assert_array_equal(restored["x"], state(step)["x"])
        with pytest.raises(checkpoint.CheckpointError, match=r"MB left, but needs 0\.4 MB"):
            checkpoints.check_space(state(0))


def test_logs_pictures_and_maps_on_a_full_disk(disk):
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(1_900_000))
    log = report.MetricLog(str(disk), 0)
    vars(log)["_board"] = mock.Mock()  # TensorBoard's own log is not what is tested
    with pytest.raises(OSError, match="No space left"):
        raise until_full(lambda step: log.scalars(step, "train", {"loss": 0.5}))
    assert len(files.read_metrics(disk / "metrics.jsonl")) > 100
    for name, write in {
        "x.png": lambda path: pictures.save_picture(path, noise(300, 300, 3)),
        "x.tif": lambda path: maps.write_map(
            path, noise(300, 300) % 9, "", (10, 0, 0, 0, -10, 0), presets.DYNAMIC_WORLD
        ),
    }.items():
        with pytest.raises(OSError, match="No space left"):
            write(disk / name)
        assert not list(disk.glob("x.*"))
    ballast.unlink()
    maps.write_map(
        disk / "x.tif", noise(300, 300) % 9, "", (10, 0, 0, 0, -10, 0), presets.DYNAMIC_WORLD
    )
    with rasterio.open(str(disk / "x.tif")) as file:
        np.testing.assert_array_equal(file.read(1), noise(300, 300) % 9)


def test_exports_on_a_full_disk(disk):
    network = Network("encoder", 10, {"s1": sensors.S1_BANDS}, None)
    random = np.random.default_rng(0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), network.abstract_state())
    arrays = {
        name: random.standard_normal(array.shape).astype(array.dtype)
        for name, array in torch_keys.to_torch_state(zeros).items()
    }
    found = Weights(network, arrays)
    (disk / "ballast").write_bytes(bytes(1_900_000))
    with pytest.raises(OSError, match="No space left"):
        weight_files.write(disk / "x.safetensors", arrays, cards.make(found, network, "encoder"))
    assert [path.name for path in disk.iterdir()] == ["ballast"]
    with pytest.raises(WeightsError, match="No space left"):
        folders.write_folder(disk / "folder", found)
    assert [path.name for path in disk.iterdir()] == ["ballast"]


@pytest.fixture(scope="module")
def geotiffs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sample") / "geotiffs"
    nol.write_sample(folder, 16, seasons=4, tile_size=96, seed=0)
    return folder


@pytest.mark.parametrize("options", ["", "ro"])
def test_a_build_on_a_full_or_read_only_disk(geotiffs, tmp_path, options):
    flags = dict(source_dir=geotiffs, data_dir=tmp_path / "disk", num_workers=1)
    try:
        with disks.small(tmp_path / "disk", "1m", options) as folder:
            done = commands.run_flags("data_prep.build", dataset="ssl4eo_s12_nol", **flags)
            left = {path.name for path in folder.rglob("*") if path.is_file()}
    except disks.NoMountError as error:
        pytest.skip(str(error))
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1
    assert ("Read-only" if options else "No space left") in done.stderr
    reports = {"bad_locations.csv", "report.md", "report.json"}
    assert left <= {f"ssl4eo_s12_nol.{name}" for name in reports}


def test_a_workdir_that_vanishes(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "vanishing", keep=3) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        shutil.rmtree(tmp_path / "vanishing")
        with pytest.raises(checkpoint.CheckpointError, match="vanishing has vanished"):
            checkpoints.save(2, state(2), {})


def test_damaged_files_of_a_run_are_one_sentence(tmp_path):
    config = runs.tiny_config("unused")
    folder = files.absolute(tmp_path)
    run.record_config(config, folder)
    (folder / "checkpoints" / "3").mkdir(parents=True)
    path = folder / "config.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(run.ConfigError, match=r"config\.json is damaged .*: restore it, or delete"):
        run.record_config(config, folder)
    path.write_text("[]")
    with pytest.raises(run.ConfigError, match=r"config\.json is damaged"):
        run.record_config(config, folder)

    good = json.dumps({"step": 1, "split": "train", "loss": 0.5})
    for bad in ("{", "null", '{"step": "1"}', "\x00\xff"):
        (folder / "metrics.jsonl").write_text(f"{good}\n{bad}\n{good}\n")
        with pytest.raises(files.DamagedFileError, match=r"line 2 of .*metrics\.jsonl is damaged"):
            report.MetricLog(str(folder), 1)
    (folder / "metrics.jsonl").write_text(f"{good}\n{bad}")  # what a kill leaves
    assert len(files.read_metrics(folder / "metrics.jsonl")) == 1
