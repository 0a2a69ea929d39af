"""One compiled step for all runs of a process that have equal configurations."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from unittest import mock

from cromss_jax.training import finetune_step, pretrain_step, sharding

MAKERS = {
    pretrain_step: ("make_train_step", "make_eval_step", "make_picture_step"),
    finetune_step: ("make_train_step", "make_eval_step"),
}


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Lets runs trace and compile each step once.

    JAX knows what it has compiled by the function, and each run makes functions of its own: tracing
    them again takes as much CPU time as tens of steps.
    """
    with contextlib.ExitStack() as stack:
        for module, names in MAKERS.items():
            for name in names:
                make = _remembering(getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, make))
        # What is jitted, too: a function that is jitted again is traced again.
        jit_step = functools.cache(sharding.jit_step)
        stack.enter_context(mock.patch.object(sharding, "jit_step", jit_step))
        yield


def _remembering(make: Callable[..., Callable]) -> Callable[..., Callable]:
    """`make`, which gives again what it gave for an equal configuration and arguments."""
    made = {}

    @functools.wraps(make)
    def remembering(config, *arguments, **named):
        fields = json.loads(config.to_json())
        fields["init_from"] = None  # weights are read before the first step
        key = (json.dumps(fields, sort_keys=True), *arguments, *sorted(named.items()))
        if key not in made:
            made[key] = make(config, *arguments, **named)
        return made[key]

    return remembering
