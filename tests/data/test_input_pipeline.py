"""Which record comes when: every location once an epoch, the same for any number of processes."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest

from cromss_jax import files, presets, sensors
from cromss_jax.data import input_pipeline
from tests import runs

COUNTS = np.array([4, 1, 3, 4, 2, 4, 4, 4, 1, 2])


@pytest.fixture
def dataset():
    records = [
        {
            "s1": np.full((6, 6, 2), index, np.uint8),
            "s2_10m": np.full((6, 6, 4), index, np.uint8),
            "s2_20m": np.full((3, 3, 6), index, np.uint8),
            "s2_60m": np.full((1, 1, 3), index, np.uint8),
            "labels": np.full((4, 6, 6), location % 9, np.uint8),
            "season": np.int32(season),
            "location_id": b"%07d" % location,
        }
        for index, (location, season) in enumerate(
            (location, season) for location, n in enumerate(COUNTS) for season in range(n)
        )
    ]
    return input_pipeline.TileDataset(
        records,
        tuple(records[0]),
        6,
        COUNTS,
        has_truth=False,
        legend=presets.DYNAMIC_WORLD,
        bands=sensors.preset_bands(is_native=True),
    )


def test_small_tiles_are_padded(dataset):
    """Images by their edge, labels by 255, at native sizes and to whole pixels of 60 m."""
    rng = np.random.default_rng(0)
    for record in dataset.source:
        for name, value in record.items():
            if getattr(value, "ndim", 0):
                record[name] = rng.integers(0, 9, value.shape, np.uint8)
    padded = dataset.padded_to(10)
    assert (dataset.padded_to(6).tile_size, padded.tile_size) == (6, 12)
    plain = input_pipeline.read_batch(dataset, ("s1", "s2"), np.arange(3))
    batch = input_pipeline.read_batch(padded, ("s1", "s2"), np.arange(3))
    assert batch["labels"].shape == (3, 4, 12, 12)
    np.testing.assert_array_equal(batch["labels"][..., :6, :6], plain["labels"])
    assert (batch["labels"][..., 6:, :] == 255).all()
    assert (batch["labels"][..., 6:] == 255).all()
    for name, side in (("s1", 6), ("s2_10m", 6), ("s2_20m", 3), ("s2_60m", 1)):
        assert batch[name].shape[1:3] == (2 * side, 2 * side)
        rows = np.minimum(np.arange(2 * side), side - 1)
        np.testing.assert_array_equal(batch[name], plain[name][:, rows][:, :, rows])


def test_an_epoch_visits_each_location_once_with_a_drawn_season(dataset):
    locations = np.array([0, 1, 2, 4, 5, 7, 9])
    batches = input_pipeline.training_records(dataset, locations, 4, seed=1)
    visits = np.concatenate([batches[i] for i in range(70)])  # 40 epochs of 7
    epochs = dataset.location_of(visits).reshape(40, 7)
    assert (np.sort(epochs) == locations).all()
    assert len({tuple(e) for e in epochs}) > 30  # each epoch has its own order
    seasons = visits - dataset.starts[dataset.location_of(visits)]
    for location in locations:
        drawn = seasons[dataset.location_of(visits) == location]
        assert set(drawn) == set(range(COUNTS[location]))


def test_the_order_is_pinned_by_the_seed(dataset):
    # The literal order: a library that changes it would make old runs irreproducible.
    batches = input_pipeline.training_records(dataset, np.arange(10), 5, seed=3)
    found = [batches[i].tolist() for i in range(3)]
    assert found == [[12, 18, 28, 23, 17], [10, 4, 26, 7, 2], [26, 4, 11, 25, 27]]
    other = input_pipeline.training_records(dataset, np.arange(10), 5, seed=4)
    assert [other[i].tolist() for i in range(3)] != found


def test_processes_share_the_rows_of_the_same_batches(dataset):
    records = input_pipeline.training_records(dataset, np.arange(10), 6, seed=0)
    whole = input_pipeline.training_batches(dataset, ("s1", "s2"), records)
    parts = [
        input_pipeline.training_batches(dataset, ("s1", "s2"), records, rows=np.array(rows))
        for rows in ([0, 5], [1, 2], [3, 4])
    ]
    for _ in range(7):
        batch, rows = next(whole), [next(part) for part in parts]
        for name in batch:
            shares = np.concatenate([r[name] for r in rows])
            np.testing.assert_array_equal(batch[name][[0, 5, 1, 2, 3, 4]], shares)
    # The state is the same number for all, so that a run may go on with other processes.
    states = [iterator.get_state() for iterator in (whole, *parts)]
    assert all(state == states[0] for state in states)


def test_iterator_state_continues_exactly(dataset):
    records = input_pipeline.training_records(dataset, np.arange(10), 4, seed=0)
    iterator = input_pipeline.training_batches(dataset, ("s1",), records)
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator)["s1"][:, 0, 0, 0] for _ in range(6)]
    resumed = input_pipeline.training_batches(dataset, ("s1",), records)
    resumed.set_state(state)
    found = [next(resumed)["s1"][:, 0, 0, 0] for _ in range(6)]
    np.testing.assert_array_equal(found, expected)


def test_validation_covers_every_season_and_pads_with_ignored_labels(dataset):
    batches = input_pipeline.validation_records(dataset, np.array([2, 5, 8]), 6)
    np.testing.assert_array_equal(batches, [[5, 6, 7, 14, 15, 16], [17, 26, -1, -1, -1, -1]])
    batch = input_pipeline.read_batch(dataset, ("s2",), batches[1])
    assert set(batch) == {"s2_10m", "s2_20m", "s2_60m", "labels", "season", "is_real"}
    np.testing.assert_array_equal(batch["is_real"], [1, 1, 0, 0, 0, 0])
    assert (batch["labels"][2:] == 255).all()
    assert (batch["labels"][:2] != 255).all()
    assert (dataset.source[17]["labels"] != 255).all()  # the record itself is untouched


def test_a_row_of_padding_repeats_the_first_record_and_ignores_labels_and_truth(dataset):
    for record in dataset.source:
        record["truth"] = record["labels"][0]
    with_truth = dataclasses.replace(dataset, has_truth=True)
    batch = input_pipeline.read_batch(with_truth, ("s1", "s2"), np.array([7, 12, -1]))
    np.testing.assert_array_equal(batch["s1"][:, 0, 0, 0], [7, 12, 7])
    np.testing.assert_array_equal(batch["s2_60m"][:, 0, 0, 0], [7, 12, 7])
    for name in ("labels", "truth"):
        assert (batch[name][2] == sensors.IGNORE_LABEL).all()
        assert (batch[name][:2] != sensors.IGNORE_LABEL).all()


def test_the_identity_has_tile_size_seasons_and_records(dataset):
    class Source(list):
        built_digest = "of the records"

    whole = dataclasses.replace(dataset, source=Source(dataset.source))
    counts = hashlib.sha256(np.asarray(COUNTS, "<i8").tobytes()).hexdigest()
    assert whole.identity == {
        "tile_size": 6,
        "season_counts": counts,
        "records": {"built": "of the records"},
    }
    assert whole.padded_to(7).identity["tile_size"] == 12


def test_missing_data_says_what_and_how(tmp_path):
    with pytest.raises(input_pipeline.DataError) as error:
        input_pipeline.open_dataset(str(tmp_path), "ssl4eo_s12_nol")
    parts = ("python -m data_prep.build", "python -m data_prep.sample")
    for part in (str(tmp_path / "ssl4eo_s12_nol"), *parts):
        assert part in str(error.value)
    other = tmp_path / "scenes/1.0.0"
    other.mkdir(parents=True)
    (other / "dataset_info.json").touch()
    with pytest.raises(input_pipeline.DataError, match="Choose scenes by --config.data.name"):
        input_pipeline.open_dataset(str(tmp_path), "ssl4eo_s12_nol")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A data set of 40 records."""
    folder = tmp_path_factory.mktemp("built")
    return runs.make_data(folder, locations=20, seasons=2, tile_size=24, seed=0)


