"""How well audits find wrong labels: `python -m tests.bench.audit --data_dir=DIR --runs=A,B`.

For each run (of any recipe) on a data set that knows the truth: `cromss_jax.audit`'s ranking, that
of 1 - P(label) of each sensor and of their mean, and that of the entangled confidence alone. Maps
are not written. `--dump=FOLDER` keeps a sample of pixels for other programs.
"""

import json
import logging
import pathlib
import tempfile

import numpy as np
from absl import app, flags

import cromss_jax
from cromss_jax import sensors
from cromss_jax.auditing import evidence, job, scores
from cromss_jax.auditing.predictions import Predictor
from cromss_jax.data import input_pipeline
from cromss_jax.mapping.job import Network
from cromss_jax.networks import decoders

_DATA_DIR = flags.DEFINE_string("data_dir", "data/sample", "Folder of data sets")
_DATASET = flags.DEFINE_string("dataset", "ssl4eo_s12_nol", "Name of the data set")
_RUNS = flags.DEFINE_list("runs", ["runs/sample"], "Folders of pretraining runs")
_DUMP = flags.DEFINE_string("dump", None, "Folder for samples of pixels")


class Remembering:
    """A judge that counts what simpler evidence says, each location once."""

    def __init__(self, predictor: Predictor, num_classes: int):
        self._predictor, self._num_classes = predictor, num_classes
        self._known: dict[int, tuple] = {}
        self.counts: dict[str, np.ndarray] = {}
        self.sample: dict[str, list] = {"probs": [], "labels": [], "truth": []}

    def __call__(self, index: int) -> tuple:
        if index in self._known:
            return self._known.pop(index)
        probs, found = self._known[index] = self._predictor.location(index)
        labels, truth = found["labels"], found["truth"]
        judged = (labels != sensors.IGNORE_LABEL) & (truth < self._num_classes)
        own = {f"1 - P(label), {m.upper()}": 1 - self._own(p, labels) for m, p in probs.items()}
        own["1 - P(label), mean"] = sum(own.values()) / len(own)
        entangled = evidence.entangled(probs)
        own["entangled confidence"] = 1 - self._own(entangled, labels)
        for name, values in own.items():
            counted = scores.count(values[judged], (labels != truth)[judged])
            self.counts[name] = self.counts.get(name, 0) + counted
        chosen = np.random.default_rng(index).permutation(np.flatnonzero(judged))[:1000]
        mean = sum(probs.values()) / len(probs)
        self.sample["probs"].append(mean.reshape(-1, self._num_classes)[chosen])
        for name in ("labels", "truth"):
            self.sample[name].append(found[name].ravel()[chosen])
        return probs, found

    def _own(self, probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return evidence.label_probability(probs, labels)


def main(_) -> None:
    """Prints the figures of each run, the last line as JSON."""
    logging.getLogger("absl").setLevel(logging.WARNING)
    dataset = input_pipeline.open_dataset(_DATA_DIR.value, _DATASET.value)
    results = {}
    for path in _RUNS.value:
        model = cromss_jax.load(path)
        stride = decoders.STRIDES[model.description.decoder]
        network = Network(model.network, stride, dict(dataset.legend.pairs()))
        judge = Remembering(Predictor(dataset, network, model.bands, 4), len(dataset.legend))
        settings = job.Settings(maps=False)
        with tempfile.TemporaryDirectory() as folder:
            content = job.audit(dataset, judge, pathlib.Path(folder), settings, {})
        found = {name: scores.ranking(counts) for name, counts in judge.counts.items()}
        truth = content["against_truth"]
        found["audit"] = {name: truth[name] for name in next(iter(found.values()))}
        found["error rate"] = {
            "estimate": content["error_rate"]["estimate"],
            "truth": truth["error_rate"],
            "calibration_error": truth["calibration_error"],
        }
        results[path] = found
        for name, values in found.items():
            shown = " ".join(f"{key} {value:.3f}" for key, value in values.items())
            print(f"{path} {name}: {shown}", flush=True)
        if _DUMP.value:
            pathlib.Path(_DUMP.value).mkdir(parents=True, exist_ok=True)
            sample = {name: np.concatenate(values) for name, values in judge.sample.items()}
            np.savez(pathlib.Path(_DUMP.value) / f"{pathlib.Path(path).name}.npz", **sample)
    print(json.dumps(results))


if __name__ == "__main__":
    app.run(main)
