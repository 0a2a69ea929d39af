"""Estimates what pretraining costs on a TPU slice, without the slice.

    python -m cromss_jax.plan --config=configs/pretrain.py --topology=v5e:4x4 [--config.x=y]

compiles the step that `cromss_jax.main` would run there and prints the compiler's figures: a table,
then JSON in the last line. Compiling takes minutes and needs libtpu (`pip install libtpu`).
`--topology=cpu:8` compiles for 8 simulated devices and needs no libtpu; it prints no times, because
CPUs have no published peak rates. The exit status is 1 if the step does not fit into memory.

Arithmetic and memory are the compiler's figures. A TPU's memory traffic is counted in the compiled
program (`costs.traffic`). All times are lower bounds: they assume a chip's published peak rates,
with arithmetic, memory and network fully overlapped, and leave out validation and checkpoints.
"""

import bisect
import dataclasses
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Sequence

import jax
import ml_collections
from absl import app, flags
from jax.experimental import topologies

from cromss_jax import command_line, files
from cromss_jax.costs import costs, table, traffic
from cromss_jax.data import description, input_pipeline
from cromss_jax.training import pretrain, pretrain_step, run, settings
from cromss_jax.training.state import TrainState

_CONFIG = command_line.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "A slice of v4, v5e, v5p or v6e, such as v5e:4x4; or cpu:8 for 8 simulated devices",
)
_NUM_LOCATIONS = flags.DEFINE_integer(
    "num_locations",
    None,
    "Number of locations in the data, validation included",
    lower_bound=1,
)
_TILE_SIZE = flags.DEFINE_integer(
    "data_tile_size", None, "Tile size in pixels at 10 m", lower_bound=1
)
_SEASONS = flags.DEFINE_integer(
    "data_seasons", None, "Largest number of seasons of a location", lower_bound=1
)
_SAMPLES_PER_SECOND_PER_CORE = flags.DEFINE_float(
    "samples_per_second_per_core",
    # Measured: 570 on two cores, records of 264 x 264 with four seasons, from a warm cache.
    285.0,
    "Samples per second that one thread reads; measure it by `python -m tests.bench.input`",
    lower_bound=1e-3,
)
_SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "If the batch does not fit, find the largest that does by compiling (minutes per attempt)",
)


class PlanError(ValueError):
    """The step cannot be compiled with these flags."""


def find_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a slice, which exist only for the compiler, or simulated CPU devices.

    Raises:
      PlanError: if the topology is unknown or libtpu is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        jax.config.update("jax_num_cpu_devices", int(shape))
        return jax.devices("cpu")
    if kind not in costs.CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise PlanError(
            f"--topology={topology} is not a slice; use one of {', '.join(costs.CHIPS)} and its "
            "shape, such as v5e:4x4 or v5p:2x2x1, or cpu:8 for eight simulated devices"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"--topology={topology} needs libtpu, the compiler for TPUs, which is not installed: "
            "run `pip install libtpu` (or the extra, `pip install -e .[plan]`), or use cpu:8"
        )
    # There is no TPU and no cloud metadata server here. Other processes may use libtpu, too.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # A v4 chip is one device in JAX only with this option; chips of the other types always are.
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PlanError(
            f"libtpu does not know --topology={topology} ({reason}); use another one, such as "
            "v5e:4x4 or v5p:2x2x1"
        ) from error


class OutOfMemory(Exception):
    """The step does not fit into the chips' memory.

    Attributes:
      needed: bytes per chip.
      available: bytes per chip.
    """

    def __init__(self, needed: float, available: float):
        super().__init__(f"needs {needed / costs.GIB:.2f} GiB of {available / costs.GIB:.2f}")
        self.needed = needed
        self.available = available


