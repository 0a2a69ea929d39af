"""Whole runs on a tiny data set made from GeoTIFFs: results, resuming, refusing, stopping."""

import gc
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import types

import jax
import numpy as np
import pytest
from etils import epath

from cromss_jax.data import input_pipeline, validation_split
from cromss_jax.results import pictures
from cromss_jax.training import (
    loop,
    memory,
    preemption,
    pretrain,
    pretrain_step,
    run,
    validation,
)
from cromss_jax.training.preemption import Preempted
from cromss_jax.weights import files as weight_files
from cromss_jax.weights import folders
from cromss_jax.weights.network import Weights
from tests import runs, steps
from tests.environment import quick_flags


@pytest.fixture(scope="module", autouse=True)
def _shared_steps():
    with steps.shared():
        yield


@pytest.fixture(scope="module")
def data_dir(tiny_run):
    return tiny_run[1].data.dir


def tiny_config(data_dir, **more):
    return runs.tiny_config(data_dir, **{**runs.SAVING, **more})


def train_here(config, workdir):
    return pretrain.pretrain(config, str(workdir))


def start(data_dir, workdir, **environment: str) -> subprocess.Popen:
    """The command line, as a user gives it."""
    flags = {f"config.{k}": v for k, v in {**runs.tiny_flags(data_dir), **runs.SAVING}.items()}
    line = runs.command(
        "cromss_jax.main", config="configs/pretrain.py:sample", workdir=workdir, **flags
    )
    return subprocess.Popen(
        line,
        cwd=runs.ROOT,
        env={**os.environ, "XLA_FLAGS": quick_flags(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def finished(tiny_run):
    """A run of mid fusion from start to end."""
    return tiny_run[0]


def test_a_run_leaves_results_logs_and_checkpoints(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        *("checkpoints", "config.json", "metrics.jsonl", "results.md", "samples.png"),
        *("tensorboard", "versions.json"),
    }
    lines = runs.logged(finished)
    validated = [line for line in lines if line["split"] == "validation"]
    # 14 locations, 8 a batch: epochs 2 and 4 end with the batches 4 and 7.
    assert [line["step"] for line in validated] == [4, 7]
    last = validated[-1]
    for key in ("s1/oa", "s2/miou", "truth/s2/iou/water", "truth/labels/oa", "s1/mf1", "loss"):
        assert key in last
    assert 0.5 < last["truth/labels/oa"] < 0.8  # about a third of the labels is wrong
    assert 0 < last["label_confidence_auroc/s2"] < 1
    trained = [line for line in lines if line["split"] == "train"]
    assert {"consistency/s1_to_s2", "segmentation/s1", "wrong_labels_selected/s2"} <= set(
        trained[-1]
    )
    assert all(np.isfinite(line["loss"]) for line in lines)
    # A step belongs to the epoch of its first sample, and logs are means since the last.
    rates = 0.003 * 0.8 ** (np.arange(7) * 8 // 14)
    expected = [rates[:3].mean(), rates[3], rates[4:6].mean(), rates[6]]
    np.testing.assert_allclose([line["learning_rate"] for line in trained], expected, rtol=1e-6)
    assert "noisy labels against truth" in (finished / "results.md").read_text()
    versions = json.loads((finished / "versions.json").read_text())
    assert versions["jax"] == jax.__version__


def test_checkpoints_are_kept_as_configured(finished):
    assert runs.saved_steps(finished) == [7]  # of the ends of the epochs 2 and 4


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended before {text}")


class Terminating(logging.Handler):
    """Interrupts this process when a text is logged."""

    def __init__(self, text: str):
        super().__init__()
        self._text = text

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in record.getMessage():
            preemption._told.set()  # as the thread does that waits for signals


@pytest.fixture
def interrupted_run(data_dir, tmp_path, caplog):
    """The folder of a run that got SIGTERM after its third step. Its name looks like a pattern."""
    workdir = tmp_path / "br[1]" / "a*?{b}#%41 ü:c"
    handler = Terminating("step 3/7")
    logger = logging.getLogger("cromss_jax")
    caplog.set_level(logging.INFO, "cromss_jax")
    logger.addHandler(handler)
    try:
        with pytest.raises(Preempted, match="interrupted: saved step 3"):
            train_here(tiny_config(data_dir), workdir)
    finally:
        logger.removeHandler(handler)
        preemption._told.clear()
    return workdir


def test_an_interrupted_validation_is_made_up_for(finished, data_dir, tmp_path, monkeypatch):
    evaluate, calls = validation.evaluate, []

    def interrupted(step, state, batches, mesh):
        calls.append(step)

        def telling():
            for batch in batches:
                if len(calls) in (1, 3):
                    preemption._told.set()
                yield batch

        return evaluate(step, state, telling(), mesh)

    monkeypatch.setattr(validation, "evaluate", interrupted)
    # Pictures take longer than the steps; `finished` has drawn its own.
    monkeypatch.setattr(pictures, "draw_samples", lambda *_: np.zeros((8, 8, 3), np.uint8))
    for step in (4, 7):
        with pytest.raises(Preempted, match=f"saved step {step}; .* with its validation"):
            train_here(tiny_config(data_dir), tmp_path)
        preemption._told.clear()
        assert runs.saved_steps(tmp_path) == [step]
        assert runs.logged(tmp_path)[-1]["split"] == "train"
    train_here(tiny_config(data_dir), tmp_path)
    assert len(calls) == 4
    assert runs.final_digest(tmp_path) == runs.final_digest(finished)
    assert runs.logged(tmp_path) == runs.logged(finished)


@pytest.mark.slow
def test_a_run_interrupted_and_then_killed_ends_bit_equal(finished, data_dir, interrupted_run):
    workdir = interrupted_run
    assert runs.saved_steps(workdir) == [3]
    assert not (workdir / "results.md").exists()

    process = start(data_dir, workdir)
    wait_for(process, "at step 3")
    wait_for(process, "step 4/7")  # its checkpoint is being written
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert not (workdir / "results.md").exists()

    # In an environment whose settings of JAX would change dtypes and random numbers.
    output = finish(start(data_dir, workdir, JAX_ENABLE_X64="1", JAX_DEFAULT_PRNG_IMPL="rbg"))
    assert "jax_enable_x64 is True in this environment; set to False" in output
    assert runs.final_digest(workdir) == runs.final_digest(finished)
    # But for the means over the steps at which the first process was interrupted.
    untouched = [[line for line in runs.logged(path) if line["step"] > 4]
                 for path in (workdir, finished)]  # fmt: skip
    assert untouched[0] == untouched[1]


def test_sigterm_ends_a_run_that_compiles(data_dir, tmp_path):
    process = start(data_dir, tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "empty"))
    wait_for(process, "locations to train on")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, output.splitlines()[-1]) == (
        0,
        "interrupted: nothing to save, the same command continues",
    )


def test_a_loss_that_is_not_finite_stops_the_run(finished, data_dir, tmp_path):
    """From a head whose logits overflow: the very step that the other runs compiled."""
    source = weight_files.load(str(finished))
    bias = np.resize(np.array([3e38, -3e38], np.float32), 9)
    arrays = {**source.arrays, "segmentation_head.0.bias": bias}
    folders.write_folder(epath.Path(tmp_path / "huge"), Weights(source.network, arrays))
    config = tiny_config(data_dir, init_from=str(tmp_path / "huge"))
    with pytest.raises(loop.NonFiniteLossError) as error:
        train_here(config, tmp_path / "run")
    first_bad = int(str(error.value).split("at step ")[1].split(",")[0])
    dataset = input_pipeline.open_dataset(data_dir, config.data.name)
    locations, _ = validation_split.split_locations(
        16, config.data.validation_fraction, config.seed
    )
    batch = input_pipeline.training_records(dataset, locations, config.batch_size, config.seed)[
        first_bad
    ]
    for index in batch:
        assert dataset.source[int(index)]["location_id"].decode() in str(error.value)
    assert runs.saved_steps(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data.crop_size": 64}, "tiles have 48 pixels"),
        ({"data.crop_size": 40}, "multiple of 32"),
        (
            {"batch_size": 12, "num_devices": 8},
            "the batch must be divisible by the number of devices, 8",
        ),
        ({"num_devices": 9}, "8 devices were found"),
        (
            {"data.validation_fraction": 0.0, "schedule.name": "plateau"},
            "plateau schedule needs a validation loss",
        ),
        ({"selection.scope": "gpu"}, "selection.scope is 'gpu'; choose from global, per_device"),
        ({"selection.ramp": "exponential"}, "choose from exp, linear, none"),
        ({"loss.segmentation": ("dice", "ce")}, "choose from cross_entropy, dice, focal"),
        ({"s2_bands": ("B4", "B14")}, "choose from B1, B2"),
        ({"network.depth": 101}, "choose from 10, 18, 34, 50"),
        ({"network.decoder": "unetpp"}, "is 'unetpp'; choose from unet, pspnet"),
        ({"s2_bands": ("B2", "B2")}, "is .*; name each once"),
        ({"seed": -1}, r"config.seed is -1; it must be from 0 to 2\^63 - 1"),
        ({"augmentation.rotation_probability": 20.0}, "is 20.0; it must be from 0 to 1"),
        ({"selection.final_keep_fraction": -0.5}, "is -0.5; it must be from 0 to 1"),
        ({"optimizer.momentum": 1.0}, "is 1.0; it must be from 0 to below 1"),
        ({"optimizer.learning_rate": math.nan}, "is nan; it must be above 0"),
        ({"optimizer.l2": -1e-8}, "is -1e-08; it must be at least 0"),
        ({"schedule.factor": 1.0}, "is 1.0; it must be above 0 and below 1"),
        ({"schedule.decay": 1.02}, "is 1.02; it must be above 0 and at most 1"),
        ({"loss.consistency_weight": math.inf}, "is inf; it must be at least 0"),
        ({"augmentation.max_angle": 360.0}, "is 360.0; it must be from 0 to 180"),
        ({"loss.prior_weight": 0.9, "loss.uniform_weight": 0.2}, "are 1.1 together; make them at"),
        ({"modalities": ("s1",)}, "use 'none' for one modality"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    data_dir, tmp_path, change, sentence
):
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=sentence):
        train_here(tiny_config(data_dir, **change), workdir)
    assert not workdir.exists()


def test_another_configuration_does_not_continue_a_run(finished, data_dir):
    with pytest.raises(run.ConfigError, match=r"changed selection.ramp_epochs from 2 to 3"):
        train_here(tiny_config(data_dir, **{"selection.ramp_epochs": 3}), finished)


def test_rebuilt_data_does_not_continue_a_run(finished, data_dir, tmp_path):
    rebuilt = runs.relabel(data_dir, tmp_path / "data")
    sentence = f"records of ssl4eo_s12_nol in {rebuilt} are not those that the run in"
    with pytest.raises(run.ConfigError, match=sentence):
        train_here(tiny_config(rebuilt), finished)


def test_a_run_saved_without_a_digest_of_the_records_continues_unverified(
    finished, data_dir, tmp_path, caplog
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (path,) = (workdir / "checkpoints" / "7" / "host").glob("metadata")
    content = json.loads(path.read_text())
    del content["data"]["records"], content["array_sums"]
    (workdir / "checkpoints" / "7" / "manifest.json").unlink()
    path.write_text(json.dumps(content))
    train_here(tiny_config(data_dir), workdir)
    assert f"unverified data: the run in {workdir}" in caplog.text
    caplog.clear()
    content["data"]["season_counts"] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(run.ConfigError, match="used other data"):
        train_here(tiny_config(data_dir), workdir)


def test_a_stray_folder_is_passed_over(finished, data_dir, tmp_path, caplog):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "checkpoints" / "9999").mkdir()
    train_here(tiny_config(data_dir), workdir)
    assert "9999 is damaged, renamed to damaged_9999: " in caplog.text
    assert runs.saved_steps(workdir) == [7]


def test_each_step_draws_crops_of_its_own():
    config = runs.tiny_config("unused")
    rng = jax.random.key_data(jax.random.key(0))
    draw = jax.jit(
        lambda rng, step: pretrain_step.draw_geometry(
            config, types.SimpleNamespace(rng=rng, step=step), 48
        )
    )
    first, again, next_step = (draw(rng, step) for step in (0, 0, 1))
    np.testing.assert_array_equal(first.top, again.top)
    assert np.any(first.top != next_step.top)


def test_garbage_is_looked_for_again_whatever_happened():
    def fail():
        with memory.garbage_collection_paused():
            assert not gc.isenabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.isenabled()
