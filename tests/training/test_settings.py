"""What a run changes in JAX's settings."""

import logging
import os
import subprocess
import sys
import textwrap

import jax
import pytest

from cromss_jax.training import settings
from tests import runs

CPUINFO = """\
processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
cpu MHz\t\t: {mhz}
flags\t\t: fpu sse4_2 avx2 {flags}

processor\t: 1
vendor_id\t: GenuineIntel
cpu MHz\t\t: 800
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd {features}\nCPU part\t: 0xd0c\n\n"


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Names the processor that a text of /proc/cpuinfo describes."""
    monkeypatch.setattr(settings, "_PROCESSORS", tmp_path / "cpuinfo")

    def name(text: str) -> str:
        (tmp_path / "cpuinfo").write_text(text)
        return settings.processor()

    return name


def test_processors_are_one_kind_if_their_instructions_are(processor):
    first = processor(CPUINFO.format(mhz=2000, flags="avx512f"))
    assert processor(CPUINFO.format(mhz=3100, flags="avx512f")) == first
    assert processor(CPUINFO.format(mhz=2000, flags="")) != first
    assert processor(ARM.format(features="sve")) != processor(ARM.format(features=""))


def test_each_kind_of_processor_has_its_own_compiled_programs(tmp_path):
    """Of another kind, none is read: XLA would run instructions that the processor lacks."""
    script = """
        import pathlib, sys
        import jax, jax.numpy as jnp
        from cromss_jax.training import settings

        workdir, cpuinfo, flags = sys.argv[1:]
        settings._PROCESSORS = pathlib.Path(cpuinfo)
        settings._PROCESSORS.write_text(f"flags : {flags}")
        settings.keep_compiled(workdir)
        read = []
        jax.monitoring.register_event_listener(
            lambda name, **_: read.append(name.endswith("/cache_hits"))
        )
        jax.jit(lambda x: x * 2 + 1)(jnp.ones(9)).block_until_ready()
        print(any(read))
    """

    def reads(flags: str) -> str:
        line = [sys.executable, "-c", textwrap.dedent(script), tmp_path / "run"]
        line += [tmp_path / "cpuinfo", flags]
        environment = {**os.environ}
        del environment["JAX_COMPILATION_CACHE_DIR"]  # of the tests
        done = subprocess.run(line, cwd=runs.ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert [reads(flags) for flags in ("avx2", "avx2 avx512f", "avx2")] == [
        "False",
        "False",
        "True",
    ]
    assert len(list((tmp_path / "run" / "compiled").iterdir())) == 2


def test_inherited_settings_are_named_and_reset(caplog):
    caplog.set_level(logging.WARNING, "cromss_jax")
    try:
        jax.config.update("jax_enable_x64", True)
        settings.use_default_numbers()
        assert not jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", False)
    assert "jax_enable_x64 is True in this environment; set to False" in caplog.text
    caplog.clear()
    settings.use_default_numbers()
    assert not caplog.records
