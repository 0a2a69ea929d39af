"""Which devices a run uses, and whether an accelerator of the machine is left unused."""

import importlib.metadata
import logging
import os
import pathlib
import re

import jax

from cromss_jax.errors import UserError

_log = logging.getLogger(__name__)

# The NVIDIA driver says its version here, whether or not any library of CUDA is installed.
DRIVER = pathlib.Path("/proc/driver/nvidia/version")
# What JAX needs on a GPU, for CUDA 12 and 13; those that are installed are recorded.
_GPU_PACKAGES = tuple(
    f"{name}-cu{cuda}" for cuda in (12, 13) for name in ("nvidia-cudnn", "nvidia-nccl")
) + ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")


class DeviceError(UserError):
    """The devices are not those that the machine has."""


def driver_version() -> str | None:
    """Version of the NVIDIA driver, such as "580.65.06"; None without one."""
    if not DRIVER.is_file():
        return None
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", DRIVER.read_text())
    return found[1] if found else "unknown"


def versions() -> dict[str, str]:
    """Versions of what runs an accelerator: driver, and the installed ones of its packages."""
    found = {}
    for name in _GPU_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    driver = driver_version()
    return found | ({"nvidia-driver": driver} if driver else {})


def check() -> None:
    """Logs platform and kind of the devices.

    Raises:
      DeviceError: if the machine has an NVIDIA GPU and JAX uses the CPU, unless JAX_PLATFORMS asks
        for that.
    """
    devices = jax.devices()
    _log.info("%d x %s (%s)", len(devices), devices[0].device_kind, devices[0].platform.upper())
    driver = driver_version()
    if driver and devices[0].platform == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        raise DeviceError(
            f"this machine has an NVIDIA GPU (driver {driver}), but JAX sees only the CPU: install "
            "'jax[cuda12]' or, for driver 580 and later, 'jax[cuda13]', or set JAX_PLATFORMS=cpu"
        )
