"""The procedural sample: reproducible, complete, with plausible spectra and label noise."""

import itertools
import pathlib

import numpy as np
import pytest
import rasterio

from cromss_jax.data import input_pipeline
from cromss_jax.presets import DFC2020_OF_IGBP, DYNAMIC_WORLD
from cromss_jax.sensors import (
    IGNORE_LABEL,
    S1_BANDS,
    S2_BANDS,
    S2_BANDS_BY_RESOLUTION,
)
from data_prep import options
from data_prep.datasets.downstream import Dfc2020
from data_prep.sample import downstream, imagery, nol, world
from tests import commands

WATER, TREES, BARE, SNOW = (
    DYNAMIC_WORLD.names.index(name) for name in ("water", "trees", "bare ground", "snow & ice")
)

CLOUD = world.NOISE_KINDS.index("cloud")


@pytest.fixture(scope="module")
def locations() -> list[world.Location]:
    """Two of every archetype."""
    return [world.make_location(0, index, 4, 96) for index in range(2 * len(world.ARCHETYPES))]


def _arrays(location: world.Location) -> dict[str, np.ndarray]:
    return {name: value for name, value in vars(location).items() if isinstance(value, np.ndarray)}


def _files(root: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _table(root: pathlib.Path) -> list[list[str]]:
    return [line.split(",") for line in (root / nol.TABLE).read_text().splitlines()]


def test_location_depends_on_seed_and_index_alone():
    later = world.make_location(5, 3, 2, 48)
    world.make_location(5, 0, 2, 48)
    again = world.make_location(5, 3, 2, 48)
    for name, array in _arrays(later).items():
        np.testing.assert_array_equal(array, getattr(again, name), err_msg=name)
    assert later.s1_times == again.s1_times
    assert later.s2_times == again.s2_times
    for other in (world.make_location(6, 3, 2, 48), world.make_location(5, 4, 2, 48)):
        assert not np.array_equal(later.s2_10m, other.s2_10m)


def test_same_files_for_any_number_of_workers_and_locations(tmp_path):
    nol.write_sample(tmp_path / "two", 3, seasons=2, tile_size=24, seed=1, num_workers=2)
    nol.write_sample(tmp_path / "one", 2, seasons=2, tile_size=24, seed=1)
    of_two, of_one = _files(tmp_path / "two"), _files(tmp_path / "one")
    assert _table(tmp_path / "two")[:3] == _table(tmp_path / "one")
    del of_one[nol.TABLE]
    # 2 S1 bands, 13 S2 bands, label and truth.
    assert len(of_one) == 2 * 2 * 17
    assert {name: of_two[name] for name in of_one} == of_one


def test_tree_is_that_of_ssl4eo_s12_nol(tmp_path):
    wrong = nol.write_sample(tmp_path, 2, seasons=3, tile_size=48, seed=2)
    header, *rows = _table(tmp_path)
    assert header == ["ids", "sub1", "sub2", "sub3"]
    wrong_pixels = 0
    for index, (location_id, *granules) in enumerate(rows):
        assert int(location_id) == index
        made = world.make_location(2, index, 3, 48)
        folder = f"{index:07d}"
        assert sorted(p.name for p in (tmp_path / "s2c" / folder).iterdir()) == granules
        s1_granules = sorted(p.name for p in (tmp_path / "s1" / folder).iterdir())
        assert len(s1_granules) == 3
        for season, (s1_granule, s2_granule) in enumerate(zip(s1_granules, granules, strict=True)):
            expected = {
                f"s1/{folder}/{s1_granule}/{band}.tif": (made.s1[season, ..., i], 10)
                for i, band in enumerate(S1_BANDS)
            }
            for metres, bands in S2_BANDS_BY_RESOLUTION.items():
                stack = made.s2(metres)[season]
                assert stack.shape == (480 // metres, 480 // metres, len(bands))
                for i, band in enumerate(bands):
                    path = f"s2c/{folder}/{s2_granule}/{band}.tif"
                    expected[path] = (stack[..., i], metres)
            labels = f"dw_noisy_labels/{folder}/{s2_granule}"
            expected[f"{labels}/label.tif"] = (made.labels[season], 10)
            expected[f"{labels}/truth.tif"] = (made.truth[season], 10)
            wrong_pixels += int((made.labels[season] != made.truth[season]).sum())
            for path, (pixels, metres) in expected.items():
                with rasterio.open(tmp_path / path) as file:
                    np.testing.assert_array_equal(file.read(1), pixels, err_msg=path)
                    assert file.dtypes == (pixels.dtype.name,)
                    assert file.crs.to_epsg() == made.epsg
                    assert file.crs.is_projected
                    assert file.res == (metres, metres)
                    west, north = made.origin
                    assert tuple(file.bounds) == (west, north - 480, west + 480, north)
    assert len(list(tmp_path.rglob("*.tif"))) == 2 * 3 * (len(S1_BANDS) + len(S2_BANDS) + 2)
    assert wrong == wrong_pixels / (2 * 3 * 48**2)


def test_granule_names_pair_by_date():
    location = world.make_location(0, 0, world.MAX_SEASONS, 6)
    names = [nol.granule_names(location, s) for s in range(world.MAX_SEASONS)]
    s1, s2 = zip(*names, strict=True)
    # Their names sort as the seasons do, so that pairing by rank is pairing by season.
    assert list(s1) == sorted(set(s1))
    assert list(s2) == sorted(set(s2))
    for s1_time, s2_time in zip(location.s1_times, location.s2_times, strict=True):
        hours = abs((s1_time - s2_time).total_seconds()) / 3600
        assert 12 < hours < 7 * 24


def test_about_a_third_of_the_labels_is_wrong(locations):
    truth = np.stack([location.truth for location in locations])
    labels = np.stack([location.labels for location in locations])
    valid = labels != IGNORE_LABEL
    assert labels[valid].max() < len(DYNAMIC_WORLD)
    assert truth.max() < len(DYNAMIC_WORLD)
    assert 0.27 <= (labels != truth)[valid].mean() <= 0.40
    # Every true class keeps its own label more often than all others together.
    for c, name in enumerate(DYNAMIC_WORLD.names):
        share = (
            np.bincount(labels[valid & (truth == c)], minlength=9) / (valid & (truth == c)).sum()
        )
        assert share[c] > 0.5, (name, share)


def test_noise_kind_says_where_and_why(locations):
    for location in locations:
        np.testing.assert_array_equal(location.noise_kind == 0, location.labels == location.truth)
        np.testing.assert_array_equal(location.noise_kind == CLOUD, location.labels == IGNORE_LABEL)
    kinds = np.unique([location.noise_kind for location in locations])
    assert set(kinds.tolist()) >= set(range(len(world.NOISE_KINDS))) - {CLOUD}


def test_noise_is_independent_between_seasons(locations):
    confused = np.stack([location.noise_kind for location in locations]) == 1
    both, independent = 0, 0
    for a, b in itertools.combinations(range(4), 2):
        both += (confused[:, a] & confused[:, b]).mean()
        independent += (confused[:, a].mean((1, 2)) * confused[:, b].mean((1, 2))).mean()
    # Some classes are confused more than others in every season, and chance remains in 16 tiles
    # of few blobs. The same noise in all seasons would give 1 / share, about 5.
    assert 0.7 < both / independent < 1.4


def test_spectra_and_backscatter_tell_the_classes_apart(locations):
    s1 = {c: [] for c in range(len(DYNAMIC_WORLD))}
    s2 = {c: [] for c in range(len(DYNAMIC_WORLD))}
    for location in locations:
        coarse = location.s2_20m.repeat(2, axis=1).repeat(2, axis=2)
        swir = coarse[..., S2_BANDS_BY_RESOLUTION[20].index("B11")]
        bands = np.concatenate([location.s2_10m, swir[..., None]], axis=-1).astype(float)
        for c in np.unique(location.truth):
            here = (location.truth == c) & (location.labels != IGNORE_LABEL)
            s1[c].append(location.s1[here])
            s2[c].append(bands[here])
    vv, vh = np.array([np.median(np.concatenate(s1[c]), axis=0) for c in s1]).T
    blue, green, red, nir, swir = np.array([np.median(np.concatenate(s2[c]), axis=0) for c in s2]).T
    ndvi = (nir - red) / (nir + red)
    ndwi = (green - nir) / (green + nir)
    ndsi = (green - swir) / (green + swir)
    assert ndvi[TREES] > 0.5 > 0.3 > ndvi[BARE]
    assert ndwi.argmax() in (WATER, SNOW)
    assert ndwi[WATER] > 0 > np.delete(ndwi, [WATER, SNOW]).max()
    assert ndsi[SNOW] > 0.6
    assert blue.argmax() == SNOW
    assert vv.argmin() == WATER
    assert vh.argmin() == WATER
    assert vv.argmax() == DYNAMIC_WORLD.names.index("built area")


def test_values_are_those_of_real_products(locations):
    cirrus = S2_BANDS_BY_RESOLUTION[60].index("B10")
    for location in locations:
        assert -45 < location.s1.min() < location.s1.max() < 20
        assert location.s2_10m.min() >= 1
        assert max(location.s2(metres).max() for metres in S2_BANDS_BY_RESOLUTION) < 15000
        # L1C cirrus over cloudless land stays below 0.02 (real tiles: below 0.01).
        if not (location.labels == IGNORE_LABEL).any():
            assert location.s2_60m[..., cirrus].max() < 200


def test_coarse_bands_are_area_means_of_the_fine_scene():
    scene = np.random.default_rng(0).uniform(500, 1500, (len(S2_BANDS), 48, 48)).astype(np.float32)
    for metres in (20, 60):
        bands = S2_BANDS_BY_RESOLUTION[metres]
        seen = imagery.sense_s2(np.random.default_rng(1), scene, metres)
        side = metres // 10
        for i, band in enumerate(bands):
            blocks = scene[S2_BANDS.index(band)].reshape(48 // side, side, 48 // side, side)
            # The sensor's noise has a standard deviation of 3 + 1.2%, 15 here: five of them.
            np.testing.assert_allclose(seen[..., i], blocks.mean((1, 3)), atol=75)


def test_coarse_labels_by_hand():
    """A tile of 60 pixels whose 20th row and 30th column begin other pixels of 500 m."""
    truth = np.zeros((60, 60), np.uint8)
    truth[:20, 30:] = 1
    truth[0, 30:] = 4
    truth[20:, :30] = 4
    truth[20:30, :30] = 6
    truth[20:, 30:] = 8
    truth[20:, 31:46] = 7
    found = downstream.coarse_labels(truth, easting=300_200.0, northing=5_000_200.0)
    expected = np.zeros((60, 60), np.uint8)
    # Water, broadleaved forest; cropland, which is more than built area; barren: half is snow.
    expected[:20, :30], expected[:20, 30:] = 17, 5
    expected[20:, :30], expected[20:, 30:] = 12, 16
    np.testing.assert_array_equal(found, expected)


def test_coarse_labels_are_built_with_the_truth(tmp_path):
    downstream.write_sample(tmp_path / "tree", "dfc2020", 2, 60, coarse=True)
    (lc,) = (tmp_path / "tree").glob("lc_validation/*.tif")
    with rasterio.open(lc) as file:
        pixels, (left, top) = file.read(1), (file.transform.c, file.transform.f)
    legend = DFC2020_OF_IGBP
    assert set(np.unique(pixels)) <= {*sum(legend.values, ()), 15}
    # Constant inside of each pixel of 500 m.
    rows = (top - 5 - 10 * np.arange(60)) // 500
    columns = (left + 5 + 10 * np.arange(60)) // 500
    for row, column in itertools.product(set(rows), set(columns)):
        assert len(np.unique(pixels[np.ix_(rows == row, columns == column)])) == 1
    choice = options.Options(labels="lc")
    source, target = tmp_path / "tree", tmp_path / "data"
    Dfc2020(source_dir=source, data_dir=target, options=choice).build()
    (record,) = input_pipeline.open_dataset(str(target), "dfc2020").source
    own = {value: i for i, values in enumerate(legend.values) for value in values}
    np.testing.assert_array_equal(
        record["labels"][0], np.vectorize(lambda v: own.get(v, 255))(pixels)
    )
    assert (record["labels"][0] != record["truth"]).any()


def test_archetypes_take_turns():
    names = {world.make_location(7, index, 1, 6).archetype for index in range(8, 16)}
    assert names == set(world.ARCHETYPES)


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tile_size is 100: .* multiple of 6"):
        nol.write_sample(tmp_path / "new", 1, tile_size=100)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="seasons is 0"):
        world.make_location(0, 0, 0, 48)


def test_directory_in_use_is_not_changed(tmp_path):
    (tmp_path / nol.TABLE).write_text("ids,sub1\n")
    with pytest.raises(FileExistsError, match="not empty: delete it, or choose another"):
        nol.write_sample(tmp_path, 1, tile_size=24)
    assert list(tmp_path.iterdir()) == [tmp_path / nol.TABLE]


def test_command(tmp_path):
    def run(*args):
        return commands.run("data_prep.sample", f"--output_dir={tmp_path / 'out'}", *args)

    done = run("--locations=2", "--seasons=1", "--tile_size=24", "--num_workers=1")
    assert done.returncode == 0, done.stderr
    assert "2 locations x 1 seasons of 24 x 24 pixels" in done.stdout
    assert len(_table(tmp_path / "out")) == 3
    again = run()
    assert again.returncode == 1
    assert again.stderr.startswith("Error: ")
    assert "is not empty" in again.stderr
    assert "Traceback" not in again.stderr
