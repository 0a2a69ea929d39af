"""The figures of a plan, on programs and peaks small enough to work out by hand."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cromss_jax import plan, presets, sensors
from cromss_jax.costs import chips, costs, table
from cromss_jax.data import description, input_pipeline
from cromss_jax.training import run, sharding
from tests import runs

# As XLA prints for a TPU and for CPUs, shortened: a loop of 30 rounds, an all-reduce of two halves,
# a call, and names that only look like collectives.
HLO = """\
HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  ROOT %add = f32[] add(%a, %b), metadata={op_name="jit(step)/all-reduce(x)"}
}

%round.sunk (p: (s32[], s32[9])) -> (s32[], s32[9]) {
  %counts = s32[9]{0:T(128)S(1)} all-reduce(%x), replica_groups=[1,16]<=[16], to_apply=%sum
  ROOT %next = (s32[], s32[9]{0:T(128)}) tuple(%i, %counts)
}

%inner (p: bf16[4,2]) -> bf16[4,4] {
  ROOT %gathered = bf16[4,4]{1,0:T(8,128)(2,1)} all-gather(%p), dimensions={1}
}

%never (p: f32[1000]) -> f32[1000] {
  ROOT %lost = f32[1000]{0} all-reduce(%p), to_apply=%sum
}

ENTRY %main_spmd (p: f32[8]) -> f32[8] {
  %while.1 = (s32[], s32[9]{0:T(128)}) while(%t), condition=%go_on, body=%round.sunk, $ROUNDS
  %pair = (f32[8]{0:T(256)}, pred[3]{0}, /*index=2*/bf16[]) all-reduce(%a, %b, %c), to_apply=%sum
  %begun = (f32[2]{0}, f32[8]{0}, u32[]) all-gather-start(%q), dimensions={0}
  %ended = f32[8]{0} all-gather-done(%begun)
  %called = bf16[4,4]{1,0} call(%r), to_apply=%inner
  %moved = s8[5]{0} collective-permute(%s), source_target_pairs={{0,1}}
  ROOT %out = f32[8]{0} fusion(%all-reduce.5), kind=kLoop, calls=%sum
}
""".replace("$ROUNDS", 'backend_config={"known_trip_count":{"n":"30"},"x":1}')
CHIP = chips.Chip(
    flops=1e12, hbm_bytes=1e9, link_bytes=1e6, memory=2**30, host_chips=4, host_cores=100
)
COST = costs.Cost(
    memory={"arguments": 2**28, "peak": 2**29},
    flops=5e11,
    hbm_bytes=2e9,
    collectives={"all-reduce": costs.Collective(3, 1_000_000)},
)


def test_collectives_of_hlo_text():
    assert costs.find_collectives(HLO) == {
        # 30 rounds of nine integers, and 32 + 3 + 2 bytes.
        "all-reduce": costs.Collective(31, 30 * 36 + 37),
        "all-gather": costs.Collective(2, 32 + 32),
        "collective-permute": costs.Collective(1, 5),
    }


def test_a_compiled_loop_counts_its_rounds():
    mesh = sharding.make_mesh(4)

    def function(_, x):
        return jax.lax.fori_loop(0, 7, lambda i, total: total + jnp.sum(x * total), 1.0)

    jitted = sharding.jit_step(function, mesh)
    compiled = jitted.lower(jnp.zeros(()), jax.ShapeDtypeStruct((8,), jnp.float32)).compile()
    assert costs.measure(compiled).collectives == {"all-reduce": costs.Collective(7, 28)}


def test_a_product_costs_what_it_does():
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 32), (32, 16)))
    cost = costs.measure(jax.jit(jnp.dot).lower(a, b).compile())
    assert cost.flops == 2 * 64 * 32 * 16
    assert cost.hbm_bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert cost.memory["arguments"] == 4 * (64 * 32 + 32 * 16)
    assert cost.memory["outputs"] == 4 * 64 * 16
    assert cost.collectives == {}


def test_bounds_by_hand():
    found = costs.bounds(COST, CHIP, num_chips=4, batch_size=36, num_samples=36 * 1799 + 1)
    # Twice three quarters of a megabyte leave a chip; the memory's two seconds are most.
    assert found["seconds"] == {"arithmetic": 0.5, "HBM traffic": 2.0, "interconnect": 1.5}
    assert (found["bound_by"], found["step_seconds"]) == ("HBM traffic", 2.0)
    assert found["images_per_second"] == 18
    assert (found["num_steps"], found["hours"], found["chip_hours"]) == (1800, 1.0, 4.0)
    # Eight batches take a quarter of a step's arithmetic each.
    validated = costs.bounds(
        COST, CHIP, num_chips=4, batch_size=36, num_samples=36, num_validated=288
    )
    assert validated["validation_hours"] == pytest.approx(1 / 3600)
    assert validated["hours"] == pytest.approx(3 / 3600)
    alone = costs.bounds(COST, CHIP, num_chips=1, batch_size=36, num_samples=36)
    assert alone["seconds"]["interconnect"] == 0


def test_hosts_of_gpus_are_joined_by_a_network():
    gpu = dataclasses.replace(CHIP, network_bytes=1e5)
    found = costs.bounds(COST, gpu, num_chips=8, num_hosts=2, batch_size=8, num_samples=8)
    # Within a host as in one of four. Of what leaves a host, twice half of a megabyte, a chip's
    # network card sends a quarter.
    assert found["seconds"]["interconnect"] == 1.5
    assert found["seconds"]["network"] == 2.5
    assert (found["bound_by"], found["network_bytes"]) == ("network", 250_000)
    pair = costs.bounds(COST, gpu, num_chips=2, num_hosts=2, batch_size=8, num_samples=8)
    assert (pair["seconds"]["interconnect"], pair["seconds"]["network"]) == (0, 10)


@pytest.mark.parametrize(
    ("speed", "num_chips", "threads", "needed", "verdict"),
    [
        (2000.0, 8, 100, 100, "keeps up"),
        (2000.0, 8, 99, 100, "too slow: set config.data.num_threads to 100"),
        (2020.0, 8, 200, 101, "too slow for any number of threads: a host has 100 cores"),
        (250.0, 1, 30, 25, "keeps up"),  # a quarter of a host
        (260.0, 1, 30, 26, "too slow for any number of threads: a host has 25 cores"),
    ],
)
def test_reading_against_need(speed, num_chips, threads, needed, verdict):
    hosts = -(-num_chips // CHIP.host_chips)
    found = costs.reading(
        speed, CHIP, num_chips=num_chips, num_hosts=hosts, num_threads=threads, per_core=10.0
    )
    assert found["threads_a_host_needed"] == needed
    assert table.reading_verdict(found) == verdict


def test_shapes_are_those_that_are_read():
    T, S = 12, 3
    record = {
        "s1": np.zeros((T, T, 2), np.uint8),
        "s2_10m": np.zeros((T, T, 4), np.uint8),
        "s2_20m": np.zeros((T // 2, T // 2, 6), np.uint8),
        "s2_60m": np.zeros((T // 6, T // 6, 3), np.uint8),
        "labels": np.zeros((S, T, T), np.uint8),
        "truth": np.zeros((T, T), np.uint8),
        "season": np.int32(0),
        "crs": b"",
    }
    says = (presets.DYNAMIC_WORLD, sensors.preset_bands(is_native=True))
    dataset = input_pipeline.TileDataset([record], tuple(record), T, np.ones(1), True, *says)
    described = description.Description("here", 1, T, S, tuple(record), *says)
    for modalities in (("s1", "s2"), ("s1",), ("s2",)):
        read = input_pipeline.read_batch(dataset, modalities, np.zeros(5, int))
        expected = {name: (x.shape, x.dtype) for name, x in read.items()}
        planned = description.record_shapes(described, modalities, 5)
        assert {name: (x.shape, x.dtype) for name, x in planned.items()} == expected


def test_published_data_stand_in_for_absent_ones():
    config = runs.tiny_config("absent", "")
    found = description.describe(config, seasons=None)
    assert (found.num_locations, found.tile_size, found.seasons) == (103_793, 264, 4)
    assert description.split_sizes(config, found) == (103_793 - 1038, 4 * 1038)
    uneven = dataclasses.replace(found, num_locations=3, season_counts=np.array([2, 2, 2]))
    assert description.split_sizes(config, uneven) == (2, 2)
    assert dataclasses.replace(found, tile_size=24).padded_to(32).tile_size == 36
    assert description.describe(config, tile_size=96).tile_size == 96
    with pytest.raises(input_pipeline.DataError, match="a multiple of 6, such as 96$"):
        description.describe(config, tile_size=100)


# As libtpu 0.0.52 says it, and a message that its library holds beside.
FULL = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (22.50G) exceeds available HBM (15.75G). HLO module: jit_step.\n"
)
ALSO_FULL = (
    "Ran out of memory in memory space hbm. Used 512.00M of 95.73G hbm. Exceeded hbm capacity by 1G"
)


def test_what_the_compiler_says_of_memory():
    full = plan.out_of_memory(FULL)
    assert (full.needed, full.available) == (22.5 * 2**30, 15.75 * 2**30)
    full = plan.out_of_memory(ALSO_FULL)
    assert (full.needed, full.available) == (2**29, 95.73 * 2**30)
    assert plan.out_of_memory("INTERNAL: out of luck") is None


@pytest.fixture
def too_large(monkeypatch):
    """A batch of 64 on two devices, of which a chip can hold 11 images; and the batches tried."""
    config = runs.tiny_config("absent", batch_size=64, num_devices=2)
    tried = []

    def compile_step(config, described, mesh, available):
        tried.append(config.batch_size // mesh.size)
        if tried[-1] > 11:
            raise plan.out_of_memory(FULL)

    monkeypatch.setattr(plan, "compile_step", compile_step)
    monkeypatch.setattr(plan, "find_devices", lambda topology: jax.devices())
    return config, tried


def test_what_does_not_fit_says_what_would(too_large):
    config, tried = too_large
    figures = plan.make_plan(config, "v5e:2x2", per_core=1)
    # Of 25.6 million float32: state (parameters, two moments) and gradients, 0.38 GiB.
    assert figures["largest_images_a_chip"] == int((15.75 - 0.38) / (22.5 - 0.38) * 32) == 22
    assert "fits is config.batch_size 44, 22 images per chip (estimated" in table.markdown(figures)
    assert tried == [32]

    figures = plan.make_plan(config, "v5e:2x2", per_core=1, search=True)
    assert (figures["fits"], figures["largest_images_a_chip"]) == (False, 11)
    lines = table.markdown(figures).splitlines()
    assert lines[-3] == "Does not fit: a chip needs 22.50 GiB and has 15.75."
    assert lines[-2].endswith("is config.batch_size 22, 11 images per chip (found by compiling).")
    assert lines[-1] == (
        "The same batch takes less memory with more config.microbatches, or "
        "config.rematerialise=True."
    )
    assert len(tried) <= 2 + 5 + 1


def test_what_fits_is_divisible_by_the_microbatches(too_large):
    config, _ = too_large
    config.microbatches = 4
    assert plan.make_plan(config, "v5e:2x2", per_core=1)["largest_images_a_chip"] == 20
    figures = plan.make_plan(config, "v5e:2x2", per_core=1, search=True)
    assert (figures["largest_images_a_chip"], figures["largest_batch_size"]) == (8, 16)
    config.microbatches = 3
    with pytest.raises(run.ConfigError, match="divisible by config.microbatches, 3"):
        plan.make_plan(config, "v5e:2x2", per_core=1)


def test_a_batch_that_the_chips_do_not_divide(too_large):
    config, _ = too_large
    config.batch_size = 63
    with pytest.raises(
        run.ConfigError, match=r"batch_size is 63,.* divisible .* devices, 2; use a multiple of 2"
    ):
        plan.make_plan(config, "v5e:2x2", per_core=1)
    config.mode = "finetune"
    with pytest.raises(plan.PlanError, match="only pretraining can be planned"):
        plan.make_plan(config, "v5e:2x2", per_core=1)


@pytest.mark.parametrize(
    "topology",
    ["v5e", "v5e:4", "v7:4x4", "cpu:0", "cpu:2x2", "4x4", ""]
    + ["h100", "h100:0", "h100:0x8", "h100:1x2x4", "b200:8", "h100:8x"],
)
def test_what_is_no_topology(topology):
    with pytest.raises(plan.PlanError, match="use one of v4, v5e, v5p, v6e and its shape, .* a100"):
        plan.find_devices(topology)


@pytest.mark.parametrize(("topology", "instead"), [("h100:16", "2x8"), ("a100:2x9", "3x8")])
def test_more_gpus_than_a_host_has(topology, instead):
    with pytest.raises(plan.PlanError, match=f"at most 8; .* such as {topology[:4]}:{instead}"):
        plan.find_devices(topology)


def test_without_a_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(plan.PlanError, match="`pip install libtpu`"):
        plan.find_devices("v5e:4x4")
    with pytest.raises(plan.PlanError, match=r"`pip install -e \.\[plan-gpu\]`"):
        plan.find_devices("h100:8")


def test_a_compiler_that_does_not_work(monkeypatch):
    """As without nvcc, or with a plugin of another version."""

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: libdevice not found at ./libdevice.10.bc\nat x")

    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(plan.topologies, "get_topology_desc", fail)
    with pytest.raises(plan.PlanError) as caught:
        plan.find_devices("h100:8")
    assert "(INTERNAL: libdevice not found at ./libdevice.10.bc)" in str(caught.value)
    assert "run `pip install -e .[plan-gpu]`" in str(caught.value)


@pytest.mark.parametrize(
    ("topology", "num_chips", "hosts"),
    [("h100:8", 8, 1), ("h100:2x4", 8, 2), ("h100:2x4", 3, 1), ("v5e:4x4", 16, 4)],
)
def test_number_of_hosts(topology, num_chips, hosts):
    assert plan.count_hosts(topology, plan.find_chip(topology), num_chips) == hosts


def test_the_share_of_memory_is_that_of_jax(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert plan.memory_fraction() == 0.75
    for text, share in {".95": 0.95, "0.5": 0.5, "1": 1.0, "1.0": 1.0}.items():
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", text)
        assert plan.memory_fraction() == share
    for text in ("0", "0.0", "90%", "1.5", "-0.5", "."):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", text)
        with pytest.raises(plan.PlanError, match="_FRACTION=.* is not a share .* such as 0.9"):
            plan.memory_fraction()


@pytest.fixture
def toy_step(monkeypatch):
    """The sample's state and records with a step that adds, for two devices.

    The real step is that of `pretrain.jit_train_step`; `tests.bench.scaling` compiles it.
    """

    def jit_train_step(config, definition, num_locations, mesh):
        def add(state, records):
            total = sum(jnp.sum(x, dtype=jnp.float32) for x in records.values())
            return jax.tree.map(lambda x: x + 1, state), total

        assert num_locations == 56
        return sharding.jit_step(add, mesh, donate_state=True)

    monkeypatch.setattr(plan.pretrain, "jit_train_step", jit_train_step)
    return runs.tiny_config("absent", batch_size=6, num_devices=2)


@pytest.fixture
def toy(toy_step, monkeypatch):
    """The toy on simulated devices, of whatever topology."""
    monkeypatch.setattr(plan, "find_devices", lambda topology: jax.devices())
    return toy_step


SMALL = {"per_core": 285.0, "num_locations": 64, "tile_size": 36, "seasons": 2}


def test_a_plan_for_simulated_devices(toy):
    figures = plan.make_plan(toy, "cpu:8", **SMALL)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(plan.abstract_state(toy)))
    # S1, S2 at three resolutions, two seasons of labels; season and is_real.
    sample = 36 * 36 * 2 + 36 * 36 * 4 + 18 * 18 * 6 + 6 * 6 * 3 + 2 * 36 * 36 + 4 + 1
    assert figures["memory"]["arguments"] == state + 3 * sample
    assert figures["memory"]["outputs"] < 10_000  # the state's place is taken again
    # The seven sums, in one.
    assert figures["collectives"] == {"all-reduce": {"count": 1, "bytes": 28}}
    assert (figures["chips"], figures["images_a_chip"], figures["fits"]) == (2, 3, True)
    assert "hours" not in figures
    text = table.markdown(figures)
    assert f"| memory: arguments | {(state + 3 * sample) / 2**30:.3f} GiB |  |  |" in text
    assert "| 1 all-reduce | 28 B |  |  |" in text
    json.dumps(figures)


def test_a_plan_for_chips(toy):
    toy.num_epochs, toy.eval_every_epochs = 3, 2
    figures = plan.make_plan(toy, "v5e:2x2", **SMALL)
    text = table.markdown(figures)
    assert figures["num_steps"] == 28  # of 6, for 3 epochs of 56 locations
    # The toy reads and writes its state, which is most of what it does.
    step_seconds = figures["hbm_bytes"] / 819e9
    assert f"| one step, at least |  | HBM traffic | {step_seconds * 1e3:.3g} ms |" in text
    # Two validations of the 8 other locations in two seasons, after steps 19 and 28.
    assert figures["num_validated"] == 32
    seconds = 28 * step_seconds + 32 / 6 * figures["flops"] / 197e12 / 4
    assert figures["chip_hours"] == pytest.approx(2 * seconds / 3600)
    assert re.search(r"\| memory: peak \| 0\.\d+ GiB \| 16 GiB \| \d% of it: fits \|", text)
    assert "| reading, hosts 1 x 56 cores |" in text
    assert len({line.count("|") for line in text.splitlines()[2:]}) == 1
    json.dumps(figures)


# What a GPU's program adds to the toy's.
LOOP = "jit(train_step)/losses/while"


@pytest.fixture
def toy_gpus(toy, monkeypatch):
    """The toy, whose program is taken for one of GPUs with launches and loops."""
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)

    def measure(compiled, *, platform, unknown_rounds):
        assert platform == "gpu"
        loops = [costs.traffic.Loop(LOOP, 15), costs.traffic.Loop(LOOP, None)]
        moved = sum(costs.memory(compiled).values())
        return costs.Cost(costs.memory(compiled), 1e12, moved, {}, launches=3819.0, loops=loops)

    monkeypatch.setattr(plan.costs, "measure", measure)
    return toy


def test_a_plan_for_gpus(toy_gpus):
    toy_gpus.augmentation.rotation_probability = 0.5
    figures = plan.make_plan(toy_gpus, "h100:2x1", **SMALL)
    text = table.markdown(figures)
    assert "2 GPUs, batch 6, 3 images per GPU" in text
    assert "JAX takes 75% of a GPU's 79.1 GiB, 59.3 GiB; XLA_PYTHON_CLIENT_MEM_FRACTION" in text
    assert re.search(r"\| memory: peak \| 0\.\d+ GiB \| 59\.3 GiB \| \d% of it: fits \|", text)
    assert "| arithmetic | 1 TFLOP | 989 TFLOP/s | 1.01 ms |" in text
    assert "| launches | 3,819 |  | microseconds each, not in the times |" in text
    assert "| loops | 15 rounds |  |  |" in text
    assert f"| loop of unknown length: {LOOP} | counted as 1.5 rounds |  | the host waits |" in text
    assert "| network | 0 B | 50 GB/s | 0 ms |" in text
    assert "| reading, hosts 2 x 28 cores |" in text
    assert "GPU-hours" in text
    assert "chip" not in text
    assert len({line.count("|") for line in text.splitlines()[3:]}) == 1
    json.dumps(figures)


def test_a_gpu_that_is_too_small(toy_gpus, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.000001")
    figures = plan.make_plan(toy_gpus, "l40s:2", **SMALL)
    assert not figures["fits"]
    assert figures["memory_available"] == pytest.approx(48_000)
    text = table.markdown(figures)
    assert "Does not fit: a GPU needs" in text
    assert "Not even the smallest batch fits" in text
    assert text.endswith("or crop, or config.rematerialise=True.")
    toy_gpus.rematerialise = True
    assert table.markdown(plan.make_plan(toy_gpus, "l40s:2", **SMALL)).endswith("or crop.")


def test_the_largest_batch_that_fits_a_gpu(toy_gpus, monkeypatch):
    def compile_step(config, described, mesh, available):
        raise plan.OutOfMemory(1.5 * available, available)

    monkeypatch.setattr(plan, "compile_step", compile_step)
    figures = plan.make_plan(toy_gpus, "a100:2", **SMALL)
    text = table.markdown(figures)
    available = 0.75 * chips.GPUS["a100"].memory / chips.GIB
    needed = f"a GPU needs {1.5 * available:.2f} GiB and has {available:.2f}."
    assert f"Does not fit: {needed}" in text
    # Nearly two thirds of three: the state's memory is the same for all.
    assert "fits is config.batch_size 2, 1 images per GPU (estimated in proportion" in text
    assert text.endswith("with more config.microbatches, or config.rematerialise=True.")


def test_a_plan_compiled_for_gpus(gpu_compiler, toy_step, monkeypatch):
    """On two hosts, with the compiler for GPUs; then in less memory than it needs."""
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    figures = plan.make_plan(toy_step, "a100:2x1", **SMALL)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(plan.abstract_state(toy_step)))
    assert figures["memory"]["arguments"] > state
    # The toy reads and writes its state.
    assert 2 * state < figures["hbm_bytes"] < 2.1 * state
    # The seven sums, which the compiler may add before they are sent; twice half of their bytes.
    reduced = figures["collectives"]["all-reduce"]["bytes"]
    assert reduced in (4, 28)
    assert figures["network_bytes"] == reduced
    assert figures["sent_bytes"] == 0  # within hosts of one GPU
    assert figures["launches"] > len(jax.tree.leaves(plan.abstract_state(toy_step)))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.0001")
    figures = plan.make_plan(toy_step, "a100:2x1", **SMALL)
    assert not figures["fits"]
