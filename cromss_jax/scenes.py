"""Scenes as networks take them: opened, checked, scaled window by window, and mapped.

What `predict` does, without its flags. Files are read as data sets of scenes read them.
"""

import dataclasses
import datetime
import itertools
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

import cromss_jax
from cromss_jax import sensors
from cromss_jax.errors import UserError
from cromss_jax.legend import MAX_CLASSES, MIN_CLASSES, Legend
from cromss_jax.mapping import job, products, scene_map
from cromss_jax.mapping.cogs import Grid as MapGrid
from cromss_jax.networks import decoders
from cromss_jax.pretrained import Pretrained
from cromss_jax.training import devices, settings
from data_prep import errors, options
from data_prep.datasets import scene_images, scene_labels, scene_scan, scene_table
from data_prep.reading import bands, safe, warping

_log = logging.getLogger(__name__)
# Size of the pixels that networks are trained on, and by which factor others may differ from it.
_METRES, _MOST_OFF = 10.0, 1.5
# Of a scene whose date nothing says; it is shown nowhere.
NO_DATE = datetime.datetime.min
# Of the windows that are looked at before the map begins.
_SCAN_SIZE = 256


class SceneError(UserError):
    """A scene that a network cannot map. The message is for the user."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """A scene scaled to the grey levels that a network takes; a `scene_map.Scene`.

    Attributes:
      acquisition: its files.
      units: of their pixels.
      grid: of the map, that of the finest band.
      model: whose bands and scaling are used.
      modalities: that are there.
    """

    acquisition: scene_table.Acquisition
    units: scene_images.Units
    grid: warping.Grid
    model: Pretrained
    modalities: tuple[str, ...]

    @property
    def height(self) -> int:
        """In pixels."""
        return self.grid.height

    @property
    def width(self) -> int:
        """In pixels."""
        return self.grid.width

    def read(self, row: int, column: int, height: int, width: int) -> scene_map.Pixels:
        """The pixels of a window. Invalid ones get the neutral grey of data sets."""
        grid = self.grid.window(row, column, height, width)
        grey, valid = {}, {}
        for modality in self.modalities:
            names = self.model.bands[modality]
            if modality == "s1":
                found = scene_images.read_s1(self.acquisition, grid, self.units).in_order(names)
                pixels = found.pixels
            else:
                found = scene_images.read_s2(self.acquisition, grid, self.units).in_order(names)
                pixels = np.maximum(found.pixels - self.units.s2_offset, 0)
            usual = [sensors.BAND_STATISTICS[name][0] for name in names]
            filled = np.where(found.valid, pixels, np.reshape(usual, (-1, 1, 1)))
            # The scan has looked at the units.
            scaled = self.model.scale(dict(zip(names, filled, strict=True)))
            mask = np.moveaxis(found.valid, 0, -1)
            grey[modality] = np.where(mask, scaled, np.uint8(bands.NEUTRAL))
            valid[modality] = found.valid.all(axis=0)
        return scene_map.Pixels(grey, valid)

    def read_labels(
        self, row: int, column: int, height: int, width: int, legend: Legend
    ) -> np.ndarray:
        """The labels of a window by the nearest pixel of their map, uint8 [h, w].

        Raises:
          errors.BadFileError: if the map has values that the legend does not know.
        """
        grid = self.grid.window(row, column, height, width)
        return scene_labels.read(self.acquisition.labels, grid, legend)[0]

    @property
    def identity(self) -> dict[str, Any]:
        """What of the scene decides a map, as JSON: its files and the offset of Sentinel-2."""
        images = {}
        for layer in itertools.chain(*self.acquisition.s1, *self.acquisition.s2):
            seen = safe.file_of(layer.path).stat()
            key = f"{layer.path} {layer.name}"
            images[key] = [layer.index, seen.st_size, seen.st_mtime_ns]
        return {"images": images, "s2_offset": self.units.s2_offset}

    @property
    def map_grid(self) -> MapGrid:
        """The grid of its maps."""
        return MapGrid(self.height, self.width, self.grid.crs, self.grid.transform)


def open_scene(
    files_by_modality: Mapping[str, tuple[pathlib.Path, ...]],
    name: str,
    date: datetime.datetime,
    model: Pretrained,
    s2_offset: int | None,
) -> tuple[Scene, dict[str, Any]]:
    """Opens the files of a scene, and checks bands, order, units, offset and where they lie.

    Args:
      files_by_modality: of the scene; `labels` are those of its label map, if there is one.
      name: of the scene, for messages.
      date: of the Sentinel-2 image, or `NO_DATE`.
      model: that maps it.
      s2_offset: None to find it out.

    Returns:
      The scene, and what was found.

    Raises:
      SceneError: if the model cannot map it.
      errors.BadFileError: if a file cannot be used.
    """
    given = tuple(m for m in sensors.MODALITIES if files_by_modality.get(m))
    for modality in given:
        if modality not in model.bands:
            raise SceneError(
                f"{name} has --{modality}, but {model.source} is a {model.description}: leave it "
                "out, or choose other weights"
            )
    row = scene_table.Row(
        0, name, date, {c: files_by_modality.get(c, ()) for c in scene_table.COLUMNS[2:]}
    )
    choice = options.Options(
        s2_offset=s2_offset,
        modalities=given,
        max_days=float("inf"),
        s2_level="".join(_levels(model)[:1]),
    )
    try:
        acquisition = scene_table.acquisition(row, choice)
    except errors.BadFileError:
        # Bands without names are those of the network if their number is the same.
        own = dataclasses.replace(choice, s2_bands=model.bands.get("s2", ()))
        acquisition = scene_table.acquisition(row, own)
    _check_bands(acquisition, model)
    layer = (acquisition.s2 or acquisition.s1)[0][0]
    grid = warping.Grid(layer.crs, layer.transform, layer.height, layer.width)
    tiles = [
        grid.window(row, column, _SCAN_SIZE, _SCAN_SIZE)
        for row in range(0, grid.height, _SCAN_SIZE)
        for column in range(0, grid.width, _SCAN_SIZE)
    ]
    metres = layer.metres
    if metres and not 1 / _MOST_OFF < metres / _METRES < _MOST_OFF:
        _log.warning(
            "%s has pixels of %g m; networks are trained on %g m, and know others badly",
            name,
            metres,
            _METRES,
        )
    scan = scene_scan.scan(acquisition, tiles, choice)
    if isinstance(scan, errors.BadFileError):
        nameless = scan.reason.replace(f" {NO_DATE:%Y-%m-%d}", "")
        raise errors.BadFileError(scan.file, nameless)
    for finding in scan.findings:
        _log.info("%s: %s (%s)", finding.kind, finding.detail, finding.file)
    unknown = {"acquisition"} | ({"days apart"} if date == NO_DATE else set())
    facts = {k: v for k, v in scan.facts.items() if k not in unknown}
    return Scene(_only(acquisition, model), scan.units, grid, model, given), facts


def _check_bands(acquisition: scene_table.Acquisition, model: Pretrained) -> None:
    """Refuses Sentinel-2 images without the network's bands, or of another level."""
    if not acquisition.s2:
        return
    missing = [band for band in model.bands["s2"] if band not in acquisition.s2_bands]
    if missing:
        raise SceneError(
            f"{acquisition.scene} lacks {', '.join(missing)}, which {model.source} needs; it has "
            f"{', '.join(acquisition.s2_bands)}: give the files of all bands, or choose weights "
            "of those bands"
        )
    levels = _levels(model)
    if acquisition.s2_level and levels and levels != [acquisition.s2_level]:
        raise SceneError(
            f"{acquisition.scene} is {acquisition.s2_level}, {model.source} was trained on "
            f"{' and '.join(levels)}, whose values differ: give the {' or '.join(levels)} product"
        )


