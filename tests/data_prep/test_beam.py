"""Builds in an Apache Beam pipeline: the same files as without; skipped where Beam is absent."""

import functools
import importlib.util
import pickle
import re
import shutil
import subprocess
import sys

import pytest

from data_prep import errors
from data_prep.datasets import downstream, scenes, ssl4eo_s12_nol, terramesh
from data_prep.options import Options
from data_prep.sample import downstream as sample_downstream
from data_prep.sample import nol
from data_prep.writing import records
from tests import commands, runs
from tests.data_prep import scene_files

BUILDERS = {"nol": ssl4eo_s12_nol.Ssl4eoS12Nol, "dfc2020": downstream.Dfc2020}
OPTIONS = {"nol": {}, "dfc2020": {"patch_size": 20}}
TILE_SIZES = {"nol": 24, "dfc2020": 36}
ONE_WORKER = ("--runner=DirectRunner",)
TWO_WORKERS = (*ONE_WORKER, "--direct_running_mode=multi_processing", "--direct_num_workers=2")

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="apache-beam is not installed: pip install -e .[beam], in an environment of its own",
)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Five locations: with seasons; as tiles, three to train on and two to test on."""
    trees = {name: tmp_path_factory.mktemp(name) for name in BUILDERS}
    nol.write_sample(trees["nol"], 5, seasons=2, tile_size=TILE_SIZES["nol"], num_workers=1)
    sample_downstream.write_sample(
        trees["dfc2020"], "dfc2020", 5, tile_size=TILE_SIZES["dfc2020"], num_workers=1
    )
    return trees


@pytest.fixture
def trees(templates, tmp_path):
    """The same, that a test may damage."""
    return {name: shutil.copytree(tree, tmp_path / name) for name, tree in templates.items()}


@pytest.fixture(autouse=True)
def several_files(monkeypatch):
    """Two locations of "nol" in a file, one of "dfc2020"."""
    monkeypatch.setattr(records, "SHARD_BYTES", 30_000)


def build(name, tree, data_dir, beam_args=None, **options):
    """Builds a data set, in a pipeline if given options of one."""
    write = None
    if beam_args:
        from data_prep.writing import pipeline

        write = functools.partial(pipeline.write, options=pipeline.parse_options(beam_args))
    options = OPTIONS[name] | options
    BUILDERS[name](source_dir=tree, data_dir=data_dir, **options).build(write)


def contents(data_dir):
    """Every file below a folder: records, what describes them, and the report."""
    files = [path for path in data_dir.rglob("*") if path.is_file()]
    return {str(path.relative_to(data_dir)): path.read_bytes() for path in files}


def damage(name, tree):
    """Makes one location bad in the first file of records and one in the last."""
    pattern = {"nol": "dw_noisy_labels/*/*/label.tif", "dfc2020": "dfc_*/*.tif"}[name]
    files = sorted(tree.glob(pattern))
    for file in (files[0], files[-1]):
        file.write_bytes(file.read_bytes()[:-10])


@needs_beam
@pytest.mark.parametrize("beam_args", [ONE_WORKER, TWO_WORKERS])
@pytest.mark.parametrize("name", BUILDERS)
def test_pipeline_changes_no_bit(templates, tmp_path, name, beam_args):
    build(name, templates[name], tmp_path / "plain")
    build(name, templates[name], tmp_path / "beam", beam_args)
    expected = contents(tmp_path / "plain")
    assert sum("array_record" in file for file in expected) >= 3
    assert contents(tmp_path / "beam") == expected


def scenes_of(root):
    """A function from a folder and options to the builder of a small scene."""
    scene_files.write_s2(root)
    scene_files.write_s1(root)
    scene_files.write_labels(root)
    table = scene_files.write_table(root)
    cutting, options = scene_files.cutting(test_fraction=0.2), scene_files.OPTIONS
    return functools.partial(scenes.Scenes, table=table, cutting=cutting, options=options)


def shards_of(root):
    """The same of five samples in shards of Zarr stores."""
    # Skipped where numcodecs is not installed.
    from tests.data_prep import test_zarr

    samples = {key: test_zarr.sample(seed, 1000 * (seed % 2)) for seed, key in enumerate("abcde")}
    test_zarr.write_shards(root, samples)
    test_zarr.write_shards(root, {"f": test_zarr.sample(7)}, split="val")
    options = Options(block_size=20_000)
    return functools.partial(terramesh.Terramesh, source_dir=root, options=options)


@pytest.mark.parametrize("make", [scenes_of, shards_of])
def test_workers_change_no_bit(tmp_path, make):
    builder = make(tmp_path)
    for number in (1, 2):
        builder(data_dir=tmp_path / f"{number}", num_workers=number).build()
    expected = contents(tmp_path / "1")
    assert sum("array_record" in file for file in expected) >= 3
    assert contents(tmp_path / "2") == expected


@needs_beam
@pytest.mark.parametrize("beam_args", [ONE_WORKER, TWO_WORKERS])
@pytest.mark.parametrize("make", [scenes_of, shards_of])
def test_pipeline_changes_no_bit_of_scenes_and_shards(tmp_path, make, beam_args):
    from data_prep.writing import pipeline

    builder = make(tmp_path)
    builder(data_dir=tmp_path / "plain").build()
    write = functools.partial(pipeline.write, options=pipeline.parse_options(beam_args))
    builder(data_dir=tmp_path / "beam").build(write)
    assert contents(tmp_path / "beam") == contents(tmp_path / "plain")


@needs_beam
@pytest.mark.parametrize("beam_args", [ONE_WORKER, TWO_WORKERS])
@pytest.mark.parametrize("name", BUILDERS)
def test_bad_locations(trees, tmp_path, name, beam_args):
    damage(name, trees[name])
    build(name, trees[name], tmp_path / "plain", max_bad_locations=2)
    build(name, trees[name], tmp_path / "beam", beam_args, max_bad_locations=2)
    expected = contents(tmp_path / "plain")
    report = f"{BUILDERS[name].name}.bad_locations.csv"
    assert expected[report].count(b"cut short") == 2
    assert contents(tmp_path / "beam") == expected


@needs_beam
@pytest.mark.parametrize("beam_args", [ONE_WORKER, TWO_WORKERS])
@pytest.mark.parametrize("name", BUILDERS)
def test_too_many_bad_locations_leave_nothing_but_the_report(trees, tmp_path, name, beam_args):
    damage(name, trees[name])
    messages = []
    for data_dir, args in ((tmp_path / "plain", None), (tmp_path / "beam", beam_args)):
        with pytest.raises(errors.BuildError, match="bad locations: 2, .*=1 allowed") as error:
            build(name, trees[name], data_dir, args, max_bad_locations=1)
        messages.append(str(error.value).replace(str(data_dir), "DIR"))
    assert messages[0] == messages[1]
    assert contents(tmp_path / "beam") == contents(tmp_path / "plain")
    name = BUILDERS[name].name
    assert sorted(path.name for path in (tmp_path / "beam").rglob("*")) == [
        f"{name}.bad_locations.csv",
        f"{name}.report.json",
        f"{name}.report.md",
    ]


@needs_beam
def test_file_with_too_many_bad_locations_stops_the_others(trees, tmp_path, monkeypatch):
    begun = []
    write_shard = records.write_shard

    def count(path, *arguments):
        begun.append(path)
        return write_shard(path, *arguments)

    monkeypatch.setattr(records, "write_shard", count)
    # One in each file at least, whichever comes first.
    for number in range(1, 5):
        next((trees["nol"] / "s2c" / f"{number:07d}").rglob("B2.tif")).unlink()
    with pytest.raises(errors.BuildError, match="bad locations: 1, .*=0 allowed"):
        build("nol", trees["nol"], tmp_path / "data", ONE_WORKER)
    assert len(begun) == 1


@needs_beam
def test_failed_pipeline_gives_one_line(templates, tmp_path, monkeypatch):
    def fail(*_):
        raise errors.BuildError("cannot write the records: No space left on device")
        yield

    monkeypatch.setattr(records, "write_shard", fail)
    with pytest.raises(errors.BuildError) as error:
        build("nol", templates["nol"], tmp_path, ONE_WORKER)
    assert str(error.value).startswith("the Beam pipeline failed, nothing was written: ")
    assert "No space left on device" in str(error.value)
    assert str(error.value).count("\n") == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "ssl4eo_s12_nol.bad_locations.csv",
        "ssl4eo_s12_nol.report.json",
        "ssl4eo_s12_nol.report.md",
    ]


@needs_beam
def test_pipeline_that_does_not_wait_is_an_error(templates, tmp_path, monkeypatch):
    from data_prep.writing import pipeline

    monkeypatch.setattr(pipeline, "_write_shard", lambda number, work_dir: None)
    with pytest.raises(errors.BuildError, match="without writing .*00000-of-00003"):
        build("nol", templates["nol"], tmp_path, ONE_WORKER)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "ssl4eo_s12_nol.bad_locations.csv",
        "ssl4eo_s12_nol.report.json",
        "ssl4eo_s12_nol.report.md",
    ]


def run(*arguments):
    return commands.run("data_prep.build", "--dataset=ssl4eo_s12_nol", *arguments)


@needs_beam
def test_command(templates, tmp_path):
    flags = (f"--source_dir={templates['nol']}", f"--data_dir={tmp_path / 'beam'}", "--beam")
    result = run(*flags, "--", *TWO_WORKERS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("5 locations written, 0 skipped, 10 records, ")
    run(flags[0], f"--data_dir={tmp_path / 'plain'}", "--num_workers=1")
    assert contents(tmp_path / "beam") == contents(tmp_path / "plain")
    unknown = run(flags[0], f"--data_dir={tmp_path / 'unknown'}", "--beam", "--", "--runer=x")
    assert "--runer" in unknown.stderr


def test_wrong_flags(templates, tmp_path):
    flags = (f"--source_dir={templates['nol']}", f"--data_dir={tmp_path / 'data'}")
    both = run(*flags, "--beam", "--num_workers=2")
    assert both.returncode == 1
    assert both.stderr.startswith("Error: --num_workers is for builds without --beam: ")
    without = run(*flags, "--", "--runner=DirectRunner")
    assert without.returncode == 1
    assert "unexpected arguments: --runner=DirectRunner" in without.stdout + without.stderr
    assert not (tmp_path / "data").exists()


def test_beam_is_not_installed(templates, tmp_path):
    # A module of that name that cannot be imported hides an installed one.
    (tmp_path / "apache_beam.py").write_text("raise ModuleNotFoundError('apache_beam')")
    command = [sys.executable, "-m", "data_prep.build", "--dataset=ssl4eo_s12_nol", "--beam"]
    command += [f"--source_dir={templates['nol']}", f"--data_dir={tmp_path / 'data'}"]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{runs.ROOT}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr == (
        "Error: --beam needs Apache Beam, which is not installed: pip install -e .[beam], in an "
        "environment of its own\n"
    )
    assert not (tmp_path / "data").exists()


def test_files_can_be_written_in_any_order_by_other_means(templates, tmp_path):
    """What a pipeline does, without one: each file for itself, from a pickled plan."""

    def write_backwards(plan):
        plan = pickle.loads(pickle.dumps(plan))
        outcomes = {}
        for shard in reversed(plan.shards):
            results = [records.attempt(plan.read, location) for location in shard.locations]
            outcomes[shard.path] = list(records.write_shard(shard.path, results, plan.features))
        for shard in plan.shards:
            for location, outcome in zip(shard.locations, outcomes[shard.path], strict=True):
                yield shard, location, outcome

    for name, tree in templates.items():
        build(name, tree, tmp_path / "plain")
        BUILDERS[name](source_dir=tree, data_dir=tmp_path / "backwards", **OPTIONS[name]).build(
            write_backwards
        )
    assert contents(tmp_path / "backwards") == contents(tmp_path / "plain")


@needs_beam
def test_commands_of_the_readme():
    """Beam knows all their options."""
    from apache_beam.options import pipeline_options

    text = (runs.ROOT / "data_prep/README.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^python -m data_prep.build .* -- (.*)$", text, re.MULTILINE)
    runners = []
    for line in lines:
        options = pipeline_options.PipelineOptions(line.split())
        known = options.get_all_options()
        assert set(options.get_all_options(retain_unknown_options=True)) == set(known), line
        name = known["runner"]
        runners.append(name)
        assert name in pipeline_options.StandardOptions.KNOWN_RUNNER_NAMES
    assert runners == ["DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner"]
