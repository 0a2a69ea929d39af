"""A map on one scene by a network that is a formula: planted errors, borders, nodata, kills."""

import json
import types

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely

from cromss_jax.auditing import evidence, job, maps, scene, vectors
from cromss_jax.legend import Legend
from cromss_jax.mapping import cogs, scene_map, windows, work
from cromss_jax.method import smoothing

HEIGHT, WIDTH, CLASSES, BATCH = 90, 110, 4, 5
LEGEND = Legend.of({"water": "#0000ff", "trees": "#00ff00", "crops": "#ffff00", "built": "#ff0000"})
LEFT, TOP = 500_000.0, 5_000_000.0
GRID = cogs.Grid(
    HEIGHT, WIDTH, rasterio.CRS.from_epsg(32632).to_wkt(), (10.0, 0.0, LEFT, 0.0, -10.0, TOP)
)
ROWS, COLUMNS = np.indices((HEIGHT, WIDTH))
# Fields of 30 pixels, and an error over the corner of four blocks and of several windows.
TRUTH = ((ROWS // 30 + COLUMNS // 30) % CLASSES).astype(np.uint8)
ERROR = (ROWS >= 27) & (ROWS < 38) & (COLUMNS >= 76) & (COLUMNS < 90)
BANDS = {"s1": ("VV", "VH"), "s2": ("B4", "B3", "B2")}


class Fields:
    """A scene whose first band is its class, and the others how sure a sensor is of it."""

    height, width, modalities = HEIGHT, WIDTH, ("s1", "s2")

    def __init__(self):
        rng = np.random.default_rng(0)
        self.grey, self.valid = {}, {}
        for modality, names in BANDS.items():
            sure = rng.integers(180, 240, (HEIGHT, WIDTH), np.uint8)
            self.grey[modality] = np.stack([TRUTH] + [sure] * (len(names) - 1), axis=-1)
            self.valid[modality] = np.ones((HEIGHT, WIDTH), bool)
        # S1 ends before the lower edge, and S2 has a hole.
        self.valid["s1"][-7:] = False
        self.valid["s2"][:40, :40] = False

    def read(self, row, column, height, width):
        window = slice(row, row + height), slice(column, column + width)
        return scene_map.Pixels(
            {m: x[window] for m, x in self.grey.items()},
            {m: x[window] for m, x in self.valid.items()},
        )


FIELDS = Fields()
VALID = FIELDS.valid["s1"] & FIELDS.valid["s2"]
LABELS = np.where(ERROR, (TRUTH + 2) % CLASSES, TRUTH).astype(np.uint8)
LABELS[50:53] = LABELS[60:80, 104:107] = 255


def formula(grey):
    """Probabilities of single pixels, which no window changes."""
    found = {}
    for modality, pixels in grey.items():
        sure = pixels[..., 1:2] / np.float32(255)
        own = np.eye(CLASSES, dtype=bool)[pixels[..., 0]]
        found[modality] = np.where(own, sure, (1 - sure) / (CLASSES - 1)).astype(np.float32)
    return found


def predicted(folder, unfinished, labels=LABELS, forward=formula):
    subject = scene.LabelledScene(FIELDS, BANDS, LEGEND, GRID, "20210703", unfinished, folder)
    subject.read_labels(lambda r, c, h, w: labels[r : r + h, c : c + w], "map.tif")
    scene_map.map_scene(
        FIELDS, windows.cut_scene(HEIGHT, WIDTH, 32, 8), forward, unfinished,
        num_classes=CLASSES, batch_size=BATCH, num_threads=2, make_layers=scene.to_levels,
    )  # fmt: skip
    subject.keep_valid("map.tif")
    return subject


def opened(folder):
    layers = dict.fromkeys(FIELDS.modalities, CLASSES)
    return work.opened(folder / "work", {"of": "fields"}, (HEIGHT, WIDTH), layers)


def audit(folder, polygons=None, **changes):
    with opened(folder) as unfinished:
        subject = predicted(folder, unfinished, **changes)
        settings = job.Settings(above=0.05, min_area=0.0)
        content = job.audit(subject, folder, settings, {"by": "it"}, polygons)
        unfinished.remove()
    return content


def read(folder, name):
    with rasterio.open(folder / f"{name}.tif") as file:
        assert file.nodata == 255
        assert tuple(file.transform[:6]) == GRID.transform
        assert file.crs.to_epsg() == 32632
        return file.read(1)


def test_eight_bits_keep_ratios_of_probabilities():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20, 30, 5))
    probs = np.exp(logits)
    probs[0, 0] = 0, 0, 0, 0, 1
    probs = (probs / probs.sum(-1, keepdims=True)).astype(np.float32)
    valid = np.ones((20, 30), bool)
    valid[3] = False
    levels = scene.to_levels({"s2": probs}, {"s2": valid})["s2"]
    assert (levels[:, 3] == 255).all()
    assert levels[:, valid].max() < 255
    found = scene.from_levels(levels)[valid]
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    expected = np.maximum(probs[valid], evidence.LEAST)
    # The least step is 9.21 / 254 in the logarithm; rounding is off by half of it.
    ratios = (found / found[:, :1]) / (expected / expected[:, :1])
    assert np.abs(np.log(ratios)).max() <= 9.2104 / 254 + 1e-5
    assert np.abs(found - expected).max() < 0.01