@pytest.fixture(scope="module")
def data_dir(built, tmp_path_factory):
    """The same without a digest, as earlier versions wrote it; 16 of its records are sampled."""
    folder = shutil.copytree(built, tmp_path_factory.mktemp("earlier") / "data")
    runs.change_digest(folder, None)
    return str(folder)


def test_the_newest_version_is_opened(built, tmp_path):
    """By number, not by text; what a killed build leaves is none."""
    folder = shutil.copytree(built, tmp_path / "data") / "ssl4eo_s12_nol"
    (version,) = folder.iterdir()
    for number in ("1.9.0", "1.10.0", "incomplete.ABC_1.11.0"):
        shutil.copytree(version, folder / number)
    (path,) = (folder / "1.10.0").glob("metadata.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "records_digest": {"train": "x"}}))
    assert open_built(tmp_path / "data").source.built_digest == "x"


def open_built(data_dir) -> input_pipeline.TileDataset:
    return input_pipeline.open_dataset(str(data_dir), "ssl4eo_s12_nol")


def test_a_copy_of_a_data_set_is_the_same_wherever_it_lies(data_dir, tmp_path):
    original = open_built(data_dir)
    assert original.identity["records"].keys() == {"sample"}
    for name in ("br[1]", "a*?{b}#%41 ü\nc"):
        copy = open_built(shutil.copytree(data_dir, tmp_path / name))
        assert copy.identity == original.identity
        assert copy.has_records_of(original.by_record.identity["records"])
        np.testing.assert_array_equal(copy.source[39]["labels"], original.source[39]["labels"])


# Of 40 records, the first and last are sampled, the second is not.
@pytest.mark.parametrize("chosen", [None, (0,), (1,), (39,)])
def test_records_with_other_labels_are_others(data_dir, tmp_path, chosen):
    original = open_built(data_dir)
    rebuilt = open_built(runs.relabel(data_dir, tmp_path / "data", chosen))
    changed = [
        index
        for index, (a, b) in enumerate(zip(original.source, rebuilt.source, strict=True))
        if (a["labels"] != b["labels"]).any()
    ]
    assert changed == list(range(40) if chosen is None else chosen)
    assert rebuilt.has_records_of(original.identity["records"]) is False
    same = {name: rebuilt.identity[name] for name in ("tile_size", "season_counts")}
    assert original.identity == {**same, "records": original.identity["records"]}
    assert open_built(runs.relabel(data_dir, tmp_path / "again", ())).identity == original.identity


def test_the_sampled_digest_is_of_the_ends_of_the_files(tmp_path):
    """The last 128 KiB, the size, and the sampled records."""
    path = files.absolute(tmp_path / "shard")

    def digest(content: bytes, records: tuple[bytes, ...] = (b"a", b"b")) -> str:
        path.write_bytes(content)
        return input_pipeline._Records(records, {}, [path], [2], None, 0).sample_digest

    content = bytes(200_000)
    change = lambda position: content[:position] + b"x" + content[position + 1 :]
    assert digest(content) == digest(content)
    for position in (199_999, 200_000 - (128 << 10)):
        assert digest(change(position)) != digest(content)
    assert digest(change(200_000 - (128 << 10) - 1)) == digest(content)
    assert digest(content, (b"a", b"c")) != digest(content)
    assert digest(b"\0" + content) != digest(content)
    assert digest(b"short") != digest(b"other")


def test_a_digest_in_the_metadata_stands_for_the_records(data_dir, built, tmp_path):
    original = open_built(data_dir)
    folder = shutil.copytree(built, tmp_path / "data")
    assert open_built(built).has_records_of(open_built(folder).identity["records"]) is True

    def with_digest(digest: str) -> input_pipeline.TileDataset:
        runs.change_digest(folder, digest)
        return open_built(folder)

    first = with_digest("a").identity["records"]
    assert first == {"built": "a"}
    assert with_digest("a").has_records_of(first) is True
    assert with_digest("b").has_records_of(first) is False
    # A run that began before the metadata had it, and one that ran on another build.
    assert with_digest("b").has_records_of(original.identity["records"]) is True
    assert original.has_records_of(first) is False
    assert original.has_records_of(None) is None


def test_a_batch_of_padding_alone_is_ignored(dataset):
    """What one of several processes may get of the last batch."""
    batch = input_pipeline.read_batch(dataset, ("s1",), np.full(2, -1))
    assert not batch["is_real"].any()
    assert (batch["labels"] == sensors.IGNORE_LABEL).all()
    assert (batch["s1"] == dataset.source[0]["s1"]).all()  # of the first record


@pytest.fixture
def copied(built, tmp_path) -> tuple[str, pathlib.Path]:
    """A copy of a data set, and its file of records."""
    shutil.copytree(built, tmp_path / "copied")
    (path,) = (tmp_path / "copied").glob("*/*/*.array_record-*")
    return str(tmp_path / "copied"), path


def test_a_damaged_record_is_named_and_gone_on_without(copied, caplog):
    whole, shard = copied
    expected = input_pipeline.open_dataset(whole, "ssl4eo_s12_nol")
    rows = np.arange(4)
    good = input_pipeline.read_batch(expected, ("s1", "s2"), rows)
    content = shard.read_bytes()
    for position in range(0, len(content), 500):  # until it lies in the second record
        shard.write_bytes(content[:position] + b"?" + content[position + 1 :])
        dataset = input_pipeline.open_dataset(whole, "ssl4eo_s12_nol", max_bad_records=1)
        found = input_pipeline.read_batch(dataset, ("s1", "s2"), rows)
        if not found["is_real"][1]:
            break
    assert found["is_real"].tolist() == [True, False, True, True], position
    assert f"skipped, 1 of 1 that may be: record 1 of {shard} cannot be read" in caplog.text
    for name, value in good.items():
        np.testing.assert_array_equal(found[name][[0, 2, 3]], value[[0, 2, 3]], err_msg=name)
    # In its place stands the next one, unlabelled.
    np.testing.assert_array_equal(found["s1"][1], good["s1"][2])
    assert (found["labels"][1] == sensors.IGNORE_LABEL).all()
    # Alone and again the same, and not counted twice.
    alone = input_pipeline.read_batch(dataset, ("s1", "s2"), np.array([1]))
    np.testing.assert_array_equal(alone["s1"][0], found["s1"][1])
    strict = input_pipeline.open_dataset(whole, "ssl4eo_s12_nol")
    with pytest.raises(input_pipeline.BadRecordError, match=f"record 1 of {shard} cannot be read"):
        input_pipeline.read_batch(strict, ("s1", "s2"), rows)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-40000]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (pathlib.Path.unlink, "No such file"),
    ],
)
def test_a_truncated_or_missing_shard_is_named(damage, reason, copied):
    data_dir, shard = copied
    damage(shard)
    dataset = input_pipeline.open_dataset(data_dir, "ssl4eo_s12_nol", max_bad_records=3)
    order = input_pipeline.training_records(dataset, np.arange(2), 2, seed=0)
    # Through the threads that read ahead, too.
    with pytest.raises(input_pipeline.BadRecordError, match=reason) as raised:
        next(input_pipeline.training_batches(dataset, ("s1",), order))
    assert str(shard) in str(raised.value)