def _levels(model: Pretrained) -> list[str]:
    """The processing levels of Sentinel-2 that the weights say they were trained on."""
    scaling = (model.card.get("input") or {}).get("by_band", {})
    units = {str(scaling.get(band, {}).get("unit", "")) for band in model.bands.get("s2", ())}
    return [level for level in sensors.S2_STATISTICS if any(level in unit for unit in units)]


def _only(acquisition: scene_table.Acquisition, model: Pretrained) -> scene_table.Acquisition:
    """An acquisition with the bands that the network takes."""
    kept = tuple(
        tuple(layer for layer in group if layer.name in model.bands["s2"])
        for group in acquisition.s2
    )
    return dataclasses.replace(acquisition, s2=tuple(filter(None, kept)))


@dataclasses.dataclass(frozen=True)
class Task:
    """A scene to map; picklable.

    Attributes:
      name: of its folder; empty for the only scene.
      date: of the Sentinel-2 image, or `NO_DATE`.
      files: by modality.
      s2_offset: None to find it out.
      settings: how it is mapped.
      folder: to write to.
    """

    name: str
    date: datetime.datetime
    files: Mapping[str, tuple[pathlib.Path, ...]]
    s2_offset: int | None
    settings: job.Settings
    folder: pathlib.Path

    @property
    def is_done(self) -> bool:
        """Whether the map is finished."""
        return (self.folder / products.IDENTITY).exists()


