"""Downstream data sets: from the trees as distributed to records, and samples of such trees."""

import csv
import hashlib
import pathlib
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import rasterio
import tensorflow_datasets as tfds

from cromss_jax import sensors
from cromss_jax.data import input_pipeline
from data_prep import errors
from data_prep.datasets import downstream, tile_files, tile_layouts
from data_prep.finding import sources
from data_prep.options import Options
from data_prep.reading import labels as label_reading
from data_prep.sample import downstream as sample_downstream
from data_prep.sample import world
from tests import commands

TILE_SIZE = 36
SEED = 3
BUILDERS = {
    "dw": downstream.Ssl4eoS12Dw,
    "osm": downstream.Ssl4eoS12Osm,
    "dfc2020": downstream.Dfc2020,
}
FORMATS = tuple(BUILDERS)
# Folder of S1, S2 and labels in our two splits, and the name of a split there.
FOLDERS = {
    "dw": "{split}/image_s1 {split}/image_s2 {split}/label_dw",
    "osm": "{split}/image_s1 {split}/image_s2 {split}/label_osm",
    "dfc2020": "s1_{split} s2_{split} dfc_{split}",
}
THEIR_NAMES = {
    "dw": {"train": "train", "test": "test"},
    "osm": {"train": "train", "test": "test"},
    "dfc2020": {"train": "validation", "test": "test"},
}
# The class of each value of a label file; what is not listed is ignored or an error.
CLASSES = {
    "dw": {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6, 8: 7, 9: 8},
    "osm": {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6, 8: 7, 9: 8, 10: 9, 11: 10, 12: 11, 13: 12},
    "dfc2020": {1: 1, 2: 5, 4: 2, 5: 3, 6: 4, 7: 6, 9: 7, 10: 0},
}
ERRORS = {"dw": set(range(11, 255)), "osm": set(range(14, 255)), "dfc2020": set()}


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """A tree of each format: three locations to train on, two to test on."""
    trees = {}
    for name in FORMATS:
        trees[name] = tmp_path_factory.mktemp(name)
        sample_downstream.write_sample(trees[name], name, 5, tile_size=TILE_SIZE, seed=SEED)
    return trees


@pytest.fixture
def trees(templates, tmp_path):
    """The same, that a test may damage."""
    return {name: shutil.copytree(tree, tmp_path / name) for name, tree in templates.items()}


def build(name, source_dir, data_dir, **options):
    builder = BUILDERS[name](source_dir=source_dir, data_dir=data_dir, **options)
    builder.build()
    return tfds.builder_from_directory(final_dir(name, data_dir))


def final_dir(name, data_dir):
    return pathlib.Path(data_dir) / BUILDERS[name].name / "1.0.0"


