"""Maps a scene: `python -m cromss_jax.predict --checkpoint=RUN --s2=SCENE --output=DIR`.

Writes `classes.tif`, what `--write` names beside it, and `summary.md`. Interrupted, the same
command goes on.
"""

import hashlib
import logging
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from absl import app, flags

import cromss_jax
from cromss_jax import files, sensors
from cromss_jax.mapping import areas, blending, cogs, forward, scene_map, styles, windows, work
from cromss_jax.networks import decoders
from cromss_jax.pretrained import Pretrained, WeightsError
from cromss_jax.training import devices, run, settings, sharding
from data_prep import errors
from data_prep.reading import bands, plain_scene

_log = logging.getLogger("cromss_jax")

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a run or of a checkpoint, or a file of weights", required=True
)
_S2 = flags.DEFINE_string("s2", None, "Sentinel-2 image of the scene")
_S1 = flags.DEFINE_string("s1", None, "Sentinel-1 image, brought onto the grid of --s2")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write to", required=True)
_WRITE = flags.DEFINE_list(
    "write",
    [],
    f"Layers beside classes: {', '.join(blending.LAYERS[1:])}; agreement is that of S1 and S2",
)
_WINDOW = flags.DEFINE_integer("window", 256, "Side of a window in pixels", lower_bound=32)
_OVERLAP = flags.DEFINE_integer(
    "overlap", 64, "Pixels that neighbouring windows share", lower_bound=0
)
_AUGMENT = flags.DEFINE_boolean(
    "augment", False, "Average over flips and rotations: eight times the work"
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 0, "Windows in a batch; 0: 4 a device on CPUs, 32 on others", lower_bound=0
)
_NUM_THREADS = flags.DEFINE_integer(
    "num_threads", max(2, len(os.sched_getaffinity(0))), "Threads that read", lower_bound=1
)
_S2_OFFSET = flags.DEFINE_string(
    "s2_offset", "auto", "Subtracted from raw Sentinel-2 pixels; auto finds it out"
)


class PredictError(ValueError):
    """A scene that cannot be mapped as the flags say. The message is for the user."""


class GreyScene:
    """A scene scaled to the grey levels that a network takes."""

    def __init__(self, scene: plain_scene.PlainScene, model: Pretrained):
        self.height, self.width, self.modalities = scene.height, scene.width, scene.modalities
        self._scene, self._model = scene, model

    def read(self, row: int, column: int, height: int, width: int) -> scene_map.Pixels:
        """See `scene_map.Scene`. Invalid pixels get the neutral grey of data sets."""
        grey, valid = {}, {}
        for modality in self.modalities:
            names = self._model.bands[modality]
            pixels, mask = self._scene.values(modality, row, column, height, width)
            usual = np.array([sensors.BAND_STATISTICS[name][0] for name in names])
            filled = np.where(mask[..., None], pixels, usual.astype(pixels.dtype))
            scaled = self._model.grey_levels(filled, names)
            grey[modality] = np.where(mask[..., None], scaled, np.uint8(bands.NEUTRAL))
            valid[modality] = mask
        return scene_map.Pixels(grey, valid)
