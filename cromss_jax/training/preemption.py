"""Noticing that a run is to stop, so that it can save and leave."""

import signal

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """The run was interrupted (SIGTERM); it is saved, and the same command continues."""


class Preemption:
    """Notices SIGTERM, so that the loop can save and leave. Use as a context."""

    def __enter__(self) -> "Preemption":
        """Starts noticing."""
        self._interrupted = False
        # With several processes JAX's own service notices, and all of them agree on a step.
        self._previous = None
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *unused) -> None:
        """Gives the signal back."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _notice(self, *unused) -> None:
        self._interrupted = True

    def reached(self, step_number: int) -> bool:
        """Whether to save at this step and leave."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step_number)
        return self._interrupted
