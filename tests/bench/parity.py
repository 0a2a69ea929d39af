"""All networks against segmentation_models_pytorch's: `python -m tests.bench.parity`.

Logits, statistics and gradients of ResNet-18/34/50 from the same random weights: U-Nets of mid and
late fusion, 13, 12, 9 and 3 bands, then the other decoders, mid fusion, 13 bands. Takes three
quarters of an hour on two cores; the tests do a part of it.
"""

import itertools
import json

import jax
from absl import app

from tests import torch_parity

# XLA's cheapest code generation: the convolutions, which take the time, are library calls.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def main(_) -> None:
    """Prints each network's errors, the last line the largest of all as JSON."""
    worst = dict.fromkeys(torch_parity.TOLERANCES, 0.0)
    depths = (18, 34, 50)
    cases = itertools.product(["unet"], depths, ("mid", "late"), (13, 12, 9, 3))
    others = [decoder for decoder in torch_parity.MODELS if decoder != "unet"]
    cases = itertools.chain(cases, itertools.product(others, depths, ["mid"], [13]))
    for decoder, depth, fusion, bands in cases:
        num_channels = {"s1": 2, "s2": bands}
        errors = torch_parity.errors(fusion, depth, num_channels, FAST_COMPILE, decoder)
        jax.clear_caches()
        worst = {name: max(worst[name], errors[name]) for name in worst}
        figures = ", ".join(f"{name} {errors[name]:.1e}" for name in worst)
        print(f"{decoder} ResNet-{depth} {fusion} {bands:2} bands: {figures}", flush=True)
    failed = [n for n, tolerance in torch_parity.TOLERANCES.items() if worst[n] > tolerance]
    print(
        json.dumps(
            {"errors": worst, "tolerances": torch_parity.TOLERANCES, "beyond_tolerance": failed}
        )
    )


if __name__ == "__main__":
    app.run(main)
