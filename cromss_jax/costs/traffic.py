"""Memory traffic of a program compiled for a TPU: bytes between chip and memory (HBM).

The count is made from the program's text. An instruction reads its operands and writes its results,
with the padding that they have in memory. Arrays that the compiler keeps on the chip, in memory
space 1, cause no traffic; a copy between chip and memory counts once. The compiler's own count
("bytes accessed") does not distinguish the two kinds of memory and counts a single round of each
loop. This count leaves out what stays on the chip and includes every round.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)((?::[^}]*)?)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
# The first line of a computation: whether the program starts with it, and its name.
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
# "%name = shape opcode(%operand, ...), attributes"
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)$")
# These move no data. Custom calls only allocate memory, or combine parts into one array.
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
        """The value of an attribute, "" if the instruction does not have it."""
        found = re.search(rf'\b{name}="?%?([^",\s]+)', self.attributes)
        return found[1] if found else ""


Computation = Mapping[str, Instruction]


class UnreadableProgram(ValueError):
    """The traffic of a compiled program cannot be counted."""


def hbm_bytes(shape: str) -> int:
    """Bytes of a shape in HBM, padded to its tiles; for a tuple, of all its elements.

    `bf16[16,256,256,16]{3,0,2,1:T(8,128)}` lists its dimensions from the innermost outwards. The
    two innermost ones, 16 channels and 16 images, are padded to multiples of 128 and of 8.
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
        if len(tile) > 1:  # one-dimensional tiles of vectors are not counted as padding
            sides += [1] * (len(tile) - len(sides))
            padded = [-(-side // of) * of for side, of in zip(sides, tile, strict=False)]
            sides = padded + sides[len(tile) :]
        bits = re.search(r"\d+", dtype)  # "pred" has no number and takes one byte
        total += math.prod(sides) * max(int(bits[0]) // 8 if bits else 1, 1)
    return total


def parse(hlo: str) -> dict[str, dict[str, Instruction]]:
    """The computations of a compiled program's text, by name; the program starts with the last."""
    computations = {}
    for line in hlo.splitlines():
        if header := COMPUTATION.match(line):
            current = computations.setdefault(header[2], {})
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, operands, attributes = found.groups()
            names = re.findall(r"%([\w.-]+)", operands)
            if opcode in ("parameter", "constant"):
                names = [operands]
            current[name] = Instruction(name, shape, opcode, names, attributes, bool(root))
    return computations


def _read_bytes(instruction: Instruction, computation: Computation, fused: Computation) -> int:
    """Bytes that an instruction reads; of an operand read only in slices, those of the slices."""
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
    """The same shape, with HBM as its memory space."""
    return re.sub(r"S\(\d+\)", "", shape)


def _written_bytes(instruction: Instruction, computation: Computation, fused: Computation) -> int:
    """Bytes that an instruction writes; for an array updated in place, those of the update."""
    root = next((i for i in fused.values() if i.is_root), instruction)
    inside = fused or computation
    roots, shapes = [root], [instruction.shape]
    if root.opcode == "tuple":  # a fusion with several results
        roots = [inside[name] for name in root.operands]
        shapes = [found[0] for found in re.finditer(_SHAPE, instruction.shape)]
    total = 0
    for result, shape in zip(roots, shapes, strict=True):
        size = hbm_bytes(shape)
        if result.opcode == "dynamic-update-slice":
            update = inside[result.operands[1]].shape
            size = min(size, hbm_bytes(_in_hbm(update)))
            if not fused:
                size += hbm_bytes(update)  # the update is also read
        total += size
    return total


def _moved_bytes(instruction: Instruction, computation: Computation, fused: Computation) -> int:
    """Bytes read and written by an instruction that is not a loop."""
    if instruction.opcode.endswith("-done"):
        # The operand is a tuple: (to, from, context) for a copy, else ((from), to, context).
        operand = computation[instruction.operands[0]].shape
        shapes = [found[0] for found in re.finditer(_SHAPE, operand)]
        read = hbm_bytes(shapes[instruction.opcode == "copy-done"])
        if instruction.opcode in ("copy-done", "slice-done"):
            read = min(read, hbm_bytes(_in_hbm(instruction.shape)))
        return hbm_bytes(instruction.shape) + read
    if instruction.opcode == "dynamic-slice":
        source = computation[instruction.operands[0]].shape
        size = min(hbm_bytes(source), hbm_bytes(_in_hbm(instruction.shape)))
        return hbm_bytes(instruction.shape) + size
    written = _written_bytes(instruction, computation, fused)
    if instruction.opcode == "dynamic-update-slice":
        return written
    return written + _read_bytes(instruction, computation, fused)


def _parts(computation: Computation, parts: Sequence[str]) -> dict[str, str]:
    """Which of `parts` each instruction belongs to, "" for none.

    An instruction's own name decides, such as
    "jit(train_step)/transpose(jvp(encoder))/dot_general". If it names no part, the instruction
    belongs to the part of its first operand, which comes before it in the program.
    """
    found: dict[str, str] = {}
    for name, instruction in computation.items():
        words = re.findall(r"\w+", instruction.attribute("op_name"))
        own = [word for word in words if word in parts]
        first = instruction.operands[0] if instruction.operands else ""
        found[name] = own[-1] if own else found.get(first, "")
    return found


def _rounds(loop: Instruction, computations: Mapping[str, Computation], unknown: float) -> float:
    """Number of rounds of a loop that counts from 0 to a constant; otherwise `unknown`."""
    condition = computations[loop.attribute("condition")]
    bounds = [i.operands[0] for i in condition.values() if i.opcode == "constant"]
    return max((int(bound) for bound in bounds if bound.isdigit()), default=unknown)


def by_part(hlo: str, parts: Sequence[str] = (), *, unknown_rounds: float) -> dict[str, float]:
    """Bytes of HBM traffic of a program, by part.

    Args:
      hlo: the compiled program's text.
      parts: parts of the program, named by `jax.named_scope`.
      unknown_rounds: expected number of rounds of loops whose number of rounds is not constant.

    Returns:
      Bytes by part; "others" has the bytes that belong to no part.

    Raises:
      UnreadableProgram: if the program has branches, or if its text has an unknown form.
    """
    computations = parse(hlo)
    found = collections.Counter(dict.fromkeys((*parts, "others"), 0.0))

    def walk(name: str, times: float, outer: str) -> None:
        computation = computations[name]
        part_of = _parts(computation, parts)
        for instruction in computation.values():
            part = part_of[instruction.name] or outer
            if instruction.opcode == "while":
                rounds = _rounds(instruction, computations, unknown_rounds)
                walk(instruction.attribute("body"), times * rounds, part)
            elif instruction.opcode == "call":
                walk(instruction.attribute("to_apply"), times, part)
            elif instruction.opcode == "conditional":
                raise UnreadableProgram(
                    f"the compiled program has a branch, {instruction.name}: its memory traffic "
                    "cannot be counted, because it is not known which side of the branch runs"
                )
            elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-start"):
                fused = computations.get(instruction.attribute("calls"), {})
                found[part] += times * _moved_bytes(instruction, computation, fused)

    try:
        walk(list(computations)[-1], 1, "others")
    except (KeyError, IndexError) as error:
        raise UnreadableProgram(
            f"the text of the compiled program has an unknown form ({error}): its memory traffic "
            "cannot be counted; install libtpu==0.0.52"
        ) from error
    return dict(found)
