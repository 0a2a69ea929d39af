"""Records to host batches, against the published pipeline: `python -m tests.bench.input`.

Ours reads ArrayRecord, a record a (location, season), as pretraining does; the device does the
rest. The other is what the published code does, written anew: LMDB values that hold the pickled
bytes of all seasons at 10 m, one value a location for S1, S2 and labels each; SciPy's Gaussian
filters for the smoothing prior, crop, flip and rotation in the workers of a torch DataLoader, which
collates float32. (There albumentations turns the picture by OpenCV, here `grid_sample` does.)

Both read the same sample from a warm cache, each in processes of its own, on the same cores.
Samples a second of a core are samples over CPU seconds, those of all threads and workers. Memory is
what the pipeline adds at most (anonymous pages, workers included).
"""

import json
import os
import pathlib
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags

from cromss_jax import presets, sensors
from cromss_jax.data import input_pipeline, validation_split
from cromss_jax.training import memory
from tests import runs

_DATA_DIR = flags.DEFINE_string("data_dir", None, "A prepared data set; none: make a sample")
_NAME = flags.DEFINE_string("name", "ssl4eo_s12_nol", "Its name")
_LOCATIONS = flags.DEFINE_integer("locations", 64, "Of the sample, and of the LMDB")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Samples a batch")
_THREADS = flags.DEFINE_integer("threads", 2, "Reading threads, and workers of the DataLoader")
_BATCHES = flags.DEFINE_integer("batches", 60, "Batches that ours reads, after one to warm up")
_LMDB_BATCHES = flags.DEFINE_integer("lmdb_batches", 16, "Batches that the other reads")
_MEASURE = flags.DEFINE_enum("measure", None, ["ours", "lmdb"], "One side only, in this process")
_LMDB_DIR = flags.DEFINE_string("lmdb_dir", None, "Where --measure=lmdb finds it")

LMDB_NAMES = ("s1", "s2", "labels")


def write_lmdb(
    dataset: input_pipeline.TileDataset, folder: pathlib.Path, num_locations: int
) -> None:
    """Writes locations as the published code does: every band at 10 m, all seasons together."""
    import lmdb
    from PIL import Image

    size = dataset.tile_size
    order = {
        band: (f"s2_{metres}m", index)
        for metres, bands in sensors.S2_BANDS_BY_RESOLUTION.items()
        for index, band in enumerate(bands)
    }

    def bands_of(record: dict) -> np.ndarray:
        bands = [record[name][..., index] for name, index in map(order.get, sensors.S2_BANDS)]
        resized = [Image.fromarray(b).resize((size, size), Image.Resampling.BICUBIC) for b in bands]
        return np.stack([np.asarray(band) for band in resized])

    environments = {n: lmdb.open(str(folder / n), map_size=1 << 36) for n in LMDB_NAMES}
    for location in range(num_locations):
        start, count = dataset.starts[location], dataset.season_counts[location]
        records = [dataset.source[int(start + season)] for season in range(count)]
        values = {
            "s1": np.stack([record["s1"].transpose(2, 0, 1) for record in records]),
            "s2": np.stack([bands_of(record) for record in records]),
            "labels": np.asarray(records[0]["labels"]),
        }
        for name, value in values.items():
            stored = pickle.dumps((value.tobytes(), value.shape, location))
            with environments[name].begin(write=True) as transaction:
                transaction.put(str(location).encode(), stored)
    for environment in environments.values():
        environment.close()


