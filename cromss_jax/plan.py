"""What pretraining will cost on a TPU slice, found out without one.

    python -m cromss_jax.plan --config=configs/pretrain.py --topology=v5e:4x4 [--config.x=y]

compiles the very step that `cromss_jax.main` would run there, which takes minutes and needs libtpu
(`pip install libtpu`), and prints what the compiler knows of it: a table, and as last line JSON.
`--topology=cpu:8` compiles for so many simulated devices and needs nothing; there are no times
then, as no peaks are published. The exit status is 1 if the step does not fit.

Arithmetic and memory are the compiler's figures, a TPU's memory traffic is reckoned from the
compiled program (`traffic`). All times are bounds as far as these hold: at a chip's published
peaks, with arithmetic, memory and network perfectly overlapped, validation and checkpoints left
out.
"""

import bisect
import dataclasses
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags
from jax.experimental import topologies

from cromss_jax import command_line, files, sensors
from cromss_jax.costs import costs, traffic
from cromss_jax.data import input_pipeline
from cromss_jax.training import pretrain, pretrain_step, run
from cromss_jax.training.state import TrainState

_CONFIG = command_line.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "A slice, as v5e:4x4 (v4, v5e, v5p, v6e), or cpu:8 for simulated devices"
)
_NUM_LOCATIONS = flags.DEFINE_integer(
    "num_locations", None, "Places of the data, those held back included", lower_bound=1
)
_TILE_SIZE = flags.DEFINE_integer("data_tile_size", None, "Pixels of a tile at 10 m", lower_bound=1)
_SEASONS = flags.DEFINE_integer("data_seasons", None, "Most seasons of a place", lower_bound=1)
_SAMPLES_PER_SECOND_PER_CORE = flags.DEFINE_float(
    "samples_per_second_per_core",
    # 570 on two cores, records of 264 x 264 with four seasons, from a warm cache.
    285.0,
    "What a reading thread manages: measure it by `python -m tests.bench.input`",
    lower_bound=1e-3,
)
_SEARCH = flags.DEFINE_bool(
    "search", False, "Where the batch does not fit, find the largest by compiling, minutes a try"
)


class PlanError(ValueError):
    """Nothing can be compiled so."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a plan must know of the data.

    Attributes:
      source: where the rest is known from.
      num_locations: those held back included.
      tile_size: pixels at 10 m.
      seasons: the most that a place has.
      features: names of what a record holds.
    """

    source: str
    num_locations: int
    tile_size: int
    seasons: int
    features: tuple[str, ...]


# SSL4EO-S12 with noisy labels, as data_prep builds it from the distributed files.
_PUBLISHED = Data(
    source="SSL4EO-S12 + NoL as published",
    num_locations=103_793,
    tile_size=264,
    seasons=4,
    features=("s1", *(f"s2_{m}m" for m in sensors.S2_BANDS_BY_RESOLUTION), "labels", "season"),
)


def find_data(config: ml_collections.ConfigDict, **overrides: int | None) -> Data:
    """The data set of the configuration; the published one where there is none.

    Args:
      config: the configuration.
      **overrides: fields of `Data` that are known otherwise; None for those that are not.

    Raises:
      data.DataError: if the data set cannot be read.
      files.PathError: if it lies where nothing can be read from.
      PlanError: for tiles that have no whole number of pixels in every band.
    """
    found = _PUBLISHED
    folder = files.absolute(config.data.dir) / config.data.name
    if folder.exists():
        dataset = input_pipeline.open_dataset(config.data.dir, config.data.name)
        found = Data(
            source=str(folder),
            num_locations=dataset.num_locations,
            tile_size=dataset.tile_size,
            seasons=len(dataset.source[0]["labels"]),
            features=dataset.features,
        )
    given = {name: value for name, value in overrides.items() if value is not None}
    found = dataclasses.replace(found, **given)
    coarsest = max(sensors.S2_BANDS_BY_RESOLUTION) // 10
    if found.tile_size % coarsest:
        raise PlanError(
            f"--data_tile_size is {found.tile_size}; bands at 60 m need a multiple of {coarsest}, "
            f"such as {max(found.tile_size // coarsest, 1) * coarsest}"
        )
    return found


