"""The training step as compiled for v5e: `python -m tests.bench.tpu`.

At more and more images a chip, the paper's recipe in bfloat16 on the published data's shapes.
Compiles by `cromss_jax.plan`, which needs libtpu and takes minutes for each of --images, and says
what the compiler counts, and which parts of the step own the traffic.

The parts' shares are reckoned from the compiled program's text: an operation moves its operands and
its results, as they lie in memory, padded. Unlike the compiler, which counts what a loop does once,
they have every round of it.
"""

import collections
import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator

import ml_collections
from absl import app, flags

from configs import pretrain
from cromss_jax import costs, plan, run

_IMAGES = flags.DEFINE_list("images", ["16", "32", "64", "128"], "A chip")
_VARIANT = flags.DEFINE_string("variant", "", "Of configs/pretrain.py, such as fusion=late")
_HLO = flags.DEFINE_string("hlo", None, "File to write the compiled program's text to")

TOPOLOGY = "v5e:2x4"
# Names that the step gives to its parts by `jax.named_scope`.
PARTS = ("preprocessing", "prior", "encoder", "decoder", "selection", "losses", "optimizer")
# What the networks see and are told, beside the networks: to be a small share.
BESIDE_THE_NETWORKS = ("preprocessing", "prior", "selection", "losses")

_BYTES = {"pred": 1, "bf16": 2}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\))?)?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
# "%name = shape opcode(%operand, ...), attributes"
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)$")
# These move nothing.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a compiled program."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """Its value, "" where there is none."""
        found = re.search(rf'\b{name}="?%?([^",\s]+)', self.attributes)
        return found[1] if found else ""


