"""The costs of a compiled step on one device, and lower bounds of its time.

Figures are for one step on one device. They are the compiler's own counts, except for the memory
traffic of TPUs and GPUs and the arithmetic of GPUs (`traffic`). Times are lower bounds: they assume
the peak rates that the chip's maker publishes, with arithmetic, memory and network fully
overlapped.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import jax

from cromss_jax.costs import traffic
from cromss_jax.costs.chips import Chip


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind.

    Attributes:
      count: number of collectives that run.
      bytes: bytes of their results on one device.
    """

    count: int = 0
    bytes: int = 0


_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# "... = (f32[8]{0:T(256)}, s32[]) all-reduce(", or its "-done": an asynchronous collective has two
# parts, and only the second one's shape is that of the result alone.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_COLLECTIVES)})(?:-done)?\(")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def shape_bytes(shape: str) -> int:
    """Bytes of an HLO shape; for a tuple, of all its elements: 36 for `(f32[8]{0}, s32[])`."""
    total = 0
    for dtype, sides in re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape):
        bits = re.search(r"\d+", dtype)  # "pred" has no number and takes one byte
        count = math.prod(int(side) for side in sides.split(",") if side)
        total += count * (int(bits[0]) if bits else 8) // 8
    return total


def find_collectives(hlo: str) -> dict[str, Collective]:
    """The collectives of a compiled program, by kind.

    If the program states how many rounds a loop has, as for CPUs and GPUs, the loop's collectives
    count once per round. If it does not, as for TPUs, they count only once. Of the training step's
    loops, only the searches of `selection.class_thresholds` communicate, 108 bytes per round.

    Args:
      hlo: text of the optimised program.
    """
    entry, name = "", ""
    own = collections.defaultdict(list)  # by computation: (kind, bytes)
    called = collections.defaultdict(list)  # by computation: (called computation, times)
    for line in hlo.splitlines():
        if header := traffic.COMPUTATION.match(line):
            name = header[2]
            entry = name if header[1] else entry
            continue
        if found := _COLLECTIVE.search(line):
            own[name].append((found[2], shape_bytes(found[1])))
        rounds = traffic.ROUNDS.search(line)
        times = int(rounds[1]) if rounds else 1
        for branches in _BRANCHES.findall(line):
            called[name] += [(branch.strip(" %"), 1) for branch in branches.split(",")]
        called[name] += [(other, times) for other in _CALLED.findall(line)]

    @functools.cache
    def totals(computation: str) -> collections.Counter:
        found = collections.Counter()
        for kind, size in own[computation]:
            found[kind, "count"] += 1
            found[kind, "bytes"] += size
        for other, times in called[computation]:
            for key, value in totals(other).items():
                found[key] += times * value
        return found

    total = totals(entry)
    return {
        kind: Collective(total[kind, "count"], total[kind, "bytes"])
        for kind in _COLLECTIVES
        if total[kind, "count"]
    }


