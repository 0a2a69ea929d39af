"""`cromss_jax.main`, each process writing down what it reads and what the steps see.

To `FOLDER/PROCESS.jsonl`, where FOLDER is in the environment as OBSERVED: lines with `read`, the
records of a batch that this process reads, -1 as padding, and lines with `step`, the global batch
as the devices hold it: a checksum of each sample's pixels and the crops, flips and angles drawn.
"""

import json
import os
import pathlib
import threading

from absl import app, flags

from cromss_jax import command_line, main
from cromss_jax.training import preemption

_lock = threading.Lock()


def write(line: dict) -> None:
    """Appends a line, from whichever thread."""
    import jax

    path = pathlib.Path(os.environ["OBSERVED"]) / f"{jax.process_index()}.jsonl"
    with _lock, path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def observe() -> None:
    """Puts what writes down in the place of the functions that it calls."""
    import jax
    import jax.numpy as jnp

    from cromss_jax.data import input_pipeline
    from cromss_jax.training import pretrain, pretrain_step, sharding

    originals = pretrain.jit_train_step, input_pipeline.read_batch

    def read_batch(dataset, modalities, records):
        write({"read": records.tolist()})
        return originals[1](dataset, modalities, records)

    def jit_train_step(config, definition, num_locations, mesh):
        train_step = originals[0](config, definition, num_locations, mesh)

        def see(state, records):
            geometry = pretrain_step.draw_geometry(config, state, records["labels"].shape[-1])
            pixels = records["s2"] if "s2" in records else records["s2_10m"]
            place = jnp.arange(1, pixels[0].size + 1, dtype=jnp.uint32).reshape(
                1, *pixels.shape[1:]
            )
            checksums = jnp.sum(pixels.astype(jnp.uint32) * place, axis=(1, 2, 3))
            return {"step": state.step, "samples": checksums, **vars(geometry)}

        see = sharding.jit_step(see, mesh)

        def observed_step(state, records):
            seen = jax.device_get(see(state, records))
            write({name: value.tolist() for name, value in seen.items()})
            return train_step(state, records)

        # A continued run compiles its step before it takes one.
        observed_step.lower = lambda *shapes: observed_step
        observed_step.compile = lambda: observed_step
        return observed_step

    pretrain.jit_train_step, input_pipeline.read_batch = jit_train_step, read_batch


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    preemption.watch(command_line.find_preemption_status)
    observe()
    app.run(main.main, flags_parser=command_line.parse)
