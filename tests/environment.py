"""The environment of the tests and of the processes that they start. Import it before jax.

Eight simulated CPU devices, counted when the backend starts; quick compilation, shared. With
TEST_PLATFORM=cuda (or tpu, or cpu) the real devices of that platform instead, compiled as users do;
tests that need several devices then fail on one. The CPU is there, too, for tests of its programs.
"""

import importlib.metadata
import os
import signal
import tempfile

# What tests run takes longer to compile than to run. Compiled so it takes a ninth of the time:
# 2.2 s instead of 20 s for a step of one ResNet-10. `make test-slow` compiles as users do.
QUICK_OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
# Later versions end where they find a flag that they do not know.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK_OPTIONS["xla_cpu_use_fusion_emitters"] = False


def quick_flags() -> str:
    """XLA_FLAGS for commands that compile quickly, also where the tests compile as users do."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags += [f"--{name}={value}".lower() for name, value in QUICK_OPTIONS.items()]
    return " ".join(dict.fromkeys(flags))


# A shell lets what it starts in the background ignore Ctrl-C, and processes inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Of xdist; workers inherit the environment of the process that starts them.
worker = os.environ.get("PYTEST_XDIST_WORKER")
if not worker:
    # What one test compiles, the others read, in whichever process; a run of the tests begins
    # with nothing compiled.
    os.environ["TEST_FOLDER"] = tempfile.mkdtemp(prefix="cromss_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["TEST_FOLDER"], "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    platform = os.environ.get("TEST_PLATFORM")
    os.environ["JAX_PLATFORMS"] = f"{platform},cpu" if platform not in (None, "", "cpu") else "cpu"
    xla_flags = [] if platform else ["--xla_force_host_platform_device_count=8"]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *xla_flags])
    if not (platform or os.environ.get("COMPILE_AS_USERS")):
        os.environ["XLA_FLAGS"] = quick_flags()
# Each worker has a core to itself: their threads would spin for each other's.
if worker:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
