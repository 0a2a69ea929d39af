"""Samples a second from records to host batches: `python -m tests.bench.input --data_dir=DIR`.

Reads a prepared data set (by default one made on the spot from the procedural sample at 264 x 264)
from a warm cache, as pretraining does.
"""

import json
import pathlib
import statistics
import tempfile
import time

from absl import app, flags

from cromss_jax import data, sensors
from tests import runs

_DATA_DIR = flags.DEFINE_string("data_dir", None, "A prepared data set; none: make a sample")
_NAME = flags.DEFINE_string("name", "ssl4eo_s12_nol", "Its name")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Samples a batch")
_THREADS = flags.DEFINE_integer("threads", 2, "Reading threads")
_BATCHES = flags.DEFINE_integer("batches", 60, "Batches a round")


def main(_) -> None:
    """Prints the figures, the last line as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir = _DATA_DIR.value or runs.make_data(
            pathlib.Path(folder), locations=64, seasons=4, tile_size=264, seed=0
        )
        dataset = data.open_dataset(data_dir, _NAME.value)
        train, _ = data.split_locations(dataset.num_locations, 0.01, 0)
        records = data.training_records(dataset, train, _BATCH_SIZE.value, 0)
        rates, cores = [], []
        for _ in range(4):
            batches = data.training_batches(
                dataset, sensors.MODALITIES, records, num_threads=_THREADS.value
            )
            next(batches)
            started, cpu = time.perf_counter(), time.process_time()
            for _ in range(_BATCHES.value):
                batch = next(batches)
            seconds = time.perf_counter() - started
            rates.append(_BATCHES.value * _BATCH_SIZE.value / seconds)
            cores.append((time.process_time() - cpu) / seconds)
        size = sum(array.nbytes for array in batch.values()) / _BATCH_SIZE.value
    # The first round warms the page cache.
    figures = {
        "samples_per_second": round(statistics.median(rates[1:]), 1),
        "cores_used": round(statistics.median(cores[1:]), 2),
        "kilobytes_a_sample": round(size / 1000, 1),
        "tile_size": dataset.tile_size,
        "threads": _THREADS.value,
        "batch_size": _BATCH_SIZE.value,
    }
    for name, value in figures.items():
        print(f"{name:24}{value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    app.run(main)
