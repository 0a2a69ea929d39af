"""Estimates what pretraining costs on a TPU slice or on GPUs, without them.

    python -m cromss_jax.plan --config=configs/pretrain.py --topology=v5e:4x4 [--config.x=y]
    python -m cromss_jax.plan --config=configs/pretrain.py --topology=h100:2x8 [--config.x=y]

compiles the step that `cromss_jax.main` would run there and prints its figures: a table, then JSON
in the last line. Compiling takes minutes. TPUs need libtpu (`pip install libtpu`), GPUs JAX's CUDA
plugin and nvcc (the extra `plan-gpu`). `--topology=cpu:8` compiles for 8 simulated devices and
needs neither; it prints no times, because CPUs have no published peak rates. The exit status is 1
if the step does not fit into memory.

Memory is the compiler's figure, as is a TPU's arithmetic. The memory traffic and a GPU's arithmetic
and launches are counted in the compiled program (`costs.traffic`). cuDNN chooses its algorithms and
their workspaces on the GPU, so they are not among the figures. All times are lower bounds: they
assume a chip's published peak rates, with arithmetic, memory and network fully overlapped and
launches that take no time, and leave out checkpoints.
"""

import bisect
import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from cromss_jax import command_line
from cromss_jax.costs import chips, costs, table
from cromss_jax.data import description
from cromss_jax.errors import UserError
from cromss_jax.networks import decoders
from cromss_jax.training import loop, pretrain, pretrain_step, run, settings
from cromss_jax.training.state import TrainState

_CONFIG = command_line.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "A TPU slice of v4, v5e, v5p or v6e, such as v5e:4x4; a100, h100, h200 or l40s with the number "
    "of GPUs, such as h100:8, or h100:2x8 for 2 hosts; or cpu:8 for 8 simulated devices",
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


# The code never runs, so optimising it would only cost minutes. In jax 0.10.2 the compiler for GPUs
# fails at some matrix products if it may use Triton for them.
_COMPILER_OPTIONS = {
    "cpu": {"xla_backend_optimization_level": 0},
    "gpu": {
        "xla_backend_optimization_level": 0,
        "xla_gpu_disable_gpuasm_optimizations": True,
        "xla_gpu_enable_triton_gemm": False,
    },
}


class PlanError(UserError):
    """The step cannot be compiled with these flags."""


