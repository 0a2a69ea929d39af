"""Injects faults and says what happened: `python -m tests.bench.faults [--only=PARTS] [--share=1]`.

bits: one flipped bit in the newest checkpoint of a run, in a file drawn from all of them. It must
be noticed, its file named, and the checkpoint before be restored with the bits that it was saved
with.
kills: SIGKILL at random moments of pretraining and of fine-tuning, again and again until the run is
complete. It must end with the bits of a run that was left alone.
truncations: a GeoTIFF, or an archive of the whole tree, cut at a random place, then built. The file
must be named in one sentence, and no data set be left.
disks: seven kinds of output on a full disk. It must be said in a sentence, nothing half-written be
left under its name, and the last checkpoint load.
writers: two processes that lock a folder at once. One must have it.

The full form takes less than half an hour on two idle cores; --share=0.1 injects a tenth.
"""

import collections
import json
import os
import pathlib
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from cromss_jax import command_line, files, sensors
from cromss_jax.results import maps, pictures, report
from cromss_jax.training import checkpoint, pretrain_step
from cromss_jax.weights import cards, folders, manifest, torch_keys
from cromss_jax.weights import files as weight_files
from cromss_jax.weights.network import Network, Weights, WeightsError
from data_prep import errors, options
from data_prep.datasets.ssl4eo_s12_nol import Ssl4eoS12Nol
from tests import disks, runs

_SEED = flags.DEFINE_integer("seed", 0, "Of the places and the moments")
_SHARE = flags.DEFINE_float("share", 1.0, "Of the faults of the full form", 0.0, 1.0)

# What stands in the table of a fault of which nothing else is known.
GOOD = "as it must be"


def count(full: int) -> int:
    """How many faults of a kind are injected."""
    return max(round(full * _SHARE.value), 1)


# ---------------------------------------------------------------- bits


