import csv
import hashlib
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import rasterio
import tensorflow_datasets as tfds

from cromss_jax import presets, sensors
from cromss_jax.data import input_pipeline
from data_prep import errors
from data_prep.datasets import ssl4eo_s12_nol
from data_prep.finding import sources
from data_prep.options import Options
from data_prep.writing import records
from tests import commands

TILE_SIZE = 24
PIXEL_SIZE = {band: m for m, bands in sensors.S2_BANDS_BY_RESOLUTION.items() for band in bands}
DATES = ("20200315T100000", "20200615T100000", "20200915T100000", "20201215T100000")
REPORTS = [f"ssl4eo_s12_nol.{n}" for n in ("bad_locations.csv", "report.json", "report.md")]
ARRAYS = ("s1", "s2_10m", "s2_20m", "s2_60m", "labels")


def write_band(path, pixels, metres=10, x=500_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pixels.shape
    transform = rasterio.Affine(metres, 0, x, 0, -metres, 6_000_000)
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=1, dtype=pixels.dtype,
        crs="EPSG:32632", transform=transform, compress="deflate",
    ) as file:  # fmt: skip
        file.write(pixels, 1)


def write_tree(root, seasons_per_location=(4, 4, 2), truth=False, scaled=False, tile=TILE_SIZE):
    """A tree of seeded noise. The table lists seasons in random order."""
    rng = np.random.default_rng(0)
    for number, seasons in enumerate(seasons_per_location):
        location_id = f"{200 + number:07d}"
        for date in DATES[:seasons]:
            s1_folder = root / "s1" / location_id / f"S1A_IW_GRDH_1SDV_{date}_{date}_0001"
            for band in sensors.S1_BANDS:
                pixels = rng.normal(-15, 6, (tile, tile)).astype(np.float32)
                pixels = sensors.scale_to_uint8(pixels, band) if scaled else pixels
                write_band(s1_folder / f"{band}.tif", pixels, x=500_040)
            granule = f"{date}_{date}_T32UPU"
            for band in sensors.S2_BANDS:
                size = tile * 10 // PIXEL_SIZE[band]
                pixels = rng.integers(0, 5000, (size, size), np.uint16)
                # Band 10 sees no ground; its values tell whether pixels carry an offset.
                pixels = pixels // 100 if band == "B10" else pixels
                pixels = sensors.scale_to_uint8(pixels, band) if scaled else pixels
                path = root / "s2c" / location_id / granule / f"{band}.tif"
                write_band(path, pixels, PIXEL_SIZE[band])
            for name in ("label", "truth") if truth else ("label",):
                pixels = rng.integers(0, 9, (tile, tile), np.uint8)
                pixels[0, :5] = 255
                path = root / "dw_noisy_labels" / location_id / granule / f"{name}.tif"
                write_band(path, pixels)
    with (root / "dw_complete_ids.csv").open("w", newline="") as file:
        table = csv.writer(file)
        columns = max(seasons_per_location)
        table.writerow(["ids", *(f"sub{i + 1}" for i in range(columns))])
        for number, seasons in enumerate(seasons_per_location):
            granules = [f"{date}_{date}_T32UPU" for date in DATES[:seasons]]
            rng.shuffle(granules)
            # Unpadded, as pandas writes them.
            table.writerow([200 + number, *granules, *[""] * (columns - seasons)])
    return root


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture
def tree(template, tmp_path):
    """A tree of 4, 4 and 2 seasons that a test may damage."""
    return pathlib.Path(shutil.copytree(template, tmp_path / "tree"))


def build(source_dir, data_dir, **options):
    builder = ssl4eo_s12_nol.Ssl4eoS12Nol(source_dir=source_dir, data_dir=data_dir, **options)
    builder.build()
    return tfds.builder_from_directory(final_dir(data_dir))


def final_dir(data_dir):
    return pathlib.Path(data_dir) / "ssl4eo_s12_nol" / "1.1.0"


def read_tif(path):
    with rasterio.open(path) as file:
        return file.read(1)