class PublishedDataset:
    """A location's example of a random season, as the published code makes it."""

    def __init__(self, folder: pathlib.Path, crop_size: int, length: int):
        self._folder, self._crop_size, self._length = folder, crop_size, length
        self._environments = None

    def __len__(self) -> int:
        return self._length

    def _read(self, name: str, index: int) -> np.ndarray:
        import lmdb

        if self._environments is None:  # by each worker for itself
            self._environments = {
                n: lmdb.open(str(self._folder / n), readonly=True, lock=False, readahead=False)
                for n in LMDB_NAMES
            }
        with self._environments[name].begin() as transaction:
            # The few locations of the sample are read over and over.
            key = str(index % transaction.stat()["entries"]).encode()
            stored, shape, _ = pickle.loads(transaction.get(key))
        return np.frombuffer(stored, np.uint8).reshape(shape)

    def __getitem__(self, index: int):
        import torch
        import torch.nn.functional as F
        from scipy.ndimage import gaussian_filter

        s1, s2, labels = (self._read(name, index) for name in LMDB_NAMES)
        rng = np.random.default_rng(index)
        season = rng.integers(len(labels))
        # Ignored labels, which the published code does not know, as one more class left out.
        classes = torch.from_numpy(labels.copy()).long().clamp(max=len(presets.DYNAMIC_WORLD))
        one_hot = (
            F.one_hot(classes, len(presets.DYNAMIC_WORLD) + 1)[..., :-1].numpy().astype(np.float32)
        )

        def smoothed(maps: np.ndarray) -> np.ndarray:
            planes = range(len(presets.DYNAMIC_WORLD))
            found = np.stack([gaussian_filter(maps[..., c], sigma=3, truncate=4) for c in planes])
            return found / found.sum(0, keepdims=True)

        prior = (smoothed(one_hot.mean(0)) + smoothed(one_hot[season])) / 2
        images = [x[season].astype(np.float32) / 255 for x in (s1, s2)]
        pixels = np.concatenate([prior, *images])
        target = labels[season].astype(np.float32)[None]

        size = self._crop_size
        top, left = rng.integers(0, pixels.shape[-1] - size + 1, 2)
        pixels, target = (x[:, top : top + size, left : left + size] for x in (pixels, target))
        if rng.random() < 0.5:
            axes = [(1,), (2,), (1, 2)][rng.integers(3)]
            pixels, target = np.flip(pixels, axes), np.flip(target, axes)
        # Copied: torch takes no negative strides, and batches want whole arrays.
        pixels, target = (torch.from_numpy(x.copy()) for x in (pixels, target))
        if rng.random() < 0.2:
            angle = np.deg2rad(rng.uniform(-90, 90))
            cos, sin = np.cos(angle), np.sin(angle)
            turn = torch.tensor([[cos, -sin, 0], [sin, cos, 0]], dtype=torch.float32)[None]
            grid = F.affine_grid(turn, [1, 1, size, size], align_corners=True)
            how = {"padding_mode": "reflection", "align_corners": True}
            pixels = F.grid_sample(pixels[None], grid, mode="bilinear", **how)[0]
            target = F.grid_sample(target[None], grid, mode="nearest", **how)[0]
        return {
            "img": pixels[len(presets.DYNAMIC_WORLD) :],
            "ns": target[0].long(),
            "smooth_prior": pixels[: len(presets.DYNAMIC_WORLD)],
        }


def anonymous_bytes() -> int:
    """Memory of this process and its children that no file stands behind; shared pages once."""
    me = os.getpid()
    children = pathlib.Path(f"/proc/{me}/task/{me}/children").read_text().split()
    total = 0
    for pid in (me, *children):
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                total += 1024 * int(line.split()[1])
    return total


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(start: Callable, num_batches: int) -> dict[str, float]:
    """Figures of a pipeline: `start()` gives its batches; the clock runs from the second on."""
    memory, cpu = anonymous_bytes(), cpu_seconds()
    batches = start()
    next(batches)
    peak = anonymous_bytes()
    started = time.perf_counter()
    for number in range(num_batches):
        batch = next(batches)
        if number % 8 == 7:
            peak = max(peak, anonymous_bytes())
    seconds = time.perf_counter() - started
    size = sum(array.nbytes for array in batch.values())
    del batches, batch  # workers end, and their seconds, of the first batch too, count
    cpu = cpu_seconds() - cpu
    return {
        "samples_per_second": round(num_batches * _BATCH_SIZE.value / seconds, 1),
        "samples_per_second_per_core": round((num_batches + 1) * _BATCH_SIZE.value / cpu, 1),
        "batch_bytes_a_sample": round(size / _BATCH_SIZE.value),
        "memory_bytes": peak - memory,
    }


