"""What configurations may say, the devices they ask for, and a run's folder."""

import functools
import importlib.metadata
import json
import math
import platform
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from cromss_jax import files, package, presets, sensors
from cromss_jax.errors import UserError
from cromss_jax.legend import Legend
from cromss_jax.training import devices as accelerators
from cromss_jax.training import sharding
from cromss_jax.weights.layouts import name_bands
from cromss_jax.weights.network import WeightsError

# What may change between the start of a run and its continuation.
_FREE_TO_CHANGE = ("num_epochs", "num_devices", "num_pictures", "save_predictions")
_FREE_TO_CHANGE += ("seeds", "weights_name", "data.max_bad_records")
_FREE_PREFIXES = ("log_every", "checkpoint", "data.dir", "data.num_threads")
# Fields that runs of earlier versions lack, with the values that they ran with.
_ADDED = {"init_from_bands": [], "microbatches": 1, "rematerialise": False, "deterministic": False}
_ADDED |= {"data.max_bad_records": 0, "network.num_classes": len(presets.DYNAMIC_WORLD)}
_ADDED |= {"legend": [list(pair) for pair in presets.DYNAMIC_WORLD.pairs()]}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class ConfigError(UserError):
    """The configuration cannot be run."""


# What a number may be, by the words of the message. A NaN is nothing of this.
_RANGES: Mapping[str, Callable[[float], bool]] = {
    "at least 0": lambda value: 0 <= value < math.inf,
    "at least 1": lambda value: 1 <= value < math.inf,
    "above 0": lambda value: 0 < value < math.inf,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "from 0 to below 1": lambda value: 0 <= value < 1,
    "above 0 and at most 1": lambda value: 0 < value <= 1,
    "above 0 and below 1": lambda value: 0 < value < 1,
    "from 0 to 180": lambda value: 0 <= value <= 180,
    "from 0 to 2^63 - 1": lambda value: 0 <= value < 1 << 63,
}


def check_fields(
    config: ml_collections.ConfigDict,
    ranges: Mapping[str, Iterable[str]],
    choices: Mapping[str, Iterable],
) -> None:
    """Checks single fields of a configuration.

    Args:
      config: the configuration.
      ranges: names of fields, such as "data.num_threads", by what they must be, one of `_RANGES`.
      choices: the allowed values by field; of a field that is a tuple, those of its elements.

    Raises:
      ConfigError: naming the first field that is wrong.
    """

    def field(name: str):
        return functools.reduce(lambda node, key: node[key], name.split("."), config)

    for rule, names in ranges.items():
        for name in names:
            if not _RANGES[rule](field(name)):
                raise ConfigError(f"config.{name} is {field(name)}; it must be {rule}")
    for name, known in choices.items():
        value = field(name)
        values = value if isinstance(value, tuple) else (value,)
        if not values or not set(values) <= set(known):
            raise ConfigError(
                f"config.{name} is {value!r}; choose from {', '.join(map(str, known))}"
            )
        if len(set(values)) < len(values):
            raise ConfigError(f"config.{name} is {value!r}; name each once")


class DataSays(Protocol):
    """What of a data set determines networks and losses: a `TileDataset` or a `Description`.

    Attributes:
      legend: the classes.
      bands: of the imagery, with their scaling.
    """

    legend: Legend
    bands: tuple[sensors.Band, ...]


def describe_data(
    config: ml_collections.ConfigDict, data: DataSays
) -> ml_collections.FrozenConfigDict:
    """The configuration with what its data set says: classes, legend and bands.

    Args:
      config: the configuration.
      data: the data set.

    Returns:
      The configuration with `network.num_classes`, `legend` (name and colour of each class) and
      `imagery` (rows of `sensors.Band`).

    Raises:
      ConfigError: if the data set lacks a modality or band that the configuration asks for.
    """
    name, asked = config.data.name, {m: sensors.S1_BANDS for m in config.modalities}
    if "s2" in asked:
        asked["s2"] = tuple(config.s2_bands)
    for modality, wanted in asked.items():
        found = [band.name for band in data.bands if band.modality == modality]
        if not found:
            other = data.bands[0].modality
            variant = "modality" if config.mode == "pretrain" else "input"
            raise ConfigError(
                f"the data set {name} has no {modality.upper()}, only {other.upper()}: choose "
                f"{variant}={other}"
            )
        missing = [band for band in wanted if band not in found]
        if missing:
            shown = tuple(band for band in wanted if band in found) or tuple(found)
            raise ConfigError(
                f"the data set {name} has no {modality.upper()} band {', '.join(missing)}, only "
                f"{', '.join(found)}: set config.s2_bands to some of these, such as "
                f'--config.s2_bands="{shown}"'
            )
    described = ml_collections.ConfigDict(config)
    with described.unlocked():
        described.network.num_classes = len(data.legend)
        described.legend = data.legend.pairs()
        described.imagery = tuple(band.to_row() for band in data.bands)
    return ml_collections.FrozenConfigDict(described)


def init_bands(config: ml_collections.ConfigDict) -> dict[str, tuple[str, ...]] | None:
    """The bands of `config.init_from` by modality, None if the configuration names none.

    Raises:
      ConfigError: if they are no bands of one sensor, or if there is no `config.init_from`.
    """
    if not config.init_from_bands:
        return None
    if not config.init_from:
        raise ConfigError(
            f"config.init_from_bands is {config.init_from_bands}, the bands of config.init_from, "
            "which is empty; set both or neither"
        )
    # A flag without brackets, B2,B3,B4, comes as one text.
    names = [name for text in config.init_from_bands for name in str(text).split(",")]
    try:
        return name_bands(names)
    except WeightsError as error:
        raise ConfigError(f"config.init_from_bands: {error}") from error