def find_chip(topology: str) -> chips.Chip | None:
    """The chip of a topology; None for simulated devices.

    Raises:
      PlanError: if the topology is not one.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        return None
    if kind in chips.TPUS and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        return chips.TPUS[kind]
    if kind not in chips.GPUS or not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", shape):
        raise PlanError(
            f"--topology={topology} is neither a TPU slice nor a number of GPUs; use one of "
            f"{', '.join(chips.TPUS)} and its shape, such as v5e:4x4 or v5p:2x2x1, one of "
            f"{', '.join(chips.GPUS)} and the number of GPUs, such as h100:8, or h100:2x8 for 2 "
            "hosts, or cpu:8 for eight simulated devices"
        )
    gpu = chips.GPUS[kind]
    num_hosts, a_host = _hosts_of_gpus(topology)
    if a_host > gpu.host_chips:
        needed = -(-num_hosts * a_host // gpu.host_chips)
        raise PlanError(
            f"--topology={topology} has {a_host} GPUs in a host, but a host has at most "
            f"{gpu.host_chips}; write the number of hosts first, such as "
            f"{kind}:{needed}x{gpu.host_chips}"
        )
    return gpu


def _hosts_of_gpus(topology: str) -> tuple[int, int]:
    """Number of hosts, GPUs of each: (2, 8) for h100:2x8, (1, 8) for h100:8."""
    num_hosts, _, a_host = topology.partition(":")[2].rpartition("x")
    return int(num_hosts or 1), int(a_host)


def find_devices(topology: str) -> Sequence[jax.Device]:
    """Devices that exist only for the compiler, TPUs or GPUs, or simulated CPU devices.

    Raises:
      PlanError: if the topology is unknown or the compiler for it is not installed.
    """
    chip = find_chip(topology)
    if chip is None:
        jax.config.update("jax_num_cpu_devices", int(topology.partition(":")[2]))
        return jax.devices("cpu")
    return _gpus(topology, chip) if chip.is_gpu else _tpus(topology)


def _tpus(topology: str) -> Sequence[jax.Device]:
    """The devices of a TPU slice."""
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"--topology={topology} needs libtpu, the compiler for TPUs, which is not installed: "
            "run `pip install libtpu` (or the extra, `pip install -e .[plan]`), or use cpu:8"
        )
    # There is no TPU and no cloud metadata server here. Other processes may use libtpu, too.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # A v4 chip is one device in JAX only with this option; chips of the other types always are.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PlanError(
            f"libtpu does not know --topology={topology} ({reason}); use another one, such as "
            "v5e:4x4 or v5p:2x2x1"
        ) from error


def _gpus(topology: str, gpu: chips.Chip) -> Sequence[jax.Device]:
    """GPUs of one or several hosts."""
    remedy = "run `pip install -e .[plan-gpu]`, or use cpu:8"
    if not any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        raise PlanError(
            f"--topology={topology} needs JAX's CUDA plugin, which is not installed: {remedy}"
        )
    num_hosts, a_host = _hosts_of_gpus(topology)
    try:
        devices = topologies.get_topology_desc(
            platform="cuda",
            topology=f"1x{num_hosts}x{a_host}",  # the first is a number of NVLink domains
            target_config=chips.target_config(gpu),
        ).devices
        # A small function that needs all that the step needs, which takes minutes to get there.
        alone = jax.sharding.SingleDeviceSharding(devices[0])
        x = jax.ShapeDtypeStruct((8,), np.float32, sharding=alone)
        jax.jit(jax.numpy.exp).lower(x).compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PlanError(
            f"the compiler for --topology={topology} does not work ({reason}); it needs JAX's CUDA "
            f"plugin in the version of jax, {jax.__version__}, and nvcc: {remedy}"
        ) from error
    return devices


def count_hosts(topology: str, chip: chips.Chip, num_chips: int) -> int:
    """Number of host machines of so many chips of a topology."""
    a_host = _hosts_of_gpus(topology)[1] if chip.is_gpu else chip.host_chips
    return -(-num_chips // a_host)


def memory_fraction() -> float:
    """The share of a GPU's memory that JAX takes, from the environment as JAX reads it.

    Raises:
      PlanError: if the variable is not a share.
    """
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        if text := os.environ.get(name):
            if not re.fullmatch(r"0?\.\d*[1-9]\d*|1(\.0*)?", text):
                raise PlanError(
                    f"{name}={text} is not a share of memory: set it to a number above 0 and up to "
                    "1, such as 0.9"
                )
            return float(text)
    return 0.75


class OutOfMemory(Exception):
    """The step does not fit into the memory of a chip.

    Attributes:
      needed: bytes per chip.
      available: bytes per chip.
    """

    def __init__(self, needed: float, available: float):
        super().__init__(f"needs {needed / chips.GIB:.2f} GiB of {available / chips.GIB:.2f}")
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

    It is the number of rounds of the only loop without a constant number of them, in a TPU's step.
    """
    return config.augmentation.rotation_probability * config.batch_size / mesh.size


def num_validations(config: ml_collections.ConfigDict, train_locations: int) -> int:
    """How often a run validates, if it has locations for that."""
    return len(loop.Schedule(config, train_locations, validates=True).eval_steps)


def abstract_state(config: ml_collections.ConfigDict) -> TrainState:
    """Shapes of the training state."""
    return jax.eval_shape(lambda: pretrain_step.init_state(config, jax.random.key(config.seed)))


def compile_step(
    config: ml_collections.ConfigDict,
    described: description.Description,
    mesh: jax.sharding.Mesh,
    available: float = math.inf,
) -> jax.stages.Compiled:
    """Compiles the training step for a mesh whose devices need not exist.

    Args:
      config: the configuration.
      described: the data.
      mesh: the devices.
      available: bytes that a device has for the step. The compiler for TPUs knows it by itself.

    Raises:
      OutOfMemory: if the step does not fit into the chips' memory.
    """
    train_step = pretrain.jit_train_step(
        config,
        pretrain_step.network_definition(config),
        description.split_sizes(config, described)[0],
        mesh,
    )
    records = description.record_shapes(described, config.modalities, config.batch_size)
    lowered = train_step.lower(abstract_state(config), records)
    try:
        options = _COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if found := out_of_memory(str(error)):
            raise found from error
        raise
    needed = costs.memory(compiled)["peak"]
    if needed > available:
        raise OutOfMemory(needed, available)
    return compiled


