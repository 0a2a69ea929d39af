"""Signals that interrupt a run: in every phase, to one process and to one of two."""

import os
import signal
import socket
import subprocess
import time

import pytest

from cromss_jax.training import preemption
from tests import runs
from tests.training.interruptible import STATUS

_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _nothing_runs_on():
    """What a failed test leaves would compute forever."""
    yield
    while _started:
        _started.pop().kill()


def start(*arguments: object) -> subprocess.Popen:
    process = subprocess.Popen(
        [*runs.command("tests.training.interruptible"), *map(str, arguments)],
        cwd=runs.ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _started.append(process)
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
    process.stdout.close()


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
    line = runs.command("tests.training.interruptible")
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
