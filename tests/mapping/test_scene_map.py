"""Whole maps by a network that is a formula: interrupted, with nodata, against one large window."""

import numpy as np
import pytest

from cromss_jax import lock
from cromss_jax.mapping import scene_map, windows, work

HEIGHT, WIDTH, CLASSES, BATCH = 90, 70, 4, 5


class Formula:
    """A scene whose grey levels say where they are; the upper rows are void."""

    height, width, modalities = HEIGHT, WIDTH, ("s1", "s2")

    def __init__(self, void_rows: int = 0):
        rng = np.random.default_rng(0)
        self.grey = {m: rng.integers(0, 256, (HEIGHT, WIDTH, 2), np.uint8) for m in self.modalities}
        self.valid = {m: np.ones((HEIGHT, WIDTH), bool) for m in self.modalities}
        for mask in self.valid.values():
            mask[:void_rows] = False
        self.valid["s1"][-20:] = False

    def read(self, row, column, height, width):
        window = slice(row, row + height), slice(column, column + width)
        return scene_map.Pixels(
            {m: x[window] for m, x in self.grey.items()},
            {m: x[window] for m, x in self.valid.items()},
        )


def formula(grey):
    """Probabilities of single pixels, which no window changes."""
    found = {}
    for modality, pixels in grey.items():
        assert len(pixels) == BATCH
        levels = pixels.astype(np.float32) / 255
        logits = np.concatenate([levels, 1 - levels], axis=-1) * 3
        found[modality] = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return found


def make(folder, scene, forward=formula, size=32):
    cut = windows.cut_scene(HEIGHT, WIDTH, size, 8)
    bands = {"classes": 1, "probabilities": CLASSES, "confidence": 1, "agreement": 1}
    with work.opened(folder, {"size": size}, (HEIGHT, WIDTH), bands) as unfinished:
        scene_map.map_scene(
            scene, cut, forward, unfinished, num_classes=CLASSES, batch_size=BATCH, num_threads=3
        )
        return {name: unfinished.path(name).read_bytes() for name in bands}


def test_windows_do_not_show(tmp_path):
    """The map of many windows is that of one window of the whole scene, up to ties by rounding."""
    many, one = make(tmp_path / "many", Formula()), make(tmp_path / "one", Formula(), size=90)
    for name, content in many.items():
        found, expected = (np.frombuffer(x, np.uint8).astype(int) for x in (content, one[name]))
        limit = 0 if name in ("classes", "agreement") else 1
        assert np.abs(found - expected).max() <= limit, name


def test_nodata_stays_nodata_and_is_not_predicted(tmp_path):
    calls = []

    def counted(grey):
        calls.append(grey)
        return formula(grey)

    scene = Formula(void_rows=60)
    found = make(tmp_path / "map", scene, counted)
    classes = np.frombuffer(found["classes"], np.uint8).reshape(HEIGHT, WIDTH)
    np.testing.assert_array_equal(classes == 255, ~scene.valid["s2"])
    agreement = np.frombuffer(found["agreement"], np.uint8).reshape(HEIGHT, WIDTH)
    np.testing.assert_array_equal(agreement == 255, ~scene.valid["s1"])
    cut = windows.cut_scene(HEIGHT, WIDTH, 32, 8)
    assert 0 < len(calls) < -(-len(cut) // BATCH)


def test_interrupted_after_any_batch_the_map_is_the_same(tmp_path):
    expected = make(tmp_path / "whole", Formula(void_rows=20))
    for last in range(3):
        folder = tmp_path / f"map_{last}"
        count = 0

        def stops(grey, last=last):
            nonlocal count
            count += 1
            if count > last:
                raise KeyboardInterrupt
            return formula(grey)

        interruptions = 0
        while True:
            count = -interruptions
            try:
                found = make(folder, Formula(void_rows=20), stops)
                break
            except KeyboardInterrupt:
                interruptions += 1
        assert found == expected
        assert interruptions > 0


@pytest.mark.parametrize("lost", ["work.raw", "map.json", "progress"])
def test_a_folder_that_was_deleted_by_halves_is_begun_anew(lost, tmp_path, monkeypatch):
    """Else the rows that are gone would be zeros of the map."""
    with work.opened(tmp_path, {"size": 32}, (40, 40), {"work": 2}) as unfinished:
        unfinished.write(1, 0, {"work": np.ones((2, 40, 40), np.uint8)})
        # Killed when one file is gone, beside what is removed first.
        monkeypatch.setattr(work.shutil, "rmtree", lambda folder: (folder / lost).unlink(True))
        unfinished.remove()
    with work.opened(tmp_path, {"size": 32}, (40, 40), {"work": 2}) as unfinished:
        assert unfinished.rows_done == 0
    unfinished.write(1, 0, {"work": np.ones((2, 40, 40), np.uint8)})
    (tmp_path / lost).unlink()
    for _ in range(2):  # killed before the first row
        with work.opened(tmp_path, {"size": 32}, (40, 40), {"work": 2}) as unfinished:
            assert unfinished.rows_done == 0


@pytest.mark.parametrize("name", ["map.json", "progress"])
def test_a_damaged_folder_is_one_sentence(name, tmp_path):
    arguments = tmp_path, {"size": 32}, (4, 4), {"work": 1}
    with work.opened(*arguments) as unfinished:
        unfinished.write(1, 0, {"work": np.ones((1, 4, 4), np.uint8)})
    (tmp_path / name).write_text("")
    sentence = f"{name} is damaged .*: delete {tmp_path}"
    with pytest.raises(work.WorkError, match=sentence), work.opened(*arguments):
        pass


def test_work_of_another_map_is_refused(tmp_path):
    make(tmp_path / "map", Formula())
    with pytest.raises(
        work.WorkError, match=r"unfinished map of a command with another size: give"
    ):
        make(tmp_path / "map", Formula(), size=48)


def test_two_commands_do_not_write_one_map(tmp_path):
    arguments = tmp_path, {}, (4, 4), {"classes": 1}
    with work.opened(*arguments) as held:
        with (
            pytest.raises(lock.LockedError, match="is being written by process"),
            work.opened(*arguments),
        ):
            pass
        held.remove()
    assert not tmp_path.exists()


def test_a_reader_that_fails_ends_the_map(tmp_path):
    scene = Formula()
    scene.read = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "map", scene)
