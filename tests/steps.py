"""One compiled step for all runs of a process that have equal configurations.

JAX knows what it has compiled by the function, and each run makes functions of its own: tracing
them again takes as much CPU time as tens of steps.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import jax
import ml_collections

from cromss_jax.training import finetune_step, pretrain_step, sharding
from tests import environment

MAKERS = {
    pretrain_step: ("make_train_step", "make_eval_step", "make_picture_step"),
    finetune_step: ("make_train_step", "make_eval_step"),
}
UNREAD = ("init_from", "num_epochs", "seeds", "seed", "save_predictions", "checkpoint_every_epochs")


class _Jitted:
    """A jitted step that is traced and compiled once for equal shapes.

    Runs that begin call it, runs that continue lower it first: JAX would trace it for each.
    """

    def __init__(self, jitted: Callable):
        self._jitted, self._lowered = jitted, {}

    def __call__(self, *arguments):
        return self.lower(*arguments).compile()(*arguments)

    def lower(self, *arguments) -> "_Lowered":
        # Shardings are those that it was jitted with.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        leaves, structure = jax.tree.flatten(shapes)
        key = (*leaves, structure)
        if key not in self._lowered:
            self._lowered[key] = _Lowered(self._jitted.lower(*shapes))
        return self._lowered[key]


class _Lowered:
    def __init__(self, lowered: jax.stages.Lowered):
        self.compile = functools.cache(lowered.compile)


def _remembering(make: Callable[..., Callable]) -> Callable[..., Callable]:
    """`make`, which gives again what it gave for an equal configuration and arguments."""
    made = {}

    @functools.wraps(make)
    def remembering(config, *arguments, **named):
        # Without what no step reads, and no step can read then.
        config = ml_collections.ConfigDict({k: v for k, v in config.items() if k not in UNREAD})
        key = (config.to_json(sort_keys=True), *arguments, *sorted(named.items()))
        if key not in made:
            made[key] = make(config, *arguments, **named)
        return made[key]

    return remembering


def _remembering_jit(jit_step: Callable[..., Callable]) -> Callable[..., _Jitted]:
    """The same for what is jitted: a function that is jitted again is traced again."""
    return functools.cache(lambda *arguments, **named: _Jitted(jit_step(*arguments, **named)))


_compiler_options = sharding.compiler_options


def _quick_options(*arguments, **named) -> dict[str, object]:
    """Of runs that are compared with each other alone, also where tests compile as users do."""
    return _compiler_options(*arguments, **named) | environment.QUICK_OPTIONS


_REMEMBERING = [
    (module, name, _remembering(getattr(module, name)))
    for module, names in MAKERS.items()
    for name in names
] + [
    (sharding, "jit_step", _remembering_jit(sharding.jit_step)),
    (sharding, "compiler_options", _quick_options),
]


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Lets runs trace and compile each step once, and quickly."""
    with contextlib.ExitStack() as stack:
        for module, name, remembering in _REMEMBERING:
            stack.enter_context(mock.patch.object(module, name, remembering))
        yield
