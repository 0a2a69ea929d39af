"""The command `audit`: a data set, a map on a scene, folds by place, what a fold's network sees."""

import json
import signal
import subprocess
import types

import numpy as np
import pyogrio
import pytest
import rasterio
import rasterio.warp
from affine import Affine

from cromss_jax import folds as spatial
from cromss_jax import presets, sensors
from cromss_jax.auditing import maps
from cromss_jax.data import input_pipeline
from cromss_jax.training import pretrain
from tests import commands, environment, runs
from tests.mapping import scene_files
from tests.mapping.weights import write_weights

LOCATIONS, SEASONS, SIZE = 12, 2, 48


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return runs.make_data(folder, locations=LOCATIONS, seasons=SEASONS, tile_size=SIZE)


def test_a_data_set_is_judged(data_dir, tmp_path):
    write_weights(tmp_path / "weights", "mid")
    done = commands.run_flags(
        "cromss_jax.audit",
        checkpoint=tmp_path / "weights",
        data_dir=data_dir,
        output=tmp_path / "audit",
        parcels=write_parcels(tmp_path / "parcels.geojson", data_dir),
        min_area=0.02,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    dataset = input_pipeline.open_dataset(data_dir, "ssl4eo_s12_nol")
    labels = np.stack([r["labels"][int(r["season"])] for r in dataset.source])
    truth = np.stack([r["truth"] for r in dataset.source])
    known = labels != sensors.IGNORE_LABEL
    for i, row in enumerate(report["classes"]):
        assert row["pixels"] == (labels == i).sum()
        if row["pixels"]:
            assert sum(row["is_really"].values()) == pytest.approx(1)
            assert sum(row["suggested"].values()) == row["pixels"]
    found = report["against_truth"]
    assert found["error_rate"] == pytest.approx((labels != truth)[known].mean())
    assert sum(group["pixels"] for group in found["reliability"]) == known.sum()
    assert len(report["worst_locations"]) == LOCATIONS
    assert "| location | labels probably wrong |" in (tmp_path / "audit" / "report.md").read_text()

    for name in ("reliability.png", "worst.png"):
        assert (tmp_path / "audit" / name).stat().st_size > 1000
        assert f"]({name})" in (tmp_path / "audit" / "report.md").read_text()

    # The maps lie where the labels do, and say what the report sums up.
    record = dataset.source[3]
    name = record["location_id"].decode()
    maps = tmp_path / "audit" / "maps" / name
    assert {path.name for path in maps.iterdir()} == {f"season_{s}" for s in range(SEASONS)}
    with rasterio.open(maps / "season_1" / "wrong_probability.tif") as file:
        wrong = file.read(1)
        assert file.crs == rasterio.CRS.from_wkt(record["crs"].decode())
        assert tuple(file.transform[:6]) == tuple(record["transform"])
        assert file.nodata == 255
    np.testing.assert_array_equal(wrong == 255, labels[3] == sensors.IGNORE_LABEL)
    assert wrong[wrong != 255].max() <= 100
    with rasterio.open(maps / "season_1" / "suggested.tif") as file:
        suggested = file.read(1)
        assert file.colormap(1)[0] == (*bytes.fromhex(presets.DYNAMIC_WORLD.colours[0][1:]), 255)
    np.testing.assert_array_equal(suggested == 255, labels[3] == sensors.IGNORE_LABEL)
    with rasterio.open(maps / "season_1" / "given.tif") as file:
        np.testing.assert_array_equal(file.read(1), labels[3])
    with rasterio.open(maps / "season_1" / "reason.tif") as file:
        reason = file.read(1)
        assert file.tags()["class_2"] == "S1 and S2 see different other classes"
    np.testing.assert_array_equal((reason == 0), (suggested == labels[3]) & (suggested != 255))
    shown = {row["name"]: row["wrong"] for row in report["worst_locations"]}
    both = []
    for season in range(SEASONS):
        with rasterio.open(maps / f"season_{season}" / "wrong_probability.tif") as file:
            both.append(file.read(1))
    both = np.stack(both)
    # Whole percents on the map.
    assert both[both != 255].mean() / 100 == pytest.approx(shown[name], abs=0.005)

    # Suspects have the area of their pixels on the maps, and parcels what the maps say.
    meta, _, _, values = pyogrio.raw.read(tmp_path / "audit" / "suspects.gpkg")
    table = dict(zip(meta["fields"], values, strict=True))
    assert meta["crs"] == "EPSG:4326"
    assert report["suspects"]["polygons"] == len(table["rank"]) > 0
    np.testing.assert_allclose(table["hectares"], table["pixels"] / 100)
    assert (table["mean_probability"] >= 0.5).all()
    assert table["hectares"].min() >= 0.02
    expected = table["hectares"] * table["mean_probability"]
    assert (np.diff(expected) <= 1e-12).all()
    assert (table["given"] != table["suggested"]).all()
    meta, _, _, values = pyogrio.raw.read(tmp_path / "audit" / "parcels.gpkg")
    (pixels,) = values[list(meta["fields"]).index("audit_pixels")]
    (share,) = values[list(meta["fields"]).index("audit_wrong")]
    (label,) = values[list(meta["fields"]).index("audit_label")]
    here = labels[2:4][both != 255]
    assert pixels == len(here)
    most = np.bincount(here).argmax()
    assert label == dataset.legend.names[most]
    assert share == pytest.approx(both[both != 255][here == most].mean() / 100)


def write_parcels(path, data_dir):
    """The second location as one parcel."""
    record = input_pipeline.open_dataset(data_dir, "ssl4eo_s12_nol").source[3]
    a, _, c, _, e, f = record["transform"].tolist()
    corners = [(c, f), (c + SIZE * a, f), (c + SIZE * a, f + SIZE * e), (c, f + SIZE * e)]
    crs = rasterio.CRS.from_wkt(record["crs"].decode())
    ring = [*corners, corners[0]]
    content = {
        "type": "FeatureCollection",
        "crs": {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{crs.to_epsg()}"}},
        "features": [
            {
                "type": "Feature",
                "properties": {"owner": "x"},
                "geometry": {"type": "Polygon", "coordinates": [ring]},
            }
        ],
    }
    path.write_text(json.dumps(content))
    return path


def test_parcels_need_maps(data_dir, tmp_path):
    line = runs.command(
        "cromss_jax.audit",
        checkpoint=tmp_path,
        data_dir=data_dir,
        output=tmp_path / "audit",
        parcels=tmp_path / "none.gpkg",
        maps=False,
    )
    done = subprocess.run(line, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    sentence = "error: --parcels are counted on the maps: leave out --maps=False"
    assert done.stderr.splitlines()[-1] == sentence


def test_folds_keep_neighbours_together():
    """Three places far apart, with 4, 2 and 2 tiles side by side."""
    places = [(32632, 500000, 5000000)] * 4 + [(32633, 400000, 1000000)] * 2
    places += [(32721, 600000, 8000000)] * 2
    records = [
        {
            "crs": rasterio.CRS.from_epsg(epsg).to_wkt().encode(),
            "transform": (10.0, 0.0, x + 480.0 * i, 0.0, -10.0, y),
            "location_id": b"0",
        }
        for i, (epsg, x, y) in enumerate(places)
    ]
    dataset = types.SimpleNamespace(
        source=records, starts=np.arange(8), tile_size=48, num_locations=8
    )
    folds = spatial.spatial_folds(dataset, 2, block_km=300.0)
    assert len({*folds[:4]}) == len({*folds[4:6]}) == len({*folds[6:]}) == 1
    np.testing.assert_array_equal(np.bincount(folds), [4, 4])
    with pytest.raises(spatial.FoldError, match=r"lie in 3 blocks of 300 km, --folds=4 needs"):
        spatial.spatial_folds(dataset, 4, block_km=300.0)
    records[5]["crs"] = b""
    with pytest.raises(spatial.FoldError, match="has no CRS"):
        spatial.spatial_folds(dataset, 2, block_km=300.0)


class Stop(Exception):
    pass


def test_a_network_of_a_fold_never_sees_its_locations(data_dir, tmp_path, monkeypatch):
    seen = {}

    def fit(training, *_):
        seen["records"] = np.unique(np.concatenate([training.order[i] for i in range(40)]))
        raise Stop

    def validator(config, definition, dataset, held_back, *_):
        seen["held_back"] = held_back

    monkeypatch.setattr(pretrain.loop, "fit", fit)
    monkeypatch.setattr(pretrain.validation, "Validator", validator)
    excluded = np.array([1, 4, 5, 8])
    config = runs.tiny_config(data_dir, **{"data.validation_fraction": 0.5})
    with pytest.raises(Stop):
        pretrain.pretrain(config, str(tmp_path), excluded)
    dataset = input_pipeline.open_dataset(data_dir, "ssl4eo_s12_nol")
    trained = np.unique(dataset.location_of(seen["records"]))
    assert len(trained)
    assert len(seen["held_back"])
    used = np.concatenate([trained, seen["held_back"]])
    assert not set(used) & set(excluded)
    np.testing.assert_array_equal(np.sort([*used, *excluded]), np.arange(LOCATIONS))


@pytest.mark.slow
def test_folds_are_trained_and_judge(data_dir, tmp_path, monkeypatch):
    # `make test-slow` compiles as users do, which takes minutes here; no numbers are compared.
    monkeypatch.setenv("XLA_FLAGS", environment.quick_flags())
    flags = {f"config.{k}": v for k, v in runs.tiny_flags(data_dir).items()}
    flags |= {"config.num_epochs": 1, "config.batch_size": 4}
    made = commands.run_flags(
        "cromss_jax.main", config="configs/pretrain.py:sample", workdir=tmp_path / "run", **flags
    )
    assert made.returncode == 0, made.stderr
    flags = {"checkpoint": tmp_path / "run", "data_dir": data_dir, "output": tmp_path / "audit"}
    flags |= {"folds": 2, "maps": False}
    # Interrupted while it trains it saves, as training alone does, and goes on from there.
    line = runs.command("cromss_jax.audit", preemption_status=143, **flags)
    process = subprocess.Popen(line, cwd=runs.ROOT, stderr=subprocess.PIPE, text=True)
    for text in process.stderr:
        if "locations to train on" in text:
            break
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate()
    assert process.returncode == 143, rest
    assert "interrupted: " in rest
    done = commands.run_flags("cromss_jax.audit", **flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert report["made"]["judged by"].startswith("2 networks like")
    assert not (tmp_path / "audit" / "maps").exists()
    for fold in range(2):
        assert runs.saved_steps(tmp_path / "audit" / "folds" / f"{fold}_of_2")


def test_weights_of_other_classes_are_refused(data_dir, tmp_path):
    write_weights(tmp_path / "weights", "mid", classes=presets.WORLDCOVER)
    done = commands.run_flags(
        "cromss_jax.audit",
        checkpoint=tmp_path / "weights",
        data_dir=data_dir,
        output=tmp_path / "audit",
    )
    assert done.returncode == 1
    assert "knows the classes Tree cover," in done.stderr.splitlines()[-1]
    assert "audit it by a network of these classes" in done.stderr.splitlines()[-1]


SCENE_SIZE = 60


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A scene with nodata in a corner, and its map in degrees with pixels of about 15 m."""
    made = scene_files.make(tmp_path_factory.mktemp("scene"), SCENE_SIZE)
    made.s2[:, :9, :7] = 0
    made.write("s2_20200601.tif", made.s2, sensors.S2_BANDS)
    made.write("s1.tif", made.s1, sensors.S1_BANDS)
    # From beyond the upper left corner of the scene to beyond the lower right one.
    west, north = made.location.origin
    crs, size = made.grid["crs"], 1.5e-4
    (left,), (top,) = rasterio.warp.transform(crs, "EPSG:4326", [west - 100], [north + 100])
    transform = Affine(size, 0, left, 0, -size, top)
    rows, columns = np.indices((80, 80)) + 0.5
    places = (left + size * columns).ravel(), (top - size * rows).ravel()
    x, y = map(np.array, rasterio.warp.transform("EPSG:4326", crs, *places))
    column, row = ((x - west) // 10).astype(int), ((north - y) // 10).astype(int)
    inside = (np.minimum(row, column) >= 0) & (np.maximum(row, column) < SCENE_SIZE)
    moved = np.full(80 * 80, 255, np.uint8)
    moved[inside] = made.location.labels[0][row[inside], column[inside]]
    moved = moved.reshape(1, 80, 80)
    made.write("map.tif", moved, crs="EPSG:4326", transform=transform, nodata=255)
    table = "scene,date,s2,s1,labels\nwood,2020-06-01,s2_20200601.tif,s1.tif,map.tif\n"
    (made.folder / "scenes.csv").write_text(table)
    write_weights(made.folder / "weights", "late")
    return made.folder


@pytest.mark.slow  # auditing/test_scene has the values
def test_a_map_on_a_scene_is_judged_as_the_data_set_of_it(scene, tmp_path):
    data = {"data_dir": tmp_path / "data", "dataset": "scenes"}
    own = {"s2": scene / "s2_20200601.tif", "s1": scene / "s1.tif", "labels": scene / "map.tif"}
    built = commands.run_flags(
        "data_prep.build", **data, table=scene / "scenes.csv", legend="dynamic_world",
        tile_size=SCENE_SIZE, test_fraction=0, num_workers=1,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    for name, flags in (("set", data), ("map", own | {"legend": "dynamic_world"})):
        output = tmp_path / name
        done = commands.run_flags(
            "cromss_jax.audit", checkpoint=scene / "weights", output=output, **flags
        )
        assert done.returncode == 0, done.stderr
    of_set = tmp_path / "set" / "maps" / "wood_0_0" / "season_0"
    layers = {}
    for name in maps.LAYERS:
        read = []
        for folder in (of_set, tmp_path / "map"):
            with rasterio.open(folder / f"{name}.tif") as file:
                read.append(file.read(1))
                assert file.shape == (SCENE_SIZE, SCENE_SIZE)
        layers[name] = read
    np.testing.assert_array_equal(*layers["given"])
    known = layers["given"][0] != 255
    assert not known[:9, :7].any()
    assert 0.8 < known.mean() < 1
    # In eight bits a probability is off by 2 %, and percents are rounded.
    first, second = (layer[known].astype(int) for layer in layers["wrong_probability"])
    assert np.abs(first - second).max() <= 3
    assert np.abs(first - second).mean() < 1
    assert np.ptp(first) > 20
    # What each sensor of random weights sees is nearly tied, so that reasons are not compared.
    first, second = layers["suggested"]
    assert (first != second)[known].mean() < 0.03
    assert (layers["wrong_probability"][1] == 255).sum() == (~known).sum()
    report = json.loads((tmp_path / "map" / "report.json").read_text())
    other = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report["error_rate"]["estimate"] == pytest.approx(
        other["error_rate"]["estimate"], abs=0.02
    )
    assert "which judges labels that it was trained on too kindly" in report["made"]["judged by"]
    assert not (tmp_path / "map" / "work").exists()
    meta, _, _, values = pyogrio.raw.read(tmp_path / "map" / "suspects.gpkg")
    assert set(values[list(meta["fields"]).index("date")]) <= {"20200601"}


def test_mistyped_commands_on_scenes_are_one_sentence(scene, tmp_path):
    whole = {"s2": scene / "s2_20200601.tif", "labels": scene / "map.tif"}
    whole |= {"legend": "dynamic_world"}
    (tmp_path / "few.csv").write_text("value,name,colour\n0,water,#0000ff\n1,trees,#00ff00\n")
    names = presets.DYNAMIC_WORLD.names
    short = [f"{i},{n},#0000ff" for i, n in enumerate(names)]
    short[5] = short[5].replace("5", "77", 1)
    (tmp_path / "wrong.csv").write_text("\n".join(["value,name,colour", *short]) + "\n")
    for flags, sentence in (
        ({}, "--s2, --labels, --legend not given: name a data set by --data_dir, or a scene"),
        ({"s2": whole["s2"]}, "--labels, --legend not given: name"),
        (whole | {"folds": 2}, "--folds=2 trains on a data set: give its --data_dir; python -m"),
        (whole | {"data_dir": tmp_path}, "--data_dir and --s2 are given: audit a data set, or"),
        (whole | {"split": "test"}, "--split is for a data set: leave it out with a scene"),
        (whole | {"labels": "none.tif"}, "--labels names none.tif, which matches no file in"),
        (whole | {"legend": "moon"}, "the legend moon is not a preset"),
        (whole | {"legend": tmp_path / "few.csv"}, "few.csv) water, trees: audit it by a network"),
        (whole | {"legend": tmp_path / "wrong.csv"}, "are not 0..4, 6..8, 77, 255: give the"),
    ):
        output = tmp_path / "audit"
        done = commands.run_flags(
            "cromss_jax.audit", checkpoint=scene / "weights", output=output, **flags
        )
        assert done.returncode == 1, flags
        assert sentence in done.stderr.splitlines()[-1], flags
        assert not list(output.glob("*.tif"))