def measure_ours() -> dict[str, float]:
    """Figures of our pipeline."""
    memory.keep_freed_memory()  # as `main` does
    dataset = input_pipeline.open_dataset(_DATA_DIR.value, _NAME.value)
    train, _ = validation_split.split_locations(dataset.num_locations, 0.01, 0)
    records = input_pipeline.training_records(dataset, train, _BATCH_SIZE.value, 0)

    def start():
        return input_pipeline.training_batches(
            dataset, sensors.MODALITIES, records, num_threads=_THREADS.value
        )

    return measure(start, _BATCHES.value)


def measure_lmdb() -> dict[str, float]:
    """Figures of the published pipeline."""
    import torch

    dataset = input_pipeline.open_dataset(_DATA_DIR.value, _NAME.value)
    # The crop of the paper's tiles of 264 pixels.
    crop_size = dataset.tile_size - 8
    length = _BATCH_SIZE.value * (_LMDB_BATCHES.value + 1)
    published = PublishedDataset(pathlib.Path(_LMDB_DIR.value), crop_size, length)

    def start():
        loader = torch.utils.data.DataLoader(
            published, _BATCH_SIZE.value, shuffle=True, num_workers=_THREADS.value
        )
        return iter(loader)

    return measure(start, _LMDB_BATCHES.value)


def in_a_process(side: str, data_dir: str, lmdb_dir: pathlib.Path) -> dict[str, float]:
    """Figures of one side, measured in a process of its own."""
    chosen = {f.name: f.value for f in (_NAME, _BATCH_SIZE, _THREADS, _BATCHES, _LMDB_BATCHES)}
    line = runs.command(
        "tests.bench.input", measure=side, data_dir=data_dir, lmdb_dir=lmdb_dir, **chosen
    )
    done = subprocess.run(line, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{side} could not be measured")
    return json.loads(done.stdout.splitlines()[-1])


def disk_bytes(folder: pathlib.Path, pattern: str) -> int:
    """What the files take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob(pattern))


def main(_) -> None:
    """Prints the figures of both and their ratios, the last line as JSON."""
    if _MEASURE.value:
        print(json.dumps(measure_ours() if _MEASURE.value == "ours" else measure_lmdb()))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        data_dir = _DATA_DIR.value or runs.make_data(
            folder, locations=_LOCATIONS.value, seasons=4, tile_size=264, seed=0
        )
        dataset = input_pipeline.open_dataset(data_dir, _NAME.value)
        num_locations = min(_LOCATIONS.value, dataset.num_locations)
        lmdb_dir = folder / "lmdb"
        lmdb_dir.mkdir()
        write_lmdb(dataset, lmdb_dir, num_locations)

        figures = {side: in_a_process(side, data_dir, lmdb_dir) for side in ("ours", "lmdb")}
        records = disk_bytes(pathlib.Path(data_dir) / _NAME.value, "*.array_record*")
        lmdb_bytes = disk_bytes(lmdb_dir, "data.mdb")
        figures["ours"]["disk_bytes_a_location"] = round(records / dataset.num_locations)
        figures["lmdb"]["disk_bytes_a_location"] = round(lmdb_bytes / num_locations)
        # A sample is one record of ours, and all that the LMDB holds of its location.
        figures["ours"]["read_bytes_a_sample"] = round(records / len(dataset.source))
        figures["lmdb"]["read_bytes_a_sample"] = figures["lmdb"]["disk_bytes_a_location"]
    ours, theirs = figures["ours"], figures["lmdb"]
    ratios = {f"{key}_ratio": round(ours[key] / theirs[key], 3) for key in ours}
    print(f"{'':30}{'ours':>16}{'LMDB':>16}{'ours / LMDB':>14}")
    for key in ours:
        print(f"{key:30}{ours[key]:>16,}{theirs[key]:>16,}{ratios[f'{key}_ratio']:>14}")
    shape = {"tile_size": dataset.tile_size, "threads": _THREADS.value}
    print(json.dumps({**ours, **ratios, "lmdb": theirs, **shape, "batch_size": _BATCH_SIZE.value}))


if __name__ == "__main__":
    app.run(main)