def search_batch(
    config: ml_collections.ConfigDict,
    described: description.Description,
    mesh: jax.sharding.Mesh,
    available: float = math.inf,
) -> int:
    """The largest number of images per chip that fits: bisection, one compile per attempt.

    The arguments are those of `compile_step`. The number is a multiple of `config.microbatches`.
    """
    parts = config.microbatches

    def overflows(images: int) -> bool:
        changed = ml_collections.ConfigDict(config)
        changed.batch_size = images * mesh.size
        try:
            compile_step(changed, described, mesh, available)
        except OutOfMemory as found:
            print(f"{images} images per chip do not fit: {found}", flush=True)
            return True
        print(f"{images} images per chip fit", flush=True)
        return False

    sizes = range(parts, config.batch_size // mesh.size, parts)
    return parts * bisect.bisect_left(sizes, True, key=overflows)


def estimate_batch(config: ml_collections.ConfigDict, num_chips: int, full: OutOfMemory) -> int:
    """An estimate of `search_batch` without compiling.

    It assumes that all memory except state and gradients grows in proportion to the batch. The
    number is a multiple of `config.microbatches`.
    """
    state = abstract_state(config)
    fixed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, state.params)))
    if full.available <= fixed:
        return 0
    share = (full.available - fixed) / (full.needed - fixed)
    images = int(share * (config.batch_size // num_chips))
    return images - images % config.microbatches


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


def _bounds(
    cost: costs.Cost,
    config: ml_collections.ConfigDict,
    described: description.Description,
    chip: chips.Chip,
    num_hosts: int,
    num_chips: int,
    per_core: float,
) -> dict[str, object]:
    """The figures about time: `costs.bounds` of the whole run, and `costs.reading`."""
    train_locations, num_scored = description.split_sizes(config, described)
    found = costs.bounds(
        cost,
        chip,
        num_chips=num_chips,
        batch_size=config.batch_size,
        num_samples=config.num_epochs * train_locations,
        num_validated=num_validations(config, train_locations) * num_scored,
        num_hosts=num_hosts if chip.is_gpu else 1,
    )
    found["reading"] = costs.reading(
        found["images_per_second"],
        chip,
        num_chips=num_chips,
        num_hosts=num_hosts,
        num_threads=config.data.num_threads,
        per_core=per_core,
    )
    return found


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
      topology: the slice or GPUs, as for `find_devices`.
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
    pretrain.check_fields(config)
    stride = decoders.STRIDES[config.network.decoder]
    described = description.describe(config, **overrides).padded_to(stride)
    pretrain.check_config(config, described.tile_size)
    config = run.describe_data(config, described)
    mesh = run.make_mesh(config.num_devices, config.batch_size, find_devices(topology))
    run.check_microbatches(config.batch_size, config.microbatches, mesh.size)
    chip = find_chip(topology)
    figures = {
        "topology": topology,
        "data": described.source,
        "tile_size": described.tile_size,
        "seasons": described.seasons,
        "train_locations": description.split_sizes(config, described)[0],
        "num_epochs": config.num_epochs,
        "chips": mesh.size,
        "batch_size": config.batch_size,
        "images_a_chip": config.batch_size // mesh.size,
        "rematerialised": config.rematerialise,
    }
    available = math.inf
    if chip and chip.is_gpu:
        figures["memory_fraction"] = memory_fraction()
        available = figures["memory_fraction"] * chip.memory
    started = time.perf_counter()
    try:
        compiled = compile_step(config, described, mesh, available)
    except OutOfMemory as full:
        if search:
            images = search_batch(config, described, mesh, available)
        else:
            images = estimate_batch(config, mesh.size, full)
        return figures | _too_large(full, images, mesh.size, search)
    figures["compile_seconds"] = round(time.perf_counter() - started, 1)
    platform = "cpu" if chip is None else "gpu" if chip.is_gpu else "tpu"
    figures["unknown_rounds"] = num_rotated(config, mesh)
    cost = costs.measure(compiled, platform=platform, unknown_rounds=figures["unknown_rounds"])
    figures |= {"fits": True, **dataclasses.asdict(cost)}
    if chip is None:
        return figures
    figures["memory_available"] = available if chip.is_gpu else chip.memory
    num_hosts = count_hosts(topology, chip, mesh.size)
    return figures | _bounds(cost, config, described, chip, num_hosts, mesh.size, per_core)


def main(arguments: list[str]) -> None:
    """Prints the plan. Errors that the user can fix are printed as one sentence, exit code 1."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    settings.use_default_numbers()
    jax.config.update("jax_platforms", "cpu")  # nothing runs, so no accelerator is needed
    # Programs for GPUs that are not there cannot be read back from a cache.
    jax.config.update("jax_enable_compilation_cache", False)
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
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table.markdown(figures), end="\n\n")
    print(json.dumps(figures))
    if not figures["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=command_line.parse)