@dataclasses.dataclass(frozen=True)
class Cost:
    """Costs of a compiled step on each device.

    Attributes:
      memory: bytes by content; "peak" is their sum, the memory needed at once.
      flops: operations per step; for GPUs, of matrix products and convolutions alone (`traffic`).
      hbm_bytes: for TPUs and GPUs, bytes of memory read and written per step (`traffic`); for CPUs,
        the compiler's count of bytes accessed.
      collectives: the collectives of a step, by kind.
      launches: for GPUs, number of kernels and library functions started per step.
      loops: for TPUs and GPUs, the step's loops.
    """

    memory: dict[str, int]
    flops: float
    hbm_bytes: float
    collectives: dict[str, Collective]
    launches: float = 0.0
    loops: Sequence[traffic.Loop] = ()


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of memory of a compiled step on each device, by content; "peak" is their sum."""
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        # The new state reuses the memory of the old one.
        "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
        "generated code": found.generated_code_size_in_bytes,
    }
    return {**parts, "peak": sum(parts.values())}


def measure(
    compiled: jax.stages.Compiled, *, platform: str = "cpu", unknown_rounds: float = 0
) -> Cost:
    """The costs of a compiled step, from the compiler and from the program's text.

    Args:
      compiled: the step.
      platform: what it is compiled for, "cpu", "gpu" or "tpu".
      unknown_rounds: expected number of rounds of loops whose number of rounds is not constant.
    """
    text = compiled.as_text()
    collectives = find_collectives(text)
    if platform == "cpu":
        cost = compiled.cost_analysis()
        return Cost(memory(compiled), cost["flops"], cost["bytes accessed"], collectives)
    is_gpu = platform == "gpu"
    counts = traffic.count(text, unknown_rounds=unknown_rounds, is_gpu=is_gpu)
    return Cost(
        memory=memory(compiled),
        flops=counts.flops if is_gpu else compiled.cost_analysis()["flops"],
        hbm_bytes=sum(counts.hbm_bytes.values()),
        collectives=collectives,
        launches=sum(counts.launches.values()) if is_gpu else 0.0,
        loops=counts.loops,
    )


def sent_bytes(found: Mapping[str, Collective], num_chips: int) -> float:
    """The least number of bytes that each chip must send, for any algorithm."""
    others = (num_chips - 1) / num_chips
    shares = {"all-reduce": 2 * others, "all-gather": others, "all-to-all": others}
    shares |= {"reduce-scatter": num_chips - 1, "collective-permute": 1}
    return sum(shares[kind] * collective.bytes for kind, collective in found.items())


def bounds(
    cost: Cost,
    chip: Chip,
    *,
    num_chips: int,
    batch_size: int,
    num_samples: int,
    num_validated: int = 0,
    num_hosts: int = 1,
) -> dict[str, object]:
    """Lower bounds of time and upper bounds of speed from a chip's peak rates.

    Args:
      cost: costs of a step.
      chip: the chip with its peak rates.
      num_chips: number of chips that share a batch.
      batch_size: samples per step on all chips together.
      num_samples: samples in the whole training, epochs times locations.
      num_validated: samples that all validations together score.
      num_hosts: number of hosts of GPUs, between which data take the network. A TPU slice counts as
        one host, as its links join all chips.
    """
    linked = num_chips // num_hosts
    sent = sent_bytes(cost.collectives, linked)
    # A host sends what one chip in its place would; the network cards of its chips share that.
    network = sent_bytes(cost.collectives, num_hosts) / linked
    seconds = {
        "arithmetic": cost.flops / chip.flops,
        "HBM traffic": cost.hbm_bytes / chip.hbm_bytes,
        "interconnect": sent / chip.link_bytes,
    }
    if num_hosts > 1:
        seconds["network"] = network / chip.network_bytes
    step_seconds = max(seconds.values())
    num_steps = -(-num_samples // batch_size)
    # A gradient takes twice the operations of the scores alone, or three times if it computes them
    # again to save memory.
    validation = num_validated / batch_size * seconds["arithmetic"] / 4
    hours = (num_steps * step_seconds + validation) / 3600
    return {
        "sent_bytes": sent,
        "network_bytes": network,
        "seconds": seconds,
        "bound_by": max(seconds, key=seconds.get),
        "step_seconds": step_seconds,
        "images_per_second": batch_size / step_seconds,
        "num_steps": num_steps,
        "num_validated": num_validated,
        "validation_hours": validation / 3600,
        "hours": hours,
        "chip_hours": hours * num_chips,
    }


def reading(
    images_per_second: float,
    chip: Chip,
    *,
    num_chips: int,
    num_hosts: int,
    num_threads: int,
    per_core: float,
) -> dict[str, object]:
    """Compares how fast the hosts can read with how fast the chips could train.

    Args:
      images_per_second: training speed of all chips together.
      chip: the chip and its host machine.
      num_chips: number of chips. Fewer than a host has get a share of its cores.
      num_hosts: number of hosts.
      num_threads: `config.data.num_threads`, reading threads of each host.
      per_core: samples per second that one core reads.
    """
    host_cores = chip.host_cores * num_chips // (chip.host_chips * num_hosts)
    needed = math.ceil(images_per_second / num_hosts / per_core)
    return {
        "hosts": num_hosts,
        "cores_a_host": host_cores,
        "samples_per_second_per_core_needed": images_per_second / num_hosts / host_cores,
        "samples_per_second_per_core_measured": per_core,
        "threads_a_host_needed": needed,
        "threads_a_host": num_threads,
        "keeps_up": needed <= min(num_threads, host_cores),
        "could_keep_up": needed <= host_cores,
    }
