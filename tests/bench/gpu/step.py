"""The pretraining step as `main` jits it: `python -m tests.bench.gpu.step --batch_size=64`.

From records on the device to new parameters: bands upsampled, priors, crops, flips, rotations,
networks, selection, losses, gradients, Adam, and what is logged. The host keeps two steps ahead of
the device, as in `main`; a step's time is that between two steps' ends. With --trace, the kernels
of five more steps (`kernels`).
"""

import gzip
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

from cromss_jax.training import memory, pretrain, pretrain_step, run, settings, sharding
from tests.bench import records
from tests.bench.gpu import kernels, recipe

_STEPS = flags.DEFINE_integer("steps", 40, "Timed steps", lower_bound=3)
_TRACE = flags.DEFINE_bool("trace", False, "Whether the profiler runs after that")
_KEEP = flags.DEFINE_string(
    "keep", None, "Folder for the compiled program's text and the profile, both compressed"
)
_WARM_UP, _TRACED = 5, 5
_AHEAD = 2  # steps that the host is ahead


def run_steps(step: Callable, state, batch, count: int) -> tuple[object, list[float], float]:
    """Takes steps as `loop.fit` does.

    Returns:
      The state after them, the seconds between their ends, and the last loss.
    """
    losses, ends = [], []
    for _ in range(count):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
        if len(losses) > _AHEAD:
            losses[-1 - _AHEAD].block_until_ready()
            ends.append(time.perf_counter())
    for loss in losses[-_AHEAD:]:
        loss.block_until_ready()
        ends.append(time.perf_counter())
    return state, np.diff(ends).tolist(), float(losses[-1])


def keep(name: str, content: bytes) -> None:
    """Writes a compressed file into the folder of --keep."""
    folder = pathlib.Path(_KEEP.value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(gzip.compress(content))


def peak_gigabytes() -> float | None:
    """The most memory that the program has held on the device; None where it is not counted."""
    statistics = jax.devices()[0].memory_stats()
    return round(statistics["peak_bytes_in_use"] / 1e9, 2) if statistics else None


def main(_) -> None:
    """Prints the figures, the last line as JSON."""
    memory.keep_freed_memory()
    settings.use_default_numbers()
    config = recipe.make_config()
    mesh = run.make_mesh(config.num_devices, config.batch_size)
    device = mesh.devices.flat[0]
    if device.platform == "cpu" and not recipe.TINY.value:
        sys.exit("JAX finds no GPU, only the CPU; --tiny tries this bench on a CPU")
    print(f"{device.device_kind}, jax {jax.__version__}, batch {config.batch_size}", flush=True)
    figures = {"device": device.device_kind, "jax": jax.__version__}

    made = records.make_records(config.batch_size, config.data.crop_size)
    batch = sharding.to_devices({**made, "is_real": np.ones(config.batch_size, bool)}, mesh)
    init = jax.jit(
        lambda key: pretrain_step.init_state(config, key), out_shardings=sharding.replicated(mesh)
    )
    started = time.perf_counter()
    state = jax.block_until_ready(init(jax.random.key(config.seed)))
    figures["init_seconds"] = round(time.perf_counter() - started, 1)
    definition = pretrain_step.network_definition(config)
    train_step = pretrain.jit_train_step(config, definition, recipe.NUM_LOCATIONS, mesh)

    started = time.perf_counter()
    lowered = train_step.lower(state, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    figures["trace_seconds"] = round(traced - started, 1)
    figures["compile_seconds"] = round(time.perf_counter() - traced, 1)
    sizes = compiled.memory_analysis()
    figures["temporaries_gigabytes"] = round(sizes.temp_size_in_bytes / 1e9, 2)
    recipe.show(figures)

    started = time.perf_counter()
    state, _, first = run_steps(compiled, state, batch, _WARM_UP)
    figures["warm_up_seconds"] = round(time.perf_counter() - started, 1)
    state, seconds, last = run_steps(compiled, state, batch, _STEPS.value)
    figures |= recipe.speed(seconds) | {"loss": [round(first, 4), round(last, 4)]}
    figures["peak_gigabytes"] = peak_gigabytes()
    recipe.show(figures)
    if not np.isfinite([first, last]).all():
        sys.exit("the loss is not finite")

    if _TRACE.value:
        with tempfile.TemporaryDirectory() as folder:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level, options.host_tracer_level = 0, 1
            with jax.profiler.trace(folder, profiler_options=options):
                run_steps(compiled, state, batch, _TRACED)
            (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
            events = kernels.read(path)
            if _KEEP.value:
                keep("profile.xplane.pb.gz", path.read_bytes())
                keep("program.txt.gz", compiled.as_text().encode())
        found = kernels.summarise(events, _TRACED, kernels.part_names(compiled.as_text()))
        print(kernels.table(found), flush=True)
        recipe.show({**figures, "kernels": found})


if __name__ == "__main__":
    app.run(main)
