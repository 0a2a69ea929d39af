"""Maps of scenes, against a tiled loop of smp: `python -m tests.bench.maps --part=PART`.

    speed    pixels a second of `predict` and of the loop: the same weights, windows, batches
    memory   peak memory of `predict` on scenes of two sizes
    kills    `predict` killed at random moments: the files that it ends with

Scenes repeat a procedural location; weights are random. Each runs in a process of its own, and of
both times, the processor's counts on a machine that others use, too.
"""

import hashlib
import json
import os
import pathlib
import random
import resource
import subprocess
import tempfile
import time

import jax.numpy as jnp
import numpy as np
import rasterio
from absl import app, flags
from affine import Affine
from etils import epath
from flax import nnx

from cromss_jax import sensors
from cromss_jax.mapping import windows as cutting
from cromss_jax.networks.fusion import make_network
from cromss_jax.weights import folders, torch_keys
from cromss_jax.weights.network import Network, Weights
from data_prep.sample import world
from tests import runs

_PART = flags.DEFINE_enum("part", "speed", ["speed", "memory", "kills", "loop"], "What is measured")
_SIZE = flags.DEFINE_integer("size", 2048, "Side of the scene in pixels")
_SIZES = flags.DEFINE_list(
    "sizes", ["2048x10980", "10980x10980"], "memory: heights and widths of the scenes"
)
_DEPTH = flags.DEFINE_integer("depth", 50, "Of the ResNet")
_KILLS = flags.DEFINE_integer("kills", 10, "How many times it is killed")
_SCENE = flags.DEFINE_string("scene", None, "loop: the scene, of S2")
_WEIGHTS = flags.DEFINE_string("weights", None, "loop: a file of smp's U-Net")
WINDOW, OVERLAP, BATCH = 256, 64, 4
_TILE = 1536


def write_scene(folder: pathlib.Path, height: int, width: int, seed: int = 3) -> None:
    """Writes `s2.tif` of 13 bands and `s1.tif` of a location that is mirrored again and again.

    A corner of S2 is nodata, another one of S1.
    """
    side = min(min(height, width) // 6 * 6, _TILE)
    location = world.make_location(seed, 0, 1, side)
    s2 = np.zeros((13, side, side), np.uint16)
    for metres, names in sensors.S2_BANDS_BY_RESOLUTION.items():
        for i, name in enumerate(names):
            pixels = location.s2(metres)[0, ..., i]
            factor = metres // 10
            s2[sensors.S2_BANDS.index(name)] = pixels.repeat(factor, 0).repeat(factor, 1)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "s2.tif", s2, (height, width), location, sensors.S2_BANDS, nodata=0)
    s1 = np.moveaxis(location.s1[0], -1, 0)
    _write(folder / "s1.tif", s1, (height, width), location, sensors.S1_BANDS, nodata=np.nan)


def _write(path, pixels, shape, location, names, nodata) -> None:
    count, side, _ = pixels.shape
    rows, columns = (
        np.resize(np.concatenate([np.arange(side), np.arange(side)[::-1]]), length)
        for length in shape
    )
    easting, northing = location.origin
    with rasterio.open(
        path, "w", driver="GTiff", width=shape[1], height=shape[0], count=count, dtype=pixels.dtype,
        crs=f"EPSG:{location.epsg}", transform=Affine(10, 0, easting, 0, -10, northing),
        nodata=nodata, tiled=True, blockxsize=512, blockysize=512, compress="deflate", zlevel=1,
        BIGTIFF="IF_SAFER",
    ) as file:  # fmt: skip
        for band in range(count):
            whole = pixels[band][rows][:, columns]
            corner = min(shape) // 5
            if names == sensors.S2_BANDS:
                whole[:corner, :corner] = nodata
            else:
                whole[-corner:, -corner:] = nodata
            file.write(whole, band + 1)
            file.set_band_description(band + 1, names[band])


def write_weights(folder: pathlib.Path, depth: int, modalities=sensors.MODALITIES) -> None:
    """Random weights of a U-Net as a folder that `cromss_jax.load` reads."""
    known = {"s1": sensors.S1_BANDS, "s2": sensors.S2_BANDS}
    bands = {m: known[m] for m in modalities}
    fusion = "mid" if len(bands) == 2 else "none"
    channels = {m: len(names) for m, names in bands.items()}
    network = make_network(fusion, depth, channels, 9, jnp.float32, nnx.Rngs(0))
    arrays = torch_keys.to_torch_state(nnx.state(network))
    found = Weights(Network(fusion, depth, bands, 9), arrays)
    folders.write_folder(epath.Path(folder), found)


def loop(scene: pathlib.Path, weights: pathlib.Path) -> None:
    """Maps S2 as users of smp write it: one window's batch after the other, on whole arrays."""
    import safetensors.torch
    import segmentation_models_pytorch as smp
    import torch

    network = smp.Unet(f"resnet{_DEPTH.value}", encoder_weights=None, in_channels=13, classes=9)
    network.load_state_dict(safetensors.torch.load_file(weights), strict=True)
    network.eval()
    with rasterio.open(scene) as file:
        height, width = file.shape
        cut = cutting.cut_scene(height, width, WINDOW, OVERLAP)
        sums = np.zeros((height, width, 9), np.float32)
        for first in range(0, len(cut), BATCH):
            chosen = range(first, min(first + BATCH, len(cut)))
            images = []
            for index in chosen:
                row, column = cut.place(index)
                window = rasterio.windows.Window(column, row, WINDOW, WINDOW)
                pixels = file.read(window=window)
                grey = [
                    sensors.scale_to_uint8(pixels[i], name)
                    for i, name in enumerate(sensors.S2_BANDS)
                ]
                images.append(np.stack(grey).astype(np.float32) / 255)
            with torch.inference_mode():
                probs = torch.softmax(network(torch.from_numpy(np.stack(images))), dim=1)
            for index, own in zip(chosen, probs.permute(0, 2, 3, 1).numpy(), strict=True):
                row, column = cut.place(index)
                i, j = divmod(index, len(cut.columns.starts))
                weight = cut.rows.weights[i][:, None] * cut.columns.weights[j]
                sums[row : row + WINDOW, column : column + WINDOW] += own * weight[..., None]
        classes = np.where(file.read(1) > 0, sums.argmax(-1), 255).astype(np.uint8)
        profile = {**file.profile, "count": 1, "dtype": "uint8", "nodata": 255}
    with rasterio.open(weights.parent / "loop.tif", "w", **profile) as file:
        file.write(classes, 1)


