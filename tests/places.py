"""Everything that the program writes, on disks on which it cannot: for tests and benches.

`python -m tests.places FOLDER PLACE...`, below a quota, is for `with_quota`.
"""

import ctypes
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cromss_jax import files, presets, sensors
from cromss_jax.results import maps, pictures, report
from cromss_jax.training import checkpoint
from cromss_jax.weights import cards, folders, torch_keys
from cromss_jax.weights import files as weight_files
from cromss_jax.weights.network import Network, Weights, WeightsError
from data_prep import errors, options
from data_prep.datasets.ssl4eo_s12_nol import Ssl4eoS12Nol
from tests import disks, runs

# What is said to the user in a sentence.
ERRORS = (OSError, checkpoint.CheckpointError, errors.BuildError, WeightsError)


def noise(*shape: int) -> np.ndarray:
    """Pixels that cannot be compressed."""
    return np.random.default_rng(0).integers(0, 255, shape, np.uint8)


def make_builder(source: pathlib.Path, data_dir: pathlib.Path) -> Ssl4eoS12Nol:
    """Builds a tree with none of its locations left out."""
    return Ssl4eoS12Nol(
        source_dir=str(source),
        data_dir=files.absolute(data_dir),
        num_workers=1,
        max_bad_locations=0,
        options=options.DEFAULT,
    )


def make_geotiffs(folder: pathlib.Path) -> pathlib.Path:
    """A tree of some megabytes."""
    line = runs.command("data_prep.sample", output_dir=folder, locations=8, seasons=2, tile_size=96)
    subprocess.run(line, check=True, cwd=runs.ROOT, capture_output=True)
    return folder


def weights() -> Weights:
    """An encoder of some megabytes."""
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


# ---------------------------------------------------------------- damages


def _fill(folder: pathlib.Path, left: int) -> None:
    """Leaves that many bytes of the disk."""
    (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - left))


def _allow(folder: pathlib.Path, left: int) -> None:
    """Leaves that many bytes of a quota; see disks.c."""
    del folder
    ctypes.c_long.in_dll(ctypes.CDLL(None), "quota_left").value = left


def _forbid(folder: pathlib.Path, left: int) -> None:
    """Mounts the disk of the folder for reading alone."""
    del left
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def _remove(folder: pathlib.Path, left: int) -> None:
    """Removes the folder and all that is in it; an empty one when what is written gets its name."""
    del left
    if any(folder.iterdir()):
        shutil.rmtree(folder)
    else:
        _VANISHING[:] = [folder]


# The folder that vanishes when something in it is renamed. A thread that looked for files would
# come too late where they are written at once.
_VANISHING: list[pathlib.Path] = []


def _vanish(event: str, arguments: tuple) -> None:
    if event != "os.rename" or not _VANISHING:
        return
    if _VANISHING[0] in pathlib.Path(os.fsdecode(arguments[0])).parents:
        shutil.rmtree(_VANISHING.pop())


sys.addaudithook(_vanish)


# How damages end.
_DAMAGES_END: dict[str, Callable[[pathlib.Path], None]] = {
    "full": lambda folder: (folder / "ballast").unlink(),
    "quota": lambda folder: _allow(folder, 1 << 60),
    "read-only": lambda folder: subprocess.run(
        ["mount", "-o", "remount,rw", str(folder)], check=True
    ),
    "vanished": lambda folder: None,
}
# By name, what is done to the folder and what must be said.
DAMAGES: dict[str, tuple[Callable[[pathlib.Path, int], None], str]] = {
    "full": (_fill, "No space left"),
    "quota": (_allow, "quota exceeded"),
    "read-only": (_forbid, "Read-only"),
    "vanished": (_remove, "No such file|has vanished|does not exist"),
}

Damage = Callable[[int], None]


# ---------------------------------------------------------------- places


def state(step: int) -> dict[str, jax.Array]:
    """What is saved at a step, 200 kB."""
    return {"x": jax.random.normal(jax.random.key(step), (50_000,))}


def _write_records(folder: pathlib.Path, damage: Damage) -> None:
    tree = folder.parent / "tree"
    if not tree.exists():
        make_geotiffs(tree)
    builder = make_builder(tree, folder)
    damage(200_000)
    builder.build()


def _write_checkpoints(folder: pathlib.Path, damage: Damage) -> None:
    with checkpoint.Checkpoints(folder / "run", keep=100) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        damage(900_000)
        for step in range(2, 100):
            checkpoints.save(step, state(step), {})


