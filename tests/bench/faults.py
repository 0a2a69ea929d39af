"""Injects faults and says what happened: `python -m tests.bench.faults [--only=PARTS] [--share=1]`.

bits: one flipped bit in the newest checkpoint of a run, in a file drawn from all of them. It must
be noticed, its file named, and the checkpoint before be restored with the bits that it was saved
with.
kills_*: SIGKILL to a run, or to one of its two processes, in each phase in turn until the run is
complete. It must end with the bits of a run that was left alone. The phase of each kill is printed.
signals: what interrupts a run, in several phases. It must leave within ten seconds, and go on to
the bits of a run that was left alone.
truncations: a GeoTIFF, or an archive of the whole tree, cut at a random place, then built. The file
must be named in one sentence, and no data set be left.
disks_*: seven kinds of output where the disk is full, a quota is used up, the disk cannot be
written any more or the folder has vanished. It must be said in a sentence, nothing half-written be
left under its name, and the last checkpoint load.
hostile: files that would take all memory or time. They must be refused in a sentence.
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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import pytest
from absl import app, flags, logging

from cromss_jax import command_line
from cromss_jax.training import checkpoint, pretrain_step
from cromss_jax.weights import manifest
from data_prep import errors
from tests import disks, places, runs, test_full_disk, test_hostile
from tests.bench import kills

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


# ---------------------------------------------------------------- truncations


def truncations(kind: str) -> Callable[[pathlib.Path, random.Random, int], Iterator[str]]:
    """The same for cut files of the source."""

    def inject(folder: pathlib.Path, rng: random.Random, trials: int) -> Iterator[str]:
        tree = folder / "tree"
        line = runs.command(
            "data_prep.sample", output_dir=tree, locations=3, seasons=2, tile_size=48
        )
        subprocess.run(line, check=True, cwd=runs.ROOT, capture_output=True)
        tiles = sorted(tree.rglob("*.tif"))
        undamaged = places.make_builder(tree, folder / "whole")
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
                builder = places.make_builder(source, target)
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


def damaged_disks(damage: str) -> Callable[[pathlib.Path, random.Random, int], Iterator[str]]:
    """The same for every kind of output where it cannot be written."""

    def inject(folder: pathlib.Path, rng: random.Random, trials: int) -> Iterator[str]:
        del rng
        chosen = list(places.PLACES)[:trials]
        if damage == "quota":
            found = places.with_quota(folder / damage, chosen)
            yield from [f"{place}: {said}" if said else GOOD for place, said in found.items()]
            return
        for place in chosen:
            # What is unlinked still takes space while it is open.
            size = "64m" if damage == "vanished" else "4m"
            with disks.small(folder / place / "disk", size) as disk:
                own = disk / "own"  # what is mounted cannot vanish
                own.mkdir()
                said = places.attempt(place, damage, own if damage == "vanished" else disk)
                yield f"{place}: {said}" if said else GOOD

    return inject


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


# ---------------------------------------------------------------- hostile files

# By what the file does, the test that says what must be said of it.
HOSTILE: dict[str, Callable[[pathlib.Path, pytest.MonkeyPatch], None]] = {
    "tile in a zip of 1.5 GB": lambda path, _: (
        test_hostile.test_a_file_in_a_zip_that_unpacks_to_more_than_a_gigabyte(path)
    ),
    "table in a zip of 1.5 GB": lambda path, _: (
        test_hostile.test_a_table_in_a_zip_that_unpacks_to_more_than_a_gigabyte(path)
    ),
    "tar.gz bomb, a member": lambda path, patch: test_hostile.test_a_tar_gz_bomb(
        path, "member", patch
    ),
    "tar.gz bomb, the tail": lambda path, patch: test_hostile.test_a_tar_gz_bomb(
        path, "tail", patch
    ),
    "GeoTIFF of 10 GB of pixels": lambda path, _: (
        test_hostile.test_a_geotiff_that_declares_more_pixels_than_memory_has(path)
    ),
    "reversed safetensors file": lambda path, _: test_hostile.test_a_reversed_safetensors_file(
        path
    ),
    "float8 tensors": lambda path, _: test_hostile.test_safetensors_that_lie(
        path, {"dtype": "F8_E4M3"}, "has float8 tensors"
    ),
    ".pt of 10 TB": lambda path, _: test_hostile.test_pickles_that_ask_for_terabytes(path),
    "truncated config.json, garbage in metrics.jsonl": lambda path, _: (
        test_full_disk.test_damaged_files_of_a_run_are_one_sentence(path)
    ),
}


def hostile(folder: pathlib.Path, rng: random.Random, trials: int) -> Iterator[str]:
    """Yields how long it took to refuse each of these files in a sentence."""
    del rng
    for number, (name, refused) in enumerate(list(HOSTILE.items())[:trials]):
        own = folder / str(number)
        own.mkdir()
        started = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            refused(own, patch)
        yield f"{name}: a sentence in {time.monotonic() - started:.1f} s"


PARTS = {
    "bits": (bits, 200),
    "kills_pretraining": (kills.kills("pretrain", 1), 16),
    "kills_finetuning": (kills.kills("finetune", 1), 16),
    "kills_pretraining_two_processes": (kills.kills("pretrain", 2), 16),
    "kills_finetuning_two_processes": (kills.kills("finetune", 2), 8),
    "signals": (kills.interruptions, len(kills.SIGNALS)),
    **{
        f"truncations_{kind}": (truncations(kind), 20)
        for kind in ("GeoTIFF", "tar", "tar.gz", "zip")
    },
    **{f"disks_{name}": (damaged_disks(name), len(places.PLACES)) for name in places.DAMAGES},
    "writers": (writers, 20),
    "hostile": (hostile, len(HOSTILE)),
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
            happened: collections.Counter = collections.Counter()
            for outcome in inject(pathlib.Path(folder), random.Random(_SEED.value), count(full)):
                happened[outcome] += 1
                print(f"{name}: {outcome}", file=sys.stderr, flush=True)
        figures[name] = dict(happened)
        said = ", ".join(f"{outcome}: {number}" for outcome, number in happened.items())
        seconds = time.monotonic() - started
        print(f"| {name} | {sum(happened.values())} | {said} | {seconds:.0f} |", flush=True)
    print(json.dumps(figures), flush=True)
    os._exit(0)  # Orbax has threads that wait for minutes after an error


if __name__ == "__main__":
    app.run(main)
