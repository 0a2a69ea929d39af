"""Checkpoints: folders of any name, checksums, damage."""

import contextlib
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cromss_jax import files
from cromss_jax.training import checkpoint
from cromss_jax.weights import folders, manifest

NAMES = [
    *("br[1]", "[!a]", "a[", "a*b", "**", "a?b", "{a,b}", "{seed}", "a#b", "a%41b", "a b", " a "),
    *("a\nb", "a\rb", "-a", "~a", "a:b", "file:", "ü", "日本", "$HOME", "a'b", 'a"b', "a&b", "@a"),
]


def state_of(step: int) -> dict:
    return {"params": {"x": jnp.full(3, step)}, "batch_stats": {"y": jnp.full(2, step)}}


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_read_back_whatever_its_folder_is_called(name, tmp_path):
    workdir = files.absolute(tmp_path / name / "run")
    with checkpoint.Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), {"iterator": step})
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0)
    )
    with checkpoint.Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        step, state, host_state = checkpoints.restore(abstract)
    np.testing.assert_array_equal(state["params"]["x"], [2, 2, 2])
    assert (step, host_state) == (2, {"iterator": 2})
    newest = folders.find_checkpoint(str(workdir))
    assert newest == workdir / "checkpoints" / "2"
    tree = folders.read_arrays(newest, ("batch_stats",))
    np.testing.assert_array_equal(tree["batch_stats"]["y"], [2, 2])
    assert [path.name for path in (tmp_path / name / "run" / "checkpoints").iterdir()] == ["2"]


def save(folder: pathlib.Path, *steps: int) -> files.epath.Path:
    with checkpoint.Checkpoints(folder, keep=3) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"iterator": step})
    return files.absolute(folder)


def restore(folder: pathlib.Path) -> tuple:
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0)
    )
    with checkpoint.Checkpoints(folder, keep=3) as checkpoints:
        step, state, host = checkpoints.restore(abstract)
        assert checkpoints.latest_step == step
    np.testing.assert_array_equal(state["params"]["x"], [step] * 3)
    assert host == {"iterator": step}
    return step


def test_the_newest_few_are_kept(tmp_path):
    """By number, not by text."""
    folder = save(tmp_path / "run" / "checkpoints", 7, 8, 9, 10)
    assert sorted(int(path.name) for path in folder.iterdir()) == [8, 9, 10]
    assert restore(folder) == 10
    assert folders.find_checkpoint(str(tmp_path / "run")) == folder / "10"


def test_a_step_is_saved_once(tmp_path):
    folder = files.absolute(tmp_path)
    with checkpoint.Checkpoints(folder, keep=3) as checkpoints:
        checkpoints.save(1, state_of(1), {"iterator": 1})
        checkpoints.wait()
        assert checkpoints.latest_step == 1
        before = [(path, path.stat().st_mtime_ns) for path in all_files(folder)]
        checkpoints.save(1, state_of(2), {"iterator": 2})
        checkpoints.wait()
        assert [(path, path.stat().st_mtime_ns) for path in all_files(folder)] == before
    assert restore(folder) == 1


def test_two_checkpoints_must_fit_before_the_first(tmp_path, monkeypatch):
    """A state of 20 bytes; later one must, as another is removed."""
    usage = shutil.disk_usage(tmp_path)
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        for free, fits in ((40, True), (39, False)):
            monkeypatch.setattr(
                shutil, "disk_usage", lambda _, free=free: usage._replace(free=free)
            )
            with contextlib.nullcontext() if fits else pytest.raises(checkpoint.CheckpointError):
                checkpoints.check_space(state_of(0))
        checkpoints.save(1, state_of(1), {})
        checkpoints.wait()
        for free, fits in ((20, True), (19, False)):
            monkeypatch.setattr(
                shutil, "disk_usage", lambda _, free=free: usage._replace(free=free)
            )
            with contextlib.nullcontext() if fits else pytest.raises(checkpoint.CheckpointError):
                checkpoints.check_space(state_of(0))


def test_what_a_killed_save_left_is_removed(tmp_path):
    folder = save(tmp_path, 1)
    shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp-0")
    assert restore(folder) == 1
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_steps_are_integers_of_python_as_json_takes_no_others(tmp_path, monkeypatch):
    folder = save(tmp_path, 1, 2)
    # What Orbax gives where several processes agree on them.
    monkeypatch.setattr(ocp.CheckpointManager, "all_steps", lambda _: list(np.int32([2, 1])))
    with checkpoint.Checkpoints(folder, keep=3) as checkpoints:
        assert type(checkpoints.latest_step) is int
    step = restore(folder)
    assert (step, type(step)) == (2, int)


