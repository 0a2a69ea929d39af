"""Full, read-only and vanished disks: an error of ours, nothing half-written under its name."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cromss_jax import files
from cromss_jax.results import report
from cromss_jax.training import checkpoint, run
from data_prep.sample import nol
from tests import commands, disks, places, runs

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


@pytest.mark.parametrize("damage", ["full", "read-only", "vanished"])
@pytest.mark.parametrize("place", sorted(places.PLACES.keys() - {"records"}))
def test_what_cannot_be_written_is_said_and_not_left_by_halves(place, damage, tmp_path):
    if (place, damage) == ("checkpoint", "read-only"):
        pytest.skip(
            "a thread of Orbax would wait for minutes at the end: see tests/bench/faults.py"
        )
    try:
        with disks.small(tmp_path / "disk", "4m") as folder:
            own = folder / "own"  # what is mounted cannot vanish
            own.mkdir()
            assert places.attempt(place, damage, own if damage == "vanished" else folder) == ""
    except disks.NoMountError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_a_quota(tmp_path):
    try:
        found = places.with_quota(tmp_path / "quota", list(places.PLACES))
    except disks.NoMountError as error:
        pytest.skip(str(error))
    assert found == dict.fromkeys(places.PLACES, "")


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
