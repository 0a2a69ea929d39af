"""Signals that interrupt a run: in every phase, to one process and to one of two."""

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from cromss_jax.training import preemption
from tests import runs

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


def start(*arguments: object) -> subprocess.Popen:
    process = subprocess.Popen(
        [*runs.command("tests.training.test_preemption"), *map(str, arguments)],
        cwd=runs.ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "ready\n" in process.stdout, process.communicate()
    return process


@pytest.mark.parametrize("number", preemption.SIGNALS)
@pytest.mark.parametrize("phase", ["outside", "within"])
def test_where_nothing_is_lost_a_signal_ends_the_process_though_it_compiles(phase, number):
    process = start(phase)
    time.sleep(0.1)  # until it is busy
    process.send_signal(number)
    output, errors = process.communicate(timeout=10)
    assert process.returncode == STATUS
    assert (output, errors) == (
        "",
        "interrupted: nothing to save, the same command continues\n",
    )


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_is_deferred_until_the_run_is_saved(number):
    process = start("deferred")
    process.send_signal(number)
    output, errors = process.communicate(timeout=10)
    # It then leaves by an exception, after which main gives the status.
    assert output == "saved\n"
    assert errors.splitlines()[-1].endswith("Preempted: interrupted: all is saved, the same "
                                            "command continues")  # fmt: skip


def test_a_closed_terminal_keeps_no_process_alive():
    process = start("outside")
    process.stderr.close()
    time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=10) == STATUS


def test_what_was_deferred_ends_a_part_in_which_it_no_longer_is():
    process = start("told before")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[0] == "saved\nleft before\n"


def test_a_second_ctrl_c_ends_at_once():
    process = start("stuck")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[1] == "interrupted twice: ended at once\n"
    assert process.returncode == 128 + signal.SIGINT


def test_what_the_shell_has_ignored_stays_ignored():
    process = start("ignored")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[0] == "saved\n"


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
    line = runs.command("tests.training.test_preemption")
    processes = [
        subprocess.Popen(
            [*line, str(index), str(port)],
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
    if sys.argv[1].isdigit():
        child_of_two(int(sys.argv[1]), int(sys.argv[2]))
    else:
        child(sys.argv[1])
