"""The training step as compiled for v5e, or for GPUs: `python -m tests.bench.tpu`.

At more and more images a chip, the paper's recipe in bfloat16 on the published data's shapes.
Compiles by `cromss_jax.plan`, which needs libtpu and takes minutes for each of --images. Traffic is
that of `cromss_jax.costs.traffic`, beside the compiler's own count, which has on-chip memory in it.
For GPUs, as by --topology=h100:1, which needs the extra `plan-gpu`, there is no such count, and
launches and loops are printed.
"""

import dataclasses
import json
import pathlib
import time

import jax
import ml_collections
from absl import app, flags

from configs import pretrain
from cromss_jax import plan
from cromss_jax.costs import chips, costs, traffic
from cromss_jax.data import description
from cromss_jax.training import run

_IMAGES = flags.DEFINE_list("images", ["16", "32", "64", "128"], "A chip")
_VARIANT = flags.DEFINE_string("variant", "", "Of configs/pretrain.py, such as fusion=late")
_HLO = flags.DEFINE_string(
    "hlo", None, "Where to write each compiled program's text, its images appended"
)

# The flag of `plan`.
flags.FLAGS.set_default("topology", "v5e:2x4")

# Names that the step gives to its parts by `jax.named_scope`.
PARTS = ("preprocessing", "prior", "encoder", "decoder", "selection", "losses", "optimizer")
# What the networks see and are told, beside the networks: to be a small share.
BESIDE_THE_NETWORKS = ("preprocessing", "prior", "selection", "losses")


def measure(images: int) -> dict[str, object]:
    """Compiles the step for so many images a chip; its figures, of one image but for memory."""
    devices = plan.find_devices(flags.FLAGS.topology)
    is_gpu = devices[0].platform == "gpu"
    config = pretrain.get_config(_VARIANT.value)
    config.network.dtype = "bfloat16"
    config.data.dir = "none"  # the published data's shapes
    config.batch_size = images * len(devices)
    config = ml_collections.FrozenConfigDict(config)
    mesh = run.make_mesh(config.num_devices, config.batch_size, devices)
    started = time.perf_counter()
    compiled = plan.compile_step(config, description.describe(config), mesh)
    seconds = time.perf_counter() - started
    rotated = plan.num_rotated(config, mesh)
    cost = costs.measure(compiled, platform=devices[0].platform, unknown_rounds=rotated)
    text = compiled.as_text()
    if _HLO.value:
        pathlib.Path(f"{_HLO.value}.{images}").write_text(text)
    counts = traffic.count(text, PARTS, unknown_rounds=rotated, is_gpu=is_gpu)
    moved = counts.hbm_bytes
    total = sum(moved.values())
    return {
        "images": images,
        "hbm_gigabytes": total / images / 1e9,
        "teraflop": cost.flops / images / 1e12,
        "temporaries_gib": cost.memory["temporaries"] / chips.GIB,
        "peak_gib": cost.memory["peak"] / chips.GIB,
        "collectives": {k: dataclasses.asdict(v) for k, v in cost.collectives.items()},
        "compile_seconds": seconds,
        "parts_gigabytes": {part: size / images / 1e9 for part, size in moved.items()},
        "beside_the_networks": sum(moved[part] for part in BESIDE_THE_NETWORKS) / total,
        "loops": [f"{loop.name}: {loop.rounds or 'unknown'}" for loop in counts.loops],
        "bytes_accessed_gigabytes": None if is_gpu else _accessed(compiled) / images / 1e9,
        "launches": cost.launches if is_gpu else None,
        "parts_launches": counts.launches if is_gpu else None,
    }


def _accessed(compiled: jax.stages.Compiled) -> float:
    """Bytes that the step accesses, by the compiler's count."""
    return compiled.cost_analysis()["bytes accessed"]


def main(_) -> None:
    """Prints a row for each number of images, then the parts', the last line as JSON."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs, so no accelerator is needed
    found = {}
    print(
        "| images a chip | HBM, GB an image | accessed, GB, as the compiler counts "
        "| TFLOP an image "
        "| temporaries, GiB | all-reduce, MB | launches | rounds of loops |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for images in map(int, _IMAGES.value):
        try:
            figures = found[images] = measure(images)
        except plan.OutOfMemory as full:
            print(f"| {images} | does not fit: {full} | | | | | | |", flush=True)
            found[images] = {"images": images, "needed_gib": full.needed / chips.GIB}
            continue
        reduced = figures["collectives"].get("all-reduce", {"bytes": 0})["bytes"]
        accessed, launches = figures["bytes_accessed_gigabytes"], figures["launches"]
        cells = (
            f"{figures['hbm_gigabytes']:.3f}",
            "" if accessed is None else f"{accessed:.3f}",
            f"{figures['teraflop']:.4f}",
            f"{figures['temporaries_gib']:.2f}",
            f"{reduced / 1e6:.1f}",
            "" if launches is None else f"{launches:,.0f}",
            "; ".join(figures["loops"]),
        )
        print(f"| {images} | {' | '.join(cells)} |", flush=True)
    names = (*PARTS, "others")
    print(f"\n| an image | {' | '.join((*names, 'beside the networks'))} |")
    print("|---" * (len(names) + 2) + "|")
    for images, figures in found.items():
        if "parts_gigabytes" in figures:
            cells = [f"{1e3 * figures['parts_gigabytes'][part]:.0f}" for part in names]
            print(f"| {images}: MB | {' | '.join(cells)} | {figures['beside_the_networks']:.1%} |")
        if figures.get("launches"):
            cells = [f"{figures['parts_launches'][part]:,.0f}" for part in names]
            print(f"| {images}: launches a step | {' | '.join(cells)} | |")
    print(json.dumps(found))


if __name__ == "__main__":
    app.run(main)
