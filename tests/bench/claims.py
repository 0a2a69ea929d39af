"""The paper's claims in miniature: `python -m tests.bench.claims --workdir=DIR`.

Pretrains ResNet-18 U-Nets on the sample world's noisy labels in each of the ways that the paper
compares, and transfers their encoders to few clean tiles of other locations of the same world.
Recipes are those of `configs/*.py:sample`. Every run is a run of `cromss_jax.main`'s loops, in a
folder of its own; the same command continues where it stopped. Hours on two cores: `--setting` and
`--only` run some.
"""

import dataclasses
import itertools
import json
import pathlib
import shutil
import subprocess
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags, logging

from configs import finetune as finetune_config
from configs import pretrain as pretrain_config
from cromss_jax import files
from cromss_jax.method import metrics
from cromss_jax.results import report
from cromss_jax.training import finetune, memory
from cromss_jax.training import pretrain as pretraining
from tests import runs

_WORKDIR = flags.DEFINE_string("workdir", None, "Where all runs go", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each kind, each pretrained and transferred")
_LOCATIONS = flags.DEFINE_integer("locations", 64, "Locations to pretrain on")
_TILES = flags.DEFINE_integer("tiles", 96, "Clean tiles, half to train on")
_TRAIN_TILES = flags.DEFINE_integer("train_tiles", 16, "Clean tiles in use, drawn by the seed")
_ONLY = flags.DEFINE_list("only", None, "Names of the ways to run; all by default")
_SETTING = flags.DEFINE_enum(
    "setting", None, ["sample", "few", "memorised"], "Runs the ways of one setting"
)

TILE_SIZE, DOWNSTREAM_TILE_SIZE = 132, 96


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to pretrain.

    Attributes:
      variant: of configs/pretrain.py; "" if encoders are randomly initialised.
      changes: fields beside it.
      modalities: whose encoders are transferred.
      encoders: how the downstream task treats them.
      decoders: what is trained on them. PSPNet reads the first half of an encoder, U-Net all of it.
      against: the ways that it is compared with, seed by seed.
    """

    variant: str = "sample"
    changes: dict = dataclasses.field(default_factory=dict)
    modalities: tuple[str, ...] = ("s1", "s2")
    encoders: tuple[str, ...] = ("frozen", "trained")
    decoders: tuple[str, ...] = ("pspnet",)
    against: tuple[str, ...] = ("random",)


# A network can memorise the wrong labels here: each of a few views comes 50 times. Epochs and
# ramp are the paper's; the learning rate falls as far as in the sample's 14 epochs.
OVERFITTING = {
    "data.dir": "few",
    "data.crop_size": 64,
    "num_epochs": 200,
    "augmentation.flip_probability": 0.0,
    "augmentation.rotation_probability": 0.0,
    "schedule.decay": 0.8 ** (14 / 200),
    "selection.ramp_epochs": 80,
    "eval_every_epochs": 40,
    "checkpoint_every_epochs": 100,
}
# Twice as long and never slower: by then it does.
MEMORISING = {**OVERFITTING, "num_epochs": 400, "schedule.name": "constant"}
FEW_LOCATIONS, FEW_TILE_SIZE = 12, 66
BOTH_DECODERS = ("pspnet", "unet")


def few_locations(variant: str, changes: dict, *against: str, decoders=("pspnet",)) -> Way:
    """A way on the few locations, of which the frozen S2 encoder is transferred."""
    return Way(variant, changes, ("s2",), ("frozen",), decoders, against)


WAYS = {
    "random": Way(""),
    "noisy labels": Way("sample,selection=off", {"loss.consistency": "none"}),
    "noisy labels + consistency": Way("sample,selection=off"),
    "CromSS mid": Way(against=("random", "noisy labels + consistency")),
    "CromSS late": Way("sample,fusion=late"),
    "CromSS S1 alone": Way("sample,modality=s1", modalities=("s1",)),
    "CromSS S2 alone": Way("sample,modality=s2", modalities=("s2",)),
    "clean labels": Way(
        "sample,selection=off", {"data.dir": "clean"}, against=("random", "noisy labels")
    ),
    "random by both decoders": few_locations("", {}, "random", decoders=BOTH_DECODERS),
    "no selection (few locations)": few_locations("sample,selection=off", OVERFITTING, "random"),
    "CromSS mid (few locations)": few_locations(
        "sample", OVERFITTING, "random", "no selection (few locations)"
    ),
    "no selection S2 alone (memorised)": few_locations(
        "sample,modality=s2,selection=off",
        MEMORISING,
        "random by both decoders",
        decoders=BOTH_DECODERS,
    ),
    "CromSS S2 alone (memorised)": few_locations(
        "sample,modality=s2",
        MEMORISING,
        "no selection S2 alone (memorised)",
        decoders=BOTH_DECODERS,
    ),
    # Half of the labels are more than the right ones that are easy to tell; a fifth are fewer.
    "CromSS S2 alone keeping a fifth (memorised)": few_locations(
        "sample,modality=s2",
        {**MEMORISING, "selection.final_keep_fraction": 0.2},
        "no selection S2 alone (memorised)",
        decoders=BOTH_DECODERS,
    ),
}


def ways_of(setting: str) -> list[str]:
    """The ways of a setting, with what they are compared with."""
    few = [name for name in WAYS if name.endswith("(few locations)")]
    memorised = ["random by both decoders", *(n for n in WAYS if n.endswith("(memorised)"))]
    if setting == "few":
        return ["random", *few]
    if setting == "memorised":
        return memorised
    return [name for name in WAYS if name not in few + memorised]


# Beside where the data are, all that differs from the samples' recipes.
LOGGING = {"log_every_steps": 7, "eval_every_epochs": 14, "checkpoint_every_epochs": 14}


def make_data(folder: pathlib.Path) -> None:
    """Noisy labels, the same locations with clean ones, and clean tiles of other locations."""
    if (folder / "made").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    noisy, clean, few, tiles = (
        folder / f"{name}_tifs" for name in ("noisy", "clean", "few", "tiles")
    )
    samples = (
        {"output_dir": noisy, "locations": _LOCATIONS.value, "tile_size": TILE_SIZE, "seed": 0},
        {"output_dir": few, "locations": FEW_LOCATIONS, "tile_size": FEW_TILE_SIZE, "seed": 0},
        {"output_dir": tiles, "locations": _TILES.value, "tile_size": DOWNSTREAM_TILE_SIZE,
         "seed": 1, "format": "dfc2020"},
    )  # fmt: skip
    for sample in samples:
        subprocess.run(runs.command("data_prep.sample", **sample), check=True, cwd=runs.ROOT)
    shutil.copytree(noisy, clean)
    for truth in clean.glob("dw_noisy_labels/*/*/truth.tif"):
        shutil.copy(truth, truth.with_name("label.tif"))
    for dataset, source, name in (
        ("ssl4eo_s12_nol", noisy, "noisy"),
        ("ssl4eo_s12_nol", clean, "clean"),
        ("ssl4eo_s12_nol", few, "few"),
        ("dfc2020", tiles, "tiles"),
    ):
        flags_ = {"dataset": dataset, "source_dir": source, "data_dir": folder / name}
        subprocess.run(runs.command("data_prep.build", **flags_), check=True, cwd=runs.ROOT)
    (folder / "made").touch()


def pretrain(way: str, seed: int, folder: pathlib.Path) -> None:
    """One pretraining run."""
    workdir = folder / way / str(seed)
    if (workdir / "results.md").exists():
        return
    changes = {**LOGGING, "data.dir": "noisy", "seed": seed, **WAYS[way].changes}
    changes["data.dir"] = str(folder / "data" / changes["data.dir"])
    config = pretrain_config.get_config(WAYS[way].variant)
    config.update_from_flattened_dict(changes)
    pretraining.pretrain(config, str(workdir))
    jax.clear_caches()


def transfer(
    way: str, modality: str, encoder: str, decoder: str, folder: pathlib.Path
) -> list[float]:
    """One finetuning run, all seeds: mIoU in percent on the test tiles."""
    workdir = folder / way / f"{modality}_{encoder}_{decoder}"
    if not (workdir / "results.json").exists():
        variant = f"task=dfc2020,sample,input={modality},encoder={encoder}"
        config = finetune_config.get_config(variant)
        changes = {
            "data.dir": str(folder / "data" / "tiles"),
            "data.num_train_tiles": _TRAIN_TILES.value,
            "init_from": str(folder / way / "{seed}") if WAYS[way].variant else "",
            "weights_name": way,
            "network.decoder": decoder,
        }
        config.update_from_flattened_dict(changes)
        config.seeds = tuple(range(_SEEDS.value))
        finetune.finetune(config, str(workdir))
        jax.clear_caches()
    results = json.loads((workdir / "results.json").read_text())
    return [100 * metrics.scores(np.array(found))["miou"] for found in results["confusions"]]


def wrong_share(way: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """By modality, the share of wrong labels among what is selected: [seeds, epochs]."""
    found: dict[str, list] = {}
    for seed in range(_SEEDS.value):
        lines = files.read_metrics(folder / way / str(seed) / "metrics.jsonl")
        lines = [line for line in lines if line["split"] == "train"]
        for modality in ("s1", "s2"):
            name = f"wrong_labels_selected/{modality}"
            values = [line[name] for line in lines if name in line]
            if values:
                found.setdefault(modality, []).append(values)
    return {modality: np.array(values) for modality, values in found.items()}


def summary(values: Sequence[float]) -> dict[str, object]:
    """Mean and standard deviation over the seeds, and the values."""
    figures = {"mean": round(float(np.mean(values)), 2), "seeds": np.round(values, 2).tolist()}
    if len(values) > 1:
        figures["std"] = round(float(np.std(values, ddof=1)), 2)
    return figures


def main(_) -> None:
    """Runs what is missing, then prints the tables; the last line is JSON."""
    memory.keep_freed_memory()
    logging.set_verbosity(logging.WARNING)
    folder = pathlib.Path(_WORKDIR.value).absolute()
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    make_data(folder / "data")
    ways = _ONLY.value or (ways_of(_SETTING.value) if _SETTING.value else list(WAYS))
    mious: dict[tuple[str, str, str, str], list[float]] = {}
    for way in ways:
        for seed in range(_SEEDS.value) if WAYS[way].variant else ():
            pretrain(way, seed, folder)
        kinds = itertools.product(WAYS[way].modalities, WAYS[way].encoders, WAYS[way].decoders)
        for modality, encoder, decoder in kinds:
            found = transfer(way, modality, encoder, decoder, folder)
            mious[way, modality, encoder, decoder] = found
            print(f"{way}, {modality}, {encoder}, {decoder}: {np.round(found, 1)}", flush=True)
    figures = {
        "miou": {"/".join(kind): summary(found) for kind, found in mious.items()},
        "differences": {},
        "wrong_labels_selected": {},
    }
    for modality in ("s1", "s2"):
        cells: dict[tuple[str, str, str], dict[str, list[float]]] = {}
        for (way, input_, encoder, decoder), found in mious.items():
            if input_ == modality:
                cells.setdefault((decoder, modality, way), {})[encoder] = [x / 100 for x in found]
        if cells:
            print(report.transfer_table(cells))
    for (way, *kind), found in mious.items():
        for against in WAYS[way].against:
            other = mious.get((against, *kind))
            if other and way != against:
                name = "/".join([f"{way} minus {against}", *kind])
                difference = figures["differences"][name] = summary(np.subtract(found, other))
                print(f"{name}: {difference}")
    for way in ways:
        if not WAYS[way].variant:
            continue
        for modality, shares in wrong_share(way, folder).items():
            mean = 100 * shares.mean(0)
            print(
                f"{way}, {modality}, wrong labels among the selected, % by epoch: "
                + " ".join(f"{x:.1f}" for x in mean)
            )
            known = {"first": mean[0], "lowest": mean.min(), "last": mean[-1]}
            known = {name: round(float(value), 2) for name, value in known.items()}
            figures["wrong_labels_selected"][f"{way}/{modality}"] = known
    print(json.dumps(figures))


if __name__ == "__main__":
    app.run(main)
