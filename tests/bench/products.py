"""The step's matrix products and convolutions alone: `python -m tests.bench.products`.

What the step on a CPU could not be faster than: each product and convolution of the step as it is
traced for CPUs is run by itself, as one program of these shapes and this layout, and their times
are added up. Beside it stands what that is of the whole step, timed in the same rounds.
"""

import collections
import dataclasses
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.extend import core

from cromss_jax import platforms
from cromss_jax.training import memory, pretrain_step
from tests.bench import step

_DEPTH = flags.DEFINE_integer("depth", 50, "Of the ResNets")
_FUSION = flags.DEFINE_enum("fusion", "mid", ["mid", "late"], "Of the network")
_SIZE = flags.DEFINE_enum("size", "8x128", list(step.SIZES), "Of the batch")

_PRODUCTS = ("dot_general", "conv_general_dilated")


def products(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Yields the products and convolutions of a program and of what it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in _PRODUCTS:
            yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from products(inner)


def flops(equation: core.JaxprEqn) -> float:
    """Of a product or a convolution: two for each pair of factors."""
    left, right = (x.aval.shape for x in equation.invars)
    (out,) = (x.aval.shape for x in equation.outvars)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * np.prod(out) * np.prod([left[axis] for axis in contracted])
    others = equation.params["dimension_numbers"].rhs_spec[1:]  # all but the output's features
    return 2 * np.prod(out) * np.prod([right[axis] for axis in others])


def runner(equation: core.JaxprEqn) -> step.Runner:
    """Runs one of them on numbers of its shapes."""
    rng = np.random.default_rng(0)
    factors = [jnp.asarray(rng.random(x.aval.shape, np.float32)) for x in equation.invars]
    bind = step.jit(lambda *factors: equation.primitive.bind(*factors, **equation.params))
    return lambda: jax.block_until_ready(bind(*factors))


def main(_) -> None:
    """Prints a row for each kind of product, then the sums, the last line as JSON."""
    memory.keep_freed_memory()
    config = step.make_config(_FUSION.value, _DEPTH.value, _SIZE.value)
    batch = jax.device_put(step.make_batch(config))
    state = jax.jit(lambda key: pretrain_step.init_state(config, key))(jax.random.key(0))
    update = pretrain_step.make_update(
        config, pretrain_step.network_definition(config), config.batch_size
    )
    with platforms.known("cpu"):
        traced = jax.make_jaxpr(update)(state, batch)
    found: collections.Counter[str] = collections.Counter()
    by_name = {}
    for equation in products(traced.jaxpr):
        name = f"{equation.primitive.name} " + " x ".join(
            str(x.aval.shape) for x in equation.invars
        )
        name += f" {equation.params['dimension_numbers']}"
        found[name] += 1
        by_name[name] = equation
    runners = {name: runner(equation) for name, equation in by_name.items()}

    compiled = step.jit(update)

    def whole() -> None:
        jax.block_until_ready(compiled(dataclasses.replace(state, step=jnp.int32(0)), batch))

    medians = step.times({"step": whole, **runners}, flags.FLAGS.rounds)  # a flag of `step`
    print("| product | times | ms | GFLOP/s |\n|---|---|---|---|")
    for name in sorted(runners, key=lambda name: -found[name] * medians[name]):
        rate = flops(by_name[name]) / medians[name] / 1e9
        cells = (name[:72], found[name], f"{1e3 * medians[name]:.2f}", f"{rate:.0f}")
        print(f"| {' | '.join(map(str, cells))} |")
    total = sum(found[name] * medians[name] for name in runners)
    arithmetic = sum(found[name] * flops(by_name[name]) for name in runners)
    print(
        json.dumps(
            {
                "step_seconds": round(medians["step"], 4),
                "products_seconds": round(total, 4),
                "share": round(total / medians["step"], 3),
                "gigaflop": round(arithmetic / 1e9, 1),
                "products": sum(found.values()),
            }
        )
    )


if __name__ == "__main__":
    app.run(main)