def out_of_memory(message: str) -> OutOfMemory | None:
    """Parses an XLA error message about the chip's memory; None for messages about other things."""
    # XLA has two wordings. In both, the first amount is the total, arguments included.
    size = r"([\d.]+)([KMGT])"
    wordings = (rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm")
    found = re.search(wordings[0], message) or re.search(wordings[1], message)
    if not found:
        return None
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needed, needed_unit, available, available_unit = found.groups()
    return OutOfMemory(float(needed) * scale[needed_unit], float(available) * scale[available_unit])


def num_rotated(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> float:
    """Mean number of samples that a chip rotates per step.

    It is the number of rounds of the step's only loop without a constant number of rounds.
    """
    return config.augmentation.rotation_probability * config.batch_size / mesh.size


def abstract_state(config: ml_collections.ConfigDict) -> TrainState:
    """Shapes of the training state."""
    return jax.eval_shape(lambda: pretrain_step.init_state(config, jax.random.key(config.seed)))


def compile_step(
    config: ml_collections.ConfigDict, described: description.Description, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
    """Compiles the training step for a mesh whose devices need not exist.

    Raises:
      OutOfMemory: if the step does not fit into the chips' memory.
    """
    train_step = pretrain.jit_train_step(
        config,
        pretrain_step.network_definition(config),
        description.num_train_locations(config, described),
        mesh,
    )
    records = description.record_shapes(described, config.modalities, config.batch_size)
    lowered = train_step.lower(abstract_state(config), records)
    # The code for simulated devices never runs, so optimising it would only cost minutes.
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if is_cpu else None
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if found := out_of_memory(str(error)):
            raise found from error
        raise


def search_batch(
    config: ml_collections.ConfigDict, described: description.Description, mesh: jax.sharding.Mesh
) -> int:
    """The largest number of images per chip that fits: bisection, one compile per attempt."""

    def overflows(images: int) -> bool:
        changed = ml_collections.ConfigDict(config)
        changed.batch_size = images * mesh.size
        try:
            compile_step(changed, described, mesh)
        except OutOfMemory as found:
            print(f"{images} images per chip do not fit: {found}", flush=True)
            return True
        print(f"{images} images per chip fit", flush=True)
        return False

    return bisect.bisect_left(range(1, config.batch_size // mesh.size), True, key=overflows)


def estimate_batch(config: ml_collections.ConfigDict, num_chips: int, full: OutOfMemory) -> int:
    """An estimate of `search_batch` without compiling.

    It assumes that all memory except state and gradients grows in proportion to the batch.
    """
    state = abstract_state(config)
    fixed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, state.params)))
    share = (full.available - fixed) / (full.needed - fixed)
    return max(int(share * (config.batch_size // num_chips)), 0)


def _too_large(
    full: OutOfMemory, images: int, num_chips: int, is_compiled: bool
) -> dict[str, object]:
    """The figures of a step that does not fit, with the largest number of images that does."""
    return {
        "fits": False,
        "memory": {"peak": full.needed},
        "memory_available": full.available,
        "largest_images_a_chip": images,
        "largest_batch_size": images * num_chips,
        "largest_is": "compiled" if is_compiled else "estimated",
    }


def make_plan(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    per_core: float,
    search: bool = False,
    **overrides: int | None,
) -> dict[str, object]:
    """Compiles the step and returns the plan's figures, which `table.markdown` prints.

    Args:
      config: the configuration.
      topology: the slice, as for `find_devices`.
      per_core: samples per second that one core reads.
      search: whether to compile for smaller batches if this one does not fit.
      **overrides: as for `description.describe`.

    Raises:
      PlanError, DataError, files.PathError, run.ConfigError: each with a message for the user.
    """
    if config.mode != "pretrain":
        raise PlanError(
            f"config.mode is {config.mode!r}, but only pretraining can be planned: use "
            "--config=configs/pretrain.py"
        )
    config = ml_collections.FrozenConfigDict(config)
    described = description.describe(config, **overrides)
    pretrain.check_config(config, described.tile_size)
    config = run.describe_data(config, described)
    mesh = run.make_mesh(config.num_devices, config.batch_size, find_devices(topology))
    chip = costs.CHIPS.get(topology.partition(":")[0])
    train_locations = description.num_train_locations(config, described)
    figures = {
        "topology": topology,
        "data": described.source,
        "tile_size": described.tile_size,
        "seasons": described.seasons,
        "train_locations": train_locations,
        "num_epochs": config.num_epochs,
        "chips": mesh.size,
        "batch_size": config.batch_size,
        "images_a_chip": config.batch_size // mesh.size,
    }
    started = time.perf_counter()
    try:
        compiled = compile_step(config, described, mesh)
    except OutOfMemory as full:
        if search:
            images = search_batch(config, described, mesh)
        else:
            images = estimate_batch(config, mesh.size, full)
        return figures | _too_large(full, images, mesh.size, search)
    figures["compile_seconds"] = round(time.perf_counter() - started, 1)
    cost = costs.measure(
        compiled, is_tpu=chip is not None, unknown_rounds=num_rotated(config, mesh)
    )
    figures |= {"fits": True, **dataclasses.asdict(cost)}
    if chip is None:
        return figures
    figures["memory_available"] = chip.memory
    figures |= costs.bounds(
        cost,
        chip,
        num_chips=mesh.size,
        batch_size=config.batch_size,
        num_samples=config.num_epochs * train_locations,
    )
    figures["reading"] = costs.reading(
        figures["images_per_second"],
        chip,
        num_chips=mesh.size,
        num_threads=config.data.num_threads,
        per_core=per_core,
    )
    return figures


def main(arguments: list[str]) -> None:
    """Prints the plan. Errors that the user can fix are printed as one sentence, exit code 1."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    settings.use_default_numbers()
    jax.config.update("jax_platforms", "cpu")  # nothing runs, so no accelerator is needed
    try:
        figures = make_plan(
            _CONFIG.value,
            _TOPOLOGY.value,
            per_core=_SAMPLES_PER_SECOND_PER_CORE.value,
            search=_SEARCH.value,
            num_locations=_NUM_LOCATIONS.value,
            tile_size=_TILE_SIZE.value,
            seasons=_SEASONS.value,
        )
    except (
        PlanError,
        input_pipeline.DataError,
        files.PathError,
        run.ConfigError,
        traffic.UnreadableProgram,
    ) as error:
        sys.exit(f"error: {error}")
    print(table.markdown(figures), end="\n\n")
    print(json.dumps(figures))
    if not figures["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=command_line.parse)
