"""What is said of the devices, and that a GPU is not left unused silently."""

import logging

import pytest

from cromss_jax.training import devices

TEXT = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:12:33 UTC 2025
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.183.01  Release Build  (x)\n"


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """The driver's file, which the tests write."""
    path = tmp_path / "version"
    monkeypatch.setattr(devices, "DRIVER", path)
    return path


@pytest.mark.parametrize(
    ("text", "version"), [(TEXT, "580.65.06"), (OPEN, "535.183.01"), ("nothing\n", "unknown")]
)
def test_the_drivers_version(driver, text, version):
    assert devices.driver_version() is None
    assert "nvidia-driver" not in devices.versions()
    driver.write_text(text)
    assert devices.driver_version() == version
    assert devices.versions()["nvidia-driver"] == version


def test_devices_are_logged_and_an_unused_gpu_stops_the_run(driver, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "cromss_jax")
    devices.check()
    assert caplog.messages == ["8 x cpu (CPU)"]
    driver.write_text(TEXT)
    devices.check()  # JAX_PLATFORMS is "cpu" in the tests: asked for
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(
        devices.DeviceError, match=r"driver 580.65.06\), but JAX sees only the CPU: inst"
    ):
        devices.check()
