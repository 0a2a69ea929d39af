"""Memory traffic of a program compiled for a TPU or GPU: bytes between chip and memory (HBM).

The count is made from the program's text. An instruction reads its operands and writes its results,
with the padding that they have in memory. Arrays that the compiler keeps on the chip, in memory
space 1, cause no traffic; a copy between chip and memory counts once. The compiler's own count
("bytes accessed") does not distinguish the two kinds of memory and counts a single round of each
loop. This count leaves out what stays on the chip and includes every round.

On a GPU each instruction that moves data is one launch of a kernel or of a library's function.
Matrix products and convolutions are calls of cuBLAS and cuDNN, whose workspaces cause no traffic
here. For GPUs the compiler counts no arithmetic, so that of these calls is counted, too.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from cromss_jax.errors import UserError

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)((?::[^}]*)?)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
# The first line of a computation: whether the program starts with it, and its name.
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
# "%name = shape opcode(%operand, ...), attributes"
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)$")
# These move no data, nor do beginnings of asynchronous operations: their ends count.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all")
_FREE += ("partition-id", "replica-id", "opt-barrier")
# Of a loop, for programs that say so.
ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Custom calls that are matrix products and convolutions of a GPU's libraries.
_PRODUCT, _CONVOLUTION = "__cublas$", "__cudnn$conv"
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


class UnreadableProgram(UserError):
    """The traffic of a compiled program cannot be counted."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a program.

    Attributes:
      name: the name in the traced program, such as "jit(step)/losses/while", else the compiler's.
      rounds: number of rounds; None if it is not constant.
    """

    name: str
    rounds: int | None


@dataclasses.dataclass
class Counts:
    """What a program does when it runs once.

    Attributes:
      hbm_bytes: bytes of memory traffic by part; "others" has what belongs to no part.
      launches: number of operations that move data, by part; on a GPU each is a launch.
      flops: of a GPU's program, operations of matrix products and convolutions.
      loops: the loops, outer ones first.
    """

    hbm_bytes: dict[str, float]
    launches: dict[str, float]
    flops: float = 0.0
    loops: list[Loop] = dataclasses.field(default_factory=list)


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
        # A reduction of several arrays has several results, too.
        roots = [i for i in roots for _ in _SHAPE.findall(i.shape)]
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
    if instruction.opcode == "custom-call":
        return _called_bytes(instruction, computation)
    if instruction.opcode == "all-reduce-done":
        return 2 * hbm_bytes(instruction.shape)  # of the same shape as what was sent
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


def _called_bytes(call: Instruction, computation: Computation) -> int:
    """Bytes that a library's function reads and writes, without its workspace."""
    written = call.shape
    if call.attribute("custom_call_target").startswith((_PRODUCT, _CONVOLUTION)):
        written = _SHAPE.search(call.shape)[0]  # workspaces come after the result
    return hbm_bytes(written) + sum(hbm_bytes(computation[name].shape) for name in call.operands)


def _sides(shape: str) -> list[int]:
    """Sizes of a shape's dimensions; for a tuple, of its first element."""
    return [int(side) for side in _SHAPE.search(shape)[2].split(",") if side]


def _numbers(pattern: str, text: str) -> list[int]:
    """The numbers in the group of a pattern; none if it is not found."""
    found = re.search(pattern, text)
    return [int(number) for number in re.findall(r"\d+", found[1])] if found else []


def _flops(instruction: Instruction, computation: Computation) -> float:
    """Operations of a matrix product or convolution; 0 for other instructions.

    A product multiplies lhs [b, m, k] by rhs [b, k, n]. A convolution takes two operations for each
    element of the filter at each pixel of its output, border pixels included, as do the two parts
    of its gradient, in whose places filter or output is the operand or the result.
    """
    target = instruction.attribute("custom_call_target")
    is_product = instruction.opcode == "dot" or target.startswith(_PRODUCT)
    is_convolution = instruction.opcode == "convolution" or target.startswith(_CONVOLUTION)
    if not is_product and not is_convolution:
        return 0.0
    first, second = (_sides(computation[name].shape) for name in instruction.operands[:2])
    result = _sides(instruction.shape)
    if is_product:
        pattern = r"lhs_batch_dim(?:ension)?s\"?[=:]([\[{][^\]}]*)"
        batch = math.prod(first[i] for i in _numbers(pattern, instruction.attributes))
        return 2 * math.sqrt(math.prod(first) * math.prod(second) * math.prod(result) / batch)
    filters, output = second, result
    if target.endswith("BackwardInput"):
        output = first
    elif target.endswith("BackwardFilter"):
        filters, output = result, second
    order = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)[1]
    return 2 * math.prod(output) * math.prod(filters) / filters[order.index("o")]


def parts_of(computation: Computation, parts: Sequence[str]) -> dict[str, str]:
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


def _rounds(loop: Instruction, computations: Mapping[str, Computation]) -> int | None:
    """Number of rounds of a loop: as the program states it, or from 0 to a constant; else None."""
    if stated := ROUNDS.search(loop.attributes):
        return int(stated[1])
    condition = computations[loop.attribute("condition")]
    bounds = [i.operands[0] for i in condition.values() if i.opcode == "constant"]
    return max((int(bound) for bound in bounds if bound.isdigit()), default=None)


def count(
    hlo: str, parts: Sequence[str] = (), *, unknown_rounds: float, is_gpu: bool = False
) -> Counts:
    """Counts what a program does, by part.

    Args:
      hlo: the compiled program's text.
      parts: parts of the program, named by `jax.named_scope`.
      unknown_rounds: expected number of rounds of loops whose number of rounds is not constant.
      is_gpu: whether the program is for GPUs. Custom calls of programs for TPUs only allocate
        memory, or combine parts into one array.

    Raises:
      UnreadableProgram: if the program has branches, or if its text has an unknown form.
    """
    computations = parse(hlo)
    free = _FREE if is_gpu else (*_FREE, "custom-call")
    names = (*parts, "others")
    counts = Counts(dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0))

    def walk(name: str, times: float, outer: str) -> None:
        computation = computations[name]
        part_of = parts_of(computation, parts)
        for instruction in computation.values():
            part = part_of[instruction.name] or outer
            if instruction.opcode == "while":
                rounds = _rounds(instruction, computations)
                title = instruction.attribute("op_name") or instruction.name
                counts.loops.append(Loop(title, rounds))
                rounds = unknown_rounds if rounds is None else rounds
                walk(instruction.attribute("body"), times * rounds, part)
            elif instruction.opcode == "call":
                walk(instruction.attribute("to_apply"), times, part)
            elif instruction.opcode == "conditional":
                raise UnreadableProgram(
                    f"the compiled program has a branch, {instruction.name}: its memory traffic "
                    "cannot be counted, because it is not known which side of the branch runs"
                )
            elif instruction.opcode not in free and not instruction.opcode.endswith("-start"):
                fused = computations.get(instruction.attribute("calls"), {})
                counts.hbm_bytes[part] += times * _moved_bytes(instruction, computation, fused)
                counts.launches[part] += times
                if is_gpu:
                    inner = [_flops(i, fused) for i in fused.values()]
                    counts.flops += times * (_flops(instruction, computation) + sum(inner))

    try:
        walk(list(computations)[-1], 1, "others")
    except (KeyError, IndexError, TypeError) as error:
        compiler = "jax-cuda12-plugin==0.10.2" if is_gpu else "libtpu==0.0.52"
        raise UnreadableProgram(
            f"the text of the compiled program has an unknown form ({error}): its memory traffic "
            f"cannot be counted; install {compiler}"
        ) from error
    return counts
