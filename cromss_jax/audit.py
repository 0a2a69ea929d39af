"""Judges labels: `python -m cromss_jax.audit --checkpoint=RUN --data_dir=DIR --output=DIR`.

For every labelled pixel of a built data set the probability that its label is wrong, and the class
that it should be. Writes `report.md`, `report.json`; for each date of each location the maps
`wrong_probability.tif` (percent), `suggested.tif`, `given.tif` and `reason.tif`; from them the
polygons `suspects.gpkg`; and with --parcels a row for each parcel.

With --folds=K, K networks are pretrained like the run, each without one part of the locations, and
each location is judged by the one that never saw it.

Instead of --data_dir: `--s2=SCENE --labels=MAP --legend=LEGEND` judges a map on one scene, which
needs no data set. The maps are of the whole scene.
"""

import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import app, flags
from etils import epath

import cromss_jax
from cromss_jax import audit_scene, command_line, files, folds, lock, scenes
from cromss_jax.auditing import job, subjects, vectors
from cromss_jax.auditing.predictions import Predictor
from cromss_jax.data import input_pipeline
from cromss_jax.errors import UserError
from cromss_jax.legend import Legend
from cromss_jax.mapping.job import Network
from cromss_jax.networks import decoders
from cromss_jax.pretrained import Pretrained
from cromss_jax.training import devices, preemption, pretrain, settings, sharding
from data_prep.datasets import scene_table
from data_prep.reading import legends, proj

_log = logging.getLogger("cromss_jax")

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a run, or with a scene a file of weights", required=True
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of data sets")
_DATASET = flags.DEFINE_string("dataset", "ssl4eo_s12_nol", "Name of the data set")
_SPLIT = flags.DEFINE_string("split", "train", "Split of the data set")
_S2 = flags.DEFINE_string(
    "s2",
    None,
    "Instead of --data_dir: a Sentinel-2 image, as a file, a .SAFE product, or several files "
    "separated by ;",
)
_S1 = flags.DEFINE_string("s1", None, "Sentinel-1 image, brought onto the grid of --s2")
_LABELS = flags.DEFINE_string(
    "labels", None, "Of a scene: its land-cover map, brought onto the grid by the nearest pixel"
)
_LEGEND = flags.DEFINE_string(
    "legend", None, "Of a scene: the classes of --labels, as data_prep.build takes them"
)
_S2_OFFSET = flags.DEFINE_integer(
    "s2_offset",
    None,
    "Of a scene: subtracted from raw Sentinel-2 pixels; found out where it is not given",
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write to", required=True)
_FOLDS = flags.DEFINE_integer(
    "folds",
    0,
    "Networks to pretrain, each location being judged by one that never saw it; 0: the run judges",
    lower_bound=0,
)
_BLOCK_KM = flags.DEFINE_float(
    "block_km", 50.0, "Folds: locations of a block of this side share their fold", lower_bound=0.1
)
_MAPS = flags.DEFINE_boolean("maps", True, "Whether maps and suspects are written, too")
_ABOVE = flags.DEFINE_float(
    "above",
    job.Settings.above,
    "Suspects: labels that are wrong with this probability or more",
    lower_bound=0.01,
    upper_bound=1,
)
_MIN_AREA = flags.DEFINE_float(
    "min_area", job.Settings.min_area, "Suspects: smallest polygon in hectares", lower_bound=0
)
_PARCELS = flags.DEFINE_string(
    "parcels", None, "GeoPackage, shapefile or GeoJSON of polygons; each gets a row in parcels.gpkg"
)
_PREEMPTION_STATUS = command_line.define_preemption_status()
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "Records, or windows of a scene, on the devices at once; 4 records or what suits the devices",
    lower_bound=1,
)
_RECORDS = 4
# Flags of one of the two forms alone.
_OF_SCENES = ("s2", "s1", "labels", "legend", "s2_offset")
_OF_DATA_SETS = ("dataset", "split", "folds", "block_km")


class AuditError(UserError):
    """What cannot be audited as the flags say. The message is for the user."""


