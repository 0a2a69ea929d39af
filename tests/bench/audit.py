"""How well audits find wrong labels, what cleaning brings: `python -m tests.bench.audit`.

For each seed a procedural world as `make pretrain` has it (or, with --dataset=dfc2020, tiles with
coarse labels), and networks of spatial folds: every location is judged by one that never saw it.
Compared are `cromss_jax.audit`, simpler evidence of the same networks, networks without selection,
and, where --cleanlab names a folder with it (`uv pip install --target=FOLDER cleanlab`), cleanlab,
in a process of its own. Networks are then trained likewise on cleaned labels, and scored against
the truth of locations that no network saw. Interrupted, the same command goes on.
"""

import json
import logging
import os
import pathlib
import subprocess
import sys

import ml_collections
import numpy as np
from absl import app, flags

import cromss_jax
from configs import pretrain as recipe
from cromss_jax import folds as spatial
from cromss_jax import sensors
from cromss_jax.auditing import evidence, job, scores, subjects
from cromss_jax.auditing.predictions import Predictor
from cromss_jax.data import input_pipeline, validation_split
from cromss_jax.mapping.job import Network
from cromss_jax.method import metrics
from cromss_jax.networks import decoders
from cromss_jax.training import pretrain
from data_prep.sample import world
from tests import runs

_WORKDIR = flags.DEFINE_string("workdir", "runs/audit", "Folder of data and networks")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the worlds")
_FOLDS = flags.DEFINE_integer("folds", 4, "Networks of each kind")
_DATASET = flags.DEFINE_enum(
    "dataset", "ssl4eo_s12_nol", ["ssl4eo_s12_nol", "dfc2020"], "Shape of the data"
)
_COMPARED = flags.DEFINE_integer(
    "compared", 0, "Folds with a network without selection and one on cleaned labels; 0: all"
)
_STAGES = flags.DEFINE_list("stages", ["audit", "clean", "off"], "What is trained and compared")
_CLEANLAB = flags.DEFINE_string("cleanlab", None, "Folder where cleanlab is installed")
_ABOVE = flags.DEFINE_float("above", 0.9, "Cleaning: labels that are wrong with this probability")

LOCATIONS, SIZE, SEASONS = 64, 132, 4
Predictions = list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]


def make_data(folder: pathlib.Path, seed: str) -> None:
    """Writes and builds a world, unless it is there."""
    source, more = folder / f"src{seed}", {"seasons": SEASONS, "locations": LOCATIONS}
    if _DATASET.value == "dfc2020":
        # Its first half is the training split.
        more = {"format": "dfc2020", "labels": "lc", "locations": 2 * LOCATIONS}
    if not source.exists():
        line = runs.command(
            "data_prep.sample", output_dir=source, tile_size=SIZE, seed=seed, **more
        )  # fmt: skip
        subprocess.run(line, check=True, cwd=runs.ROOT)
    build(folder, seed, "data")


def build(folder: pathlib.Path, seed: str, name: str, **more) -> None:
    """Builds a data set of a world, unless it is there."""
    if not (folder / f"{name}{seed}" / _DATASET.value).exists():
        if _DATASET.value == "dfc2020":
            more["labels"] = "lc"
        line = runs.command(
            "data_prep.build", dataset=_DATASET.value, source_dir=folder / f"src{seed}",
            data_dir=folder / f"{name}{seed}", **more,
        )  # fmt: skip
        subprocess.run(line, check=True, cwd=runs.ROOT)


def config_of(data_dir: pathlib.Path, variant: str) -> ml_collections.ConfigDict:
    """The recipe of `make pretrain`."""
    config = recipe.get_config(variant)
    config.data.dir, config.data.name = str(data_dir), _DATASET.value
    return config


def folds_of(folder: pathlib.Path, seed: str) -> tuple[input_pipeline.TileDataset, np.ndarray]:
    """The data set of a world, and the fold of each location."""
    dataset = input_pipeline.open_dataset(str(folder / f"data{seed}"), _DATASET.value)
    return dataset, spatial.spatial_folds(dataset, _FOLDS.value, 50.0)


def workdir(folder: pathlib.Path, seed: str, kind: str, fold: int) -> pathlib.Path:
    """Of the network of a fold, as `cromss_jax.audit` has it."""
    return folder / f"{kind}{seed}" / "folds" / f"{fold}_of_{_FOLDS.value}"