def padded_bytes(shape: str) -> int:
    """Bytes that a shape takes in memory, padded to its tiles; of a tuple all of them.

    `bf16[16,256,256,16]{3,0,2,1:T(8,128)}` lists its dimensions from the innermost outwards, and
    the two innermost, 16 channels and 16 images, are padded to 128 and to multiples of 8.
    """
    total = 0
    for dtype, sides, order, tile in _SHAPE.findall(shape):
        sides = [int(side) for side in sides.split(",") if side]
        if order:
            sides = [sides[int(i)] for i in order.split(",")]
        tile = [int(side) for side in tile.split(",") if side][::-1]
        if len(tile) > 1:  # those of vectors are none of theirs
            sides += [1] * (len(tile) - len(sides))
            padded = [-(-side // of) * of for side, of in zip(sides, tile, strict=False)]
            sides = padded + sides[len(tile) :]
        bits = re.search(r"\d+", dtype)
        total += math.prod(sides) * (int(bits[0]) // 8 or 1 if bits else 1)
    return total


def parse(hlo: str) -> dict[str, dict[str, Instruction]]:
    """The computations of a compiled program's text, by name; the last is where it begins."""
    computations = {}
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[1], {})
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, operands, attributes = found.groups()
            names = re.findall(r"%([\w.-]+)", operands)
            if opcode in ("parameter", "constant"):
                names = [operands]
            current[name] = Instruction(name, shape, opcode, names, attributes, bool(root))
    return computations


def _operand_bytes(
    instruction: Instruction,
    computation: dict[str, Instruction],
    fused: dict[str, Instruction],
) -> int:
    """Of what an instruction reads; of an operand that it reads slices of, the slices."""
    parameters = {i.operands[0]: i.name for i in fused.values() if i.opcode == "parameter"}
    total = 0
    for position, operand in enumerate(instruction.operands):
        size = padded_bytes(computation[operand].shape)
        parameter = parameters.get(str(position))
        uses = [i for i in fused.values() if parameter in i.operands]
        sliced = ("dynamic-slice", "dynamic-update-slice")
        if uses and all(i.opcode in sliced and i.operands[0] == parameter for i in uses):
            parts = [padded_bytes(i.shape) for i in uses if i.opcode == "dynamic-slice"]
            size = min(size, sum(parts))
        total += size
    return total


def _moved_bytes(
    instruction: Instruction, computation: dict[str, Instruction], fused: dict[str, Instruction]
) -> int:
    """Read and written by an instruction that is no loop."""
    result = padded_bytes(instruction.shape)
    if instruction.opcode in ("dynamic-slice", "copy-done", "slice-done"):
        return 2 * result
    # What is updated in place moves the update alone.
    root = next((i for i in fused.values() if i.is_root), instruction)
    inside = fused or computation
    if root.opcode == "dynamic-update-slice":
        result = padded_bytes(inside[root.operands[1]].shape)
        if not fused:
            return 2 * result
    return result + _operand_bytes(instruction, computation, fused)


def _part(name: str, computation: dict[str, Instruction]) -> str:
    """Which of `PARTS` an instruction is of: by its own name or that of what it reads first."""
    for _ in range(len(computation)):
        instruction = computation.get(name)
        if instruction is None:
            return ""
        found = re.findall(rf"\b({'|'.join(PARTS)})\b", instruction.attribute("op_name"))
        if found:
            return found[-1]
        if not instruction.operands:
            return ""
        name = instruction.operands[0]
    return ""


def traffic(hlo: str) -> Iterator[tuple[str, int, int]]:
    """What each instruction moves: its part of the step, bytes, and how many times it does."""
    computations = parse(hlo)

    def walk(name: str, times: int, loop_part: str) -> Iterator[tuple[str, int, int]]:
        computation = computations[name]
        for instruction in computation.values():
            part = _part(instruction.name, computation) or loop_part
            if instruction.opcode == "while":
                condition = computations[instruction.attribute("condition")]
                # All loops count rounds from 0 to a constant.
                bounds = [i.operands[0] for i in condition.values() if i.opcode == "constant"]
                rounds = max(int(bound) for bound in bounds if bound.isdigit())
                yield from walk(instruction.attribute("body"), times * rounds, part)
            elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-start"):
                if instruction.opcode == "custom-call":  # allocates, or names parts as a whole
                    continue
                fused = computations.get(instruction.attribute("calls"), {})
                yield part, _moved_bytes(instruction, computation, fused), times

    yield from walk(list(computations)[-1], 1, "")


def owners(hlo: str) -> dict[str, float]:
    """Bytes that each part of the step moves, "others" those of none."""
    found = collections.Counter(dict.fromkeys(PARTS, 0))
    for part, size, times in traffic(hlo):
        found[part or "others"] += size * times
    return dict(found)


def measure(images: int) -> dict[str, object]:
    """Compiles the step for so many images a chip; its figures, of one image but for memory."""
    devices = plan.find_devices(TOPOLOGY)
    config = pretrain.get_config(_VARIANT.value)
    config.network.dtype = "bfloat16"
    config.data.dir = "none"  # the published data's shapes
    config.batch_size = images * len(devices)
    config = ml_collections.FrozenConfigDict(config)
    mesh = run.make_mesh(config.num_devices, config.batch_size, devices)
    started = time.perf_counter()
    compiled = plan.compile_step(config, plan.find_data(config), mesh)
    cost = costs.measure(compiled)
    text = compiled.as_text()
    if _HLO.value:
        with open(_HLO.value, "w") as file:
            file.write(text)
    moved = owners(text)
    total = sum(moved.values())
    return {
        "images": images,
        "hbm_gigabytes": cost.hbm_bytes / images / 1e9,
        "teraflop": cost.flops / images / 1e12,
        "temporaries_gib": cost.memory["temporaries"] / costs.GIB,
        "peak_gib": cost.memory["peak"] / costs.GIB,
        "collectives": {k: dataclasses.asdict(v) for k, v in cost.collectives.items()},
        "compile_seconds": time.perf_counter() - started,
        "parts_gigabytes": {part: size / images / 1e9 for part, size in moved.items()},
        "beside_the_networks": sum(moved[part] for part in BESIDE_THE_NETWORKS) / total,
    }


def main(_) -> None:
    """Prints a row for each number of images, then the parts', the last line as JSON."""
    found = {}
    print("| images a chip | GB an image | TFLOP an image | temporaries, GiB | all-reduce, MB |")
    print("|---|---|---|---|---|")
    for images in map(int, _IMAGES.value):
        try:
            figures = found[images] = measure(images)
        except plan.OutOfMemory as full:
            print(f"| {images} | does not fit: {full} | | | |", flush=True)
            found[images] = {"images": images, "needed_gib": full.needed / costs.GIB}
            continue
        reduced = figures["collectives"].get("all-reduce", {"bytes": 0})["bytes"]
        print(
            f"| {images} | {figures['hbm_gigabytes']:.3f} | {figures['teraflop']:.4f} "
            f"| {figures['temporaries_gib']:.2f} | {reduced / 1e6:.1f} |",
            flush=True,
        )
    print(f"\n| MB an image | {' | '.join((*PARTS, 'others', 'beside the networks'))} |")
    print("|---" * (len(PARTS) + 3) + "|")
    for images, figures in found.items():
        if "parts_gigabytes" in figures:
            parts = figures["parts_gigabytes"]
            cells = [f"{1e3 * parts.get(part, 0):.0f}" for part in (*PARTS, "others")]
            print(f"| {images} | {' | '.join(cells)} | {figures['beside_the_networks']:.1%} |")
    print(json.dumps(found))


if __name__ == "__main__":
    app.run(main)