def _network(model: Pretrained, legend: Legend, what: str) -> Network:
    """A network that judges labels of a legend.

    Raises:
      AuditError: if it does not know its classes.
    """
    names = tuple(model.legend or ())
    if names != legend.names:
        raise AuditError(
            f"{model.source} knows the classes {', '.join(names) or '(unknown)'}, {what} "
            f"{', '.join(legend.names)}: audit it by a network of these classes"
        )
    stride = decoders.STRIDES[model.description.decoder]
    return Network(model.network, stride, dict(legend.pairs()))


def _predictor(model: Pretrained, dataset: input_pipeline.TileDataset, mesh_size: int) -> Predictor:
    """A network on the records of a data set; raises what `_network` raises."""
    network = _network(model, dataset.legend, "the data set")
    batch = -(-(_BATCH_SIZE.value or _RECORDS) // mesh_size) * mesh_size
    return Predictor(dataset, network, model.bands, batch)


def _recipe(checkpoint: str) -> ml_collections.ConfigDict:
    """The configuration of a pretraining run, for the same data elsewhere.

    Raises:
      AuditError: if it is none.
    """
    path = files.absolute(checkpoint) / "config.json"
    if not path.exists():
        raise AuditError(f"{path} is missing: --folds needs the folder of a pretraining run")
    try:
        saved = _tuples(files.parse_json(path.read_bytes()))
    except ValueError as error:
        raise AuditError(f"{path} is damaged ({error}): give another run") from error
    if saved.get("mode") != "pretrain":
        raise AuditError(
            f"{checkpoint} is a run of mode {saved.get('mode')!r}: --folds needs a pretraining run"
        )
    config = ml_collections.ConfigDict(saved)
    config.data.dir, config.data.name = _DATA_DIR.value, _DATASET.value
    return config


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that configurations have."""
    if isinstance(value, dict):
        return {name: _tuples(own) for name, own in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _keep_folds(folder: pathlib.Path, fold_of: np.ndarray) -> None:
    """Writes down who was left out of which network, for the same command to go on.

    Args:
      folder: of the networks.
      fold_of: [N] the fold of each location.

    Raises:
      AuditError: if networks of other folds are there: they know what they would judge.
    """
    path = epath.Path(folder / f"{_FOLDS.value}_folds.json")
    wanted = json.dumps(fold_of.tolist()).encode()
    if path.exists() and path.read_bytes() != wanted:
        raise AuditError(
            f"{folder} holds networks that know other locations, as of another --block_km: give "
            "the same flags, or choose another --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, wanted)


def _given(names: Sequence[str]) -> list[str]:
    """Those of some flags that the command line has."""
    return [name for name in names if flags.FLAGS[name].present]


def _check_form() -> None:
    """Refuses flags of both forms, and of none.

    Raises:
      AuditError: naming them.
    """
    if _DATA_DIR.value:
        if of_scenes := _given(_OF_SCENES):
            raise AuditError(
                f"--data_dir and --{of_scenes[0]} are given: audit a data set, or a map on a scene"
            )
        return
    if _FOLDS.value:
        raise AuditError(
            f"--folds={_FOLDS.value} trains on a data set: give its --data_dir; python -m "
            "data_prep.build --dataset=scenes builds one of a scene"
        )
    needed = {"s2": _S2.value or _S1.value, "labels": _LABELS.value, "legend": _LEGEND.value}
    missing = [f"--{name}" for name, value in needed.items() if not value]
    if missing:
        raise AuditError(
            f"{', '.join(missing)} not given: name a data set by --data_dir, or a scene by --s2, "
            "its map by --labels, and the map's classes by --legend"
        )
    if of_data_sets := _given(_OF_DATA_SETS):
        raise AuditError(f"--{of_data_sets[0]} is for a data set: leave it out with a scene")


def _audit_scene(
    output: pathlib.Path, chosen: job.Settings, polygons: vectors.Polygons | None
) -> None:
    """Audits the map of a scene; raises what `audit_scene.audit` raises."""
    legend = legends.read_legend(_LEGEND.value)
    here = pathlib.Path.cwd()
    named = {"s2": _S2.value, "s1": _S1.value, "labels": _LABELS.value}
    found = {
        name: scene_table.find_files(here, f"--{name}", text)
        for name, text in named.items()
        if text
    }
    model = scenes.load(_CHECKPOINT.value, str(output))
    network = _network(model, legend, f"the map (--legend={_LEGEND.value})")
    audit_scene.audit(
        model,
        network,
        found,
        legend,
        output,
        chosen,
        s2_offset=_S2_OFFSET.value,
        batch_size=_BATCH_SIZE.value or 0,
        polygons=polygons,
    )


def audit(output: pathlib.Path) -> None:
    """Audits as the flags say.

    Raises:
      AuditError and others, see `main`: each with a sentence.
      preemption.Preempted: after a signal; what was trained is saved.
    """
    polygons = None
    if _PARCELS.value:
        if not _MAPS.value:
            raise AuditError("--parcels are counted on the maps: leave out --maps=False")
        polygons = vectors.read(os.fspath(files.absolute(_PARCELS.value)))
    chosen = job.Settings(maps=_MAPS.value, above=_ABOVE.value, min_area=_MIN_AREA.value)
    if _DATA_DIR.value:
        _audit_data_set(output, chosen, polygons)
    else:
        _audit_scene(output, chosen, polygons)
    _log.info("%s\n\n%s", output, (output / "report.md").read_text())


def _audit_data_set(
    output: pathlib.Path, chosen: job.Settings, polygons: vectors.Polygons | None
) -> None:
    """Audits a data set, by networks of folds if there are any."""
    dataset = input_pipeline.open_dataset(_DATA_DIR.value, _DATASET.value, _SPLIT.value)
    mesh_size = sharding.make_mesh().size
    if not chosen.maps and (output / "maps").exists():
        raise AuditError(
            f"{output / 'maps'} is of an earlier audit, and would be taken for maps of this one: "
            "delete it, or choose another --output"
        )
    facts = {"data set": f"{_DATASET.value}, {_SPLIT.value}, {dataset.num_locations} locations"}
    if _FOLDS.value:
        fold_of = folds.spatial_folds(dataset, _FOLDS.value, _BLOCK_KM.value)
        _keep_folds(output / "folds", fold_of)
        predictors = []
        for fold in range(_FOLDS.value):
            workdir = str(output / "folds" / f"{fold}_of_{_FOLDS.value}")
            _log.info("fold %d of %d, in %s", fold + 1, _FOLDS.value, workdir)
            excluded = np.flatnonzero(fold_of == fold)
            pretrain.pretrain(_recipe(_CHECKPOINT.value), workdir, excluded)
            predictors.append(_predictor(cromss_jax.load(workdir), dataset, mesh_size))
        facts["judged by"] = (
            f"{_FOLDS.value} networks like {_CHECKPOINT.value}, each on locations that it never saw"
        )
    else:
        fold_of = np.zeros(dataset.num_locations, int)
        predictors = [_predictor(cromss_jax.load(_CHECKPOINT.value), dataset, mesh_size)]
        facts["judged by"] = (
            f"{_CHECKPOINT.value}, which was trained on these labels and judges them too kindly: "
            "with --folds=2 each is judged by a network that never saw it"
        )
    subject = subjects.DataSet(
        dataset, lambda index: predictors[fold_of[index]].location(index), output
    )
    job.audit(subject, output, chosen, facts, polygons)


def main(arguments: list[str]) -> None:
    """Audits what the flags name; a sentence and exit code 1 for what the user can mend."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    command_line.log_progress()
    command_line.quieten_orbax()
    try:
        if files.in_bucket(_OUTPUT.value):
            raise AuditError(f"--output={_OUTPUT.value}: a local folder is needed")
        if _FOLDS.value == 1:
            raise AuditError("--folds=1 would train on nothing: give 2 or more, or 0")
        _check_form()
        output = pathlib.Path(os.fspath(files.absolute(_OUTPUT.value)))
        proj.check()
        settings.use_default_numbers()
        settings.keep_compiled(str(output))
        devices.check()
        with lock.held(epath.Path(output / lock.NAME)):
            audit(output)
    except preemption.Preempted as interruption:
        _log.info("%s", interruption)
        sys.exit(_PREEMPTION_STATUS.value)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    preemption.watch(command_line.find_preemption_status)
    app.run(main, flags_parser=command_line.parse)