@pytest.mark.parametrize(("processes", "waits"), [(1, True), (2, False), (3, False)])
def test_a_save_is_not_waited_for_where_another_process_is_lost(
    processes, waits, tmp_path, monkeypatch
):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    waited = []
    monkeypatch.setattr(checkpoints, "_finish", lambda: waited.append(True))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    error = jax.errors.JaxRuntimeError("lost")
    checkpoints.__exit__(type(error), error, None)
    assert waited == [True] * waits


def all_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())


def flip(path: pathlib.Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


DAMAGES = {
    "flipped": lambda path: flip(path, 4 * path.stat().st_size),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": pathlib.Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_file_is_named_and_the_checkpoint_before_taken(damage, tmp_path, caplog):
    whole = save(tmp_path / "whole", 1, 2)
    for path in all_files(whole / "2"):
        name = path.relative_to(whole / "2")
        caplog.clear()
        folder = tmp_path / "copy"
        shutil.copytree(whole, folder)
        DAMAGES[damage](folder / "2" / name)
        assert restore(folder) == 1, name
        assert str(folder / "2" / name) in caplog.text or name.name == "_CHECKPOINT_METADATA"
        assert "step 1: the steps up to 2 are lost" in caplog.text
        assert sorted(path.name for path in folder.iterdir()) == ["1", "damaged_2"]
        shutil.rmtree(folder)


def test_every_flipped_bit_changes_the_sums_of_arrays():
    sums = manifest.array_sums({"a": np.arange(6, dtype=np.float32), "b": [jnp.bfloat16(1)]})
    assert list(sums) == ["a", "b/0"]
    for bit in range(6 * 32):
        flipped = np.arange(6, dtype=np.float32).view(np.uint32)
        flipped[bit // 32] ^= np.uint32(1 << bit % 32)
        other = {"a": flipped.view(np.float32)}
        with pytest.raises(manifest.DamagedError, match="array a is not as it was saved"):
            manifest.check_arrays(other, sums, files.absolute("/x"))
    manifest.check_arrays({"b": [np.asarray(jnp.bfloat16(1))]}, sums, files.absolute("/x"))
    assert manifest.array_sums(np.zeros((2, 3))) != manifest.array_sums(np.zeros((3, 2)))
    # CRC-32 of the documentation's check value.
    assert manifest._file_sum(_written(b"123456789")) == [9, "cbf43926"]


def _written(content: bytes) -> files.epath.Path:
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(content)
    return files.absolute(file.name)


def test_what_is_no_checkpoint_is_passed_over(tmp_path, caplog):
    folder = save(tmp_path, 1, 2, 3)
    (folder / "9999").mkdir()
    (folder / "3" / "_CHECKPOINT_METADATA").unlink()
    assert restore(folder) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "damaged_3", "damaged_9999"]
    # The step is taken and saved again, and may be damaged again.
    save(tmp_path, 3)
    (folder / "3" / manifest.NAME).write_text("{}")
    assert restore(folder) == 2
    assert (folder / "damaged_3_2").exists()


def test_of_several_damaged_ones_the_newest_says_what_is_lost(tmp_path, caplog):
    folder = save(tmp_path, 1, 2, 3)
    for step in ("2", "3"):
        (folder / step / "_CHECKPOINT_METADATA").unlink()
    assert restore(folder) == 1
    assert "step 1: the steps up to 3 are lost" in caplog.text


def test_nothing_is_renamed_where_no_checkpoint_is_whole(tmp_path):
    folder = save(tmp_path, 1, 2)
    for step in ("1", "2"):
        flip(folder / step / "host" / "metadata", 9)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"no checkpoint .* is whole: .*2/host/metadata"
    ):
        restore(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_checkpoints_of_before_are_restored_unverified(tmp_path, caplog):
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state_of(5)), host=ocp.args.JsonSave({"iterator": 5})
    )
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=args)
    assert restore(tmp_path) == 5
    assert f"unverified: {tmp_path}/5 was saved by a version" in caplog.text
    # Where one cannot be read, the older one is taken if it can.
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(6, args=args)
    (tmp_path / "6" / "state" / "_METADATA").write_text("{}")
    assert restore(tmp_path) == 5


def test_a_whole_checkpoint_of_another_network_is_not_called_damaged(tmp_path):
    folder = save(tmp_path, 1, 2)
    other = {"params": {"x": jax.ShapeDtypeStruct((3,), jnp.int32)}}
    with (
        checkpoint.Checkpoints(folder, keep=3) as checkpoints,
        pytest.raises(checkpoint.CheckpointError, match="2 is whole, but is of another network"),
    ):
        checkpoints.restore(other)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
