"""Data and runs in a `gs://` bucket, of an emulator."""

import pathlib
import subprocess
import sys
import textwrap

import pytest

from tests import runs

pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install -e .[gcs]")
bucket = pytest.importorskip("tests.bucket", reason="gcp-storage-emulator is not installed")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with bucket.emulated("bucket") as environment:
        yield environment


def python(script: str, environment: dict[str, str], *arguments: object) -> str:
    """Runs a script, which finds the bucket, and gives what it printed."""
    line = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(line, cwd=runs.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_records_are_read_from_a_bucket(environment, tmp_path):
    local = pathlib.Path(runs.make_data(tmp_path, locations=2, seasons=2, tile_size=24, seed=0))
    script = """
        import pathlib, sys
        import numpy as np
        from etils import epath
        from cromss_jax.data import input_pipeline

        local, bucket = pathlib.Path(sys.argv[1]), epath.Path("gs://bucket/data")
        for file in filter(pathlib.Path.is_file, local.rglob("*")):
            (bucket / file.relative_to(local)).write_bytes(file.read_bytes())
        there, here = (
            input_pipeline.open_dataset(folder, "ssl4eo_s12_nol") for folder in (bucket, local)
        )
        assert there.identity == here.identity
        for found, expected in zip(there.source, here.source, strict=True):
            for name in expected:
                np.testing.assert_array_equal(found[name], expected[name])
        print(len(there.source))
    """
    assert python(script, environment, local) == "4\n"


@pytest.mark.slow
def test_a_run_in_a_bucket_continues_from_its_last_whole_checkpoint(environment):
    first = """
        import os
        import jax.numpy as jnp
        from cromss_jax.results import report
        from cromss_jax.training import checkpoint

        log = report.MetricLog("gs://bucket/run", 0)
        with checkpoint.Checkpoints("gs://bucket/run/checkpoints", keep=2) as checkpoints:
            for step in (1, 2, 3, 4):
                log.scalars(step, "train", {"loss": 0.5 * step})
                checkpoints.save(step, {"x": jnp.full(3, step)}, {"iterator": step})
    """
    python(first, environment)
    second = """
        import jax, jax.numpy as jnp
        from etils import epath
        from cromss_jax import files
        from cromss_jax.results import report
        from cromss_jax.training import checkpoint

        folder = epath.Path("gs://bucket/run/checkpoints")
        for name in ("commit_success.txt", "_CHECKPOINT_METADATA"):
            (folder / "4" / name).unlink()  # as a kill leaves it
        with checkpoint.Checkpoints(str(folder), keep=2) as checkpoints:
            print(checkpoints.latest_step)
            shape = jax.ShapeDtypeStruct((3,), jnp.int32, sharding=jnp.zeros(3).sharding)
            print(checkpoints.restore({"x": shape}))
            checkpoints.save(4, {"x": jnp.full(3, 40)}, {"iterator": 40})
        with checkpoint.Checkpoints(str(folder), keep=2) as checkpoints:
            print(checkpoints.restore({"x": shape}))
        damaged = folder / "4" / "host" / "metadata"
        damaged.write_text(damaged.read_text().replace("40", "41"))
        with checkpoint.Checkpoints(str(folder), keep=2) as checkpoints:
            print(checkpoints.restore({"x": shape}))
        print(sorted(path.name for path in folder.iterdir()))
        report.MetricLog("gs://bucket/run", 3).close()
        print([line["step"] for line in files.read_metrics("gs://bucket/run/metrics.jsonl")])
    """
    assert python(second, environment).splitlines() == [
        "3",
        "(3, {'x': Array([3, 3, 3], dtype=int32)}, {'iterator': 3})",
        "(4, {'x': Array([40, 40, 40], dtype=int32)}, {'iterator': 40})",
        "(3, {'x': Array([3, 3, 3], dtype=int32)}, {'iterator': 3})",
        "['3', 'damaged_4']",
        "[1, 2, 3]",
    ]