def digests(data_dir):
    files = sorted(final_dir(data_dir).glob("*array_record*"))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def reported(data_dir):
    with (data_dir / "ssl4eo_s12_nol.bad_locations.csv").open(newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def run(*arguments):
    return commands.run("data_prep.build", "--dataset=ssl4eo_s12_nol", *arguments)


def assert_scaled_files(record, tree):
    """Every pixel of a record is the scaled pixel that rasterio reads."""
    location_id = record["location_id"].decode()
    folder = tree / "s1" / location_id / record["s1_granule"].decode()
    for i, band in enumerate(sensors.S1_BANDS):
        expected = sensors.scale_to_uint8(read_tif(folder / f"{band}.tif"), band)
        np.testing.assert_array_equal(record["s1"][..., i], expected)
    folder = tree / "s2c" / location_id / record["s2_granule"].decode()
    for metres, bands in sensors.S2_BANDS_BY_RESOLUTION.items():
        assert record[f"s2_{metres}m"].shape[-1] == len(bands)
        for i, band in enumerate(bands):
            expected = sensors.scale_to_uint8(read_tif(folder / f"{band}.tif"), band)
            np.testing.assert_array_equal(record[f"s2_{metres}m"][..., i], expected)
    with rasterio.open(folder / "B2.tif") as file:
        assert rasterio.CRS.from_wkt(record["crs"].decode()) == file.crs
        assert tuple(record["transform"]) == file.transform[:6]
    folder = tree / "dw_noisy_labels" / location_id
    for i, granule in enumerate(sorted(file.name for file in folder.iterdir())):
        expected = read_tif(folder / granule / "label.tif")
        np.testing.assert_array_equal(record["labels"][i], expected)


def test_records(template, tmp_path):
    builder = build(template, tmp_path)
    data = builder.as_data_source("train")
    metadata = dict(builder.info.metadata)
    assert len(metadata.pop("records_digest")["train"]) == 64
    assert metadata == {
        "tile_size": 24, "max_seasons": 4, "has_truth": False,
        "season_counts": {"train": [4, 4, 2]},
        "num_bad_locations": 0, "s2_offset": "auto", "max_invalid": 0.5, "max_days": 60,
        "block_size": 0.0,
        "test_cities": [],
        "modalities": ["s1", "s2"], "s2_level": "L1C", "s2_bands": list(sensors.S2_BANDS),
        "legend": presets.DYNAMIC_WORLD.to_dict(),
        "bands": [list(band.to_row()) for band in sensors.preset_bands(is_native=True)],
        "origin": f"ssl4eo_s12_nol in {template}",
    }  # fmt: skip
    assert builder.info.features["season"].np_dtype == np.int32
    assert reported(tmp_path) == []
    order = [(record["location_id"].decode(), int(record["season"])) for record in data]
    assert order == [
        (location_id, season)
        for location_id, seasons in (("0000200", 4), ("0000201", 4), ("0000202", 2))
        for season in range(seasons)
    ]
    for record in data:
        season = int(record["season"])
        assert record["s1"].shape == (24, 24, 2)
        assert record["s2_10m"].shape == (24, 24, 4)
        assert record["s2_20m"].shape == (12, 12, 6)
        assert record["s2_60m"].shape == (4, 4, 3)
        assert record["labels"].shape == (4, 24, 24)
        assert all(record[name].dtype == np.uint8 for name in ARRAYS)
        assert record["s2_timestamp"].decode() == f"2020-{3 * season + 3:02d}-15T10:00:00"
        assert record["s1_timestamp"] == record["s2_timestamp"]
        assert record["transform"].dtype == np.float64
        assert tuple(record["s1_transform"]) == (10, 0, 500_040, 0, -10, 6_000_000)
        assert rasterio.CRS.from_wkt(record["s1_crs"].decode()) == rasterio.CRS.from_epsg(32632)
        assert "truth" not in record
        assert_scaled_files(record, template)
    # The third location lacks two seasons.
    assert (data[8]["labels"][2:] == 255).all()
    np.testing.assert_array_equal(data[8]["labels"], data[9]["labels"])


def test_training_reads_what_tfds_reads(template, tmp_path):
    expected = build(template, tmp_path).as_data_source("train")
    found = input_pipeline.open_dataset(str(tmp_path), "ssl4eo_s12_nol").source
    assert len(found) == len(expected)
    for index in (0, 9):
        assert set(found[index]) == set(expected[index])
        for name, value in expected[index].items():
            np.testing.assert_array_equal(found[index][name], value, name)
            assert not isinstance(value, np.ndarray) or found[index][name].dtype == value.dtype


def test_readable_where_data_prep_was_never_imported(template, tmp_path):
    build(template, tmp_path)
    script = (
        "import sys, tensorflow_datasets as tfds\n"
        f"builder = tfds.builder_from_directory({str(final_dir(tmp_path))!r})\n"
        "data = builder.as_data_source('train')\n"
        "print(len(data), data[9]['labels'].shape, 'data_prep' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n")[0] == "10 (4, 24, 24) False"


def test_truth_beside_labels(tmp_path):
    tree = write_tree(tmp_path / "tree", (2, 1), truth=True)
    builder = build(tree, tmp_path / "data")
    assert builder.info.metadata["has_truth"] is True
    for record in builder.as_data_source("train"):
        granule = record["s2_granule"].decode()
        folder = tree / "dw_noisy_labels" / record["location_id"].decode() / granule
        np.testing.assert_array_equal(record["truth"], read_tif(folder / "truth.tif"))


def test_scaled_uint8_files_are_taken_as_they_are(template, tmp_path):
    scaled = write_tree(tmp_path / "scaled", scaled=True)
    build(template, tmp_path / "from_raw")
    build(scaled, tmp_path / "from_scaled", options=Options(s2_offset=1000))
    assert digests(tmp_path / "from_raw") == digests(tmp_path / "from_scaled")


def test_s2_offset(template, tmp_path):
    data = build(template, tmp_path, options=Options(s2_offset=1000)).as_data_source("train")
    folder = template / "s2c" / "0000200" / f"{DATES[0]}_{DATES[0]}_T32UPU"
    raw = read_tif(folder / "B3.tif").astype(int)
    assert (raw < 1000).any()
    expected = sensors.scale_to_uint8(np.maximum(raw - 1000, 0), "B3")
    np.testing.assert_array_equal(data[0]["s2_10m"][..., 1], expected)
    pixels = read_tif(next((template / "s1" / "0000200").glob(f"*{DATES[0]}*")) / "VV.tif")
    np.testing.assert_array_equal(data[0]["s1"][..., 0], sensors.scale_to_uint8(pixels, "VV"))


def test_archives_and_workers_change_no_bit(template, tmp_path):
    build(template, tmp_path / "extracted")
    expected = digests(tmp_path / "extracted")
    build(template, tmp_path / "workers", num_workers=2)
    assert digests(tmp_path / "workers") == expected

    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(template.rglob("*")):
            archive.write(file, pathlib.Path("ssl4eo") / file.relative_to(template))
    build(tmp_path / "all.zip", tmp_path / "zip", num_workers=2)
    assert digests(tmp_path / "zip") == expected

    mixture = tmp_path / "mixture"
    mixture.mkdir()
    for name, mode in (("s1.tar.gz", "w:gz"), ("s2c.tar", "w")):
        with tarfile.open(mixture / name, mode) as archive:
            archive.add(template / name.split(".")[0], f"./x/{name.split('.')[0]}")
    with zipfile.ZipFile(mixture / "ssl4eo_s12_nol.zip", "w") as archive:
        for file in (template / "dw_noisy_labels").rglob("*.tif"):
            archive.write(file, file.relative_to(template))
    shutil.copy(template / "dw_complete_ids.csv", mixture)
    build(mixture, tmp_path / "mixed", num_workers=2)
    assert digests(tmp_path / "mixed") == expected


def test_the_digest_in_the_metadata_is_that_of_the_records(template, tmp_path, monkeypatch):
    def digest(source, name):
        return build(source, tmp_path / name).info.metadata["records_digest"]["train"]

    first = digest(template, "first")
    changed = tmp_path / "changed"
    shutil.copytree(template, changed)
    label = next(changed.glob("dw_noisy_labels/*/*/label.tif"))
    with rasterio.open(label, "r+") as file:
        pixels = file.read(1)
        pixels[0, 0] = 1 - (pixels[0, 0] == 1)
        file.write(pixels, 1)
    assert digest(changed, "other") != first
    # Whatever the number of files.
    monkeypatch.setattr(records, "SHARD_BYTES", 1)
    assert digest(template, "several") == first


def test_several_record_files_keep_the_order(template, tmp_path, monkeypatch):
    build(template, tmp_path / "one")
    monkeypatch.setattr(records, "SHARD_BYTES", 1)
    several = build(template, tmp_path / "several").as_data_source("train")
    assert len(digests(tmp_path / "several")) == 3
    one = tfds.builder_from_directory(final_dir(tmp_path / "one")).as_data_source("train")
    assert len(one) == len(several) == 10
    for a, b in zip(one, several, strict=True):
        assert a["s2_granule"] == b["s2_granule"]
        np.testing.assert_array_equal(a["s2_10m"], b["s2_10m"])


LOCATION = "0000201"
S1 = f"s1/{LOCATION}/S1A_IW_GRDH_1SDV_{DATES[1]}_{DATES[1]}_0001"
S2 = f"s2c/{LOCATION}/{DATES[1]}_{DATES[1]}_T32UPU"
LABEL = f"dw_noisy_labels/{LOCATION}/{DATES[1]}_{DATES[1]}_T32UPU"


def rewrite(path, change):
    write_band(path, change(read_tif(path)))


DAMAGE = {
    "missing": (f"{S2}/B8A.tif", lambda path: path.unlink(), "missing"),
    "missing label": (f"{LABEL}/label.tif", lambda path: path.unlink(), "missing"),
    "missing season": (
        f"s1/{LOCATION}",
        lambda path: shutil.rmtree(next(path.iterdir())),
        "3 S1 granules for the 4 seasons",
    ),
    "no date": (
        f"s1/{LOCATION}",
        lambda path: next(path.iterdir()).rename(path / "undated"),
        "no date",
    ),
    "cut short": (
        f"{S2}/B4.tif",
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        "cut short",
    ),
    "no image": (f"{S1}/VH.tif", lambda path: path.write_text("<html>404</html>"), "no GeoTIFF"),
    "off-size": (f"{S2}/B5.tif", lambda path: rewrite(path, lambda a: np.kron(a, [[1, 1]] * 2)),
                 "24x24 pixels, 12x12 needed"),
    "off-size label": (f"{LABEL}/label.tif", lambda path: rewrite(path, lambda a: a[:18, :18]),
                       "18x18 pixels, 24x24 needed, at most 2 more"),
    "labels": (
        f"{LABEL}/label.tif",
        lambda path: rewrite(path, lambda a: np.where(a == 3, 11, np.where(a == 4, 9, a))),
        "labels 9, 11 are not 0..8, 255",
    ),
    "linear power": (
        f"{S1}/VV.tif",
        lambda path: rewrite(path, lambda a: 10 ** (a / 10)),
        "linear power, dB is needed",
    ),
    "dtype": (f"{S2}/B2.tif", lambda path: rewrite(path, lambda a: a.astype(np.float32)),
              "dtype float32, but reflectance"),
    "stray truth": (
        f"{LABEL}/truth.tif",
        lambda path: shutil.copy(path.with_name("label.tif"), path),
        "or none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_location_is_skipped(tree, tmp_path, name):
    file, damage, reason = DAMAGE[name]
    damage(tree / file)
    builder = build(tree, tmp_path / "data", max_bad_locations=1)
    assert builder.info.metadata["season_counts"] == {"train": [4, 2]}
    assert builder.info.metadata["num_bad_locations"] == 1
    ids = [record["location_id"].decode() for record in builder.as_data_source("train")]
    assert ids == ["0000200"] * 4 + ["0000202"] * 2
    ((location_id, reported_file, reported_reason),) = reported(tmp_path / "data")
    assert (location_id, reported_file) == (LOCATION, file)
    assert reason in reported_reason


@pytest.mark.parametrize("num_workers", [1, 2])
def test_too_many_bad_locations_leave_nothing_but_the_report(tree, tmp_path, num_workers):
    # The first location is good, so that the build gets beyond looking at it.
    for location_id in ("0000201", "0000202"):
        next((tree / "s2c" / location_id).rglob("B9.tif")).unlink()
    data_dir = tmp_path / "data"
    with pytest.raises(errors.BuildError, match=r"bad locations: 2, .*=1 allowed.*B9.tif: missing"):
        build(tree, data_dir, max_bad_locations=1, num_workers=num_workers)
    assert sorted(file.name for file in data_dir.rglob("*")) == REPORTS
    assert [row[0] for row in reported(data_dir)] == ["0000201", "0000202"]


def test_no_good_location_is_an_error_however_many_are_allowed(tree, tmp_path):
    shutil.rmtree(tree / "s1" / "0000200")
    for file in tree.rglob("VV.tif"):
        file.unlink()
    with pytest.raises(errors.BuildError, match="none of the 3 locations"):
        build(tree, tmp_path / "data", max_bad_locations=99)
    assert len(reported(tmp_path / "data")) == 3


def test_record_file_without_records_is_readable(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD_BYTES", 1)
    shutil.rmtree(tree / "s1" / LOCATION)
    builder = build(tree, tmp_path / "data", max_bad_locations=1)
    data = builder.as_data_source("train")
    assert [int(record["season"]) for record in data] == [0, 1, 2, 3, 0, 1]


def test_tile_that_does_not_fit_60_metres(tmp_path):
    """It is cropped to whole pixels of all bands, from the upper left corner."""
    tree = write_tree(tmp_path / "tree", (1,), tile=20)
    (record,) = build(tree, tmp_path / "data").as_data_source("train")
    shapes = {name: record[name].shape for name in ARRAYS}
    assert shapes == {
        "s1": (18, 18, 2), "s2_10m": (18, 18, 4), "s2_20m": (9, 9, 6), "s2_60m": (3, 3, 3),
        "labels": (1, 18, 18),
    }  # fmt: skip
    (path,) = tree.glob("s2c/*/*/B2.tif")
    expected = sensors.scale_to_uint8(read_tif(path), "B2")[:18, :18]
    np.testing.assert_array_equal(record["s2_10m"][..., 0], expected)
    (path,) = tree.glob("dw_noisy_labels/*/*/label.tif")
    np.testing.assert_array_equal(record["labels"][0], read_tif(path)[:18, :18])
    assert "20 to 18 pixels" in (tmp_path / "data" / "ssl4eo_s12_nol.report.md").read_text()


def test_tile_smaller_than_a_pixel_of_60_metres(tmp_path):
    tree = write_tree(tmp_path / "tree", (1,), tile=6)
    for path in tree.rglob("B*.tif"):
        pixels = read_tif(path)
        path.unlink()
        write_band(path, pixels[:5, :5] if PIXEL_SIZE[path.stem] == 10 else pixels, 10)
    with pytest.raises(errors.BuildError, match="5 pixels a side, but bands at 60 m need at lea"):
        build(tree, tmp_path / "data")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "begins with 'an empty file'"),
        ("location,sub1\n1,x\n", "the columns ids,sub1"),
        ("ids,sub1\n", "lists no locations"),
        ("ids,sub1\n200,a\n0000200,a\n", "lists location 0000200 twice"),
        ("ids,sub1\n200.0,a\n", "has the id '200.0'"),
    ],
)
def test_wrong_table(tree, tmp_path, table, message):
    (tree / "dw_complete_ids.csv").write_text(table)
    with pytest.raises(errors.BuildError, match=message):
        build(tree, tmp_path / "data")


def test_no_source_dir(tmp_path):
    with pytest.raises(sources.SourceError, match=r"s1, s2c, .* not found in .*nowhere: looked"):
        build(tmp_path / "nowhere", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_missing_components_are_named(tree, tmp_path):
    shutil.rmtree(tree / "dw_noisy_labels")
    with pytest.raises(sources.SourceError) as error:
        build(tree, tmp_path / "data")
    message = str(error.value)
    assert message.startswith(f"dw_noisy_labels not found in {tree}")
    assert "python -m data_prep.sample --output_dir=DIR" in message


def test_command(template, tmp_path):
    arguments = (f"--source_dir={template}", f"--data_dir={tmp_path}", "--num_workers=2")
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith("3 locations written, 0 skipped, 10 records, ")
    assert result.stdout.count("\n") == 1
    before = digests(tmp_path)
    # Another process, one worker: the same bits.
    build(template, tmp_path / "here")
    assert digests(tmp_path / "here") == before
    again = run(*arguments)
    assert again.returncode == 0
    assert "exists, nothing was done: 10 records" in again.stdout
    other = run(*arguments, "--s2_offset=1000")
    assert other.returncode == 1
    assert "was built with --s2_offset=auto" in other.stderr
    assert digests(tmp_path) == before


def test_command_prints_errors_in_one_line(tree, tmp_path):
    next(tree.rglob("B9.tif")).unlink()
    result = run(f"--source_dir={tree}", f"--data_dir={tmp_path / 'data'}", "--num_workers=2")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: bad locations: 1, --max_bad_locations=0 allowed")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "returncode"), [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_interrupted_command_leaves_no_unfinished_dataset(tree, tmp_path, number, returncode):
    table = tree / "dw_complete_ids.csv"
    header, *_, last = table.read_text().splitlines()
    ids = range(1000, 2000)
    for i in ids:
        for folder in ("s1", "s2c", "dw_noisy_labels"):
            (tree / folder / f"{i:07d}").symlink_to(tree / folder / "0000202")
    granules = last.split(",", 1)[1]
    table.write_text("\n".join([header, *(f"{i},{granules}" for i in ids)]))
    data_dir = tmp_path / "data"
    command = [sys.executable, "-m", "data_prep.build", "--dataset=ssl4eo_s12_nol"]
    command += [f"--source_dir={tree}", f"--data_dir={data_dir}", "--num_workers=2"]
    root = pathlib.Path(__file__).parents[2]
    # What runs in the background ignores interrupts, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        deadline = time.monotonic() + 60
        while not list(data_dir.glob("*/incomplete*/*array_record*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == returncode, errors
    left = sorted(file.name for file in data_dir.rglob("*"))
    assert left == REPORTS


def test_real_locations(shared, tmp_path):
    tree = shared / "real" / "nol"
    builder = build(tree, tmp_path, num_workers=2)
    data = builder.as_data_source("train")
    assert builder.info.metadata["tile_size"] == 216
    assert builder.info.metadata["season_counts"] == {"train": [1, 1, 1, 1]}
    assert len(data) == 4
    for record in data:
        assert_scaled_files(record, tree)


def test_real_location_without_labels(shared, tmp_path):
    tree = shared / "real" / "ssl4eo_s12"
    result = run(f"--source_dir={tree}", f"--data_dir={tmp_path}")
    assert result.returncode == 1
    assert "dw_noisy_labels, dw_complete_ids.csv not found" in result.stderr
    # Given labels, its bands read back equal. The S1 and S2 grids are 0.0004 degrees apart.
    copy = tmp_path / "tree"
    copy.mkdir()
    for folder in ("s1", "s2c"):
        (copy / folder).symlink_to(tree / folder)
    granules = sorted(file.name for file in (tree / "s2c" / "0000200").iterdir())
    for granule in granules:
        path = copy / "dw_noisy_labels" / "0000200" / granule / "label.tif"
        path.parent.mkdir(parents=True)
        with (
            rasterio.open(tree / "s2c" / "0000200" / granule / "B2.tif") as band,
            rasterio.open(path, "w", **(band.profile | {"dtype": "uint8"})) as file,
        ):
            file.write(np.zeros((1, 264, 264), np.uint8))
    (copy / "dw_complete_ids.csv").write_text(f"ids,sub1,sub2\n200,{','.join(granules)}\n")
    data = build(copy, tmp_path / "data").as_data_source("train")
    assert len(data) == 2
    report = (tmp_path / "data" / "ssl4eo_s12_nol.report.md").read_text()
    # VV and VH of both seasons; metadata.json is read.
    assert "| grids shifted | 4 |" in report
    assert report.count("pixels of 10 m") == 4
    assert "not read" not in report
    for record in data:
        assert_scaled_files(record, copy)
        assert 0.0002 < record["transform"][2] - record["s1_transform"][2] < 0.0006
