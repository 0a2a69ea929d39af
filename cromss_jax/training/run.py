"""Around the loops: what configurations may say, a run's folder, its first weights, its end."""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib.metadata
import json
import logging
import platform
import signal
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from cromss_jax import files, package
from cromss_jax.data import input_pipeline
from cromss_jax.training import sharding
from cromss_jax.training.state import TrainState
from cromss_jax.weights import files as weight_files
from cromss_jax.weights import torch_keys
from cromss_jax.weights.network import PARTS, Network, Weights
from cromss_jax.weights.transfer import transfer

_log = logging.getLogger(__name__)

# What may change between the start of a run and its continuation.
_FREE_TO_CHANGE = ("num_epochs", "num_devices", "num_pictures", "save_predictions")
_FREE_TO_CHANGE += ("seeds", "weights_name")
_FREE_PREFIXES = ("log_every", "checkpoint", "data.dir", "data.num_threads")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


class NonFiniteLossError(ValueError):
    """The loss or its gradient became infinite or NaN."""


class Preempted(Exception):
    """Told to stop (SIGTERM); everything is saved, and the same command continues."""


class ConfigError(ValueError):
    """The configuration cannot be run."""


def keep_freed_memory() -> None:
    """Has this process keep the memory that it frees, for its next allocation.

    Call it before there are other threads. XLA's CPU backend allocates a program's temporaries,
    gigabytes for a training step, at each call and frees them after it. By default glibc gives them
    back to the system, which must then clear every page again. Where the C library is another than
    glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        # Threads' own arenas are given back whatever the threshold.
        mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """Has Python not look for garbage meanwhile, for where a step is traced.

    Tracing makes a great many objects and keeps nearly all of them. Python looks through them again
    and again: 1.5 s of a second start of the sample.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def check_fields(
    config: ml_collections.ConfigDict,
    counts: Iterable[str],
    shares: Iterable[str],
    choices: Mapping[str, Iterable],
) -> None:
    """Checks single fields of a configuration.

    Args:
      config: the configuration.
      counts: fields that must be at least 1, as in "data.num_threads".
      shares: fields that must be from 0 to 1, such as probabilities.
      choices: by field, what it may be; of a tuple, each of its values.

    Raises:
      ConfigError: naming the first field that is wrong.
    """

    def field(name: str):
        return functools.reduce(lambda node, key: node[key], name.split("."), config)

    for name in counts:
        if field(name) < 1:
            raise ConfigError(f"config.{name} is {field(name)}; it must be at least 1")
    for name in shares:
        if not 0 <= field(name) <= 1:
            raise ConfigError(f"config.{name} is {field(name)}; it must be from 0 to 1")
    for name, known in choices.items():
        value = field(name)
        values = value if isinstance(value, tuple) else (value,)
        if not values or not set(values) <= set(known):
            raise ConfigError(
                f"config.{name} is {value!r}; choose from {', '.join(map(str, known))}"
            )


def check_sizes(crop_size: int, tile_size: int, stride: int) -> None:
    """Raises ConfigError for a crop that the tiles don't have or the network can't take."""
    if crop_size > tile_size:
        raise ConfigError(
            f"config.data.crop_size is {crop_size} but the data set's tiles have {tile_size} "
            "pixels; make it at most that"
        )
    if crop_size % stride or crop_size < stride:
        raise ConfigError(
            f"config.data.crop_size is {crop_size}; the networks need a multiple of {stride}, "
            f"such as {max(crop_size // stride, 1) * stride}"
        )


