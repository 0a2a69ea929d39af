"""One map from beginning to end: windows, prediction, files. `make_map` is what commands call."""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from cromss_jax.errors import UserError
from cromss_jax.mapping import blending, forward, products, scene_map, windows, work
from cromss_jax.mapping.cogs import Grid
from cromss_jax.training import sharding

_log = logging.getLogger(__name__)
# Windows in a batch of one device.
_BATCH = {"cpu": 4}
_ACCELERATOR_BATCH = 32
# Threads that read, unless it is said; each holds up to 200 MB.
NUM_THREADS = min(max(len(os.sched_getaffinity(0)), 2), 8)


class MapError(UserError):
    """A map that cannot be made as asked. The message is for the user."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a map is made.

    Attributes:
      write: layers beside the classes, of `blending.LAYERS`.
      window: side of a window in pixels.
      overlap: pixels that neighbouring windows share at least.
      augment: whether probabilities are averaged over eight flips and rotations.
      batch_size: windows in a batch, made a multiple of the devices; 0 for what suits them.
      num_threads: that read.
    """

    write: tuple[str, ...] = ()
    window: int = 256
    overlap: int = 64
    augment: bool = False
    batch_size: int = 0
    num_threads: int = NUM_THREADS

    def check(self, modalities: tuple[str, ...]) -> None:
        """Refuses settings that are not possible for a scene of these modalities.

        Raises:
          MapError: saying which.
        """
        unknown = sorted(set(self.write) - set(blending.LAYERS))
        if unknown:
            raise MapError(
                f"there is no layer {', '.join(unknown)}: choose from "
                f"{', '.join(blending.LAYERS[1:])}"
            )
        if not 0 <= self.overlap <= self.window // 2:
            raise MapError(
                f"windows of {self.window} pixels cannot overlap by {self.overlap}: choose an "
                f"overlap from 0 to {self.window // 2}, or larger windows"
            )
        if "agreement" in self.write and len(modalities) < 2:
            raise MapError(
                f"the layer agreement is of S1 and S2, the scene has {modalities[0].upper()} only: "
                "leave it out, or give both"
            )

    @property
    def windows(self) -> str:
        """How windows are cut, for summaries."""
        text = f"{self.window} pixels, overlap {self.overlap}"
        return text + ", averaged over eight flips and rotations" * self.augment

    def for_devices(self) -> "Settings":
        """The same with the number of windows in a batch that suits the devices."""
        mesh = sharding.make_mesh()
        wanted = self.batch_size or mesh.size * _BATCH.get(
            mesh.devices.flat[0].platform, _ACCELERATOR_BATCH
        )
        return dataclasses.replace(self, batch_size=-(-wanted // mesh.size) * mesh.size)


@dataclasses.dataclass(frozen=True)
class Network:
    """What maps.

    Attributes:
      module: float32, from images by modality to logits.
      stride: image sizes that suit it are multiples of it.
      legend: the names of its classes with their colours "#rrggbb".
    """

    module: nnx.Module
    stride: int
    legend: Mapping[str, str]

    def digest(self) -> str:
        """SHA-256 of its arrays."""
        found = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(self.module)):
            found.update(jax.tree_util.keystr(path).encode())
            found.update(np.asarray(leaf).tobytes())
        return found.hexdigest()


def identity_of(
    network: Network, settings: Settings, of_scene: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides a map, as JSON.

    Args:
      network: that maps.
      settings: of the devices.
      of_scene: what of the scene decides it, such as its files.
    """
    decisive = {k: v for k, v in dataclasses.asdict(settings).items() if k != "num_threads"}
    return json.loads(json.dumps({"checkpoint": network.digest(), **of_scene, **decisive}))


def predict(
    scene: scene_map.Scene,
    network: Network,
    settings: Settings,
    unfinished: work.Work,
    make_layers: scene_map.MakeLayers = blending.layers,
) -> None:
    """Predicts what is missing of a scene.

    Args:
      scene: to predict.
      network: that predicts.
      settings: how; for the devices.
      unfinished: where the layers go.
      make_layers: makes them from probabilities.
    """
    size = scene.height, scene.width
    cut = windows.cut_scene(*size, settings.window, settings.overlap)
    _log.info("%d x %d pixels, %d windows of %d x %d", *size, len(cut), *cut.shape)
    mesh = sharding.make_mesh()
    scene_map.map_scene(
        scene,
        cut,
        forward.make_forward(network.module, network.stride, mesh, augment=settings.augment),
        unfinished,
        num_classes=len(network.legend),
        batch_size=settings.batch_size,
        num_threads=settings.num_threads,
        make_layers=make_layers,
    )


def make_map(
    scene: scene_map.Scene,
    grid: Grid,
    network: Network,
    settings: Settings,
    folder: pathlib.Path,
    identity: Mapping[str, Any],
    facts: Mapping[str, str],
) -> None:
    """Makes a map, or goes on with one; does nothing where it is finished.

    Args:
      scene: to map.
      grid: where it lies.
      network: that maps it.
      settings: how.
      folder: to write to.
      identity: what else decides the map, such as the files of the scene, as JSON.
      facts: what the summary says about how the map was made.

    Raises:
      MapError, work.WorkError, lock.LockedError: if the map cannot be made.
    """
    settings.check(scene.modalities)
    names = tuple(n for n in blending.LAYERS if n == "classes" or n in settings.write)
    settings = dataclasses.replace(settings.for_devices(), write=names)
    identity = identity_of(network, settings, identity)
    if (folder / products.IDENTITY).exists():
        if work.read_json(folder / products.IDENTITY) != identity:
            raise MapError(
                f"{folder} holds the map of another command: delete it, or choose another --output"
            )
        _log.info("%s is finished", folder)
        return
    layers = products.describe(names, network.legend)
    bands = {layer.name: len(layer.bands) for layer in layers}
    size = scene.height, scene.width
    with work.opened(folder / "work", identity, size, bands) as unfinished:
        predict(scene, network, settings, unfinished)
        _log.info("writing %s", ", ".join(f"{name}.tif" for name in names))
        facts = {**facts, "windows": settings.windows}
        text = products.write(unfinished, layers, grid, network.legend, folder, facts)
    _log.info("%s\n\n%s", folder, text)
