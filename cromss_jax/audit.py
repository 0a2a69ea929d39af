"""Judges labels: `python -m cromss_jax.audit --checkpoint=RUN --data_dir=DIR --output=DIR`.

For every labelled pixel of a built data set the probability that its label is wrong, and the class
that it should be. Writes `report.md`, `report.json`; for each date of each location the maps
`wrong_probability.tif` (percent), `suggested.tif`, `given.tif` and `reason.tif`; from them the
polygons `suspects.gpkg`; and with --parcels a row for each parcel.

With --folds=K, K networks are pretrained like the run, each without one part of the locations, and
each location is judged by the one that never saw it.
"""

import json
import logging
import os
import pathlib
import sys

import ml_collections
import numpy as np
from absl import app, flags
from etils import epath

import cromss_jax
from cromss_jax import command_line, files, folds, lock
from cromss_jax.auditing import job, vectors
from cromss_jax.auditing.predictions import Predictor
from cromss_jax.data import input_pipeline
from cromss_jax.mapping.job import Network
from cromss_jax.networks import decoders
from cromss_jax.pretrained import Pretrained, WeightsError
from cromss_jax.training import devices, preemption, pretrain, run, settings, sharding
from data_prep.reading import proj

_log = logging.getLogger("cromss_jax")

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a pretraining run", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of data sets", required=True)
_DATASET = flags.DEFINE_string("dataset", "ssl4eo_s12_nol", "Name of the data set")
_SPLIT = flags.DEFINE_string("split", "train", "Split of the data set")
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
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Records on the devices at once", lower_bound=1)


class AuditError(ValueError):
    """A data set that cannot be audited as the flags say. The message is for the user."""


def _predictor(model: Pretrained, dataset: input_pipeline.TileDataset, mesh_size: int) -> Predictor:
    """A network on the records of a data set.

    Raises:
      AuditError: if it does not know the data set's classes.
    """
    names = tuple(model.legend or ())
    if names != dataset.legend.names:
        raise AuditError(
            f"{model.source} knows the classes {', '.join(names) or '(unknown)'}, the data set "
            f"{', '.join(dataset.legend.names)}: audit it by a network that was trained on it"
        )
    stride = decoders.STRIDES[model.description.decoder]
    network = Network(model.network, stride, dict(dataset.legend.pairs()))
    batch = -(-_BATCH_SIZE.value // mesh_size) * mesh_size
    return Predictor(dataset, network, model.bands, batch)


def _recipe(checkpoint: str) -> ml_collections.ConfigDict:
    """The configuration of a pretraining run, for the same data elsewhere.

    Raises:
      AuditError: if it is none.
    """
    path = files.absolute(checkpoint) / "config.json"
    if not path.exists():
        raise AuditError(f"{path} is missing: --folds needs the folder of a pretraining run")
    saved = json.loads(path.read_text(), object_hook=_tuples)
    if saved.get("mode") != "pretrain":
        raise AuditError(
            f"{checkpoint} is a run of mode {saved.get('mode')!r}: --folds needs a pretraining run"
        )
    config = ml_collections.ConfigDict(saved)
    config.data.dir, config.data.name = _DATA_DIR.value, _DATASET.value
    return config


def _tuples(fields: dict) -> dict:
    """JSON's lists as the tuples that configurations have."""
    return {
        k: tuple(tuple(x) if isinstance(x, list) else x for x in v) if isinstance(v, list) else v
        for k, v in fields.items()
    }


def audit(output: pathlib.Path) -> None:
    """Audits as the flags say.

    Raises:
      AuditError, vectors.VectorError, folds.FoldError, WeightsError, input_pipeline.DataError,
        run.ConfigError: each with a sentence.
      preemption.Preempted: after a signal; what was trained is saved.
    """
    polygons = None
    if _PARCELS.value:
        if not _MAPS.value:
            raise AuditError("--parcels are counted on the maps: leave out --maps=False")
        polygons = vectors.read(_PARCELS.value)
    dataset = input_pipeline.open_dataset(_DATA_DIR.value, _DATASET.value, _SPLIT.value)
    mesh_size = sharding.make_mesh().size
    facts = {"data set": f"{_DATASET.value}, {_SPLIT.value}, {dataset.num_locations} locations"}
    if _FOLDS.value:
        fold_of = folds.spatial_folds(dataset, _FOLDS.value, _BLOCK_KM.value)
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
    job.audit(
        dataset,
        lambda index: predictors[fold_of[index]].location(index),
        output,
        job.Settings(maps=_MAPS.value, above=_ABOVE.value, min_area=_MIN_AREA.value),
        facts,
        polygons,
    )
    _log.info("%s\n\n%s", output, (output / "report.md").read_text())


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
    except (
        AuditError,
        folds.FoldError,
        vectors.VectorError,
        WeightsError,
        input_pipeline.DataError,
        run.ConfigError,
        devices.DeviceError,
        OSError,
    ) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    preemption.watch(command_line.find_preemption_status)
    app.run(main, flags_parser=command_line.parse)
