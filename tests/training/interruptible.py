"""Processes for test_preemption.py to interrupt; they start in a tenth of a second."""

import contextlib
import hashlib
import signal
import sys
import time

from cromss_jax.training import preemption

STATUS = 75


def busy() -> None:
    """Minutes in C, as a compilation: the main thread sees no signal meanwhile."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def until_reached() -> None:
    for _ in range(10**9):
        time.sleep(0.01)
        if preemption.reached():
            break


def child(phase: str) -> None:
    """A run in that phase."""
    if phase == "ignored":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    preemption.watch(lambda: STATUS)
    if phase == "outside":
        print("ready", flush=True)
        busy()
    with preemption.deferred():
        print("ready", flush=True)
        if phase == "stuck":
            busy()
        if phase == "within":
            with preemption.deferred(False):
                busy()
        until_reached()
        print("saved", flush=True)
        if phase == "told before":
            with contextlib.suppress(preemption.Preempted), preemption.deferred(False):
                print("not left", flush=True)
            print("left before", flush=True)
    print("not left", flush=True)


def child_of_two(index: int, port: int) -> None:
    """Counts steps until the processes agree to leave, and prints the step."""
    preemption.watch(lambda: STATUS)
    from cromss_jax.training import distributed

    distributed.initialize(f"localhost:{port}", 2, index)
    with preemption.deferred():
        print("ready", flush=True)
        for number in range(10**9):
            time.sleep(0.01)
            if preemption.reached():
                print(f"left {number}", flush=True)
                break


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        child_of_two(int(sys.argv[1]), int(sys.argv[2]))
    else:
        child(sys.argv[1])
