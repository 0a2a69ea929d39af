"""How JAX is set up for a run, whatever the environment says."""

import hashlib
import logging
import os
import pathlib
import platform

import jax

_log = logging.getLogger(__name__)

# Settings that change dtypes or random numbers, and thus the results. All may be inherited from the
# environment, as in JAX_ENABLE_X64=1. The values are JAX's defaults.
_NUMBERS = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}

_PROCESSORS = pathlib.Path("/proc/cpuinfo")
# What names a processor's instructions there: the first four on x86, the others on ARM.
_KINDS = {"vendor_id", "cpu family", "model", "flags"}
_KINDS |= {"CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"}


def use_default_numbers() -> None:
    """Resets the settings of JAX that change the results of a run, and logs which were changed."""
    for name, value in _NUMBERS.items():
        found = getattr(jax.config, name)
        if found != value:
            _log.warning("%s is %s in this environment; set to %s for this run", name, found, value)
            jax.config.update(name, value)


def processor() -> str:
    """A short name for the kind of this machine's processor; differs if its instructions do."""
    text = _PROCESSORS.read_text() if _PROCESSORS.exists() else platform.processor()
    first, _, _ = text.partition("\n\n")
    kind = [line for line in first.splitlines() if line.partition(":")[0].strip() in _KINDS]
    digest = hashlib.sha256("\n".join(kind or [first]).encode()).hexdigest()
    return f"{platform.machine()}_{digest[:12]}"


def keep_compiled(workdir: str) -> None:
    """Keeps compiled programs in a run's folder, so that a continued run need not compile again.

    Each kind of processor has a folder of its own. Programs for CPUs contain instructions that
    others may not have, and JAX does not check this. A cache that the user has set is used as it
    is.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    folder = os.path.join(workdir, "compiled", processor())
    jax.config.update("jax_compilation_cache_dir", folder)
    # Dozens of small programs start a run, which by default would not be kept.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
