"""Signals that interrupt a run, to one process and to one of two."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from cromss_jax.training import distributed
from cromss_jax.training.preemption import Preemption
from tests import runs

NOTICED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


@pytest.mark.parametrize("number", NOTICED)
def test_a_signal_is_noticed_and_the_previous_handler_restored(number):
    got = []
    before = signal.signal(number, lambda *_: got.append(number))
    try:
        with Preemption() as preemption:
            assert not preemption.reached(1)
            signal.raise_signal(number)
            assert preemption.reached(2)
            assert not got
        signal.raise_signal(number)
        assert got == [number]
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_ends_at_once():
    with Preemption() as preemption:
        signal.raise_signal(signal.SIGINT)
        assert preemption.reached(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_the_shell_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGINT)
            assert not preemption.reached(1)
    finally:
        signal.signal(signal.SIGINT, before)


def child(index: int, port: int) -> None:
    """Counts steps until the processes agree to leave, and prints the step."""
    distributed.initialize(f"localhost:{port}", 2, index)
    with Preemption() as preemption:
        print("ready", flush=True)
        for number in range(10**9):
            time.sleep(0.01)
            if preemption.reached(number):
                print(f"left {number}", flush=True)
                break


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGUSR1, (1,)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((signal.SIGUSR1, (0, 1)), (signal.SIGTERM, (1,)), (signal.SIGTERM, (0, 1)))
        ),
    ],
)
def test_two_processes_leave_at_the_same_step(number, told):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [*runs.command("tests.training.test_preemption"), str(index), str(port)],
            cwd=runs.ROOT,
            env=dict(os.environ),
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in processes:
        assert "ready\n" in process.stdout
    for index in told:
        processes[index].send_signal(number)
    left = [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert left[0].startswith("left ")
    assert left[0] == left[1]


if __name__ == "__main__":
    child(int(sys.argv[1]), int(sys.argv[2]))