def _timed(line: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Runs a command: seconds, seconds of the processors, peak memory in MB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    with subprocess.Popen(line, cwd=runs.ROOT, env=environment) as process:
        peak = 0
        status = pathlib.Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            fields = status.read_text() if status.exists() else ""
            if "VmHWM:" in fields:
                peak = int(fields.partition("VmHWM:")[2].split()[0])
            time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{line} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.monotonic() - started, "processors": processors, "peak_mb": peak / 1024}


def _predict(weights: pathlib.Path, scene: pathlib.Path, output: pathlib.Path, **more) -> list[str]:
    return runs.command(
        "cromss_jax.predict",
        checkpoint=weights,
        s2=scene / "s2.tif",
        output=output,
        window=WINDOW,
        overlap=OVERLAP,
        batch_size=BATCH,
        **more,
    )


def _speed(folder: pathlib.Path, environment: dict[str, str]) -> dict:
    """Of both, and of one window alone, whose time is that of starting."""
    weights = folder / "weights"
    write_weights(weights, _DEPTH.value, ("s2",))
    exported = folder / "unet.safetensors"
    line = runs.command(
        "cromss_jax.convert", checkpoint=weights, output=exported, layout="unet", modality="s2"
    )
    subprocess.run([*line, "to_torch"], check=True, cwd=runs.ROOT)
    found: dict[str, dict] = {}
    for size in (WINDOW, _SIZE.value):
        scene = folder / f"scene_{size}"
        write_scene(scene, size, size)
        ours = _timed(_predict(weights, scene, folder / f"map_{size}"), environment)
        line = runs.command(
            "tests.bench.maps",
            part="loop",
            depth=_DEPTH.value,
            scene=scene / "s2.tif",
            weights=exported,
        )
        found[str(size)] = {"predict": ours, "loop": _timed(line, environment)}
        print(size, json.dumps(found[str(size)]), flush=True)
    with (
        rasterio.open(folder / f"map_{_SIZE.value}" / "classes.tif") as ours,
        rasterio.open(folder / "loop.tif") as theirs,
    ):
        found["same_classes"] = float((ours.read(1) == theirs.read(1)).mean())
    pixels = _SIZE.value**2
    for name in ("predict", "loop"):
        start, whole = found[str(WINDOW)][name], found[str(_SIZE.value)][name]
        for kind in ("seconds", "processors"):
            found[f"{name}_pixels_per_{kind}"] = pixels / (whole[kind] - start[kind])
    return found


def _memory(folder: pathlib.Path, environment: dict[str, str]) -> dict:
    write_weights(folder / "weights", _DEPTH.value)
    found = {}
    for size in _SIZES.value:
        scene = folder / f"scene_{size}"
        write_scene(scene, *map(int, size.split("x")))
        more = {"s1": scene / "s1.tif", "write": "probabilities,confidence,agreement"}
        line = _predict(folder / "weights", scene, folder / f"map_{size}", **more)
        found[size] = _timed(line, environment)
        print(size, json.dumps(found[size]), flush=True)
    return found


def digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of each file of a map."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def _kills(folder: pathlib.Path, environment: dict[str, str]) -> dict:
    """One map is killed again and again, until it is whole; the other one never is."""
    write_weights(folder / "weights", _DEPTH.value)
    scene = folder / "scene"
    write_scene(scene, _SIZE.value, _SIZE.value)
    more = {"s1": scene / "s1.tif", "write": "probabilities,confidence,agreement"}
    _timed(_predict(folder / "weights", scene, folder / "first", **more), environment)
    line = _predict(folder / "weights", scene, folder / "whole", **more)
    length = _timed(line, environment)["seconds"]
    rng = random.Random(0)
    expected = digests(folder / "whole")
    kills, maps, same = 0, 0, 0
    while kills < _KILLS.value:
        killed = folder / f"killed_{maps}"
        maps += 1
        line = _predict(folder / "weights", scene, killed, **more)
        # Killed and started again until it is whole.
        while not (killed / "map.json").exists():
            moment = rng.uniform(0, length)
            process = subprocess.Popen(line, cwd=runs.ROOT, env=environment)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                progress = killed / "work" / "progress"
                rows = progress.read_text() if progress.exists() else "0"
                files = " ".join(sorted(path.name for path in killed.glob("*.tif")))
                print(
                    f"killed after {moment:.1f} of {length:.1f} s: {rows} rows, {files}", flush=True
                )
        same += digests(killed) == expected
    return {"kills": kills, "maps": maps, "maps_of_the_same_files": same}


def main(_) -> None:
    """Prints the figures, the last line as JSON."""
    if _PART.value == "loop":
        loop(pathlib.Path(_SCENE.value), pathlib.Path(_WEIGHTS.value))
        return
    parts = {"speed": _speed, "memory": _memory, "kills": _kills}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        print(json.dumps(parts[_PART.value](folder, environment)))


if __name__ == "__main__":
    app.run(main)