def load(checkpoint: str, compiled: str) -> Pretrained:
    """Loads a network that maps, and prepares JAX for it.

    Args:
      checkpoint: a run, a checkpoint, or a file of weights.
      compiled: folder for what is compiled.

    Raises:
      SceneError: if it has no decoder, or too few or too many classes for a map.
      WeightsError, devices.DeviceError: if it cannot be loaded or used.
    """
    settings.use_default_numbers()
    settings.keep_compiled(compiled)
    devices.check()
    model = cromss_jax.load(checkpoint)
    for note in model.notes:
        _log.info("%s", note)
    if model.description.num_classes is None:
        raise SceneError(
            f"{model.source} holds a {model.description}, without decoder and head: fine-tune "
            "it, and give that run"
        )
    if not MIN_CLASSES <= model.description.num_classes <= MAX_CLASSES:
        raise SceneError(
            f"{model.source} tells {model.description.num_classes} classes apart: maps hold "
            f"{MIN_CLASSES} to {MAX_CLASSES}"
        )
    return model


def map_task(task: Task, model: Pretrained) -> None:
    """Opens and maps a scene; raises what `open_scene` and `job.make_map` raise."""
    name = task.name or "the scene"
    scene, facts = open_scene(task.files, name, task.date, model, task.s2_offset)
    predict(model, scene, facts, task.settings, task.folder)


def predict(
    model: Pretrained,
    scene: Scene,
    facts: Mapping[str, Any],
    chosen: job.Settings,
    folder: pathlib.Path,
) -> None:
    """Maps a scene; see `job.make_map`.

    Args:
      model: a whole network of the scene's modalities.
      scene: to map.
      facts: what was found out about it, for the summary.
      chosen: how.
      folder: to write to.
    """
    used = " and ".join(m.upper() for m in scene.modalities)
    told = {
        "weights": f"{model.source}, {model.description}",
        "input": used + ", geometric mean of both" * (len(scene.modalities) == 2),
        **{str(name): str(value) for name, value in facts.items()},
    }
    job.make_map(
        scene,
        scene.map_grid,
        job.Network(model.network, decoders.STRIDES[model.description.decoder], _legend(model)),
        chosen,
        folder,
        scene.identity,
        told,
    )


def _legend(model: Pretrained) -> dict[str, str]:
    """The classes with their colours; grey levels where none are known."""
    count = model.description.num_classes
    names = list(model.legend or [f"class {i}" for i in range(count)])
    greys = [
        f"#{level:02x}{level:02x}{level:02x}" for level in np.linspace(40, 220, count, dtype=int)
    ]
    known = list((model.legend or {}).values()) or [None] * count
    if None in known:
        _log.warning(
            "%s does not say the colours of its classes: they are shown in grey", model.source
        )
    return {name: colour or grey for name, colour, grey in zip(names, known, greys, strict=True)}