def digests(name, data_dir):
    files = sorted(final_dir(name, data_dir).glob("*array_record*"))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def reported(name, data_dir):
    with (data_dir / f"{BUILDERS[name].name}.bad_locations.csv").open(newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def files_of(name, tree, split):
    """(S1, S2, label) files of a split, by location."""
    folders = FOLDERS[name].format(split=THEIR_NAMES[name][split]).split()
    columns = []
    for folder in folders:
        # p10 comes after p9; other locations are sorted from west to east.
        files = list((tree / folder).iterdir())
        columns.append(
            sorted(files, key=lambda f: [float(part) for part in location_of(name, f).split("_")])
        )
    return list(zip(*columns, strict=True))


def location_of(name, path):
    """The part of a file's name that says where: LON_LAT or a number."""
    if name == "dfc2020":
        return path.stem.rpartition("_p")[2]
    return path.stem.split("_", 1)[1].rsplit("-", 1)[0]


def read_tif(path):
    with rasterio.open(path) as file:
        return file.read()


def rewrite(path, change, **options):
    with rasterio.open(path) as file:
        pixels, profile = change(file.read()), file.profile
    count, height, width = pixels.shape
    profile |= {"count": count, "height": height, "width": width, "dtype": pixels.dtype}
    profile.pop("blockysize", None)
    with rasterio.open(path, "w", **(profile | options)) as file:
        file.write(pixels)


def crop(height, width):
    return lambda pixels: pixels[:, :height, :width]


def scaled(pixels, mean, std):
    """The formula of the published code, band by band: [K,H,W] to [H,W,K]."""
    mean, std = np.reshape(mean, (-1, 1, 1)), np.reshape(std, (-1, 1, 1))
    values = (pixels - (mean - 2 * std)) / (4 * std) * 255
    return np.clip(values, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def classes_of(name, values):
    labels = np.full(values.shape, 255, np.uint8)
    for value, label in CLASSES[name].items():
        labels[values == value] = label
    return labels


def assert_whole_tile(name, record, files):
    s1, s2, label = files
    np.testing.assert_array_equal(
        record["s1"], scaled(read_tif(s1), sensors.S1_MEAN, sensors.S1_STD)
    )
    np.testing.assert_array_equal(
        record["s2"], scaled(read_tif(s2), sensors.S2_MEAN, sensors.S2_STD)
    )
    np.testing.assert_array_equal(record["labels"][0], classes_of(name, read_tif(label)[-1]))
    with rasterio.open(s2) as file:
        assert rasterio.CRS.from_wkt(record["crs"].decode()) == file.crs
        assert tuple(record["transform"]) == file.transform[:6]


@pytest.mark.parametrize("name", FORMATS)
def test_records(templates, tmp_path, name):
    builder = build(name, templates[name], tmp_path)
    metadata = dict(builder.info.metadata)
    assert {split: len(text) for split, text in metadata.pop("records_digest").items()} == {
        "train": 64, "test": 64,
    }  # fmt: skip
    assert metadata == {
        "tile_size": 36, "has_truth": False, "s2_offset": "auto", "max_invalid": 0.5,
        "max_days": 60, "patch_size": 0,
        "num_empty_patches": {"train": 0, "test": 0},
        "modalities": ["s1", "s2"], "s2_level": "L1C", "s2_bands": list(sensors.S2_BANDS),
        "legend": BUILDERS[name].LEGEND.to_dict(),
        "bands": [list(band.to_row()) for band in sensors.preset_bands()],
        "origin": f"{builder.name} in {templates[name]}",
        "season_counts": {"train": [1, 1, 1], "test": [1, 1]}, "num_bad_locations": 0,
        "block_size": 0.0,
        "test_cities": [],
    }  # fmt: skip
    assert reported(name, tmp_path) == []
    assert set(builder.info.splits) == {"train", "test"}
    for number in ("season", "height", "width"):
        assert builder.info.features[number].np_dtype == np.int32
    for split in ("train", "test"):
        data = builder.as_data_source(split)
        files = files_of(name, templates[name], split)
        assert len(data) == len(files) == {"train": 3, "test": 2}[split]
        for record, tile in zip(data, files, strict=True):
            assert record["s1"].shape == (36, 36, 2)
            assert record["s2"].shape == (36, 36, 13)
            assert record["labels"].shape == (1, 36, 36)
            for array in ("s1", "s2", "labels"):
                assert record[array].dtype == np.uint8
            assert record["season"] == 0
            assert (record["height"], record["width"]) == (36, 36)
            assert_whole_tile(name, record, tile)
            s2 = tile[1].stem
            expected = s2[3:] if name != "dfc2020" else s2.replace("ROIs0000_", "").replace(
                "_s2_0", "")  # fmt: skip
            assert record["location_id"].decode() == expected


@pytest.mark.parametrize("name", FORMATS)
def test_training_opens_every_split(templates, tmp_path, name):
    build(name, templates[name], tmp_path)
    for split, count in (("train", 3), ("test", 2)):
        dataset = input_pipeline.open_dataset(str(tmp_path), BUILDERS[name].name, split)
        assert dataset.tile_size == 36
        assert len(dataset.source) == dataset.num_locations == count
        assert dataset.legend == BUILDERS[name].LEGEND
        batch = input_pipeline.read_batch(dataset, ("s1", "s2"), np.array([1, -1]))
        assert batch["s2"].shape == (2, 36, 36, 13)
        assert set(batch) == {"s1", "s2", "labels", "season", "is_real"}
    with pytest.raises(input_pipeline.DataError, match="no split 'val': choose one of .*test"):
        input_pipeline.open_dataset(str(tmp_path), BUILDERS[name].name, "val")


@pytest.mark.parametrize("name", FORMATS)
def test_sample_shows_the_world_with_its_true_classes(templates, name):
    # Water, trees, grass, flooded vegetation, crops, shrub, built area, bare ground, snow & ice.
    values = {
        "dw": [1, 2, 3, 4, 5, 6, 7, 8, 9],
        "osm": [9, 3, 7, 12, 2, 11, 1, 10, 10],
        "dfc2020": [10, 1, 4, 5, 6, 2, 7, 9, 8],
    }[name]
    locations = {
        split: {location_of(name, tile[1]): tile for tile in files_of(name, templates[name], split)}
        for split in ("train", "test")
    }
    for index in range(5):
        made = world.make_location(SEED, index, 1, TILE_SIZE)
        location = str(index) if name == "dfc2020" else f"{made.longitude:.4f}_{made.latitude:.4f}"
        s1, s2, label = locations["train" if index < 3 else "test"][location]
        np.testing.assert_array_equal(read_tif(s1), made.s1[0].transpose(2, 0, 1))
        assert read_tif(s1).dtype == (np.float64 if name == "dfc2020" else np.float32)
        bands = read_tif(s2)
        assert (bands.shape, bands.dtype) == ((13, 36, 36), np.uint16)
        for metres, names in sensors.S2_BANDS_BY_RESOLUTION.items():
            for i, band in enumerate(names):
                side = metres // 10
                expected = np.kron(made.s2(metres)[0, ..., i], np.ones((side, side), int))
                np.testing.assert_array_equal(bands[sensors.S2_BANDS.index(band)], expected)
        labels = read_tif(label)
        assert len(labels) == (2 if name == "dw" else 1)
        np.testing.assert_array_equal(labels[-1], np.array(values)[made.truth[0]])
        with rasterio.open(label) as file:
            assert file.crs.to_epsg() == made.epsg
            assert (file.transform.c, file.transform.f) == made.origin


def test_sample_sizes_need_be_no_multiple_of_6(tmp_path):
    sample_downstream.write_sample(tmp_path, "dfc2020", 2, tile_size=32)
    _, s2, label = files_of("dfc2020", tmp_path, "train")[0]
    made = world.make_location(0, 0, 1, 36)
    np.testing.assert_array_equal(read_tif(s2), sample_downstream.stack_s2(made, 36)[:, :32, :32])
    assert read_tif(label).shape == (1, 32, 32)
    with pytest.raises(FileExistsError, match="not empty"):
        sample_downstream.write_sample(tmp_path, "dfc2020", 2)
    with pytest.raises(ValueError, match="--locations=1 leaves no tile for the test split"):
        sample_downstream.write_sample(tmp_path / "one", "dfc2020", 1)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_every_label_value(name):
    legend = BUILDERS[name].LEGEND
    for value in range(256):
        pixels = np.full((2, 3), value, np.uint8)
        if value in ERRORS[name]:
            with pytest.raises(errors.BadFileError, match=f"labels {value} are not 0"):
                label_reading.classes("x.tif", pixels, legend)
        else:
            expected = np.full((2, 3), CLASSES[name].get(value, 255), np.uint8)
            np.testing.assert_array_equal(label_reading.classes("x.tif", pixels, legend), expected)
            np.testing.assert_array_equal(
                label_reading.classes("x.tif", pixels * 1.0, legend), expected
            )
    if name != "dfc2020":
        with pytest.raises(errors.BadFileError, match="labels 2.5, nan are no whole"):
            label_reading.classes("x.tif", np.array([[1, 2.5], [np.nan, 3]]), legend)


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_second_of_several_label_bands_counts(trees, tmp_path, interleave):
    _, _, label = files_of("osm", trees["osm"], "train")[1]
    values = read_tif(label)[0]
    rewrite(
        label,
        lambda pixels: np.concatenate([pixels * 0 + 99, pixels, pixels * 0 + 1]),
        interleave=interleave,
    )
    record = build("osm", trees["osm"], tmp_path / "data").as_data_source("train")[1]
    np.testing.assert_array_equal(record["labels"][0], classes_of("osm", values))


def test_ignored_labels_s2_offset_and_ready_made_uint8(trees, tmp_path):
    (s1, s2, label), (_, other, _), _ = files_of("dw", trees["dw"], "train")
    rewrite(label, lambda pixels: np.where(pixels == 5, 10, np.where(pixels == 2, 0, pixels)))
    rewrite(s1, lambda pixels: scaled(pixels, sensors.S1_MEAN, sensors.S1_STD).transpose(2, 0, 1))
    rewrite(s2, lambda pixels: (pixels % 251).astype(np.uint8))
    builder = build("dw", trees["dw"], tmp_path / "data", options=Options(s2_offset=1000))
    first, second, _ = builder.as_data_source("train")
    values = read_tif(label)[1]
    assert ((values == 0) | (values == 10)).any()
    expected = np.where((values == 0) | (values == 10), 255, values - 1)
    np.testing.assert_array_equal(first["labels"][0], expected)
    np.testing.assert_array_equal(first["s1"], read_tif(s1).transpose(1, 2, 0))
    np.testing.assert_array_equal(first["s2"], read_tif(s2).transpose(1, 2, 0))
    lowered = np.maximum(read_tif(other).astype(int) - 1000, 0)
    np.testing.assert_array_equal(second["s2"], scaled(lowered, sensors.S2_MEAN, sensors.S2_STD))
    assert builder.info.metadata["s2_offset"] == 1000


@pytest.mark.parametrize(("height", "width"), [(30, 30), (30, 36), (36, 31)])
def test_smaller_tiles_are_filled_up(trees, tmp_path, height, width):
    files = files_of("dw", trees["dw"], "train")[1]
    for file in files:
        rewrite(file, crop(height, width))
    # Of another split than the largest tile.
    for tile in files_of("dw", trees["dw"], "test"):
        for file in tile:
            rewrite(file, crop(30, 30))
    builder = build("dw", trees["dw"], tmp_path / "data")
    assert builder.info.metadata["tile_size"] == 36
    assert [record["height"] for record in builder.as_data_source("test")] == [30, 30]
    record = builder.as_data_source("train")[1]
    assert (record["height"], record["width"]) == (height, width)
    real = {name: record[name][:height, :width] for name in ("s1", "s2")}
    labels = record["labels"][:, :height, :width]
    assert_whole_tile("dw", {**record, **real, "labels": labels}, files)
    assert (record["labels"][:, height:] == 255).all()
    assert (record["labels"][:, :, width:] == 255).all()
    for name in ("s1", "s2"):
        rows, columns = np.minimum(np.arange(36), height - 1), np.minimum(np.arange(36), width - 1)
        np.testing.assert_array_equal(record[name], record[name][rows][:, columns])


def test_patches(trees, tmp_path):
    tree = trees["osm"]
    files = files_of("osm", tree, "train")

    def unmark(window):
        def change(pixels):
            pixels[:, window[0], window[1]] = 0
            return pixels

        return change

    # Nothing is left of the first tile, and no label in the last patch of the second.
    rewrite(files[0][2], unmark((slice(None), slice(None))))
    rewrite(files[1][2], unmark((slice(20, None), slice(20, None))))
    builder = build("osm", tree, tmp_path / "data", patch_size=20)
    metadata = builder.info.metadata
    assert (metadata["tile_size"], metadata["patch_size"]) == (20, 20)
    assert metadata["num_empty_patches"] == {"train": 5, "test": 0}
    assert metadata["season_counts"] == {"train": [0, 3, 4], "test": [4, 4]}
    # Those without records are not visited in training.
    dataset = input_pipeline.open_dataset(str(tmp_path / "data"), "ssl4eo_s12_osm")
    assert dataset.season_counts.tolist() == [3, 4]
    patches = list(builder.as_data_source("train"))
    location = files[1][1].stem[3:]
    ids = [f"{location}_0_0", f"{location}_0_20", f"{location}_20_0"]
    assert [patch["location_id"].decode() for patch in patches[:3]] == ids
    whole = build("osm", tree, tmp_path / "whole").as_data_source("train")
    corners = [(1, 0, 0), (1, 0, 20), (1, 20, 0), (2, 0, 0), (2, 0, 20), (2, 20, 0), (2, 20, 20)]
    for patch, (tile, row, column) in zip(patches, corners, strict=True):
        height, width = min(20, 36 - row), min(20, 36 - column)
        assert (patch["height"], patch["width"]) == (height, width)
        expected = whole[tile]
        rows = np.minimum(np.arange(row, row + 20), 35)
        columns = np.minimum(np.arange(column, column + 20), 35)
        for name in ("s1", "s2"):
            np.testing.assert_array_equal(patch[name], expected[name][rows][:, columns])
        labels = np.full((1, 20, 20), 255)
        labels[:, :height, :width] = expected["labels"][:, row : row + 20, column : column + 20]
        np.testing.assert_array_equal(patch["labels"], labels)
        west, north = expected["transform"][[2, 5]]
        corner = (west + 10 * column, north - 10 * row)
        assert tuple(patch["transform"][[2, 5]]) == corner
        np.testing.assert_array_equal(patch["transform"][[0, 1, 3, 4]], [10, 0, 0, -10])
    # A tile without records takes nothing from the others.
    dataset = input_pipeline.open_dataset(str(tmp_path / "data"), "ssl4eo_s12_osm")
    np.testing.assert_array_equal(
        dataset.location_of(np.arange(7)), [tile - 1 for tile, _, _ in corners]
    )
    with pytest.raises(errors.BuildError, match="--patch_size=37 is larger .* 36 pixels"):
        build("osm", tree, tmp_path / "large", patch_size=37)


DAMAGE = {
    "missing": (1, lambda file: file.unlink(), "missing"),
    "missing label": (2, lambda file: file.unlink(), "missing"),
    "cut short": (1, lambda file: file.write_bytes(file.read_bytes()[:-10]), "cut short"),
    "cut label": (2, lambda file: file.write_bytes(file.read_bytes()[:-10]), "cut short"),
    "no image": (0, lambda file: file.write_text("<html>404</html>"), "no GeoTIFF"),
    "off-size": (0, lambda file: rewrite(file, crop(30, 36)), "30x36 pixels, 36x36 needed"),
    "bands": (1, lambda file: rewrite(file, lambda a: a[:12]), "has 12 bands, 13 are needed"),
    "more bands": (0, lambda file: rewrite(file, lambda a: a[[0, 1, 1]]), "has 3 bands, 2 are"),
    "dtype": (1, lambda file: rewrite(file, lambda a: a.astype(np.float32)), "dtype float32, but"),
    "linear power": (0, lambda file: rewrite(file, lambda a: 10 ** (a / 10)), "linear power"),
    "label": (2, lambda file: rewrite(file, lambda a: a + 11), "are not 0..10"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_tile_is_skipped(trees, tmp_path, case):
    kind, damage, reason = DAMAGE[case]
    file = files_of("dw", trees["dw"], "train")[1][kind]
    location = location_of("dw", file)
    damage(file)
    with pytest.raises(errors.BuildError, match="bad locations: 1, --max_bad_locations=0"):
        build("dw", trees["dw"], tmp_path / "none")
    assert not list((tmp_path / "none").glob("*/"))
    builder = build("dw", trees["dw"], tmp_path / "data", max_bad_locations=1)
    assert builder.info.metadata["season_counts"] == {"train": [1, 1], "test": [1, 1]}
    assert builder.info.metadata["num_bad_locations"] == 1
    assert not any(
        location in record["location_id"].decode() for record in builder.as_data_source("train")
    )
    ((location_id, path, reported_reason),) = reported("dw", tmp_path / "data")
    assert location_id.startswith(location)
    assert reason in reported_reason
    # The date of a missing file is unknown.
    wanted = str(file.relative_to(trees["dw"]))
    if reason == "missing":
        wanted = wanted.rsplit("-", 1)[0] + "-*.tif"
    assert path == wanted


def test_larger_label_does_not_set_the_size_of_tiles(trees, tmp_path):
    _, _, label = files_of("osm", trees["osm"], "train")[0]
    rewrite(label, lambda pixels: np.pad(pixels, ((0, 0), (0, 6), (0, 6))))
    builder = build("osm", trees["osm"], tmp_path / "data", max_bad_locations=1)
    assert builder.info.metadata["tile_size"] == 36
    ((_, path, reason),) = reported("osm", tmp_path / "data")
    assert path == str(label.relative_to(trees["osm"]))
    assert reason == "42x42 pixels, 36x36 needed, at most 2 more or fewer are accepted"


def test_dfc2020_tiles_of_both_splits_are_named_apart(trees, tmp_path):
    tree = trees["dfc2020"]
    files_of("dfc2020", tree, "train")[2][1].unlink()
    (tree / "s2_test" / "ROIs0000_test_s2_0_p11.tif").write_bytes(b"")
    (tree / "s2_test" / "p12.tif").write_bytes(b"")
    (tree / "s2_test" / "._ROIs0000_test_s2_0_p13.tif").write_bytes(b"")
    build("dfc2020", tree, tmp_path / "data", max_bad_locations=3)
    assert reported("dfc2020", tmp_path / "data") == [
        ("validation_p2", "s2_validation/ROIs0000_validation_s2_0_p2.tif", "missing"),
        ("p12.tif", "s2_test/p12.tif", "the name is not ROIs0000_test_s2_0_p{number}.tif"),
        ("test_p11", "s1_test/ROIs0000_test_s1_0_p11.tif", "missing"),
    ]


def find_tiles(names, max_days=60):
    files, unread = tile_files.sort_files(names, tile_layouts.SSL4EO_S12_OSM)
    return tile_files.find_tiles(
        files["train"], unread, tile_layouts.SSL4EO_S12_OSM, "train", max_days
    )


def test_locations_and_dates_in_names():
    names = [
        f"train/{folder}_{location}-{date}.tif"
        for folder, dates in (
            ("image_s1/s1", ("20200320", "20200103")),
            ("image_s2/s2", ("20200101", "20200317")),
            ("label_osm/osm", ("20200101", "20200317")),
        )
        for location in ("-58.25_-33.1", "7_-0.5", "-101.5_40")
        for date in (dates if location == "7_-0.5" else dates[1:])
    ]
    names.append("train/label_osm/osm_12.5_3-20200101.tif")
    # A second date of labels alone cannot be paired.
    names += [f"train/{kind}_9_9-20200101.tif" for kind in ("image_s1/s1", "image_s2/s2")]
    names += [f"train/label_osm/osm_9_9-2020010{day}.tif" for day in (1, 2)]
    tiles, findings = find_tiles(names)
    # Images of the two locations that follow, which have no label of a near date.
    assert {finding.kind for finding in findings} == {"not paired"}
    assert {pathlib.Path(finding.file).parent.name for finding in findings} == {
        "image_s1", "image_s2",
    }  # fmt: skip
    assert len(findings) == 4
    assert [tile.location_id for tile in tiles] == [
        "-101.5_40-20200317", "-58.25_-33.1-20200317", "7_-0.5-20200101", "7_-0.5-20200317",
        "9_9", "12.5_3",
    ]  # fmt: skip
    # The dates of Sentinel-1 and -2 are 74 days apart.
    assert tiles[0].fault[0] == "train/label_osm/osm_-101.5_40-20200317.tif"
    assert tiles[0].fault[1].startswith("no s1 file of its own within 60 days: found 20200103")
    first, second = tiles[2:4]
    assert first.paths == {
        "s1": "train/image_s1/s1_7_-0.5-20200103.tif",
        "s2": "train/image_s2/s2_7_-0.5-20200101.tif",
        "labels": "train/label_osm/osm_7_-0.5-20200101.tif",
    }
    assert second.paths["s1"] == "train/image_s1/s1_7_-0.5-20200320.tif"
    assert tiles[4].fault == (
        "train/label_osm/osm_9_9-20200101.tif",
        "the files cannot be paired: 1 of s1, 1 of s2, 2 of labels",
    )
    assert tiles[5].fault == ("train/image_s1/s1_12.5_3-*.tif", "missing")


def test_dates_of_s1_and_s2_are_compared():
    names = [
        "train/image_s1/s1_1_2-20200101.tif",
        "train/image_s2/s2_1_2-20200320.tif",
        "train/label_osm/osm_1_2-20200220.tif",
    ]
    (tile,), _ = find_tiles(names)
    assert tile.fault[1].startswith("no s1 file of its own within 60 days: found 20200101")
    (tile,), findings = find_tiles(names, max_days=79)
    assert (tile.fault, findings) == ((), [])
    assert tile.location_id == "1_2-20200320"


def test_names_with_impossible_dates_are_faults():
    names = [f"train/{kind}_1_2-20200101.tif" for kind in ("image_s1/s1", "image_s2/s2")]
    names += ["train/label_osm/osm_1_2-20200101.tif", "train/label_osm/osm_1_2-20201399.tif"]
    tiles, _ = find_tiles(names)
    assert [tile.fault for tile in tiles] == [
        (
            "train/label_osm/osm_1_2-20201399.tif",
            "the name is not osm_{lon}_{lat}-{date}.tif",
        ),
        (),
    ]


def test_archives_and_workers_change_no_bit(templates, tmp_path):
    for name in ("dw", "dfc2020"):
        template = templates[name]
        root = tmp_path / name
        build(name, template, root / "extracted")
        expected = digests(name, root / "extracted")
        with zipfile.ZipFile(root / "all.zip", "w") as archive:
            for file in sorted(template.rglob("*.tif"), reverse=True):
                archive.write(file, pathlib.Path("x") / file.relative_to(template))
        build(name, root / "all.zip", root / "zip", num_workers=2 if name == "dw" else 1)
        assert digests(name, root / "zip") == expected
        with tarfile.open(root / "all.tar.gz", "w:gz") as archive:
            archive.add(template, "x/y")
        build(name, root / "all.tar.gz", root / "tar")
        assert digests(name, root / "tar") == expected


def test_validation_split_where_there_is_one(trees, tmp_path):
    tree = trees["osm"]
    shutil.copytree(tree / "test", tree / "val")
    builder = build("osm", tree, tmp_path / "data")
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == {
        "train": 3, "test": 2, "val": 2,
    }  # fmt: skip
    shutil.rmtree(tree / "val" / "label_osm")
    with pytest.raises(sources.SourceError, match=r"^val/label_osm not found"):
        build("osm", tree, tmp_path / "again")


def test_split_without_records_is_an_error(trees, tmp_path):
    for _, _, label in files_of("dw", trees["dw"], "test"):
        label.write_bytes(b"")
    with pytest.raises(errors.BuildError, match="split test is left without records: its 2"):
        build("dw", trees["dw"], tmp_path / "data", max_bad_locations=9)
    left = sorted(file.name for file in (tmp_path / "data").rglob("*"))
    assert left == [f"ssl4eo_s12_dw.{n}" for n in ("bad_locations.csv", "report.json", "report.md")]


@pytest.mark.parametrize(
    ("name", "missing", "layout"),
    [
        ("dw", "train/label_dw, test/label_dw", "{split}/label_dw/dw_{lon}_{lat}-{date}.tif"),
        (
            "dfc2020",
            "s1_validation, s2_validation, dfc_validation, s1_test, s2_test, dfc_test",
            "s2_{split}/ROIs0000_{split}_s2_0_p{number}.tif",
        ),
    ],
)
def test_wrong_tree_says_what_was_looked_for(templates, tmp_path, name, missing, layout):
    for tree in (templates["osm"], tmp_path / "nowhere"):
        with pytest.raises(sources.SourceError) as error:
            build(name, tree, tmp_path / "data")
        message = str(error.value)
        assert f"not found in {tree}: looked for folders and for .zip" in message
        assert layout in message
        assert f"python -m data_prep.sample --format={name} --output_dir=DIR" in message
        if tree.exists():
            assert message.startswith(f"{missing} not found")
    assert not (tmp_path / "data").exists()


def test_commands(templates, tmp_path):
    run = commands.run_flags
    tree, data_dir = tmp_path / "tree", tmp_path / "data"
    flags = {"output_dir": tree, "format": "dfc2020", "locations": 3, "tile_size": 24}
    refused = run("data_prep.sample", seasons=2, **flags)
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: --seasons=2 is for --format=nol")
    made = run("data_prep.sample", num_workers=1, **flags)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("3 tiles (2 to train on, 1 to test on) of 24 x 24 pixels")

    files_of("dfc2020", tree, "train")[0][0].unlink()
    flags = {"source_dir": tree, "data_dir": data_dir, "num_workers": 1, "patch_size": 16}
    built = run("data_prep.build", dataset="dfc2020", max_bad_locations=1, **flags)
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""
    assert built.stdout.startswith("2 tiles written, 1 skipped (see ")
    # Snow alone in one patch, which is none of the classes.
    assert ", 7 records (train 4, test 3), patches without labels omitted (train 0, test 1), " in (
        built.stdout
    )
    other = run("data_prep.build", dataset="dfc2020", **(flags | {"patch_size": 0}))
    assert other.returncode == 1
    assert "was built with --patch_size=16: delete it" in other.stderr
    uncut = run("data_prep.build", dataset="ssl4eo_s12_nol", **flags)
    assert uncut.returncode == 1
    assert uncut.stderr.startswith("Error: --patch_size=16 is for downstream data sets, not for")