def test_planted_errors_are_found_and_nodata_stays(tmp_path):
    box = shapely.box(LEFT + 760, TOP - 380, LEFT + 900, TOP - 270)
    polygons = vectors.Polygons(np.array([box], object), {}, "EPSG:32632")
    content = audit(tmp_path, polygons)
    names = {"report.json", "report.md", "worst.png", "suspects.gpkg", "parcels.gpkg"}
    names |= {"parcels.csv"} | {f"{name}{end}" for name in maps.LAYERS for end in (".tif", ".qml")}
    names |= {f"{name}.tif.aux.xml" for name in ("given", "suggested", "reason")}
    assert {path.name for path in tmp_path.iterdir()} == names

    given, wrong, suggested, reason = (read(tmp_path, name) for name in maps.LAYERS)
    known = VALID & (LABELS != 255)
    np.testing.assert_array_equal(given, np.where(known, LABELS, 255))
    for layer in (wrong, suggested, reason):
        np.testing.assert_array_equal(layer == 255, ~known)
    # Calibrated to the confident half of few errors, so that they are ranked, and not sure.
    assert wrong[ERROR].min() > 5
    assert wrong[known & ~ERROR].max() == 0
    np.testing.assert_array_equal(suggested[known], TRUTH[known])
    assert (reason[ERROR] == 1).all()
    assert (reason[known & ~ERROR] == 0).all()

    # The error is one polygon, although it lies in four blocks.
    meta, _, geometry, values = pyogrio.raw.read(tmp_path / "suspects.gpkg")
    table = dict(zip(meta["fields"], values, strict=True))
    assert shapely.union_all(shapely.from_wkb(geometry)).equals(box)
    # It covers fields of several classes.
    assert table["pixels"].sum() == ERROR.sum()
    assert set(table["location"]) <= {"0_55", "0_82", "30_55", "30_82"}
    assert set(table["date"]) == {"20210703"}
    for i, shape in enumerate(shapely.from_wkb(geometry)):
        inside = shape.representative_point()
        place = int((TOP - inside.y) // 10), int((inside.x - LEFT) // 10)
        assert table["given"][i] == LEGEND.names[LABELS[place]]
        assert table["suggested"][i] == LEGEND.names[TRUTH[place]]
    assert content["parcels"] == {"parcels": 1, "judged": 1}
    rows = (tmp_path / "parcels.csv").read_text().splitlines()
    assert rows[1].split(",")[-1] == str(ERROR.sum())
    # The worst block holds most of the error.
    assert content["worst_locations"][0]["name"] == "30_82"
    assert [row["pixels"] for row in content["classes"]] == np.bincount(LABELS[known]).tolist()


def test_borders_of_blocks_and_windows_do_not_show(tmp_path):
    with opened(tmp_path) as unfinished:
        subject = predicted(tmp_path, unfinished)
        labels = np.where(VALID, LABELS, 255)
        prior = smoothing.smoothing_prior(labels[None, None], labels[None], CLASSES, "ts")[0]
        expected = formula({m: x for m, x in FIELDS.grey.items()})
        assert subject.num_locations > 6
        seen = np.zeros((HEIGHT, WIDTH), int)
        for index in range(subject.num_locations):
            (tile,) = subject.tiles(index)
            (row, column), grid = tile.corner, tile.grid
            assert grid == GRID.window(row, column, grid.height, grid.width)
            window = slice(row, row + grid.height), slice(column, column + grid.width)
            seen[window] += 1
            probs, found = subject.location(index)
            np.testing.assert_array_equal(found["labels"][0], labels[window])
            np.testing.assert_allclose(found["prior"][0], prior[window], atol=2e-6)
            for modality, values in probs.items():
                own = FIELDS.valid[modality][window]
                off = np.abs(values[0] - expected[modality][window])[own]
                assert off.max() < 0.01
    # Each labelled pixel once; the first block is nodata.
    assert (seen[labels != 255] == 1).all()
    assert seen[0, 0] == 0


def test_killed_anywhere_the_files_are_the_same(tmp_path, monkeypatch):
    audit(tmp_path / "whole")
    final = {p.name for p in (tmp_path / "whole").iterdir()}
    folder, calls = tmp_path / "killed", 0

    def dies(function, at):
        count = 0

        def counted(*arguments, **more):
            nonlocal count, calls
            calls += function is formula
            count += 1
            if count > at:
                raise KeyboardInterrupt
            return function(*arguments, **more)

        return counted

    # While it predicts, twice; while it judges; between two maps; before the report.
    for at in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            audit(folder, forward=dies(formula, at))
        assert {p.name for p in folder.iterdir()} == {"work"}
    for owner, name, at, there in (
        (scene.LabelledScene, "write", 3, set()),
        (cogs, "write", 1, {"given.tif", "given.qml", "given.tif.aux.xml"}),
        (job, "_write_report", 0, final - {"report.json", "report.md"}),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, dies(getattr(owner, name), at))
            with pytest.raises(KeyboardInterrupt):
                audit(folder, forward=dies(formula, 1000))
        assert {p.name for p in folder.iterdir()} == there | {"work"}
    once = calls
    audit(folder, forward=dies(formula, 1000))
    assert calls == once, "what was predicted is kept"
    assert {p.name for p in folder.iterdir()} == final
    # A GeoPackage says when it was written.
    for name in final - {"suspects.gpkg"}:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    first, second = (pyogrio.raw.read(f / "suspects.gpkg") for f in (folder, tmp_path / "whole"))
    np.testing.assert_array_equal(first[2], second[2])
    for a, b in zip(first[3], second[3], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_report_of_before_does_not_stand_for_an_unfinished_audit(tmp_path):
    for name in ("report.json", "report.md"):
        (tmp_path / name).write_text("of before")
    subject = types.SimpleNamespace(num_locations=1, location=None)
    with pytest.raises(TypeError):
        job.audit(subject, tmp_path, job.Settings(), {"by": "it"})
    assert not list(tmp_path.iterdir())


def test_without_maps_there_is_a_report(tmp_path):
    with opened(tmp_path) as unfinished:
        subject = predicted(tmp_path, unfinished)
        job.audit(subject, tmp_path, job.Settings(maps=False), {"by": "it"})
        unfinished.remove()
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}
    assert json.loads((tmp_path / "report.json").read_text())["made"] == {"by": "it"}


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        (
            np.zeros((HEIGHT, WIDTH), bool),
            "map.tif has no class anywhere on the scene: is --legend",
        ),
        (~VALID, "map.tif has no class where the scene has data: do they lie in the same area?"),
    ],
)
def test_maps_without_labels_are_refused(tmp_path, where, sentence):
    with opened(tmp_path) as unfinished, pytest.raises(scene.LabelError, match=sentence):
        predicted(tmp_path, unfinished, np.where(where, TRUTH, np.uint8(255)))
