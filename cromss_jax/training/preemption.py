"""Noticing that a run is to stop, so that it can save and leave."""

import signal

import jax
from jax.experimental import multihost_utils

# SIGTERM comes from schedulers and clouds, SIGUSR1 and SIGUSR2 from SLURM's --signal, SIGINT from
# Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Preempted(Exception):
    """The run was interrupted by a signal; it is saved, and the same command continues."""


class Preemption:
    """Notices SIGTERM, SIGUSR1, SIGUSR2 and the first SIGINT. Use as a context in the main thread.

    With several processes one that gets a signal is enough: all of them agree on a step. A second
    SIGINT raises KeyboardInterrupt at once, as without this context.
    """

    def __enter__(self) -> "Preemption":
        """Starts noticing."""
        self._interrupted = False
        self._previous = {}
        for number in _SIGNALS:
            # With several processes JAX has its own handler of SIGTERM, which tells the others.
            by_jax = number == signal.SIGTERM and jax.process_count() > 1
            # A shell ignores SIGINT for what it starts in the background.
            if not by_jax and signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *unused) -> None:
        """Restores the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _notice(self, number: int, _) -> None:
        self._interrupted = True
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)  # the only signal that JAX's handler notices

    def reached(self, step_number: int) -> bool:
        """Whether to save at this step and leave."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step_number)
        return self._interrupted
