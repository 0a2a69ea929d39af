"""Eight simulated CPU devices, strict rank promotion, and the folder of reference material."""

from tests import environment  # isort: skip

import collections
import gc
import importlib.util
import os
import pathlib
import shutil

import filelock
import jax
import ml_collections
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")

# The slowest files, which workers must take up first: one begun last is waited for.
SLOW = (
    "test_pretrain",
    "test_fusion",
    "test_sharding",
    "test_finetune",
    "test_docs",
    "test_convert",
    "test_gradients",
    "test_oracle",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return SLOW.index(name) if name in SLOW else len(SLOW)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Garbage is looked for less often, and not in what was imported: a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def _forget_what_was_compiled():
    """A worker would hold some gigabytes of it at the end."""
    yield
    jax.clear_caches()


def pytest_sessionfinish() -> None:
    """Removes what was compiled, and the run of `tiny_run`."""
    if not environment.worker:
        shutil.rmtree(os.environ["TEST_FOLDER"], ignore_errors=True)


def pytest_terminal_summary(terminalreporter) -> None:
    """How many blocks of the README files were run, parsed, and left alone (test_docs.py)."""
    total = collections.Counter()
    for report in terminalreporter.getreports("passed"):
        total.update(dict(report.user_properties).get("blocks", {}))
    if total:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(total.items()))
        terminalreporter.write_line(f"blocks of the README files: {counts}")


@pytest.fixture(scope="session")
def tiny_run() -> tuple[pathlib.Path, ml_collections.ConfigDict]:
    """A finished run of mid fusion, made once for all workers, and its configuration.

    Its data set is in `config.data.dir`. To change either, copy it.
    """
    from cromss_jax.training import pretrain  # late: seconds that few tests need
    from tests import runs, steps

    folder = pathlib.Path(os.environ["TEST_FOLDER"], "tiny_run")
    with filelock.FileLock(folder.with_suffix(".lock")):
        data = folder / "data" / "data"  # as `make_data` names it
        config = runs.tiny_config(str(data), **runs.SAVING)
        if not (folder / "run" / "results.md").exists():  # written last
            shutil.rmtree(folder, ignore_errors=True)
            runs.make_data(folder / "data", locations=16, seasons=2, tile_size=48, seed=0)
            with steps.shared():
                pretrain.pretrain(config, str(folder / "run"))
    return folder / "run", config


SHARED = pathlib.Path(__file__).parents[2] / "shared"


@pytest.fixture
def shared() -> pathlib.Path:
    """`../shared`: real Sentinel data and numbers of the published code."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: no reference data on this machine")
    return SHARED


@pytest.fixture(scope="session")
def parity():
    """`tests.torch_parity`, where PyTorch and smp are installed."""
    pytest.importorskip("segmentation_models_pytorch")
    from tests import torch_parity

    return torch_parity


@pytest.fixture(scope="module")
def torch():
    """PyTorch, on one thread: two spin for each other where a core is busy."""
    torch = pytest.importorskip("torch")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(num_threads)


@pytest.fixture
def gpu_compiler():
    """The compiler for GPUs, without JAX's cache, from which their programs cannot be read back."""
    if not importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("needs JAX's CUDA plugin and nvcc: pip install -e .[plan-gpu]")
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