def changed(path: pathlib.Path, **more) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("dataset_info.json", lambda path: path.write_text("{"), "ParseError"),
        ("features.json", lambda path: path.write_text(""), "JSONDecodeError"),
        ("features.json", pathlib.Path.unlink, "ValueError"),
        ("metadata.json", lambda path: path.write_text("{"), "JSONDecodeError"),
        ("metadata.json", lambda path: path.write_text("[]"), "season_counts"),
        ("metadata.json", pathlib.Path.unlink, "KeyError"),
        ("metadata.json", lambda path: changed(path, tile_size=None), "TypeError"),
        (
            "metadata.json",
            lambda path: changed(path, season_counts={"train": [2] * 21}),
            "season_counts are 42 records of train, not 40",
        ),
        (
            "metadata.json",
            lambda path: changed(path, blocks={"train": [0]}),
            "blocks are of 1 locations, not 20",
        ),
    ],
)
def test_a_damaged_description_is_told_in_a_sentence(name, damage, reason, copied):
    data_dir, shard = copied
    damage(shard.with_name(name))
    with pytest.raises(input_pipeline.DataError, match="is damaged, or data_prep did not") as error:
        open_built(data_dir)
    assert reason in str(error.value)


def test_a_damaged_record_may_be_among_those_sampled_for_the_digest(copied):
    data_dir, shard = copied
    runs.change_digest(pathlib.Path(data_dir), None)
    content = shard.read_bytes()
    for position in range(0, len(content), 500):  # until it lies in the first record
        shard.write_bytes(content[:position] + b"?" + content[position + 1 :])
        dataset = input_pipeline.open_dataset(data_dir, "ssl4eo_s12_nol", max_bad_records=1)
        if not dataset.read(0)[1]:
            break
    with pytest.raises(input_pipeline.BadRecordError, match=f"record 0 of {shard} cannot be read"):
        _ = open_built(data_dir).identity
    some = input_pipeline.open_dataset(data_dir, "ssl4eo_s12_nol", max_bad_records=40)
    assert "sample" in some.identity["records"]


def test_a_record_that_cannot_be_read_is_counted_in_its_own_file():
    class Broken:
        def __len__(self):
            return 9

        def __getitem__(self, index):
            raise OSError("damaged")

    records = input_pipeline._Records(Broken(), {}, ["a", "b", "c"], [2, 3, 4], None, 0)
    for index, place in ((1, "record 1 of a"), (2, "record 0 of b"), (8, "record 3 of c")):
        with pytest.raises(input_pipeline.BadRecordError, match=place):
            records[index]