def train(
    folder: pathlib.Path, seed: str, kind: str, data: str, variant: str, num_folds: int
) -> None:
    """Trains the networks of the first folds, unless they are trained."""
    _, fold_of = folds_of(folder, seed)
    for fold in range(num_folds):
        target = workdir(folder, seed, kind, fold)
        if not (target / "results.md").exists():
            config = config_of(folder / f"{data}{seed}", variant)
            pretrain.pretrain(config, str(target), np.flatnonzero(fold_of == fold))


def predictor(folder: pathlib.Path, seed: str, kind: str, fold: int) -> Predictor:
    """The network of a fold on the records of a world."""
    dataset, _ = folds_of(folder, seed)
    model = cromss_jax.load(workdir(folder, seed, kind, fold))
    stride = decoders.STRIDES[model.description.decoder]
    network = Network(model.network, stride, dict(dataset.legend.pairs()))
    return Predictor(dataset, network, model.bands, 4)


def predict(folder: pathlib.Path, seed: str, kind: str, num_folds: int) -> Predictions:
    """What is known of each location of the first folds, by the network that never saw it."""
    _, fold_of = folds_of(folder, seed)
    networks = [predictor(folder, seed, kind, fold) for fold in range(num_folds)]
    chosen = np.flatnonzero(fold_of < num_folds).tolist()
    return [networks[fold_of[i]].location(i) for i in chosen]


def rank(found: Predictions, wrong: list[np.ndarray], num_classes: int) -> dict[str, float]:
    """The ranking of evidence against the truth."""
    counts = np.zeros((2, scores.NUM_BINS), np.int64)
    for (_, known), own in zip(found, wrong, strict=True):
        judged = judged_pixels(known, num_classes)
        counts += scores.count(own[judged], (known["labels"] != known["truth"])[judged])
    return scores.ranking(counts)


def judged_pixels(known: dict[str, np.ndarray], num_classes: int) -> np.ndarray:
    """Pixels with a label and a known truth."""
    return (known["labels"] != sensors.IGNORE_LABEL) & (known["truth"] < num_classes)


def simple_evidence(found: Predictions) -> dict[str, list[np.ndarray]]:
    """1 - P(label) of each sensor and their mean, and the entangled confidence alone."""
    shown: dict[str, list] = {}
    for probs, known in found:

        def doubt(p: np.ndarray, labels: np.ndarray = known["labels"]) -> np.ndarray:
            return 1 - evidence.label_probability(p, labels)

        mean = sum(probs.values()) / len(probs)
        each = {f"1 - P(label), {m.upper()}": doubt(p) for m, p in probs.items()}
        each |= {"1 - P(label), mean": doubt(mean)}
        each |= {"entangled confidence": doubt(evidence.entangled(probs))}
        for name, own in each.items():
            shown.setdefault(name, []).append(own)
    return shown


def cleanlab_evidence(found: Predictions, folder: pathlib.Path) -> dict[str, list[np.ndarray]]:
    """What cleanlab says of the mean of both sensors, on all pixels."""
    mean = np.concatenate([sum(p.values()) / len(p) for p, _ in found]).astype(np.float32)
    labels = np.concatenate([known["labels"] for _, known in found])
    path = folder / "cleanlab.npz"
    np.savez(path, probs=mean, labels=labels)
    line = [sys.executable, str(pathlib.Path(__file__).with_name("cleanlab_ranking.py")), str(path)]
    subprocess.run(line, check=True, env={**os.environ, "PYTHONPATH": _CLEANLAB.value})
    ends = np.cumsum([len(known["labels"]) for _, known in found])[:-1]
    with np.load(path) as said:
        shown = {f"cleanlab, {name.replace('_', ' ')}": np.split(1 - said[name], ends)
                 for name in ("segmentation", "normalized_margin")}  # fmt: skip
    path.unlink()
    return shown


def audited(found: Predictions, seed: str, folder: pathlib.Path) -> dict:
    """The audit's report, and its maps, unless they are there."""
    dataset, _ = folds_of(folder, seed)
    target = folder / f"audit{seed}"
    settings = job.Settings(maps=not (target / "suspects.gpkg").exists())
    subject = subjects.DataSet(dataset, found.__getitem__, target)
    return job.audit(subject, target, settings, {"judged by": "folds"})


