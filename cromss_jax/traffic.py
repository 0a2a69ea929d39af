"""What a program compiled for a TPU moves between chip and memory (HBM), by its text.

An instruction reads its operands and writes its results, padded as they lie in memory. What the
compiler keeps on the chip, in memory space 1, moves nothing; a copy between chip and memory counts
once. Unlike the compiler's own count ("bytes accessed"), which takes both kinds of memory for one
and a loop for a single round of it, this one leaves out what stays on the chip and has every round.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)((?::[^}]*)?)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
# "%name = shape opcode(%operand, ...), attributes"
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)$")
# These move nothing. Custom calls allocate, or name parts of an array as a whole.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all")
_FREE += ("custom-call",)
_SLICES = ("slice", "dynamic-slice", "dynamic-update-slice")


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


Computation = Mapping[str, Instruction]


def hbm_bytes(shape: str) -> int:
    """Bytes that a shape takes of HBM, padded to its tiles; of a tuple all of them.

    `bf16[16,256,256,16]{3,0,2,1:T(8,128)}` lists its dimensions from the innermost outwards, and
    the two innermost, 16 channels and 16 images, are padded to 128 and to multiples of 8.
    """
    total = 0
    for dtype, sides, order, memory in _SHAPE.findall(shape):
        space = _SPACE.search(memory)
        if space and space[1] != "0":
            continue
        sides = [int(side) for side in sides.split(",") if side]
        if order:
            sides = [sides[int(i)] for i in order.split(",")]
        tile = _TILE.search(memory)
        tile = [int(side) for side in tile[1].split(",")][::-1] if tile else []
        if len(tile) > 1:  # those of vectors are none of theirs
            sides += [1] * (len(tile) - len(sides))
            padded = [-(-side // of) * of for side, of in zip(sides, tile, strict=False)]
            sides = padded + sides[len(tile) :]
        bits = re.search(r"\d+", dtype)  # none in pred, which takes a byte
        total += math.prod(sides) * max(int(bits[0]) // 8 if bits else 1, 1)
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


def _read_bytes(instruction: Instruction, computation: Computation, fused: Computation) -> int:
    """Of what an instruction reads; of an operand that it reads slices of, the slices."""
    parameters = {i.operands[0]: i.name for i in fused.values() if i.opcode == "parameter"}
    total = 0
    for position, operand in enumerate(instruction.operands):
        size = hbm_bytes(computation[operand].shape)
        parameter = parameters.get(str(position))
        uses = [i for i in fused.values() if parameter in i.operands]
        if uses and all(i.opcode in _SLICES and i.operands[0] == parameter for i in uses):
            slices = [i.shape for i in uses if i.opcode != "dynamic-update-slice"]
            size = min(size, sum(hbm_bytes(_in_hbm(shape)) for shape in slices))
        total += size
    return total


def _in_hbm(shape: str) -> str:
    """The same shape, if it lay in HBM."""
    return re.sub(r"S\(\d+\)", "", shape)


def _moved_bytes(instruction: Instruction, computation: Computation, fused: Computation) -> int:
    """Read and written by an instruction that is no loop."""
    written = hbm_bytes(instruction.shape)
    if instruction.opcode in ("copy-done", "slice-done"):
        # Its operand is a tuple: of a copy (to, from, context), of a slice ((from), to, context).
        operand = computation[instruction.operands[0]].shape
        shapes = [found[0] for found in re.finditer(_SHAPE, operand)]
        source = shapes[instruction.opcode == "copy-done"]
        return written + min(hbm_bytes(source), hbm_bytes(_in_hbm(instruction.shape)))
    if instruction.opcode == "dynamic-slice":
        source = computation[instruction.operands[0]].shape
        return written + min(hbm_bytes(source), hbm_bytes(_in_hbm(instruction.shape)))
    root = next((i for i in fused.values() if i.is_root), instruction)
    if root.opcode == "dynamic-update-slice":
        # In place: it moves the update alone.
        update = (fused or computation)[root.operands[1]].shape
        written = min(written, hbm_bytes(_in_hbm(update)))
        if not fused:
            return written + hbm_bytes(update)
    return written + _read_bytes(instruction, computation, fused)


def _part(name: str, computation: Computation, parts: Sequence[str]) -> str:
    """Which of `parts` an instruction is of: by its own name or that of what it reads first."""
    while instruction := computation.get(name):
        # Such as "jit(train_step)/transpose(jvp(encoder))/dot_general".
        words = re.findall(r"\w+", instruction.attribute("op_name"))
        found = [word for word in words if word in parts]
        if found or not instruction.operands:
            return found[-1] if found else ""
        name = instruction.operands[0]
    return ""


def _rounds(loop: Instruction, computations: Mapping[str, Computation], unknown: float) -> float:
    """Of a loop, which counts from 0 to a constant; `unknown` if not to one."""
    condition = computations[loop.attribute("condition")]
    bounds = [i.operands[0] for i in condition.values() if i.opcode == "constant"]
    return max((int(bound) for bound in bounds if bound.isdigit()), default=unknown)


def by_part(hlo: str, parts: Sequence[str] = (), unknown_rounds: float = 0.0) -> dict[str, float]:
    """Bytes of HBM that a program moves.

    Args:
      hlo: the compiled program's text.
      parts: of the program, names that it gives by `jax.named_scope`.
      unknown_rounds: of a loop whose rounds are not known before it runs.

    Returns:
      Bytes by part, and "others" of none.

    Raises:
      ValueError: for a program with branches.
    """
    computations = parse(hlo)
    found = collections.Counter(dict.fromkeys((*parts, "others"), 0.0))

    def walk(name: str, times: float, outer: str) -> None:
        computation = computations[name]
        for instruction in computation.values():
            part = _part(instruction.name, computation, parts) or outer
            if instruction.opcode == "while":
                rounds = _rounds(instruction, computations, unknown_rounds)
                walk(instruction.attribute("body"), times * rounds, part)
            elif instruction.opcode == "call":
                walk(instruction.attribute("to_apply"), times, part)
            elif instruction.opcode == "conditional":
                raise ValueError(f"{instruction.name}: which branch is taken is not known")
            elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-start"):
                fused = computations.get(instruction.attribute("calls"), {})
                found[part] += times * _moved_bytes(instruction, computation, fused)

    walk(list(computations)[-1], 1, "others")
    return dict(found)
