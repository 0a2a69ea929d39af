"""The command `audit`: a whole data set, folds by place, what a fold's network sees."""

import json
import signal
import subprocess
import types

import numpy as np
import pyogrio
import pytest
import rasterio

from cromss_jax import folds as spatial
from cromss_jax import presets, sensors
from cromss_jax.data import input_pipeline
from cromss_jax.training import pretrain
from tests import commands, environment, runs
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
    assert "audit it by a network that was trained on it" in done.stderr.splitlines()[-1]