def link_tree(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a folder without copying what is in its files."""
    shutil.copytree(source, target, copy_function=os.link)


def flip_bit(path: pathlib.Path, rng: random.Random) -> None:
    """Replaces a file by one of which one bit differs."""
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.unlink()  # other links keep the old content
    path.write_bytes(content)


def bits(folder: pathlib.Path, rng: random.Random, trials: int) -> Iterator[str]:
    """Yields what happened at each flipped bit of a checkpoint."""
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    data_dir = runs.make_data(folder, locations=16, seasons=2, tile_size=48)
    config = runs.tiny_config(data_dir)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.jit(lambda key: pretrain_step.init_state(config, key))(jax.random.key(0))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state
    )
    with checkpoint.Checkpoints(folder / "whole", keep=2) as checkpoints:
        for step in (1, 2):
            state = jax.tree.map(lambda x: x + jnp.ones_like(x) * 3, state)
            checkpoints.save(step, state, {"iterator": {"next_index": step}, "data": {}})
            if step == 1:
                expected = manifest.array_sums(state)
    names = sorted(
        path.relative_to(folder / "whole" / "2")
        for path in (folder / "whole" / "2").rglob("*")
        if path.is_file()
    )
    for number in range(trials):
        copy = folder / f"flipped_{number}"
        link_tree(folder / "whole", copy)
        name = names[number % len(names)]  # each file in turn, small ones, too
        flip_bit(copy / "2" / name, rng)
        with checkpoint.Checkpoints(copy, keep=2) as checkpoints:
            step, restored, host = checkpoints.restore(abstract)
        right = (step, host["iterator"]) == (1, {"next_index": 1})
        if not (copy / "damaged_2").exists():
            yield "NOT NOTICED"
        elif not right or manifest.array_sums(restored) != expected:
            yield "NOTICED, WRONG FALLBACK"
        else:
            yield GOOD
        shutil.rmtree(copy)


# ---------------------------------------------------------------- kills


def kills(mode: str) -> Callable[[pathlib.Path, random.Random, int], Iterator[str]]:
    """The same for kills of pretraining or fine-tuning."""

    def inject(folder: pathlib.Path, rng: random.Random, trials: int) -> Iterator[str]:
        finetunes = mode == "finetune"
        dataset = "dfc2020" if finetunes else "ssl4eo_s12_nol"
        sample = {"format": "dfc2020"} if finetunes else {"seasons": 2}
        data_dir = runs.make_data(folder, dataset, locations=16, tile_size=48, **sample)
        chosen = runs.tiny_flags(data_dir)
        recipe = "configs/pretrain.py:sample"
        if finetunes:
            of_both = {name for name in chosen if not name.startswith(("eval", "selection"))}
            chosen = {name: chosen[name] for name in of_both} | {"seeds": "(0,)"}
            recipe = "configs/finetune.py:task=dfc2020,input=s2,sample"
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

        def start(workdir: pathlib.Path) -> subprocess.Popen:
            line = runs.command(
                "cromss_jax.main",
                config=recipe,
                workdir=workdir,
                **{f"config.{k}": v for k, v in chosen.items()},
            )
            log = (folder / f"{workdir.name}.log").open("a")
            return subprocess.Popen(line, cwd=runs.ROOT, env=environment, stdout=log, stderr=log)

        def outcome(workdir: pathlib.Path) -> tuple:
            run = workdir / "seed_0" if finetunes else workdir
            return runs.final_digest(run), runs.logged(run)

        for name in ("compiles", "reference"):
            started = time.monotonic()
            if start(folder / name).wait():
                raise RuntimeError((folder / f"{name}.log").read_text())
            length = time.monotonic() - started
        expected, killed, number = outcome(folder / "reference"), 0, 0
        while killed < trials:
            workdir, here = folder / f"killed_{number}", 0
            number += 1
            while True:
                process = start(workdir)
                try:
                    status = process.wait(timeout=rng.uniform(0, 1.2 * length))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    here += 1
                    if here < trials - killed:
                        continue
                    status = start(workdir).wait()
                break
            killed += here
            if status:
                raise RuntimeError((folder / f"{workdir.name}.log").read_text())
            same = outcome(workdir) == expected
            yield from [GOOD if same else "ENDED DIFFERENTLY"] * here

    return inject


# ---------------------------------------------------------------- truncations


def make_builder(source: pathlib.Path, data_dir: pathlib.Path) -> Ssl4eoS12Nol:
    """Builds a tree with none of its locations left out."""
    return Ssl4eoS12Nol(
        source_dir=str(source),
        data_dir=data_dir,
        num_workers=1,
        max_bad_locations=0,
        options=options.DEFAULT,
    )


def truncations(kind: str) -> Callable[[pathlib.Path, random.Random, int], Iterator[str]]:
    """The same for cut files of the source."""

    def inject(folder: pathlib.Path, rng: random.Random, trials: int) -> Iterator[str]:
        tree = folder / "tree"
        line = runs.command(
            "data_prep.sample", output_dir=tree, locations=3, seasons=2, tile_size=48
        )
        subprocess.run(line, check=True, cwd=runs.ROOT, capture_output=True)
        tiles = sorted(tree.rglob("*.tif"))
        undamaged = make_builder(tree, folder / "whole")
        undamaged.build()
        expected = undamaged.info.metadata["records_digest"]
        for number in range(trials):
            if kind == "GeoTIFF":
                source, cut = tree, rng.choice(tiles)
            else:
                source = cut = folder / f"tree.{kind}"
                if not cut.exists():
                    made = {"tar": "tar", "tar.gz": "gztar", "zip": "zip"}[kind]
                    shutil.make_archive(str(folder / "tree"), made, tree)
            whole = cut.read_bytes()
            cut.write_bytes(whole[: rng.randrange(len(whole))])
            target = folder / f"data_{number}"
            try:
                builder = make_builder(source, target)
                builder.build()
                same = builder.info.metadata["records_digest"] == expected
                yield "nothing was lost (the end of the padding)" if same else "NOT NOTICED"
            except (errors.BuildError, OSError) as error:
                named = cut.name in str(error)
                left = list(target.rglob("*.array_record*"))
                yield GOOD if named and not left else f"named: {named}, left: {len(left)}"
            cut.write_bytes(whole)

    return inject


# ---------------------------------------------------------------- disks


def noise(*shape: int) -> np.ndarray:
    """Pixels that cannot be compressed."""
    return np.random.default_rng(0).integers(0, 255, shape, np.uint8)


def fill(disk: pathlib.Path, left: int) -> None:
    """Leaves that many bytes of a disk."""
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - left))


def weights() -> Weights:
    """An encoder of a megabyte."""
    network = Network("encoder", 10, {"s1": sensors.S1_BANDS}, None)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), network.abstract_state())
    random_values = np.random.default_rng(0)
    return Weights(
        network,
        {
            name: random_values.standard_normal(array.shape).astype(array.dtype)
            for name, array in torch_keys.to_torch_state(zeros).items()
        },
    )


def _write_checkpoints(disk: pathlib.Path) -> None:
    fill(disk, 1_000_000)
    with checkpoint.Checkpoints(disk / "run", keep=100) as checkpoints:
        for step in range(100):
            state = {"x": jax.random.normal(jax.random.key(step), (50_000,))}
            checkpoints.save(step, state, {})


def _write_log(disk: pathlib.Path) -> None:
    log = report.MetricLog(str(disk), 0)
    fill(disk, 50_000)
    for step in range(10_000):
        log.scalars(step, "train", {"loss": 0.5})


def _build(disk: pathlib.Path) -> None:
    tree = disk.parent / "tree"
    line = runs.command("data_prep.sample", output_dir=tree, locations=8, seasons=2, tile_size=96)
    subprocess.run(line, check=True, cwd=runs.ROOT, capture_output=True)
    fill(disk, 200_000)
    make_builder(tree, disk).build()


def _write(name: str) -> Callable[[pathlib.Path], None]:
    def write(disk: pathlib.Path) -> None:
        path, found = files.absolute(disk / name), weights()
        fill(disk, 20_000)
        if name.endswith("png"):
            pictures.save_picture(path, noise(300, 300, 3))
        elif name.endswith("tif"):
            transform = (10, 0, 0, 0, -10, 0)
            maps.write_map(path, noise(300, 300) % 9, "", transform, sensors.DYNAMIC_WORLD)
        elif name.endswith("safetensors"):
            card = cards.make(found, found.network, "encoder")
            weight_files.write(path, found.arrays, card)
        else:
            folders.write_folder(path, found)

    return write


PLACES = {
    "records": (_build, ("*.array_record*", "dataset_info.json")),
    "checkpoint": (_write_checkpoints, ()),
    "metrics.jsonl": (_write_log, ()),
    **{
        name: (_write(name), (name,))
        for name in ("samples.png", "map.tif", "weights.safetensors", "weights_folder")
    },
}


def full_disks(folder: pathlib.Path, rng: random.Random, trials: int) -> Iterator[str]:
    """The same for seven kinds of output on a full disk."""
    del rng
    for place, (write, names) in list(PLACES.items())[:trials]:
        with disks.small(folder / place / "disk", "4m") as disk:
            try:
                write(disk)
                yield f"{place}: NOT NOTICED"
                continue
            except (OSError, checkpoint.CheckpointError, errors.BuildError, WeightsError) as error:
                said = "No space left" in str(error)
            left = [path.name for name in names for path in disk.rglob(name)]
            if place == "checkpoint":
                shape = jax.ShapeDtypeStruct((50_000,), jnp.float32, sharding=jnp.zeros(1).sharding)
                with checkpoint.Checkpoints(disk / "run", keep=100) as checkpoints:
                    step, restored, _ = checkpoints.restore({"x": shape})
                wanted = jax.random.normal(jax.random.key(step), (50_000,))
                left += [] if bool((restored["x"] == wanted).all()) else ["wrong checkpoint"]
            if place == "metrics.jsonl":
                files.read_metrics(disk / place)
            yield GOOD if said and not left else f"{place}: said: {said}, left: {left}"


# ---------------------------------------------------------------- writers


def writers(folder: pathlib.Path, rng: random.Random, trials: int) -> Iterator[str]:
    """The same for pairs of processes that lock a folder at once."""
    del rng
    for number in range(trials):
        pair = [runs.hold_lock(folder / f"pair_{number}" / "lock.json") for _ in range(2)]
        said = sorted(process.stdout.readline() for process in pair)
        for process in pair:
            process.communicate()
        has_one = said[1] == "held\n" and "is being written by" in said[0]
        yield GOOD if has_one else f"{said}"


PARTS = {
    "bits": (bits, 200),
    "kills_pretraining": (kills("pretrain"), 25),
    "kills_finetuning": (kills("finetune"), 25),
    **{
        f"truncations_{kind}": (truncations(kind), 20)
        for kind in ("GeoTIFF", "tar", "tar.gz", "zip")
    },
    "disks": (full_disks, len(PLACES)),
    "writers": (writers, 20),
}
_ONLY = flags.DEFINE_list("only", list(PARTS), f"Parts to run, of {', '.join(PARTS)}")


def main(_) -> None:
    """Prints the table, the last line as JSON."""
    logging.set_verbosity(logging.ERROR)
    command_line.quieten_orbax()
    figures = {}
    print("| fault | trials | what happened | seconds |\n|---|---|---|---|", flush=True)
    for name in _ONLY.value:
        inject, full = PARTS[name]
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = inject(pathlib.Path(folder), random.Random(_SEED.value), count(full))
            happened = collections.Counter(found)
        figures[name] = dict(happened)
        said = ", ".join(f"{outcome}: {number}" for outcome, number in happened.items())
        seconds = time.monotonic() - started
        print(f"| {name} | {sum(happened.values())} | {said} | {seconds:.0f} |", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    app.run(main)