def judged(found: Predictions) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Wrong probability and suggested class of each location, as the audit has them."""
    settings = job.Settings()
    calibration = job.calibrate(found.__getitem__, np.arange(len(found)), settings)
    pairs = [
        calibration.judge(job.witnesses(probs, known["prior"], known["labels"])[1], known["labels"])
        for probs, known in found
    ]
    return [wrong for wrong, _ in pairs], [suggested for _, suggested in pairs]


def by_kind(found: Predictions, seed: str) -> dict[str, dict[str, float]]:
    """Of each kind of noise: its share of the labels, how it is ranked above right ones, and more.

    `found_at_0.5` is the share of its pixels with such a probability or a higher one,
    `suggested_right` the share of these whose suggested class is the true one.
    """
    wrong, suggested = judged(found)
    values: dict[int, list] = {}
    for index, (_, known) in enumerate(found):
        made = world.make_location(int(seed), index, SEASONS, SIZE)
        if not np.array_equal(made.labels, known["labels"]):
            raise RuntimeError(f"location {index} of seed {seed} is not that of the data set")
        kinds = made.noise_kind
        pixels = judged_pixels(known, 9)
        fits = suggested[index] == known["truth"]
        for kind in np.unique(kinds[pixels]).tolist():
            chosen = pixels & (kinds == kind)
            values.setdefault(kind, []).append((wrong[index][chosen], fits[chosen]))
    joined = {k: [np.concatenate(x) for x in zip(*v, strict=True)] for k, v in values.items()}
    total, right = sum(len(p) for p, _ in joined.values()), joined[0][0]
    shown = {}
    for kind, (own, fits) in joined.items():
        counts = np.stack([scores.count(x, np.zeros(len(x), bool))[0] for x in (right, own)])
        flagged = own >= 0.5
        shown[world.NOISE_KINDS[kind]] = {
            "share": len(own) / total,
            "auroc": scores.ranking(counts)["auroc"],
            "mean_probability": float(own.mean()),
            "found_at_0.5": float(flagged.mean()),
            "suggested_right": float(fits[flagged].mean()) if flagged.any() else float("nan"),
        }
    return shown


def against_truth(found: Predictions, num_classes: int) -> dict[str, float]:
    """mIoU in percent of each sensor and of their geometric mean."""
    counts: dict[str, np.ndarray] = {}
    for probs, known in found:
        both = np.exp(sum(np.log(np.maximum(p, 1e-12)) for p in probs.values()))
        pixels = known["truth"] < num_classes
        for name, p in {**probs, "both": both}.items():
            pairs = known["truth"][pixels].astype(int) * num_classes + p.argmax(-1)[pixels]
            own = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
            counts[name] = counts.get(name, 0) + own
    return {name: 100 * metrics.scores(own)["miou"] for name, own in counts.items()}


def retrained(folder: pathlib.Path, seed: str, num_folds: int, num_classes: int) -> dict:
    """Networks before and after cleaning, on locations that they never saw.

    `held back` are those that no network saw, nor those that cleaned the labels. `other fold` are
    those whose noisy labels taught the networks that cleaned.
    """
    _, fold_of = folds_of(folder, seed)
    held_back, shown = unseen(folder, seed), []
    for fold in range(num_folds):
        own = {}
        for name, kind in (("before", "audit"), ("after", "auditclean")):
            network = predictor(folder, seed, kind, fold)
            groups = {"held back": held_back}
            groups["other fold"] = np.setdiff1d(np.flatnonzero(fold_of == fold), held_back)
            for group, locations in groups.items():
                found = [network.location(i) for i in locations.tolist()]
                own[f"{name}, {group}"] = against_truth(found, num_classes)
        shown.append(own)
    return {"labels": labels_before_and_after(folder, seed), "folds": shown}


def without_selection(
    folder: pathlib.Path, seed: str, num_folds: int, num_classes: int
) -> dict[str, dict[str, float]]:
    """Rankings on the locations of the compared folds, of networks with and without selection."""
    shown = {}
    for name, kind in (("with", "audit"), ("without", "auditoff")):
        own = predict(folder, seed, kind, num_folds)
        mean = simple_evidence(own)["1 - P(label), mean"]
        shown[f"audit, {name}"] = rank(own, judged(own)[0], num_classes)
        shown[f"1 - P(label), mean, {name}"] = rank(own, mean, num_classes)
    return shown


def unseen(folder: pathlib.Path, seed: str) -> np.ndarray:
    """Locations that are held back from the networks of all folds."""
    dataset = input_pipeline.open_dataset(str(folder / f"data{seed}"), _DATASET.value)
    config = config_of(folder / f"data{seed}", "sample")
    return validation_split.split_locations(
        dataset.num_locations, config.data.validation_fraction, config.seed, dataset.blocks
    )[1]


def measure(folder: pathlib.Path, seed: str) -> dict:
    """The figures of a seed that --stages asks for."""
    make_data(folder, seed)
    compared = _COMPARED.value or _FOLDS.value
    needed = _FOLDS.value if "audit" in _STAGES.value else compared
    train(folder, seed, "audit", "data", "sample", needed)
    num_classes = len(folds_of(folder, seed)[0].legend)
    figures = {}
    if "audit" in _STAGES.value:
        found = predict(folder, seed, "audit", _FOLDS.value)
        figures |= ranked(folder, seed, found, num_classes)
        print(json.dumps({seed: figures}), flush=True)
    if "clean" in _STAGES.value:
        audit = folder / f"audit{seed}"
        build(folder, seed, "cleaned", replace_labels=audit, above=_ABOVE.value)
        train(folder, seed, "auditclean", "cleaned", "sample", compared)
        figures["cleaned"] = retrained(folder, seed, compared, num_classes)
        print(json.dumps({seed: figures}), flush=True)
    if "off" in _STAGES.value:
        train(folder, seed, "auditoff", "data", "sample,selection=off", compared)
        figures["selection"] = without_selection(folder, seed, compared, num_classes)
    return figures


def ranked(folder: pathlib.Path, seed: str, found: Predictions, num_classes: int) -> dict:
    """How evidence ranks wrong labels, estimated and true rates, and what is found of each kind."""
    content = audited(found, seed, folder)
    shown = {n: rank(found, own, num_classes) for n, own in simple_evidence(found).items()}
    if _CLEANLAB.value:
        more = cleanlab_evidence(found, folder)
        shown |= {name: rank(found, own, num_classes) for name, own in more.items()}
    names = next(iter(shown.values()))
    shown["audit"] = {name: content["against_truth"][name] for name in names}
    figures = {"ranking": shown, "rates": rates(content, found, num_classes)}
    if _DATASET.value == "ssl4eo_s12_nol":
        figures["kinds"] = by_kind(found, seed)
    return figures


def rates(content: dict, found: Predictions, num_classes: int) -> dict:
    """Estimated and true error rates, of all labels and of each class."""
    label, wrong = np.zeros((2, num_classes))
    for _, known in found:
        judged = judged_pixels(known, num_classes)
        given = known["labels"][judged]
        label += np.bincount(given, minlength=num_classes)
        wrong += np.bincount(given, given != known["truth"][judged], minlength=num_classes)
    return {
        "estimate": content["error_rate"]["estimate"],
        "interval": content["error_rate"]["interval_90"],
        "truth": float(wrong.sum() / label.sum()),
        "calibration_error": content["against_truth"]["calibration_error"],
        "classes": {
            row["name"]: [row["error_rate"], float(wrong[i] / label[i]) if label[i] else None]
            for i, row in enumerate(content["classes"])
        },
    }


def labels_before_and_after(folder: pathlib.Path, seed: str) -> dict[str, float]:
    """Shares of wrong labels, and of the labels that were replaced, those that were wrong."""
    counts = np.zeros(6)
    sets = [
        input_pipeline.open_dataset(str(folder / f"{name}{seed}"), _DATASET.value).source
        for name in ("data", "cleaned")
    ]
    for before, after in zip(*sets, strict=True):
        season, truth = int(before["season"]), before["truth"]
        old, new = before["labels"][season], after["labels"][season]
        known = (old != sensors.IGNORE_LABEL) & (truth != sensors.IGNORE_LABEL)
        changed = known & (old != new)
        counts += [known.sum(), (known & (old != truth)).sum(), (known & (new != truth)).sum(),
                   changed.sum(), (changed & (old != truth)).sum(),
                   (changed & (new == truth)).sum()]  # fmt: skip
    known, before, after, changed, rightly, to_truth = counts.tolist()
    return {
        "wrong_before": before / known,
        "wrong_after": after / known,
        "changed": changed / known,
        "changed_was_wrong": rightly / max(changed, 1),
        "changed_is_right": to_truth / max(changed, 1),
    }


def main(_) -> None:
    """Prints the figures of each seed, the last line as JSON."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("absl").setLevel(logging.WARNING)
    logging.getLogger("cromss_jax.training").setLevel(logging.INFO)
    folder = pathlib.Path(_WORKDIR.value).absolute()
    results = {}
    for seed in _SEEDS.value:
        results[seed] = measure(folder, seed)
        print(json.dumps({seed: results[seed]}), flush=True)
    print(json.dumps({"dataset": _DATASET.value, "above": _ABOVE.value, "seeds": results}))


if __name__ == "__main__":
    app.run(main)
