"""Locks: one of two has it, whoever ends gives it up."""

import contextlib
import json
import os
import signal
import socket
import time
from unittest import mock

import pytest

from cromss_jax import files, lock
from tests import runs


@pytest.fixture
def hold_lock():
    """`runs.hold_lock`, whose processes end with the test."""
    with contextlib.ExitStack() as started:
        yield lambda *path, **environment: started.enter_context(
            runs.hold_lock(*path, **environment)
        )


def test_the_second_names_the_first(hold_lock, tmp_path):
    path = files.absolute(tmp_path / "new" / "folder" / lock.NAME)
    with lock.held(path):
        described = json.loads(path.read_text())
        assert (described["host"], described["pid"]) == (socket.gethostname(), os.getpid())
        second = hold_lock(path)
        said = second.communicate()[0]
        assert f"{path.parent} is being written by process {os.getpid()} on " in said
        assert f"started {described['started']}: wait until" in said
        # What the second did not get it leaves alone.
        assert json.loads(path.read_text()) == described
    assert list(tmp_path.iterdir()) == []
    with lock.held(path):
        (path.parent / "written").touch()
    assert [found.name for found in path.parent.iterdir()] == ["written"]


def test_a_lock_is_taken_over_from_a_killed_process(hold_lock, tmp_path, caplog):
    path = files.absolute(tmp_path / lock.NAME)
    first = hold_lock(path)
    assert first.stdout.readline() == "held\n"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    with lock.held(path):
        assert f"was left over by process {first.pid} on" in caplog.text
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("pair", range(3))
def test_of_two_at_once_one_has_it(pair, hold_lock, tmp_path):
    both = [hold_lock(tmp_path / lock.NAME) for _ in range(2)]
    said = [process.stdout.readline() for process in both]
    assert sorted(line == "held\n" for line in said) == [False, True], said
    for process in both:
        process.communicate()


def test_every_beat_has_one_length(monkeypatch):
    """A reader that learned the length before the last beat gets a whole text."""
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.001)
    texts = []
    path = mock.Mock(
        exists=lambda: bool(texts), write_text=texts.append, read_text=lambda: texts[-1]
    )
    with lock._held_in_bucket(path):
        deadline = time.monotonic() + 10
        while len(texts) < 12 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(texts) >= 12
    assert len({len(text) for text in texts}) == 1
    assert len(set(texts)) == len(texts)


@pytest.mark.slow
def test_a_lock_in_a_bucket(hold_lock):
    pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install -e .[gcs]")
    bucket = pytest.importorskip("tests.bucket", reason="gcp-storage-emulator is not installed")
    path = f"gs://bucket/run/{lock.NAME}"
    with bucket.emulated("bucket") as environment:
        first = hold_lock(path, **environment)
        assert first.stdout.readline() == "held\n"
        started = time.monotonic()
        said = hold_lock(path, **environment).communicate()[0]
        assert time.monotonic() - started < 20  # 3 s beside the imports
        assert f"gs://bucket/run is being written by process {first.pid} on" in said
        first.send_signal(signal.SIGKILL)
        first.communicate()
        third = hold_lock(path, **environment)
        assert third.stdout.readline() == "held\n"
        assert f"left over by process {first.pid} on" in third.communicate()[1]
        fourth = hold_lock(path, **environment)
        assert fourth.stdout.readline() == "held\n"
        assert fourth.communicate()[1] == ""
