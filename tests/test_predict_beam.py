"""`predict --beam`: the same maps as without, whatever the workers; needs Beam."""

import importlib.util
import subprocess
import sys

import pytest
import rasterio

from cromss_jax import sensors
from data_prep.sample import downstream, world
from tests import runs
from tests.mapping.weights import write_weights

SIZE = 66
WORKERS = {
    "one": ["--runner=DirectRunner"],
    "two": ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
}

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="apache-beam is not installed: pip install -e .[beam], in an environment of its own",
)


def write_scenes(folder, count=3) -> None:
    """Scenes of all Sentinel-2 bands, and their table."""
    rows = ["scene,date,s2"]
    for number in range(count):
        location = world.make_location(0, number, 1, SIZE)
        pixels = downstream.stack_s2(location, SIZE)
        easting, northing = location.origin
        with rasterio.open(
            folder / f"{number}.tif", "w", driver="GTiff", count=13, dtype="uint16", height=SIZE,
            width=SIZE, crs=f"EPSG:{location.epsg}",
            transform=rasterio.Affine(10, 0, easting, 0, -10, northing),
        ) as file:  # fmt: skip
            file.write(pixels)
            for i, band in enumerate(sensors.S2_BANDS):
                file.set_band_description(i + 1, band)
        rows.append(f"wood{number},2020-06-0{number + 1},{number}.tif")
    (folder / "scenes.csv").write_text("\n".join(rows) + "\n")


def predict(weights, folder, output, *more) -> subprocess.CompletedProcess:
    line = runs.command(
        "cromss_jax.predict", checkpoint=weights, table=folder / "scenes.csv", output=output,
        window=48, overlap=16, batch_size=2, write="probabilities",
    )  # fmt: skip
    return subprocess.run([*line, *more], cwd=runs.ROOT, capture_output=True, text=True)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@needs_beam
@pytest.mark.slow
def test_the_same_maps_whatever_the_workers(tmp_path):
    write_weights(tmp_path / "weights", "late")
    write_scenes(tmp_path)
    plain = predict(tmp_path / "weights", tmp_path, tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    expected = contents(tmp_path / "plain")
    assert sum(path.name == "classes.tif" for path in expected) == 3
    for name, workers in WORKERS.items():
        done = predict(tmp_path / "weights", tmp_path, tmp_path / name, "--beam", "--", *workers)
        assert done.returncode == 0, done.stderr
        assert contents(tmp_path / name) == expected
    # A scene that cannot be mapped leaves the others alone, and is named.
    (tmp_path / "1.tif").write_bytes(b"no image")
    bad = predict(tmp_path / "weights", tmp_path, tmp_path / "bad", "--beam", "--", *WORKERS["one"])
    assert bad.returncode == 1
    last = bad.stderr.splitlines()[-1]
    assert last.startswith("error: 1 of 3 scenes could not be mapped: ")
    assert "1.tif" in last
    made = {path.parts[0] for path in contents(tmp_path / "bad") if path.name == "classes.tif"}
    assert made == {"wood0_20200601", "wood2_20200603"}


def test_beam_is_not_installed(tmp_path):
    # A module of that name that cannot be imported hides an installed one.
    (tmp_path / "apache_beam.py").write_text("raise ModuleNotFoundError('apache_beam')")
    write_scenes(tmp_path, 1)
    line = runs.command(
        "cromss_jax.predict",
        checkpoint="run",
        table=tmp_path / "scenes.csv",
        output=tmp_path / "map",
    )
    path = ":".join([str(tmp_path), str(runs.ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [*line, "--beam"], cwd=tmp_path, env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: --beam needs Apache Beam, which is not installed: pip")
