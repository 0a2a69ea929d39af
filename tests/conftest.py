"""Eight simulated CPU devices, strict rank promotion, and the folder of reference material."""

import collections
import os
import pathlib
import tempfile

# Runs of the same recipe share what they compile, those in processes of their own too.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "cromss_jax_tests")
# Before jax is imported anywhere: devices are counted when the backend starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Each of xdist's workers has a core to itself: their threads would spin for each other's.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# The slowest files, which workers must take up first: one begun last is waited for.
SLOW = (
    "test_pretrain",
    "test_fusion",
    "test_sharding",
    "test_oracle",
    "test_finetune",
    "test_convert",
    "test_docs",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return SLOW.index(name) if name in SLOW else len(SLOW)

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def _forget_what_was_compiled():
    """A worker would hold some gigabytes of it at the end."""
    yield
    jax.clear_caches()


def pytest_terminal_summary(terminalreporter) -> None:
    """How many blocks of the README files were run, parsed, and left alone (test_docs.py)."""
    total = collections.Counter()
    for report in terminalreporter.getreports("passed"):
        total.update(dict(report.user_properties).get("blocks", {}))
    if total:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(total.items()))
        terminalreporter.write_line(f"blocks of the README files: {counts}")


SHARED = pathlib.Path(__file__).parents[2] / "shared"


@pytest.fixture
def shared() -> pathlib.Path:
    """`../shared`: real Sentinel data and numbers of the published code."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: no reference data on this machine")
    return SHARED
