"""The number of processors that this process may use."""

import math
import os
import pathlib

_CGROUPS = pathlib.Path("/sys/fs/cgroup")


def _quota(folder: pathlib.Path) -> float:
    """Processors that a cgroup of version 1 or 2 allows; infinity without a limit."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()[:2]
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
    except (OSError, ValueError):
        return math.inf
    # "max" in version 2 and -1 in version 1 mean no limit.
    return math.inf if quota == "max" or int(quota) <= 0 else int(quota) / int(period)


def _cgroup_folders(
    root: pathlib.Path = _CGROUPS, own: pathlib.Path = pathlib.Path("/proc/self/cgroup")
) -> list[pathlib.Path]:
    """The folders of this process's cgroup and of those above it, in both versions."""
    folders = [root, root / "cpu", root / "cpu,cpuacct"]
    lines = own.read_text().splitlines() if own.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        start = root / controllers if controllers else root
        parts = [part for part in path.split("/") if part and part != ".."]
        folders += [start.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    return folders


def available() -> int:
    """Processors that this process may use, by its CPU affinity and the quotas of its cgroups."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    quota = min(_quota(folder) for folder in _cgroup_folders())
    return max(1, min(allowed, math.ceil(quota) if math.isfinite(quota) else allowed))
