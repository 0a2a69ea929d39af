"""Two real processes of four devices each; `tests.bench.processes` lets them train."""

import json
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from cromss_jax.data import preprocess
from cromss_jax.training import distributed, sharding
from tests import runs

BATCH_SIZE = 16
KEY_DATA = np.array([0, 3], np.uint32)


def seen(key_data: np.ndarray, records: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The rows of a batch, their sum, and the views drawn for them."""
    geometry = preprocess.random_geometry(
        jax.random.wrap_key_data(key_data),
        BATCH_SIZE,
        100,
        flip_probability=0.5,
        rotation_probability=0.5,
        max_angle=90.0,
    )
    return {**records, "total": records["row"].sum(), **vars(geometry)}


def child(index: int, port: int) -> None:
    """Prints what this process has and sees; then the second kills itself and the first notices."""
    distributed.initialize(f"localhost:{port}", 2, index)

    def stepping(mesh):
        rows, see = sharding.process_rows(mesh, BATCH_SIZE), sharding.jit_step(seen, mesh)
        return rows, lambda: see(KEY_DATA, sharding.to_devices({"row": rows}, mesh))

    # As `jax.make_mesh` orders the chips of v5e:4x4: through the hosts and back to the first.
    ring = [jax.devices()[i] for i in (0, 1, 4, 5, 6, 7, 2, 3)]
    rows, step = stepping(sharding.make_mesh(devices=ring))
    found = {name: value.tolist() for name, value in jax.device_get(step()).items()}
    print(json.dumps({"rows": rows.tolist(), **found}), flush=True)
    _, step = stepping(sharding.make_mesh())
    try:
        for number in range(1000):
            if (index, number) == (1, 3):
                os.kill(os.getpid(), signal.SIGKILL)
            sharding.wait(step()["total"])
    except jax.errors.JaxRuntimeError as error:
        distributed.leave(distributed.lost(error), distributed.LOST_STATUS)


def test_processes_share_a_batch_and_one_notices_the_end_of_another():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    four = "--xla_force_host_platform_device_count=4"  # the last of equal flags counts
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {four}"}
    processes = [
        subprocess.Popen(
            [*runs.command("tests.training.test_processes"), str(index), str(port)],
            cwd=runs.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    printed = [process.communicate(timeout=300) for process in processes]
    assert [p.returncode for p in processes] == [distributed.LOST_STATUS, -signal.SIGKILL], printed
    assert "error: the joint computation of the processes failed" in printed[0][1]

    # Beside what Gloo prints.
    lines = [line for output, _ in printed for line in output.splitlines()]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert found[0].pop("rows") == [0, 1, 2, 3, 12, 13, 14, 15]
    assert found[1].pop("rows") == [4, 5, 6, 7, 8, 9, 10, 11]
    # One device of one process sees the same, each value.
    alone = jax.jit(seen)(KEY_DATA, {"row": np.arange(BATCH_SIZE)})
    expected = {name: np.asarray(value).tolist() for name, value in alone.items()}
    assert found == [expected, expected]


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ((None, None, 0), "are missing: set all three"),
        (("localhost:1234", 2, None), "are missing: set all three"),
        (("localhost", 2, 0), "must be HOST:PORT"),
        (("localhost:port", 2, 0), "must be HOST:PORT"),
        (("localhost:1234", 2, 2), "numbered from 0 to 1"),
        (("localhost:1234", 2, 1, False), "for a single process: remove"),
        ((None, None, None, True), "without SLURM or Cloud TPU, set"),
    ],
)
def test_flags_that_cannot_work_are_refused_at_once(told, sentence):
    with pytest.raises(distributed.DistributedError, match=sentence):
        distributed.initialize(*told)


if __name__ == "__main__":
    child(int(sys.argv[1]), int(sys.argv[2]))
