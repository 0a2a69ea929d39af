"""Small real runs for tests and benches: a tiny data set, a tiny recipe, digests of the outcome."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Container

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from configs import pretrain
from tests import commands

ROOT = pathlib.Path(__file__).parents[1]
# Few checkpoints, as each takes longer than the steps between them.
SAVING = {"checkpoint_every_epochs": 2, "checkpoints_to_keep": 1}


def command(module: str, **flags) -> list[str]:
    """The command line of a module of ours."""
    return [sys.executable, "-m", module, *(f"--{name}={value}" for name, value in flags.items())]


def make_data(folder: pathlib.Path, dataset: str = "ssl4eo_s12_nol", **sample_flags) -> str:
    """Writes the procedural sample as GeoTIFFs and builds it; returns the data folder."""
    source, target = folder / "geotiffs", folder / "data"
    for module, flags in (
        ("data_prep.sample", dict(output_dir=source, **sample_flags)),
        ("data_prep.build", dict(dataset=dataset, source_dir=source, data_dir=target)),
    ):
        done = commands.run_flags(module, **flags)
        assert done.returncode == 0, done.stderr
    return str(target)


def relabel(data_dir: str, target: pathlib.Path, chosen: Container[int] | None = None) -> str:
    """Copies a data set, as a rebuild with other labels leaves it.

    Args:
      data_dir: where the data set is, of one version and one file.
      target: the data folder to write.
      chosen: indices of the records that get other labels; None for all.
    """
    shutil.copytree(data_dir, target)
    (path,) = target.glob("*/*/*.array_record-*")
    reader = array_record_module.ArrayRecordReader(str(path))
    records, options = reader.read_all(), reader.writer_options_string()
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for index, record in enumerate(records):
        example = tf_example_pb2.Example.FromString(record)
        if chosen is None or index in chosen:
            labels = example.features.feature["labels"].bytes_list.value
            labels[0] = (
                np.random.default_rng(index).integers(0, 9, len(labels[0]), np.uint8).tobytes()
            )
        writer.write(example.SerializeToString(deterministic=True))
    writer.close()
    if chosen is None or chosen:
        change_digest(target, "of other records")
    return str(target)


def change_digest(data_dir: pathlib.Path, digest: str | None) -> None:
    """Replaces the digest of the records in a data set's metadata; None removes it."""
    (path,) = data_dir.glob("*/*/metadata.json")
    content = json.loads(path.read_text())
    known = content.pop("records_digest", None)
    if known and digest:
        content["records_digest"] = dict.fromkeys(known, digest)
    path.write_text(json.dumps(content))


def tiny_flags(data_dir: str) -> dict[str, object]:
    """Overrides of the sample recipe for runs of seconds: ResNet-10, tiles of 48, crops of 32."""
    return {
        "network.depth": 10,
        "data.dir": data_dir,
        "data.crop_size": 32,
        "num_devices": 1,
        "num_epochs": 4,
        "batch_size": 8,
        "eval_every_epochs": 2,
        "checkpoint_every_epochs": 1,
        "log_every_steps": 3,
        "selection.ramp_epochs": 2,
    }


def tiny_config(data_dir: str, variant: str = "sample", **more) -> ml_collections.ConfigDict:
    """The same as a configuration."""
    config = pretrain.get_config(variant)
    config.update_from_flattened_dict({**tiny_flags(data_dir), **more})
    return config


def make_start(folder: pathlib.Path) -> pathlib.Path:
    """Weights away from the kinks of ReLUs, as a folder to start from."""
    code = """
import sys
import jax
from etils import epath
from cromss_jax.training import pretrain_step
from cromss_jax.weights import folders, torch_keys
from cromss_jax.weights.network import Network, Weights
from tests import runs
from tests.training.test_sharding import away_from_kinks
config = runs.tiny_config("unused")
state = away_from_kinks(jax.jit(lambda k: pretrain_step.init_state(config, k))(jax.random.key(0)))
arrays = torch_keys.to_torch_state(state.params) | torch_keys.to_torch_state(state.batch_stats)
found = Weights(Network.of_config(config), arrays)
folders.write_folder(epath.Path(sys.argv[1]), found)
"""
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=ROOT)
    return folder


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Steps of the finished checkpoints."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def final_digest(workdir: pathlib.Path) -> str:
    """SHA-256 of every array of the newest checkpoint, names and shapes included."""
    newest = workdir / "checkpoints" / str(max(saved_steps(workdir)))
    reader, folder = ocp.PyTreeCheckpointHandler(), (newest / "state").absolute()
    # NumPy arrays, as the devices that saved it may not be here.
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).tree
    )
    tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    digest = hashlib.sha256(newest.name.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def logged(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clocked = ("samples_per_second", "wait_for_data")
    return [{k: v for k, v in line.items() if k not in clocked} for line in lines]


# Holds a lock until its standard input is closed, and says so.
_HOLD_LOCK = """
import logging, sys
from cromss_jax import files, lock

logging.basicConfig()
try:
    with lock.held(files.absolute(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except lock.LockedError as error:
    print(error, flush=True)
"""


def hold_lock(path: os.PathLike, **environment: str) -> subprocess.Popen:
    """Starts a process that holds a lock, or says who does."""
    return subprocess.Popen(
        [sys.executable, "-c", _HOLD_LOCK, str(path)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
