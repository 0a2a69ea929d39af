"""The command `predict`: a whole map, and what it refuses."""

import json
import types

import numpy as np
import pytest
import rasterio

import cromss_jax
from cromss_jax import scenes, sensors
from data_prep import errors
from tests import commands
from tests.mapping import scene_files
from tests.mapping.weights import write_weights

SIZE = 96


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of both sensors with a card."""
    folder = tmp_path_factory.mktemp("weights") / "late"
    write_weights(folder, "late")
    return str(folder)


@pytest.fixture(scope="module")
def model(weights):
    return cromss_jax.load(weights)


@pytest.fixture
def written(tmp_path):
    return scene_files.make(tmp_path, SIZE)


def open_scene(model, **paths):
    found = {m: (path,) for m, path in paths.items()}
    return scenes.open_scene(found, "the scene", scenes.NO_DATE, model, None)


def test_pixels_are_scaled_as_in_python(written, model):
    written.s2[:, :10, :20] = 0
    written.s1[:, -5:] = np.nan
    s2 = written.write("s2.tif", written.s2, sensors.S2_BANDS)
    s1 = written.write("s1.tif", written.s1, sensors.S1_BANDS)
    scene, _ = open_scene(model, s2=s2, s1=s1)
    found = scene.read(0, 8, 64, 40)
    raw = np.moveaxis(written.s2, 0, -1)[:64, 8:48]
    expected = model.grey_levels(raw, sensors.S2_BANDS)
    void = (raw == 0).all(-1)
    assert void.sum() == 10 * 12
    np.testing.assert_array_equal(found.valid["s2"], ~void)
    np.testing.assert_array_equal(found.grey["s2"][~void], expected[~void])
    assert (found.grey["s2"][void] == 127).all()
    below = scene.read(SIZE - 10, 0, 10, SIZE)
    assert not below.valid["s1"][-5:].any()
    assert below.valid["s1"][:-5].all()


def test_s1_is_brought_onto_the_grid_of_s2(written, model):
    """From a grid moved by 3 columns and 2 rows; and turned bands."""
    s2 = written.write("s2.tif", written.s2, sensors.S2_BANDS)
    s1 = written.write("s1.tif", written.s1[::-1], ("VH", "VV"), transform=written.moved(2, 3))
    scene, _ = open_scene(model, s2=s2, s1=s1)
    found = scene.read(0, 0, SIZE, SIZE)
    expected = model.grey_levels(np.moveaxis(written.s1, 0, -1), sensors.S1_BANDS)
    np.testing.assert_array_equal(found.grey["s1"][2:, 3:], expected[:-2, :-3])
    assert not found.valid["s1"][:2].any()
    assert not found.valid["s1"][:, :3].any()


def test_the_offset_is_found_and_subtracted(written, model):
    plain = written.write("plain.tif", written.s2, sensors.S2_BANDS)
    offset = written.write("offset.tif", written.s2 + np.uint16(1000), sensors.S2_BANDS)
    (expected, _), (found, facts) = (open_scene(model, s2=path) for path in (plain, offset))
    window = 0, 0, SIZE, SIZE
    np.testing.assert_array_equal(found.read(*window).grey["s2"], expected.read(*window).grey["s2"])
    assert facts["offset"].startswith("1000")


def refusals(written):
    """Files that are wrong, and what is said."""
    s1, s2 = written.s1, written.s2
    return {
        "looks already scaled|uint8": {
            "s2": written.write("a.tif", (s2 // 40).clip(0, 255).astype(np.uint8), sensors.S2_BANDS)
        },
        "the bands are in another order": {"s2": written.write("b.tif", s2[::-1])},
        "the bands are swapped": {"s1": written.write("c.tif", s1[::-1])},
        "neither dB": {"s1": written.write("d.tif", s1 + 100, sensors.S1_BANDS)},
        "lacks B10": {
            "s2": written.write("e.tif", np.delete(s2, 10, 0), sensors.S2_BAND_SUBSETS[12])
        },
        "has 4 bands without names": {"s2": written.write("f.tif", s2[:4])},
        "does not say where it lies": {
            "s2": written.write("g.tif", s2, sensors.S2_BANDS, crs=None)
        },
        "has no valid pixel on the grid of the scene": {
            "s2": written.write("h.tif", s2, sensors.S2_BANDS),
            "s1": written.write(
                "i.tif",
                s1,
                sensors.S1_BANDS,
                transform=written.moved(5000, 0),
            ),
        },
    }


def test_what_cannot_be_mapped_is_refused(written, model):
    for sentence, paths in refusals(written).items():
        with pytest.raises((errors.BadFileError, scenes.SceneError), match=sentence):
            open_scene(model, **paths)


def test_another_level_than_the_weights_is_refused(written, model):
    path = written.folder / "S2A_MSIL2A_20200101.tif"
    written.write(path.name, written.s2, sensors.S2_BANDS)
    with pytest.raises(scenes.SceneError, match=r"is L2A, .* was trained on L1C"):
        open_scene(model, s2=path)


def test_the_command_makes_a_map_and_goes_on_with_it(written, weights):
    written.s2[:, :20] = 0
    written.write("s2.tif", written.s2, sensors.S2_BANDS)
    written.write("s1.tif", written.s1, sensors.S1_BANDS)
    (written.folder / "scenes.csv").write_text("scene,date,s2,s1\nwood,2020-06-01,s2.tif,s1.tif\n")
    output = written.folder / "maps"
    more = {"window": 64, "overlap": 16, "batch_size": 3}
    flags = dict(checkpoint=weights, table=written.folder / "scenes.csv", output=output)
    flags |= dict(write="agreement", **more)
    first = commands.run_flags("cromss_jax.predict", **flags)
    assert first.returncode == 0, first.stderr
    made = output / "wood_20200601"
    assert {p.name for p in output.iterdir()} == {made.name}
    names = {"classes", "agreement"}
    expected = {f"{n}{end}" for n in names for end in (".tif", ".tif.aux.xml", ".qml")}
    assert {p.name for p in made.iterdir()} == expected | {"summary.md", "map.json"}
    with rasterio.open(made / "classes.tif") as file:
        classes = file.read(1)
    # S1 alone maps what S2 does not see.
    assert (classes < 9).all()
    with rasterio.open(made / "agreement.tif") as file:
        agreement = file.read(1)
    np.testing.assert_array_equal(agreement == 255, np.arange(SIZE)[:, None].repeat(SIZE, 1) < 20)
    summary = (made / "summary.md").read_text()
    assert "geometric mean" in summary
    assert json.loads((made / "map.json").read_text())["window"] == 64
    stamp = (made / "classes.tif").stat().st_mtime_ns
    again = commands.run_flags("cromss_jax.predict", **flags)
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stderr
    assert (made / "classes.tif").stat().st_mtime_ns == stamp
    other = commands.run_flags("cromss_jax.predict", **flags | {"overlap": 8})
    assert other.returncode == 1
    assert "holds the map of another command: delete it" in other.stderr


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (["a,2020-06-01T10:00:00", "a,2020-06-01T10:05:00"], "mapped into the folder a_20200601"),
        (
            ["north/a,2020-06-01"],
            "scene 'north/a', which files are named after: take out the /",
        ),
    ],
)
def test_each_row_has_a_folder_of_its_own(written, rows, sentence):
    written.write("s2.tif", written.s2, sensors.S2_BANDS)
    table = written.folder / "rows.csv"
    table.write_text("\n".join(["scene,date,s2", *(f"{row},s2.tif" for row in rows)]))
    done = commands.run_flags(
        "cromss_jax.predict", checkpoint="none", table=table, output=written.folder / "maps"
    )
    assert done.returncode == 1
    assert sentence in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("count", [1, 251])
def test_networks_of_one_class_or_too_many_make_no_map(monkeypatch, tmp_path, count):
    described = types.SimpleNamespace(num_classes=count)
    model = types.SimpleNamespace(notes=(), source="unet.pt", description=described)
    monkeypatch.setattr(scenes.cromss_jax, "load", lambda _: model)
    monkeypatch.setattr(scenes.settings, "keep_compiled", lambda _: None)
    with pytest.raises(scenes.SceneError, match=f"unet.pt tells {count} classes apart: maps hold"):
        scenes.load("unet.pt", str(tmp_path))


def test_a_window_of_any_values_is_scaled(written, model):
    """Of a whole scene such values are refused: they look like power, and like a wrong unit."""
    written.s2[:, :8, :8] = written.s1[:, :8, :8] = 1
    s2 = written.write("s2.tif", written.s2.astype(np.float32), sensors.S2_BANDS)
    s1 = written.write("s1.tif", written.s1, sensors.S1_BANDS)
    scene, _ = open_scene(model, s2=s2, s1=s1)
    grey = scene.read(0, 0, 8, 8).grey
    for modality, names in (("s1", sensors.S1_BANDS), ("s2", sensors.S2_BANDS)):
        expected = [sensors.scale_to_uint8(np.ones(1), name)[0] for name in names]
        np.testing.assert_array_equal(grey[modality], np.broadcast_to(expected, (8, 8, len(names))))


def test_wrong_flags_are_one_sentence(weights, tmp_path):
    flags = dict(checkpoint=weights, output=tmp_path / "map", s2="missing.tif")
    done = commands.run_flags("cromss_jax.predict", **flags)
    assert done.returncode == 1
    assert "--s2 names missing.tif, which matches no file in" in done.stderr.splitlines()[-1]
