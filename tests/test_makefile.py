"""What `make` installs, by the NVIDIA driver that is there."""

import os
import subprocess

import pytest

from tests import runs


def installs(tmp_path, printed: str, *arguments: str) -> str:
    """What `make pretrain` would run where `nvidia-smi` prints that."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{printed}'\n")
    smi.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("ACCELERATOR", None)
    line = ["make", "--dry-run", "--always-make", "pretrain", *arguments]
    done = subprocess.run(
        line, cwd=runs.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("printed", "accelerator"),
    [
        ("580.65.06\\n580.65.06\\n", "cuda13"),
        ("535.183.01\\n", "cuda12"),
        ("470.256.02\\n", "cpu"),  # too old for any JAX of today
        ("NVIDIA-SMI has failed because it could not communicate with the driver.\\n", "cpu"),
        ("", "cpu"),
    ],
)
def test_the_driver_decides(tmp_path, printed, accelerator):
    text = installs(tmp_path, printed)
    assert f"Installing for {accelerator} (NVIDIA driver: " in text
    assert ("'jax[" in text) == (accelerator != "cpu")
    if accelerator != "cpu":
        assert f"'jax[{accelerator}]'" in text


def test_the_user_overrides(tmp_path):
    assert "'jax[tpu]'" in installs(tmp_path, "580.65.06\\n", "ACCELERATOR=tpu")
    assert "'jax[" not in installs(tmp_path, "580.65.06\\n", "ACCELERATOR=cpu")
