"""What a compiled program costs a device, and how long that takes at the least.

Figures are of one step on one device and, but for a TPU's memory traffic, the compiler's: as right
as its counts. Times are bounds: at the peaks that a chip's maker publishes, with arithmetic, memory
and network perfectly overlapped.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import jax

from cromss_jax.costs import traffic

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is published of a chip, and of the virtual machines that hold it.

    Attributes:
      flops: a second, in bfloat16; matrix products of float32 are made of these too.
      hbm_bytes: a second.
      ici_bytes: a second, that leave a chip through all its links; half of "bidirectional".
      memory: bytes.
      host_chips: of a machine, in slices of more than one.
      host_cores: virtual ones, of such a machine.
    """

    flops: float
    hbm_bytes: float
    ici_bytes: float
    memory: float
    host_chips: int
    host_cores: int


# From cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; machines are ct4p-hightpu-4t, ct5lp-hightpu-4t,
# ct5p-hightpu-4t and ct6e-standard-4t.
CHIPS = {
    "v4": Chip(275e12, 1228e9, 300e9, 32 * GIB, 4, 240),
    "v5e": Chip(197e12, 819e9, 200e9, 16 * GIB, 4, 112),
    "v5p": Chip(459e12, 2765e9, 600e9, 95 * GIB, 4, 208),
    "v6e": Chip(918e12, 1640e9, 400e9, 32 * GIB, 4, 180),
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a kind.

    Attributes:
      count: how many run.
      bytes: of their results, on a device.
    """

    count: int = 0
    bytes: int = 0


_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# "... = (f32[8]{0:T(256)}, s32[]) all-reduce(", or its -done: of what runs in two parts, the second
# has the result alone.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_COLLECTIVES)})(?:-done)?\(")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def shape_bytes(shape: str) -> int:
    """Bytes of an HLO shape, of a tuple all of them: 36 of `(f32[8]{0}, s32[])`."""
    total = 0
    for dtype, sides in re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape):
        bits = re.search(r"\d+", dtype)  # none in pred, which takes a byte
        count = math.prod(int(side) for side in sides.split(",") if side)
        total += count * (int(bits[0]) if bits else 8) // 8
    return total


def find_collectives(hlo: str) -> dict[str, Collective]:
    """What a compiled program communicates, by kind.

    The collectives of a loop count once a round where the program says how many rounds there are,
    as for CPUs, and once in all where it doesn't, as for TPUs. Of the training step's loops only
    the searches of `selection.class_thresholds` communicate, 108 bytes a round.

    Args:
      hlo: text of the optimised program.
    """
    entry, name = "", ""
    own = collections.defaultdict(list)  # by computation, (kind, bytes)
    called = collections.defaultdict(list)  # by computation, (other computation, times)
    for line in hlo.splitlines():
        if header := traffic.COMPUTATION.match(line):
            name = header[2]
            entry = name if header[1] else entry
            continue
        if found := _COLLECTIVE.search(line):
            own[name].append((found[2], shape_bytes(found[1])))
        rounds = _ROUNDS.search(line)
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
    """What a compiled step takes of each device.

    Attributes:
      memory: bytes by what they hold; "peak" is what is there at once.
      flops: operations a step.
      hbm_bytes: of a TPU's memory, read and written a step (`traffic`); elsewhere the compiler's
        count of all that is accessed.
      collectives: by kind.
    """

    memory: dict[str, int]
    flops: float
    hbm_bytes: float
    collectives: dict[str, Collective]


def measure(
    compiled: jax.stages.Compiled, *, is_tpu: bool = False, unknown_rounds: float = 0
) -> Cost:
    """Asks the compiler what a step costs.

    Args:
      compiled: the step.
      is_tpu: whether it is compiled for TPUs.
      unknown_rounds: to be expected of its loops whose rounds are not known before they run.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        # The new state takes the place of the old one.
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "generated code": memory.generated_code_size_in_bytes,
    }
    text = compiled.as_text()
    return Cost(
        memory={**parts, "peak": sum(parts.values())},
        flops=cost["flops"],
        hbm_bytes=sum(traffic.by_part(text, unknown_rounds=unknown_rounds).values())
        if is_tpu
        else cost["bytes accessed"],
        collectives=find_collectives(text),
    )


def sent_bytes(found: Mapping[str, Collective], num_chips: int) -> float:
    """Bytes that each chip must send at least, whatever the algorithm."""
    others = (num_chips - 1) / num_chips
    shares = {"all-reduce": 2 * others, "all-gather": others, "all-to-all": others}
    shares |= {"reduce-scatter": num_chips - 1, "collective-permute": 1}
    return sum(shares[kind] * collective.bytes for kind, collective in found.items())


def bounds(
    cost: Cost, chip: Chip, *, num_chips: int, batch_size: int, num_samples: int
) -> dict[str, object]:
    """The least time and the most speed that a chip's peaks allow.

    Args:
      cost: of a step.
      chip: its peaks.
      num_chips: that share a batch.
      batch_size: samples of all chips together.
      num_samples: to train on in all, epochs times locations.
    """
    sent = sent_bytes(cost.collectives, num_chips)
    seconds = {
        "arithmetic": cost.flops / chip.flops,
        "HBM traffic": cost.hbm_bytes / chip.hbm_bytes,
        "interconnect": sent / chip.ici_bytes,
    }
    step_seconds = max(seconds.values())
    num_steps = -(-num_samples // batch_size)
    hours = num_steps * step_seconds / 3600
    return {
        "sent_bytes": sent,
        "seconds": seconds,
        "bound_by": max(seconds, key=seconds.get),
        "step_seconds": step_seconds,
        "images_per_second": batch_size / step_seconds,
        "num_steps": num_steps,
        "hours": hours,
        "chip_hours": hours * num_chips,
    }


def reading(
    images_per_second: float, chip: Chip, *, num_chips: int, num_threads: int, per_core: float
) -> dict[str, object]:
    """Whether the slice's machines read as fast as its chips could train.

    Args:
      images_per_second: of the whole slice.
      chip: with its machine.
      num_chips: of the slice; fewer than a machine has come with their share of its cores.
      num_threads: `config.data.num_threads`, of each machine.
      per_core: samples a second that a core reads.
    """
    num_hosts = -(-num_chips // chip.host_chips)
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