def record_shapes(
    described: Data, modalities: Sequence[str], batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `data.read_batch` makes of such a data set."""
    size = described.tile_size
    shapes = {
        "s1": (size, size, len(sensors.S1_BANDS)),
        "s2": (size, size, len(sensors.S2_BANDS)),
        "labels": (described.seasons, size, size),
        "truth": (size, size),
    }
    for metres, bands in sensors.S2_BANDS_BY_RESOLUTION.items():
        side = size * 10 // metres
        shapes[f"s2_{metres}m"] = (side, side, len(bands))
    names = [name for m in modalities for name in input_pipeline.IMAGE_FEATURES[m]] + [
        "labels",
        "truth",
    ]
    records = {
        name: jax.ShapeDtypeStruct((batch_size, *shapes[name]), jnp.uint8)
        for name in names
        if name in described.features
    }
    records["season"] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    records["is_real"] = jax.ShapeDtypeStruct((batch_size,), jnp.bool_)
    return records


def find_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a slice, which are there for the compiler alone; or simulated ones.

    Raises:
      PlanError: for what is no slice, or without libtpu.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        jax.config.update("jax_num_cpu_devices", int(shape))
        return jax.devices("cpu")
    if kind not in costs.CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise PlanError(
            f"--topology={topology} is no slice; it is one of {', '.join(costs.CHIPS)} and a "
            "topology, as in v5e:4x4 or v5p:2x2x1, or cpu:8 for eight simulated devices"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"--topology={topology} needs the compiler for TPUs, libtpu, which is not installed; "
            "`pip install libtpu` (or the extra, `pip install -e .[plan]`), or plan for cpu:8"
        )
    # There is no TPU, nor a cloud machine's metadata to ask; other processes may use libtpu too.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # A chip of v4 is one device to JAX, as those of the others are without being told.
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PlanError(
            f"--topology={topology} is none that libtpu knows ({reason}); name another, such as "
            "v5e:4x4 or v5p:2x2x1"
        ) from error


class OutOfMemory(Exception):
    """The compiler found no way to fit the step.

    Attributes:
      needed: bytes a chip.
      available: bytes a chip.
    """

    def __init__(self, needed: float, available: float):
        super().__init__(f"needs {needed / costs.GIB:.2f} GiB of {available / costs.GIB:.2f}")
        self.needed = needed
        self.available = available


def out_of_memory(message: str) -> OutOfMemory | None:
    """What XLA's message says of the chip's memory; None if that is not what it is about."""
    # Its two wordings; in both the first amount is of everything, arguments included.
    size = r"([\d.]+)([KMGT])"
    wordings = (rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm")
    found = re.search(wordings[0], message) or re.search(wordings[1], message)
    if not found:
        return None
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needed, needed_unit, available, available_unit = found.groups()
    return OutOfMemory(float(needed) * scale[needed_unit], float(available) * scale[available_unit])


def num_train_locations(config: ml_collections.ConfigDict, described: Data) -> int:
    """Without those held back."""
    locations, _ = input_pipeline.split_locations(
        described.num_locations, config.data.validation_fraction, config.seed
    )
    return len(locations)


def num_rotated(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> float:
    """Samples that a chip rotates in a step, on average: rounds of the step's one open loop."""
    return config.augmentation.rotation_probability * config.batch_size / mesh.size


def abstract_state(config: ml_collections.ConfigDict) -> TrainState:
    """Shapes of the training state."""
    return jax.eval_shape(lambda: pretrain_step.init_state(config, jax.random.key(config.seed)))


def compile_step(
    config: ml_collections.ConfigDict, described: Data, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
    """Compiles the training step for a mesh, none of whose devices need be there.

    Raises:
      OutOfMemory: if it does not fit.
    """
    train_step = pretrain.jit_train_step(
        config,
        pretrain_step.network_definition(config),
        num_train_locations(config, described),
        mesh,
    )
    records = record_shapes(described, config.modalities, config.batch_size)
    lowered = train_step.lower(abstract_state(config), records)
    # Nothing is run on simulated devices: their machine code needs no care, which takes minutes.
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if is_cpu else None
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if found := out_of_memory(str(error)):
            raise found from error
        raise


def search_batch(
    config: ml_collections.ConfigDict, described: Data, mesh: jax.sharding.Mesh
) -> int:
    """How many images a chip fit where `config.batch_size` does not: bisection, a compile a try."""

    def overflows(images: int) -> bool:
        changed = ml_collections.ConfigDict(config)
        changed.batch_size = images * mesh.size
        try:
            compile_step(changed, described, mesh)
        except OutOfMemory as found:
            print(f"{images} images a chip do not fit: {found}", flush=True)
            return True
        print(f"{images} images a chip fit", flush=True)
        return False

    return bisect.bisect_left(range(1, config.batch_size // mesh.size), True, key=overflows)


def estimate_batch(config: ml_collections.ConfigDict, num_chips: int, full: OutOfMemory) -> int:
    """The same without compiling: all but state and gradients is taken to grow with the batch."""
    state = abstract_state(config)
    fixed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, state.params)))
    share = (full.available - fixed) / (full.needed - fixed)
    return max(int(share * (config.batch_size // num_chips)), 0)


def make_plan(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    per_core: float,
    search: bool = False,
    **overrides: int | None,
) -> dict[str, object]:
    """Compiles and reckons; returns the figures, which `table` shows.

    Args:
      config: the configuration.
      topology: the slice.
      per_core: samples a second that a core reads.
      search: whether to compile for smaller batches where this one does not fit.
      **overrides: as for `find_data`.

    Raises:
      PlanError, data.DataError, files.PathError, run.ConfigError: each with a sentence for the
        user.
    """
    if config.mode != "pretrain":
        raise PlanError(
            f"config.mode is {config.mode!r}; only pretraining is planned, as by "
            "--config=configs/pretrain.py"
        )
    config = ml_collections.FrozenConfigDict(config)
    described = find_data(config, **overrides)
    pretrain.check_config(config, described.tile_size)
    mesh = run.make_mesh(config.num_devices, config.batch_size, find_devices(topology))
    chip = costs.CHIPS.get(topology.partition(":")[0])
    train_locations = num_train_locations(config, described)
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
        return figures | {
            "fits": False,
            "memory": {"peak": full.needed},
            "memory_available": full.available,
            "largest_images_a_chip": images,
            "largest_batch_size": images * mesh.size,
            "largest_is": "compiled" if search else "estimated",
        }
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


def _amount(value: float, unit: str) -> str:
    """60.4 GB of 60.4e9 bytes."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000


def _reading_verdict(found: Mapping[str, object]) -> str:
    if found["keeps_up"]:
        return "keeps up"
    if found["could_keep_up"]:
        return f"too slow: set config.data.num_threads to {found['threads_a_host_needed']}"
    return f"too slow, whatever the threads: a host has {found['cores_a_host']} cores"


def table(figures: Mapping[str, object]) -> str:
    """The figures of `make_plan` in Markdown."""
    lines = [
        f"{figures['topology']}: {figures['chips']} chips, batch {figures['batch_size']}, "
        f"{figures['images_a_chip']} images a chip. {figures['data']}: "
        f"{figures['train_locations']} places to train on, tiles of {figures['tile_size']} pixels, "
        f"{figures['seasons']} seasons.",
        "",
    ]
    if not figures["fits"]:
        sizes = figures["memory"]["peak"], figures["memory_available"]
        needed, available = (f"{size / costs.GIB:.2f}" for size in sizes)
        lines.append(f"Does not fit: a chip needs {needed} GiB and has {available}.")
        if not figures["largest_images_a_chip"]:
            lines.append("Not a single image a chip does; use a smaller network or crop.")
            return "\n".join(lines)
        how = {
            "compiled": "found by compiling",
            "estimated": "an estimate from this compile alone, in proportion; --search compiles",
        }
        lines.append(
            f"The largest that does is config.batch_size {figures['largest_batch_size']}, "
            f"{figures['largest_images_a_chip']} images a chip ({how[figures['largest_is']]})."
        )
        return "\n".join(lines)

    chip = costs.CHIPS.get(figures["topology"].partition(":")[0])

    def at_peak(name: str, value: float, unit: str, peak: str) -> tuple[str, ...]:
        if not chip:
            return name, _amount(value, unit)
        milliseconds = figures["seconds"][name] * 1e3
        limit = f"{_amount(getattr(chip, peak), unit)}/s"
        return name, _amount(value, unit), limit, f"{milliseconds:.3g} ms"

    rows = [(f"memory: {k}", f"{v / costs.GIB:.3f} GiB") for k, v in figures["memory"].items()]
    if chip:
        share = figures["memory"]["peak"] / chip.memory
        rows[-1] += (f"{chip.memory / costs.GIB:.0f} GiB", f"{share:.0%} of it: fits")
    rows.append(at_peak("arithmetic", figures["flops"], "FLOP", "flops"))
    rows.append(at_peak("HBM traffic", figures["hbm_bytes"], "B", "hbm_bytes"))
    for kind, found in figures["collectives"].items():
        rows.append((f"{found['count']} {kind}", _amount(found["bytes"], "B")))
    if chip:
        rows.append(at_peak("interconnect", figures["sent_bytes"], "B", "ici_bytes"))
        step_milliseconds = figures["step_seconds"] * 1e3
        rows.append(("a step, at least", "", figures["bound_by"], f"{step_milliseconds:.3g} ms"))
        rows.append(("images a second, at most", "", "", f"{figures['images_per_second']:,.0f}"))
        name = f"{figures['num_epochs']} epochs, at least"
        hours = f"{figures['hours']:.3g} h, {figures['chip_hours']:.3g} chip-hours"
        rows.append((name, f"{figures['num_steps']:,} steps", "", hours))
        found = figures["reading"]
        name = f"reading, hosts {found['hosts']} x {found['cores_a_host']} cores"
        needed = f"{found['threads_a_host_needed']} threads a host"
        threads = f"config.data.num_threads {found['threads_a_host']}"
        rows.append((name, needed, threads, _reading_verdict(found)))
    rows.append(("compiling", f"{figures['compile_seconds']} s"))
    lines += ["| a chip, a step | takes | of | makes |", "|---|---|---|---|"]
    lines += [f"| {' | '.join((*row, '', '')[:4])} |" for row in rows]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Prints the plan; a sentence and exit code 1 for what the user can mend."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    jax.config.update("jax_platforms", "cpu")  # whatever else there is: nothing is run
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
    print(table(figures), end="\n\n")
    print(json.dumps(figures))
    if not figures["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=command_line.parse)
