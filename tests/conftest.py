"""Eight simulated CPU devices, strict rank promotion, and the folder of reference material."""

import collections
import os
import pathlib
import shutil
import tempfile

# xdist's workers, and the processes that tests start, inherit the environment from here. It is set
# before jax is imported anywhere: devices are counted when the backend starts.
worker = os.environ.get("PYTEST_XDIST_WORKER")
if not worker:
    # What one test compiles, the others read, in whichever process; a run of the tests begins
    # with nothing compiled.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="cromss_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PLATFORMS"] = "cpu"
    xla_flags = ["--xla_force_host_platform_device_count=8"]
    # What tests run takes longer to compile than to run. Compiled so it takes a ninth of the time:
    # 2.2 s instead of 20 s for a step of one ResNet-10. `make test-all` compiles as users do.
    if not os.environ.get("COMPILE_AS_USERS"):
        xla_flags += ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
        xla_flags += ["--xla_cpu_parallel_codegen_split_count=1"]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *xla_flags])
# Each worker has a core to itself: their threads would spin for each other's.
if worker:
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


def pytest_sessionfinish() -> None:
    """Removes what was compiled."""
    if not worker:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


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
