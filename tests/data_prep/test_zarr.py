"""TerraMesh and SSL4EO-S12 v1.1, from small shards written as the released ones are."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import rasterio

from cromss_jax import sensors
from cromss_jax.data import input_pipeline
from data_prep import errors, options
from data_prep.datasets import terramesh, zarr_shards
from data_prep.finding import sources
from data_prep.reading import offsets, zarr_stores

numcodecs = pytest.importorskip("numcodecs", reason="needs the extra zarr")

SIDE = 24
NAMES = {
    "S2L1C": [
        f"B{b:02d}" if isinstance(b, int) else b for b in (*range(1, 9), "B8A", 9, 10, 11, 12)
    ],
    "S1RTC": ["vv", "vh"],
    "S1GRD": ["vv", "vh"],
    "LULC": ["lulc"],
}
NAMES["S2L2A"] = [name for name in NAMES["S2L1C"] if name != "B10"]
CRS = rasterio.CRS.from_epsg(32633).to_wkt()


def pack(arrays, attributes=None, consolidated=True, chunks=None):
    """A store of Zarr version 2 with Blosc, as zarr 2.18 writes it."""
    codec = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=1)
    metadata = {".zgroup": {"zarr_format": 2}}
    members = {}
    for name, array in arrays.items():
        array = np.asarray(array)
        size = (chunks or {}).get(name, array.shape)
        metadata[f"{name}/.zarray"] = {
            "chunks": list(size), "compressor": codec.get_config() if array.ndim else None,
            "dtype": array.dtype.str, "fill_value": 0 if array.dtype.kind in "iuf" else "",
            "filters": None, "order": "C", "shape": list(array.shape), "zarr_format": 2,
        }  # fmt: skip
        metadata[f"{name}/.zattrs"] = (attributes or {}).get(name, {})
        for index in np.ndindex(*(-(-n // c) for n, c in zip(array.shape, size, strict=True))):
            chunk = np.zeros(size, array.dtype)
            part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, size, strict=True))]
            chunk[tuple(map(slice, part.shape))] = part
            data = codec.encode(chunk) if array.ndim else chunk.tobytes()
            members[f"{name}/{'.'.join(map(str, index)) or '0'}"] = data
    files = {name: json.dumps(value) for name, value in metadata.items()}
    if consolidated:
        content = {"metadata": metadata, "zarr_consolidated_format": 1}
        files[".zmetadata"] = json.dumps(content)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, value in {**files, **members}.items():
            archive.writestr(name, value)
    return out.getvalue()


def days(*dates):
    return np.array(dates, "datetime64[ns]").astype(np.int64)


def store(
    folder, pixels, dates, *, left=500_000.0, top=6_000_000.0, crs=CRS, clouds=None, turned=False
):
    places = np.arange(pixels.shape[-1]) * 10 + 5.0
    arrays = {
        "bands": pixels, "band": np.array(NAMES[folder]), "time": days(*dates),
        "x": left + places, "y": top + (places if turned else -places), "spatial_ref": 0,
    }  # fmt: skip
    if clouds is not None:
        arrays["cloud_mask"] = clouds
    return pack(arrays, {"spatial_ref": {"crs_wkt": crs}, "time": {}})


def real_samples(folder):
    """The stores by folder of each real place, and their pixels."""
    stores, images = {}, {}
    for path in sorted(folder.glob("LULC/*.tif")):
        stores[path.stem], images[path.stem], dates = {}, {}, {}
        for kind in ("LULC", "S1RTC", "S2L1C", "S2L2A"):
            with rasterio.open(folder / kind / path.name) as file:
                pixels, place, crs = file.read(), file.transform, file.crs.to_wkt()
                # Sentinel-2 has no date here, the labels that were made from it have.
                dates[kind] = file.tags().get("datetime") or dates["LULC"]
            # As float16 they were released.
            stored = pixels.astype(np.float16) if kind == "S1RTC" else pixels
            np.testing.assert_array_equal(stored, pixels)
            stores[path.stem][kind] = store(
                kind, stored[None], [dates[kind]], left=place.c, top=place.f, crs=crs
            )
            images[path.stem][kind] = pixels
    return stores, images


def reflectance(seed, num_dates=1, b10=15):
    """L1C without offset, (T, 13, H, W)."""
    random = np.random.default_rng(seed)
    pixels = random.integers(300, 3000, (num_dates, 13, SIDE, SIDE))
    pixels[:, 10] = b10
    return pixels.astype(np.int16)


def radar(seed, num_dates=1):
    pixels = np.random.default_rng(seed).normal(-12, 2, (num_dates, 2, SIDE, SIDE))
    return (pixels - np.array([0, 7])[None, :, None, None]).astype(np.float16)


def classes(seed, num_dates=1):
    values = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    return np.random.default_rng(seed).choice(values, (num_dates, 1, SIDE, SIDE)).astype(np.uint8)


DATE = ["2020-05-03T10:00:00"]
LONG_AGO = ["2019-05-01"]
EAST = 501_000.0


def sample(seed, offset=0, s1="S1RTC", l2a_offset=None, **changes):
    """The stores of a sample by folder."""
    pixels = reflectance(seed)
    stores = {
        "S2L1C": store("S2L1C", pixels + np.int16(offset), DATE),
        s1: store(s1, radar(seed), ["2020-05-01T05:00:00"]),
        "LULC": store("LULC", classes(seed), ["2020-01-01"]),
    }
    if l2a_offset is not None:
        darker = np.delete(pixels, 10, axis=1) + np.int16(120 + l2a_offset)
        stores["S2L2A"] = store("S2L2A", darker, DATE)
    return stores | changes


def write_shards(root, samples, split="train", shard="majortom_shard_000001.tar"):
    """Shards of samples, a mapping from key to stores by folder."""
    for folder in sorted({name for stores in samples.values() for name in stores}):
        path = root / split / folder / shard
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for key, stores in samples.items():
                if folder in stores:
                    info = tarfile.TarInfo(f"{key}.zarr.zip")
                    info.size = len(stores[folder])
                    archive.addfile(info, io.BytesIO(stores[folder]))


def build(root, builder=terramesh.Terramesh, **arguments):
    built = builder(source_dir=root, data_dir=root / "data", **arguments)
    built.build()
    return built


def test_samples_with_and_without_offset(tmp_path):
    write_shards(tmp_path, {"a": sample(1), "b": sample(2, offset=1000)})
    write_shards(tmp_path, {"c": sample(3, s1="S1GRD")}, shard="ssl4eos12_shard_000794.tar")
    write_shards(tmp_path, {"d": sample(4)}, split="val")
    built = build(tmp_path)
    dataset = input_pipeline.open_dataset(str(tmp_path / "data"), "terramesh")
    assert [dataset.source[i]["location_id"] for i in range(3)] == [b"a", b"b", b"c"]
    for i, seed in enumerate((1, 2, 3)):
        record = dataset.source[i]
        for k, name in enumerate(sensors.S2_BANDS):
            want = sensors.scale_to_uint8(reflectance(seed)[0, k], name)
            np.testing.assert_array_equal(record["s2"][..., k], want)
        for k, name in enumerate(sensors.S1_BANDS):
            want = sensors.scale_to_uint8(radar(seed)[0, k].astype(np.float32), name)
            np.testing.assert_array_equal(record["s1"][..., k], want)
        want = np.array([255, 0, 1, 2, 3, 4, 5, 6, 255, 7])[classes(seed)[0, 0]]
        np.testing.assert_array_equal(record["labels"][0], want)
        assert record["transform"].tolist() == [10, 0, 500_000, 0, -10, 6_000_000]
        assert rasterio.CRS.from_wkt(record["crs"].decode()).to_epsg() == 32633
        assert record["s1_timestamp"] == b"2020-05-01T05:00:00"
    assert built.report.counts["offset subtracted"] == 1
    rows = {
        row["measure"]: row
        for row in json.loads(built.report.json_path.read_text())["tables"]["Measures"]
    }
    assert rows["offset subtracted from Sentinel-2"]["largest"] == "1000"
    assert rows["days between Sentinel-1 and Sentinel-2"]["median"] == "2.20833"
    val = input_pipeline.open_dataset(str(tmp_path / "data"), "terramesh", "val")
    assert val.source[0]["location_id"] == b"d"


@pytest.mark.parametrize("l2a_offset", [0, 1000])
@pytest.mark.parametrize("l1c_offset", [0, 1000])
def test_offset_of_l2a_comes_from_l1c(tmp_path, l1c_offset, l2a_offset):
    write_shards(tmp_path, {"a": sample(1, l1c_offset, l2a_offset=l2a_offset)})
    opts = options.Options(s2_level="L2A")
    build(tmp_path, options=opts)
    record = input_pipeline.open_dataset(str(tmp_path / "data"), "terramesh").source[0]
    band = opts.described_bands(is_native=False)[2]
    want = sensors.scale_to_uint8(reflectance(1)[0, 0] + 120, "B1", {"B1": (band.mean, band.std)})
    np.testing.assert_array_equal(record["s2"][..., 0], want)


def test_offset_of_l2a_that_is_neither():
    pixels = reflectance(1)[0].astype(int)
    valid = np.ones((SIDE, SIDE), bool)

    def bands(add):
        return {"B11": (pixels[11] + add, valid), "B12": (pixels[12] + add, valid)}

    found = [offsets.from_l1c(bands(add), bands(0), 0) for add in (-200, 0, 300, 500, 900, 2000)]
    assert [f and f.value for f in found] == [0, 0, 0, None, 1000, None]
    assert offsets.from_l1c({}, bands(0), 0) is None


def test_four_seasons_are_paired_by_date(tmp_path):
    dates = ["2020-02-01", "2020-05-01", "2020-08-01", "2020-11-01"]
    s1_dates = ["2020-11-04", "2020-02-03", "2020-05-02", "2020-08-07"]
    pixels = reflectance(1, 4)
    # Each in an order of its own.
    stores = {
        "S2L1C": store("S2L1C", pixels[[1, 0, 2, 3]], [dates[i] for i in (1, 0, 2, 3)]),
        "S1GRD": store("S1GRD", radar(1, 4), s1_dates),
        "LULC": store("LULC", classes(1, 4)[::-1], dates[::-1]),
    }
    write_shards(tmp_path, {"0000001": stores}, shard="ssl4eos12_shard_000001.tar")
    build(tmp_path, terramesh.Ssl4eoS12V11)
    dataset = input_pipeline.open_dataset(str(tmp_path / "data"), "ssl4eo_s12_v1_1")
    assert dataset.season_counts.tolist() == [4]
    for season, s1_index in enumerate((1, 2, 3, 0)):
        record = dataset.source[season]
        assert int(record["season"]) == season
        assert record["s2_timestamp"].decode()[:10] == dates[season]
        assert record["s1_timestamp"].decode()[:10] == s1_dates[s1_index]
        want = sensors.scale_to_uint8(radar(1, 4)[s1_index, 0].astype(np.float32), "VV")
        np.testing.assert_array_equal(record["s1"][..., 0], want)
        want = sensors.scale_to_uint8(pixels[season, 3], "B4")
        np.testing.assert_array_equal(record["s2"][..., 3], want)
        want = np.array([255, 0, 1, 2, 3, 4, 5, 6, 255, 7])[classes(1, 4)[season, 0]]
        np.testing.assert_array_equal(record["labels"][season], want)


@pytest.mark.parametrize("ignore", [False, True])
def test_clouds(tmp_path, ignore):
    clouds = np.zeros((1, SIDE, SIDE), np.uint8)
    clouds[0, :7] = np.arange(7)[:, None]
    pixels = reflectance(1)
    stores = sample(1, S2L1C=store("S2L1C", pixels, DATE, clouds=clouds))
    write_shards(tmp_path, {"a": stores})
    built = build(tmp_path, ignore_clouds=ignore)
    record = input_pipeline.open_dataset(str(tmp_path / "data"), "terramesh").source[0]
    want = np.array([255, 0, 1, 2, 3, 4, 5, 6, 255, 7])[classes(1)[0, 0]]
    if ignore:
        want[3:7] = 255
    np.testing.assert_array_equal(record["labels"][0], want)
    assert ("masked" in built.report.counts) == ignore


def test_keys_of_the_shards_are_matched(tmp_path):
    samples = {key: sample(i) for i, key in enumerate("abc")}
    del samples["b"]["LULC"]
    write_shards(tmp_path, samples)
    write_shards(tmp_path, {k: {"S1RTC": samples[k]["S1RTC"]} for k in "cba"})
    built = build(tmp_path)
    dataset = input_pipeline.open_dataset(str(tmp_path / "data"), "terramesh")
    assert sorted(dataset.source[i]["location_id"] for i in range(2)) == [b"a", b"c"]
    record = next(r for r in (dataset.source[0], dataset.source[1]) if r["location_id"] == b"c")
    want = sensors.scale_to_uint8(radar(2)[0, 0].astype(np.float32), "VV")
    np.testing.assert_array_equal(record["s1"][..., 0], want)
    assert built.report.counts["not paired"] == 1
    assert built.report.counts["shards differ"] == 2


def test_missing_shards(tmp_path):
    stores = sample(1)
    del stores["S1RTC"]
    write_shards(tmp_path, {"a": stores})
    with pytest.raises(errors.BuildError, match=r"no shards .* in S1RTC or S1GRD: download them"):
        build(tmp_path)
    build(tmp_path, options=options.Options(modalities=("s2",)))
    with pytest.raises(sources.SourceError, match="no folder train or val"):
        build(tmp_path / "train")


def test_samples_that_are_found_twice(tmp_path):
    write_shards(tmp_path, {"a": sample(1), "b": sample(2)})
    write_shards(tmp_path, {"b": sample(2)}, shard="majortom_shard_000002.tar")
    write_shards(tmp_path, {"a": sample(1), "c": sample(3)}, split="val")
    built = build(tmp_path)
    assert built.report.counts["found twice"] == 2
    kept = {
        split: [record["location_id"] for record in built.as_data_source(split)]
        for split in ("train", "val")
    }
    assert kept == {"train": [b"a", b"b"], "val": [b"c"]}


def test_samples_without_a_label_or_names_of_bands(tmp_path):
    arrays = {
        "bands": reflectance(2), "time": days(*DATE), "x": 500_005.0 + 10 * np.arange(SIDE),
        "y": 5_999_995.0 - 10 * np.arange(SIDE), "crs": np.array(32633),
    }  # fmt: skip
    cloudy = store("LULC", np.full((1, 1, SIDE, SIDE), 8, np.uint8), DATE)
    write_shards(tmp_path, {"a": sample(1, LULC=cloudy), "b": sample(2, S2L1C=pack(arrays))})
    built = build(tmp_path)
    assert built.report.counts == {"season unlabelled": 1}
    (record,) = built.as_data_source("train")
    want = sensors.scale_to_uint8(reflectance(2)[0, 3], "B4")
    np.testing.assert_array_equal(record["s2"][..., 3], want)


def test_blocks_that_validation_holds_back(tmp_path):
    # 60 km apart, and beside each other; the last has no label.
    lefts = {"a": 500_000.0, "b": 560_000.0, "c": 500_240.0, "d": 560_240.0}
    samples = {}
    for seed, (key, left) in enumerate(lefts.items()):
        labels = np.zeros((1, 1, SIDE, SIDE), np.uint8) if key == "d" else classes(seed)
        samples[key] = {
            "S2L1C": store("S2L1C", reflectance(seed), DATE, left=left),
            "S1RTC": store("S1RTC", radar(seed), DATE, left=left),
            "LULC": store("LULC", labels, DATE, left=left),
        }
    write_shards(tmp_path, samples)
    build(tmp_path, options=options.Options(block_size=20_000))
    dataset = input_pipeline.open_dataset(str(tmp_path / "data"), "terramesh")
    assert dataset.blocks.tolist() == [0, 1, 0]
    assert dataset.season_counts.tolist() == [1, 1, 1]


def test_swapped_polarisations(tmp_path):
    """Of a sample alone they could be right, of most they cannot."""
    swapped = {
        seed: sample(seed, S1RTC=store("S1RTC", radar(seed)[:, ::-1], DATE)) for seed in (1, 2)
    }
    write_shards(tmp_path, {"a": swapped[1], "b": sample(2), "c": sample(3)})
    built = build(tmp_path)
    values = built.report.measures("VV minus VH, dB")
    # The bands were drawn 7 dB apart; scaling clips them a little.
    np.testing.assert_allclose(values, [-7, 7, 7], atol=0.5)
    write_shards(tmp_path, {"a": swapped[1], "b": swapped[2], "c": sample(3)})
    (tmp_path / "data").rename(tmp_path / "first")
    with pytest.raises(errors.BuildError, match="VH is brighter than VV, by .* are swapped"):
        build(tmp_path)


def test_shards_in_a_bucket(tmp_path):
    with pytest.raises(sources.SourceError, match="shards cannot be read there: give the path"):
        terramesh.Terramesh(source_dir="gs://bucket/terramesh", data_dir=tmp_path)


def test_the_form_without_labels(tmp_path):
    folder = tmp_path / "train/S2L1C"
    folder.mkdir(parents=True)
    (folder / "ssl4eos12_train_seasonal_data_000001.zarr.zip").touch()
    with pytest.raises(errors.BuildError, match="without labels .*: download the other one"):
        build(tmp_path, terramesh.Ssl4eoS12V11)


def test_damaged_shards(tmp_path):
    write_shards(tmp_path, {"a": sample(1)})
    path = tmp_path / "train/LULC/majortom_shard_000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    with pytest.raises(errors.BuildError, match="is no tar file, or cut short"):
        build(tmp_path)
    with tarfile.open(path, "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.zarr.zip"))
    with pytest.raises(errors.BuildError, match=r"holds a\.zarr\.zip twice"):
        zarr_shards.find(tmp_path / "train", ["LULC"], (), ())


def changed(folder, seed=1, **changes):
    return sample(seed, **{folder: store(folder, **changes)})


@pytest.mark.parametrize(
    ("stores", "message"),
    [
        (sample(1, S2L1C=b"PK nothing"), "no Zarr store, or damaged"),
        (
            changed("LULC", pixels=classes(1) + np.uint8(2), dates=DATE),
            "labels 10, 11 are ESRI's own codes",
        ),
        (
            changed("S1RTC", pixels=radar(1), dates=["2019-05-01"]),
            "no Sentinel-1 image is within 60",
        ),
        (
            changed("LULC", pixels=classes(1), dates=DATE, left=501_000.0),
            "is 100 pixels of 10 m off",
        ),
        (
            changed("LULC", pixels=classes(1), dates=DATE, turned=True),
            "not evenly spaced from north",
        ),
        (
            changed("S1RTC", pixels=10 ** (radar(1) / 10), dates=DATE),
            "looks like linear power, dB is needed",
        ),
        (
            changed("S2L1C", pixels=reflectance(1, b10=700), dates=DATE),
            "give --s2_offset=0 or --s2_offset=1000",
        ),
        (changed("S2L1C", pixels=reflectance(1), dates=DATE * 2), "has 2 dates for 1 images"),
        (changed("LULC", pixels=classes(1, 3), dates=DATE * 3), "has 3 dates of 1 bands; one band"),
    ],
)
def test_samples_that_are_refused(tmp_path, stores, message):
    write_shards(tmp_path, {"a": stores})
    with pytest.raises(errors.BuildError, match="bad locations: 1") as error:
        build(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_clouds_that_are_not_there(tmp_path):
    write_shards(tmp_path, {"a": sample(1)})
    with pytest.raises(errors.BuildError, match="has no cloud_mask of its size"):
        build(tmp_path, ignore_clouds=True)


@pytest.mark.parametrize("consolidated", [True, False])
@pytest.mark.parametrize("size", [(1, 3, 5), (2, 2, 2), (2, 7, 9)])
def test_chunks_of_a_store(consolidated, size):
    array = np.arange(2 * 7 * 9, dtype=">i4").reshape(2, 7, 9)
    data = pack({"a": array, "b": 3}, {"a": {"unit": "m"}}, consolidated, {"a": size})
    found = zarr_stores.read(data, ("a", "b", "c"))
    np.testing.assert_array_equal(found.arrays["a"], array)
    assert found.arrays["b"] == 3
    assert set(found.arrays) == {"a", "b"}
    assert found.attributes["a"] == {"unit": "m"}


def test_times_as_xarray_writes_them(tmp_path):
    stores = sample(1)
    arrays = {
        "bands": radar(1), "band": np.array(["vv", "vh"]), "time": np.array([3]),
        "x": 500_005.0 + 10 * np.arange(SIDE), "y": 5_999_995.0 - 10 * np.arange(SIDE),
        "crs": np.array(32633),
    }  # fmt: skip
    stores["S1RTC"] = pack(arrays, {"time": {"units": "days since 2020-05-01 12:00:00"}})
    write_shards(tmp_path, {"a": stores})
    build(tmp_path)
    record = input_pipeline.open_dataset(str(tmp_path / "data"), "terramesh").source[0]
    assert record["s1_timestamp"] == b"2020-05-04T12:00:00"


# Band 10 of the places is near 1005, 59, 1042 and 18.
REAL_OFFSETS = {"282D_485L_3_3": 1000, "38D_378R_2_3": 0, "609U_541L_3_0": 1000, "637U_59R_1_3": 0}


@pytest.mark.parametrize("level", ["L1C", "L2A"])
def test_real_places(shared, tmp_path, level):
    stores, images = real_samples(shared / "real/terramesh")
    write_shards(tmp_path, stores)
    built = build(tmp_path, options=options.Options(s2_level=level))
    dataset = input_pipeline.open_dataset(str(tmp_path / "data"), "terramesh")
    places = [dataset.source[i]["location_id"].decode() for i in range(4)]
    assert places == list(REAL_OFFSETS)
    for i, place in enumerate(places):
        record, pixels = dataset.source[i], images[place]
        # All four have L2A without offset.
        offset = REAL_OFFSETS[place] if level == "L1C" else 0
        raw = {
            "s1": pixels["S1RTC"].astype(np.float32),
            "s2": np.maximum(pixels[f"S2{level}"] - offset, 0),
        }
        for array, values in raw.items():
            own = [band for band in dataset.bands if band.array == array]
            for k, band in enumerate(own):
                statistics = {band.name: (band.mean, band.std)}
                want = sensors.scale_to_uint8(values[k], band.name, statistics)
                np.testing.assert_array_equal(record[array][..., k], want)
        want = np.array([255, 0, 1, 2, 3, 4, 5, 6, 255, 7])[pixels["LULC"][0]]
        np.testing.assert_array_equal(record["labels"][0], want)
    assert built.report.counts.get("offset subtracted", 0) == (2 if level == "L1C" else 0)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"compressor": {"id": "zlib", "level": 1}}, "incorrect header check"),
        ({"chunks": [0, 4]}, "zero"),
        ({"shape": [1 << 20, 1 << 20], "chunks": [1 << 20, 1 << 20]}, "declares"),
        ({"compressor": 5}, ""),
    ],
)
def test_a_damaged_store_is_one_sentence(change, fault):
    data = pack({"bands": np.ones((4, 4), np.uint16)}, consolidated=False)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "bands/.zarray":
                content = json.dumps(json.loads(content) | change)
            new.writestr(name, content)
    with pytest.raises(zarr_stores.ZarrError, match=f"no Zarr store, or damaged: .*{fault}"):
        zarr_stores.read(out.getvalue(), ("bands",))


def test_pixels_without_a_label_are_no_code_of_another_legend(tmp_path):
    """255 is always ignored."""
    changed = classes(0)
    changed[..., :3] = 255
    write_shards(tmp_path, {"a": sample(0, LULC=store("LULC", changed, ["2020-01-01"]))})
    (record,) = build(tmp_path).as_data_source("train")
    # No data and cloud are ignored, too.
    ignored = np.isin(changed[0, 0], (0, 8, 255))
    np.testing.assert_array_equal(record["labels"][0] == 255, ignored)
