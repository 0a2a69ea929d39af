"""What a profile says of the kernels of some steps: how many, how long, of which part, and idling.

Read by JAX's own `ProfileData`. On a GPU a kernel is an event of a stream. On a CPU, where the
bench is only tried out, it is an event that names an instruction of the compiled program.
"""

import collections
import dataclasses
import pathlib
import re
import warnings
from collections.abc import Mapping, Sequence

import jax

from cromss_jax.costs import traffic
from tests.bench.tpu import PARTS

LONGEST = 15


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that ran.

    Attributes:
      name: its name.
      instruction: that of the compiled program which it belongs to, "" if the profile tells none.
      start: nanoseconds.
      duration: nanoseconds.
    """

    name: str
    instruction: str
    start: float
    duration: float


def read(path: pathlib.Path) -> list[Kernel]:
    """The kernels in a profile, on all streams of the first device.

    Raises:
      ValueError: if there are none.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU:0")]
    found = []
    with warnings.catch_warnings():
        # Of `event.stats`, in Python 3.12 and later.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in devices or planes:
            for line in plane.lines:
                if devices and not line.name.startswith("Stream"):
                    continue  # sums of other lines
                for event in line.events:
                    instruction = str(dict(event.stats).get("hlo_op", ""))
                    if devices or instruction:
                        found.append(
                            Kernel(event.name, instruction, event.start_ns, event.duration_ns)
                        )
    if not found:
        lines = {plane.name: [line.name for line in plane.lines] for plane in planes}
        raise ValueError(f"no kernels in {path}: it has the planes and lines {lines}")
    return found


def part_names(program: str) -> dict[str, str]:
    """The part of the step that each instruction of a compiled program's text belongs to."""
    found = {}
    for computation in traffic.parse(program).values():
        parts = traffic.parts_of(computation, PARTS)
        found |= {name: part or "others" for name, part in parts.items()}
    return found


def busy(kernels: Sequence[Kernel]) -> float:
    """Nanoseconds in which at least one kernel ran."""
    total, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        stop = kernel.start + kernel.duration
        total += max(0.0, stop - max(kernel.start, end))
        end = max(end, stop)
    return total


def summarise(kernels: Sequence[Kernel], num_steps: int, parts: Mapping[str, str]) -> dict:
    """Figures of a step.

    Args:
      kernels: of `num_steps` steps.
      num_steps: how many steps.
      parts: from `part_names`.
    """
    span = max(k.start + k.duration for k in kernels) - min(k.start for k in kernels)
    names, by_part = collections.defaultdict(list), collections.defaultdict(list)
    for kernel in kernels:
        # Kernels of a CUDA graph tell no instruction, but XLA's own are named after theirs.
        own = re.sub(r"_(\d+)$", r".\1", kernel.name)
        part = parts.get(kernel.instruction) or parts.get(own) or parts.get(kernel.name, "unknown")
        names[f"{kernel.name} ({part})"].append(kernel.duration)
        by_part[part].append(kernel.duration)

    def rows(found: Mapping[str, Sequence[float]]) -> list[list]:
        ordered = sorted(found.items(), key=lambda item: -sum(item[1]))
        return [
            [name, round(len(times) / num_steps, 1), round(sum(times) / num_steps / 1e6, 4)]
            for name, times in ordered
        ]

    total = sum(kernel.duration for kernel in kernels)
    return {
        "kernels": round(len(kernels) / num_steps, 1),
        "below_5_microseconds": round(sum(k.duration < 5000 for k in kernels) / num_steps, 1),
        "kernel_milliseconds": round(total / num_steps / 1e6, 3),
        "span_milliseconds": round(span / num_steps / 1e6, 3),
        "idle_share": round(1 - busy(kernels) / span, 4),
        "parts": rows(by_part),
        "longest": rows(names)[:LONGEST],
    }


def table(found: Mapping) -> str:
    """The figures of `summarise` as text."""
    lines = [
        f"a step: {found['kernels']} kernels ({found['below_5_microseconds']} below 5 us), "
        f"{found['kernel_milliseconds']} ms in kernels, {found['span_milliseconds']} ms in all, "
        f"idle {found['idle_share']:.1%}"
    ]
    for kind in ("parts", "longest"):
        lines.append(f"{'ms':>10}{'count':>10}  {kind}")
        lines += [f"{ms:10.3f}{count:10.1f}  {name[:110]}" for name, count, ms in found[kind]]
    return "\n".join(lines)