def check_sizes(crop_size: int, tile_size: int, stride: int) -> None:
    """Raises ConfigError for a crop larger than the tiles, or of no multiple of the stride."""
    if crop_size > tile_size:
        raise ConfigError(
            f"config.data.crop_size is {crop_size} but the data set's tiles have {tile_size} "
            "pixels; use a crop of at most that size"
        )
    if crop_size % stride or crop_size < stride:
        raise ConfigError(
            f"config.data.crop_size is {crop_size}; the networks need a multiple of {stride}, "
            f"such as {max(crop_size // stride, 1) * stride}"
        )


def make_mesh(
    num_devices: int, batch_size: int, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """The mesh of the devices that the batch is split over.

    Args:
      num_devices: `config.num_devices`; 0 takes all devices.
      batch_size: the global batch size.
      devices: the devices to choose from; by default those of all processes.

    Raises:
      ConfigError: if there are fewer devices, or if they do not divide the batch.
    """
    devices = jax.devices() if devices is None else devices
    if not 0 <= num_devices <= len(devices):
        raise ConfigError(
            f"config.num_devices is {num_devices} but {len(devices)} devices were "
            "found; set it to 0 to use all of them"
        )
    if num_devices and jax.process_count() > 1 and num_devices < len(devices):
        raise ConfigError(
            f"config.num_devices is {num_devices} of {len(devices)} devices of "
            f"{jax.process_count()} processes, so some would have none; set it to 0"
        )
    mesh = sharding.make_mesh(num_devices, devices)
    if batch_size % mesh.size:
        raise ConfigError(
            f"config.batch_size is {batch_size}, but the batch must be divisible by the number of "
            f"devices, {mesh.size}; use a multiple of {mesh.size} or set config.num_devices"
        )
    return mesh


def check_microbatches(batch_size: int, microbatches: int, num_devices: int) -> None:
    """Raises ConfigError unless microbatches of equal size can be split over the devices."""
    if batch_size % (microbatches * num_devices):
        raise ConfigError(
            f"config.batch_size is {batch_size}, but it must be divisible by config.microbatches, "
            f"{microbatches}, times the number of devices, {num_devices}; use a multiple of "
            f"{microbatches * num_devices} or fewer microbatches"
        )


def _flat(config: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _short(value: object) -> str:
    """The beginning of a value that may be a legend of many classes."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_same_everywhere(**found: str) -> None:
    """Checks that all processes found the same, such as the data.

    Args:
      **found: what this process found, as text, under the name that an error shall call it.

    Raises:
      ConfigError: naming what differs.
    """
    sums = np.array([zlib.crc32(text.encode()) for text in found.values()], np.uint32)
    different = np.ptp(multihost_utils.process_allgather(sums), axis=0) > 0
    if different.any():
        names = [name.replace("_", " ") for name, bad in zip(found, different, strict=True) if bad]
        raise ConfigError(
            f"the processes differ in their {' and '.join(names)}; start all of them with the "
            "same flags and with the same data"
        )


def record_config(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Writes the resolved configuration and the versions, on process 0, unless runs would mix.

    Raises:
      ConfigError: if the folder holds a run of another configuration.
    """
    path = workdir / "config.json"
    resolved = json.loads(config.to_json())
    # Before its first checkpoint a run has nothing that a change could spoil.
    if path.exists() and any(p.name.isdigit() for p in (workdir / "checkpoints").glob("*")):
        now = _ADDED | _flat(resolved)
        # Runs of earlier versions do not say their bands; the digest of their records decides.
        added = _ADDED | {"imagery": now.get("imagery")}
        try:
            before = added | _flat(json.loads(path.read_bytes()))
        except (ValueError, AttributeError) as error:
            raise ConfigError(
                f"{path} is damaged ({error}): restore it, or delete it if the configuration is "
                "still that which the run began with"
            ) from error
        changed = [
            f"{name} from {_short(before.get(name))} to {_short(now.get(name))}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
            and name not in _FREE_TO_CHANGE
            and not name.startswith(_FREE_PREFIXES)
        ]
        if changed:
            raise ConfigError(
                f"{workdir} holds a run of another configuration: changed {', '.join(changed)}; "
                "use the same configuration to continue it, or another --workdir"
            )
    if jax.process_index() > 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, (json.dumps(resolved, indent=2) + "\n").encode())
    versions = {"python": platform.python_version(), "cromss_jax": package.version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    found = [f"{len(jax.devices())} x {jax.devices()[0].device_kind}"]
    versions |= {"devices": found, "processes": jax.process_count()} | accelerators.versions()
    files.write_whole(workdir / "versions.json", (json.dumps(versions, indent=2) + "\n").encode())


def check_progress(done: int, num_steps: int, folder: epath.Path) -> None:
    """Raises ConfigError if a run has taken more steps than the configuration asks for."""
    if done > num_steps:
        raise ConfigError(
            f"{folder} holds step {done}, but config.num_epochs ends at step {num_steps}; use at "
            "least as many epochs as before, or another --workdir"
        )
