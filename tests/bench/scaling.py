"""The training step over more and more simulated devices: `python -m tests.bench.scaling`.

Compiles the sample's step by `cromss_jax.plan` at one image a device, of 64 pixels, in a process of
its own for each number of devices. What a device computes, holds and communicates must not grow.
"""

import json
import subprocess
import sys

from absl import app, flags

from tests import runs

_MAX_DEVICES = flags.DEFINE_integer("max_devices", 256, "Up to how many, in powers of two")
_IMAGES = flags.DEFINE_integer("images", 1, "A device")


def plan(num_devices: int) -> dict:
    """The figures of the step on so many devices."""
    line = runs.command(
        "cromss_jax.plan",
        config="configs/pretrain.py:sample",
        topology=f"cpu:{num_devices}",
        num_locations=1024,
        data_tile_size=66,
        data_seasons=2,
        **{
            "config.data.dir": "none",
            "config.data.crop_size": 64,
            "config.batch_size": _IMAGES.value * num_devices,
        },
    )
    done = subprocess.run(line, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"plan failed on {num_devices} devices")
    return json.loads(done.stdout.splitlines()[-1])


def main(_) -> None:
    """Prints a row for each number of devices, the last line as JSON."""
    print("| devices | all-reduce | their MB | all-gather | others | GFLOP | temporaries, MB | s |")
    print("|---|---|---|---|---|---|---|---|")
    found = {}
    for exponent in range(_MAX_DEVICES.value.bit_length()):
        num_devices = 2**exponent
        figures = plan(num_devices)
        kinds = dict(figures["collectives"])
        none = {"count": 0, "bytes": 0}
        reduced, gathered = kinds.pop("all-reduce", none), kinds.pop("all-gather", none)
        row = {
            "all_reduce_count": reduced["count"],
            "all_reduce_bytes": reduced["bytes"],
            "all_gather_count": gathered["count"],
            "other_collectives": sum(kind["count"] for kind in kinds.values()),
            "flops": figures["flops"],
            "temporary_bytes": figures["memory"]["temporaries"],
            "compile_seconds": figures["compile_seconds"],
        }
        found[num_devices] = row
        print(
            f"| {num_devices} | {row['all_reduce_count']} | {row['all_reduce_bytes'] / 1e6:.2f} "
            f"| {row['all_gather_count']} | {row['other_collectives']} "
            f"| {row['flops'] / 1e9:.3f} | {row['temporary_bytes'] / 1e6:.1f} "
            f"| {row['compile_seconds']} |",
            flush=True,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    app.run(main)
