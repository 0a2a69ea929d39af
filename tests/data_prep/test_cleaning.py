"""Labels replaced or ignored by an audit: by hand, and by the command on built data sets."""

import json
import subprocess
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cromss_jax.auditing import maps
from cromss_jax.data import input_pipeline
from data_prep import build, errors, options
from data_prep.sample import nol
from data_prep.writing import cleaning, records
from tests import runs
from tests.auditing.test_suspects import write_tile

NAME = "0000001"
LABELS = np.uint8([[0, 1, 2, 255], [3, 4, 5, 6]])
WRONG = np.array([[0.95, 0.9, 0.89, 0.95], [0.1, 0.95, 0.0, 1.0]])
SUGGESTED = np.uint8([[7, 7, 7, 7], [7, 4, 7, 8]])


def example(season: int) -> dict:
    return {"location_id": NAME, "season": season, "labels": np.stack([LABELS] * 2)}


def read(location):
    return records.Reading([example(0), example(1)], (), (("days", 1.0),))


@pytest.fixture
def audit(tmp_path):
    """Of two dates; at the second one nothing is wrong."""
    for season, wrong in enumerate((WRONG, 0.0)):
        tile = write_tile(tmp_path, NAME, 0, 0, LABELS, wrong, SUGGESTED)
        tile.folder.rename(tmp_path / f"season {season}")
    folder = tmp_path / maps.FOLDER / NAME
    for season in range(2):
        (tmp_path / f"season {season}").rename(folder / f"season_{season}")
    return tmp_path


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("replace", [[7, 7, 2, 255], [3, 4, 5, 8]]),
        ("ignore", [[255, 255, 2, 255], [3, 4, 5, 255]]),
    ],
)
def test_by_hand(audit, how, expected):
    choice = options.Cleaning(str(audit), 0.9, how)
    found = cleaning.cleaned(read, choice)(None)
    for record in found.examples:
        np.testing.assert_array_equal(record["labels"], [expected, LABELS])
    # Three of the seven labels of the first date, none of the second.
    name = f"percent of labels {how}d"
    assert found.measures == (("days", 1.0), (name, pytest.approx(300 / 7)), (name, 0.0))
    assert cleaning.cleaned(read, None) is read


def test_other_labels_than_those_audited_are_refused(audit):
    def read_other(location):
        labels = np.stack([LABELS] * 2)
        labels[1, 0, :2] = 8
        return records.Reading([{**example(0), "labels": labels}, {**example(1), "labels": labels}])

    choice = options.Cleaning(str(audit))
    with pytest.raises(errors.BadFileError) as error:
        cleaning.cleaned(read_other, choice)(None)
    assert error.value.file.endswith("0000001/season_1/given.tif")
    assert error.value.reason.startswith("2 of 8 labels differ from those that were audited")
    small = {**example(0), "labels": np.zeros((2, 3, 3), np.uint8)}
    with pytest.raises(errors.BadFileError, match="2 x 4 pixels, the labels 3 x 3"):
        cleaning.cleaned(lambda _: records.Reading([small]), choice)(None)
    (audit / "maps" / NAME / "season_1" / "suggested.tif").unlink()
    with pytest.raises(errors.BadFileError, match="cannot be read"):
        cleaning.cleaned(read, choice)(None)


def test_a_location_that_was_not_audited_is_kept_and_reported(audit):
    def read_other(location):
        return records.Reading([{**example(0), "location_id": "0000002"}])

    found = cleaning.cleaned(read_other, options.Cleaning(str(audit)))(None)
    np.testing.assert_array_equal(found.examples[0]["labels"], [LABELS] * 2)
    assert [f.kind for f in found.findings] == ["not audited"]


def run(*arguments):
    line = runs.command("data_prep.build", dataset="ssl4eo_s12_nol", num_workers=1)
    return subprocess.run([*line, *arguments], cwd=runs.ROOT, capture_output=True, text=True)


def test_command(tmp_path):
    nol.write_sample(tmp_path / "source", 2, seasons=2, tile_size=24, num_workers=1)
    source = f"--source_dir={tmp_path / 'source'}"
    assert run(source, f"--data_dir={tmp_path / 'plain'}").returncode == 0
    plain = input_pipeline.open_dataset(str(tmp_path / "plain"), "ssl4eo_s12_nol")
    audit = tmp_path / "audit"
    for index in range(4):
        record = plain.source[index]
        season = int(record["season"])
        tile = maps.tile_of(audit, record, season)
        layers = maps.layers_of(
            record["labels"][season],
            np.full((24, 24), 0.95 * (index == 1)),
            np.full((24, 24), 3, np.uint8),
            np.ones((24, 24), np.uint8),
        )
        maps.write(tile, layers, plain.legend)
    flags = (source, f"--data_dir={tmp_path / 'cleaned'}", f"--replace_labels={audit}")
    unfinished = run(*flags)
    assert unfinished.returncode == 1
    assert "report.json is missing; give the --output of a finished" in unfinished.stderr
    (audit / "report.json").write_text("{}")
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    found = input_pipeline.open_dataset(str(tmp_path / "cleaned"), "ssl4eo_s12_nol")
    for index in range(4):
        before, after = (d.source[index]["labels"].copy() for d in (plain, found))
        if index < 2:  # both dates of the first location hold the labels of both
            before[1] = np.where(before[1] == 255, 255, 3)
        np.testing.assert_array_equal(after, before)
        np.testing.assert_array_equal(found.source[index]["truth"], plain.source[index]["truth"])
    info = tfds.builder_from_directory(next((tmp_path / "cleaned").glob("*/*"))).info
    assert info.metadata["cleaning"] == {"audit": str(audit), "above": 0.9, "how": "replace"}
    report = json.loads((tmp_path / "cleaned" / "ssl4eo_s12_nol.report.json").read_text())
    assert "percent of labels replaced" in json.dumps(report)
    # What is there already was built with these labels, or is refused.
    kept, own = options.Options(), options.Options(cleaning=options.Cleaning(str(audit)))
    folders = {name: next((tmp_path / name).glob("*/*")) for name in ("plain", "cleaned")}
    assert "nothing was done" in build._existing(folders["cleaned"], own, {})
    with pytest.raises(errors.BuildError, match="built with other labels, --replace_labels=.*=0.9"):
        build._existing(folders["cleaned"], kept, {})
    less = options.Options(cleaning=options.Cleaning(str(audit), 0.8))
    with pytest.raises(errors.BuildError, match="built with other labels, --replace_labels=.*=0.9"):
        build._existing(folders["cleaned"], less, {})
    with pytest.raises(errors.BuildError, match="built with other labels, those of its sources: "):
        build._existing(folders["plain"], own, {})


def test_flags_that_contradict_each_other(audit, monkeypatch):
    def given(replace=None, ignore=None, above=None):
        for name, value in (("REPLACE_LABELS", replace), ("IGNORE_LABELS", ignore)):
            monkeypatch.setattr(build, f"_{name}", types.SimpleNamespace(value=value))
        above = types.SimpleNamespace(value=above or 0.9, present=above is not None)
        monkeypatch.setattr(build, "_ABOVE", above)
        return build._cleaning()

    (audit / "report.json").write_text("{}")
    assert given() is None
    assert given(ignore=str(audit), above=0.7) == options.Cleaning(str(audit), 0.7, "ignore")
    with pytest.raises(errors.BuildError, match="choose one of them"):
        given(str(audit), str(audit))
    with pytest.raises(errors.BuildError, match="--above=0.8 is for --replace_labels or"):
        given(above=0.8)