def _write_log(folder: pathlib.Path, damage: Damage) -> None:
    log = report.MetricLog(str(folder), 0)
    damage(50_000)
    for step in range(10_000):
        log.scalars(step, "train", {"loss": 0.5})


def _write_file(name: str) -> Callable[[pathlib.Path, Damage], None]:
    def write(folder: pathlib.Path, damage: Damage) -> None:
        path, found = files.absolute(folder / name), weights()
        damage(20_000)
        if name.endswith("png"):
            pictures.save_picture(path, noise(300, 300, 3))
        elif name.endswith("tif"):
            transform = (10, 0, 0, 0, -10, 0)
            maps.write_map(path, noise(300, 300) % 9, "", transform, presets.DYNAMIC_WORLD)
        elif name.endswith("safetensors"):
            card = cards.make(found, found.network, "encoder")
            weight_files.write(path, found.arrays, card)
        else:
            folders.write_folder(path, found)

    return write


# By name, what writes there and the names that must not be left half-written.
PLACES: dict[str, tuple[Callable[[pathlib.Path, Damage], None], tuple[str, ...]]] = {
    "records": (_write_records, ("*.array_record*", "dataset_info.json")),
    "checkpoint": (_write_checkpoints, ()),
    "metrics.jsonl": (_write_log, ()),
    **{
        name: (_write_file(name), (name,))
        for name in ("samples.png", "map.tif", "weights.safetensors", "weights_folder")
    },
}


def attempt(place: str, damage: str, folder: pathlib.Path) -> str:
    """Writes to a place that is damaged meanwhile.

    Args:
      place: of `PLACES`.
      damage: of `DAMAGES`.
      folder: where; all that is in it may be lost.

    Returns:
      "" if everything is as it must be, else what is not.
    """
    write, names = PLACES[place]
    do_damage, wanted = DAMAGES[damage]
    try:
        write(folder, lambda left: do_damage(folder, left))
        # A builder may make its folder anew and write all of it after that has vanished.
        has_vanished = damage == "vanished" and not _VANISHING
        is_whole = has_vanished and names and all(list(folder.rglob(n)) for n in names)
        return "" if is_whole else "not noticed"
    except ERRORS as error:
        said = str(error)
    _DAMAGES_END[damage](folder)
    problems = []
    if not re.search(wanted, said, re.IGNORECASE) or len(said.splitlines()) != 1:
        problems.append(f"said {said!r}")
    problems += [f"left {path.name}" for name in names for path in folder.rglob(name)]
    if damage != "vanished":
        if place == "checkpoint":
            problems += _wrong_checkpoint(folder / "run")
        if place == "metrics.jsonl":
            files.read_metrics(folder / place)
    return ", ".join(problems)


def _wrong_checkpoint(folder: pathlib.Path) -> list[str]:
    """What is wrong with the newest checkpoint."""
    shape = jax.ShapeDtypeStruct((50_000,), jnp.float32, sharding=jnp.zeros(1).sharding)
    with checkpoint.Checkpoints(folder, keep=100) as checkpoints:
        step, restored, _ = checkpoints.restore({"x": shape})
    return [] if bool((restored["x"] == state(step)["x"]).all()) else [f"wrong step {step}"]


def with_quota(folder: pathlib.Path, chosen: Sequence[str]) -> dict[str, str]:
    """`attempt` for places below a quota, in a process of which that can be said.

    Args:
      folder: a new one.
      chosen: of `PLACES`.

    Raises:
      disks.NoMountError: if there is no C compiler.
    """
    folder.mkdir(parents=True)
    library = folder / "quota.so"
    source = pathlib.Path(__file__).with_name("disks.c")
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    except OSError as error:
        raise disks.NoMountError(f"cannot compile a quota here: {error}") from error
    limited = folder / "limited"
    line = runs.command("tests.places")
    environment = {**os.environ, "LD_PRELOAD": str(library), "QUOTA_FOLDER": str(limited)}
    done = subprocess.run(
        [*line, str(limited), *chosen],
        cwd=runs.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    found = {}
    for name in sys.argv[2:]:
        own = pathlib.Path(sys.argv[1]) / name
        own.mkdir(parents=True)
        found[name] = attempt(name, "quota", own)
    print(json.dumps(found))