def make_mesh(
    num_devices: int, batch_size: int, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """The mesh of `config.num_devices`, which must be there and share the batch equally.

    Args:
      num_devices: of the configuration.
      batch_size: of all devices together.
      devices: to choose from; those of all processes unless given.

    Raises:
      ConfigError: if not.
    """
    devices = jax.devices() if devices is None else devices
    if not 0 <= num_devices <= len(devices):
        raise ConfigError(
            f"config.num_devices is {num_devices} but {len(devices)} devices were "
            "found; set it to 0 to use all that there are"
        )
    if num_devices and jax.process_count() > 1 and num_devices < len(devices):
        raise ConfigError(
            f"config.num_devices is {num_devices} of {len(devices)} devices of "
            f"{jax.process_count()} processes, some of which would have none; set it to 0"
        )
    mesh = sharding.make_mesh(num_devices, devices)
    if batch_size % mesh.size:
        raise ConfigError(
            f"config.batch_size is {batch_size}, which {mesh.size} devices cannot share "
            f"equally; use a multiple of {mesh.size} or set config.num_devices"
        )
    return mesh


def _flat(config: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def check_same_everywhere(**found: str) -> None:
    """Checks that all processes found the same, such as the data.

    Args:
      **found: by what it is called.

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
    """Refuses to mix two runs; process 0 writes the resolved configuration and the versions.

    Raises:
      ConfigError: if the folder holds a run of another configuration.
    """
    path = workdir / "config.json"
    resolved = json.loads(config.to_json())
    # Before its first checkpoint a run has nothing that a change could spoil.
    if path.exists() and any(p.name.isdigit() for p in (workdir / "checkpoints").glob("*")):
        before, now = _flat(json.loads(path.read_text())), _flat(resolved)
        changed = [
            f"{name} from {before.get(name)} to {now.get(name)}"
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
    devices = [f"{len(jax.devices())} x {jax.devices()[0].device_kind}"]
    versions |= {"devices": devices, "processes": jax.process_count()}
    files.write_whole(workdir / "versions.json", (json.dumps(versions, indent=2) + "\n").encode())


def check_progress(done: int, num_steps: int, folder: epath.Path) -> None:
    """Raises ConfigError for a run that went further than it now shall."""
    if done > num_steps:
        raise ConfigError(
            f"{folder} holds step {done}, and config.num_epochs now ends at step {num_steps}; use "
            "at least as many epochs, or another --workdir"
        )


def stop_if_bad(
    state: TrainState,
    dataset: input_pipeline.TileDataset,
    records: Sequence[np.ndarray],
    newest: int | None,
    what: str,
) -> None:
    """Stops a run whose loss is not finite.

    Args:
      state: after some steps.
      dataset: that is trained on.
      records: indices of the records of each step's batch.
      newest: step of the newest checkpoint.
      what: a record's place is called, in the plural.

    Raises:
      NonFiniteLossError: naming the batch.
    """
    first_bad = int(jax.device_get(state.first_bad_step))
    if first_bad < 0:
        return
    ids = [dataset.source[int(i)]["location_id"].decode() for i in records[first_bad]]
    raise NonFiniteLossError(
        f"the loss or its gradient was not finite at step {first_bad}, on the batch of "
        f"{what} {', '.join(ids)}; checkpoints (newest: step {newest}) are "
        f"from before that: look at those {what}, or lower config.optimizer.learning_rate"
    )


class Preemption:
    """Notices SIGTERM, so that the loop can save and leave. Use as a context."""

    def __enter__(self) -> "Preemption":
        """Starts noticing."""
        self._told = False
        # With several processes JAX's own service notices, and all of them agree on a step.
        self._previous = None
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *unused) -> None:
        """Gives the signal back."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _notice(self, *unused) -> None:
        self._told = True

    def reached(self, step_number: int) -> bool:
        """Whether to save at this step and leave."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step_number)
        return self._told


def start_from(
    path: str,
    network: Network,
    state: TrainState,
    placement: jax.sharding.NamedSharding,
    parts: Sequence[str] = PARTS,
) -> TrainState:
    """Takes over weights for a network's parts, and says which.

    Args:
      path: a run's folder, one of its checkpoints, or a file.
      network: what `state` is of.
      state: freshly drawn.
      placement: where the weights go.
      parts: which of `weights.PARTS` may be taken.

    Raises:
      weights.WeightsError: if they cannot be read or don't fit.
    """
    groups = (state.params, state.batch_stats)
    initial = {k: v for group in groups for k, v in torch_keys.to_torch_state(group).items()}
    source = weight_files.load(path)
    started, sentences = transfer(source, Weights(network, initial), parts)
    _log.info("starting from %s, a %s", path, source.network)
    for sentence in (*source.notes, *sentences):
        _log.info("  %s", sentence)
    return put_weights(started, state, placement)


def put_weights(
    found: Weights, state: TrainState, placement: jax.sharding.NamedSharding
) -> TrainState:
    """The state with other weights, of the same network."""
    params, batch_stats = (
        torch_keys.from_torch_state({k: found.arrays[k] for k in torch_keys.keys(group)}, group)
        for group in (state.params, state.batch_stats)
    )
    return dataclasses.replace(
        state,
        params=jax.device_put(params, placement),
        batch_stats=jax.device_put(batch_stats, placement),
    )
