"""What an optimised program does, read from the text that XLA prints of it: kernels, memory traffic, collectives.

These are counts, not times, and the same on every machine. A kernel is an instruction that computes something, in the
program's entry or, counted once for each trip, in a loop's body. Its traffic is what it reads from memory and writes to
it. If a kernel reads only slices of an operand, the slices count; if a buffer is updated in place, the update counts. A
custom kernel may read an operand several times; it counts by its own estimate of its cost.
"""

import dataclasses
import math
import re
from typing import Any

BITS = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 8),
    **dict.fromkeys(("s4", "u4"), 4),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    "c128": 128,
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
NO_KERNEL = {
    "parameter",
    "constant",
    "iota",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
VIEWS = {"bitcast", "reshape", "copy", "convert", "transpose"}
"""What a kernel may do to a value before it takes slices of it, or puts them into it."""
ONE_BY_ONE = {"add", "maximum", "minimum", "multiply", "negate", "reduce-precision", "select", "subtract"}
"""What it may do besides before it takes slices or gathers, and then does for these alone."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


Computations = dict[str, dict[str, Instruction]]
ENTRY = "ENTRY"


@dataclasses.dataclass(frozen=True)
class Program:
    """Counts of a compiled program; sizes in bytes."""

    kernels: int
    traffic: int
    least: int
    """The program's arguments and results: what any program must move."""
    temporaries: int
    collectives: dict[str, int]


def read(compiled: Any) -> Program:
    """The counts of a program compiled by `jax.jit(f).lower(…).compile()`."""
    text = compiled.as_text()
    kernels, traffic = count(parse(text))
    memory = compiled.memory_analysis()
    return Program(
        kernels,
        traffic,
        memory.argument_size_in_bytes + memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        collectives(text),
    )


def collectives(text: str) -> dict[str, int]:
    """The number of instructions of each kind that exchange data between devices."""
    kinds = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    return {kind: kinds.count(kind) for kind in COLLECTIVES if kind in kinds}


def sizes(shape: str) -> list[tuple[int, bool]]:
    """Bytes of each array of a shape, and whether it is in memory: a TPU keeps some on its chip, in memory space
    S(1)."""
    parts = re.findall(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?", shape)
    return [
        (math.prod(map(int, filter(None, dimensions.split(",")))) * BITS[dtype] // 8, "S(1)" not in layout)
        for dtype, dimensions, layout in parts
        if dtype in BITS
    ]


def size(shape: str) -> int:
    """Bytes in memory of a shape, or of a tuple of shapes."""
    return sum(count for count, in_memory in sizes(shape) if in_memory)


def parse(text: str) -> Computations:
    """The computations of a program by name; the one that runs is ENTRY."""
    found: Computations = {}
    name = None
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            name = ENTRY if head[1] else head[2]
            found[name] = {}
        elif line.startswith("}"):
            name = None
        elif name and (m := re.match(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line)):
            operands = tuple(re.findall(r"%([\w.\-]+)", m[5].split("), ")[0]))
            found[name][m[2]] = Instruction(m[2], m[3], m[4], operands, m[5], bool(m[1]))
    return found


def called(instruction: Instruction, attribute: str) -> str | None:
    """The computation that an attribute names."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", instruction.attributes)
    return found and found[1]


def count(computations: Computations, name: str = ENTRY) -> tuple[int, int]:
    """Kernels and traffic of a computation, its loops and the larger of its branches."""
    kernels = traffic = 0
    for instruction in computations.get(name, {}).values():
        if instruction.operation in NO_KERNEL or instruction.operation.endswith("-done"):
            continue
        if instruction.operation == "while":
            times, inner = trips(computations, instruction), [count(computations, called(instruction, "body") or "")]
        elif instruction.operation == "conditional":
            times, inner = 1, [count(computations, branch) for branch in branches(instruction)]
        elif instruction.operation == "call":
            times, inner = 1, [count(computations, called(instruction, "to_apply") or "")]
        else:
            times, inner = 1, [(1, moved(computations, name, instruction))]
        of_inner = max(inner, key=lambda pair: pair[1], default=(0, 0))
        kernels, traffic = kernels + times * of_inner[0], traffic + times * of_inner[1]
    return kernels, traffic


def branches(instruction: Instruction) -> list[str]:
    """The computations of a conditional."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)


def trips(computations: Computations, instruction: Instruction) -> int:
    """How often a loop runs: the number that XLA gives, or else the largest whole number in its condition."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes):
        return int(known[1])
    condition = computations.get(called(instruction, "condition") or "", {}).values()
    constants = [i for i in condition if i.operation == "constant" and i.shape.startswith("s32")]
    numbers = [int(m[1]) for i in constants if (m := re.match(r"(\d+)\)", i.attributes))]
    return max(numbers, default=1)


def moved(computations: Computations, name: str, instruction: Instruction) -> int:
    """The bytes that one kernel of the computation reads and writes."""
    if estimate := re.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"', instruction.attributes):
        return int(estimate[1])
    if instruction.operation in ("copy-start", "slice-start"):  # its tuple begins with where it copies to and from
        ends = sizes(instruction.shape)[:2]
        return min(count for count, _ in ends) * sum(in_memory for _, in_memory in ends)
    operands = [computations[name][o] for o in instruction.operands if o in computations[name]]
    if instruction.operation in ("dynamic-slice", "gather"):
        return 2 * size(instruction.shape)
    if instruction.operation == "dynamic-update-slice":
        return 2 * size(operands[1].shape)
    fused = computations.get(called(instruction, "calls") or "")
    if not fused:
        return size(instruction.shape) + sum(size(operand.shape) for operand in operands)
    users, parameters = _users(fused), [i for i in fused.values() if i.operation == "parameter"]
    written = [_written(fused, i) for i in fused.values() if i.root]
    return sum(_bytes_read(computations, users, i.name, size(i.shape)) for i in parameters) + sum(written)


Users = dict[str, list[tuple[Instruction, int]]]
"""For each value of a computation, the instructions that read it, and as which operand."""


def _bytes_read(computations: Computations, users: Users, name: str, whole: int) -> int:
    """Bytes that a fused kernel reads of a value: all of it, or the part that it slices or gathers, before or after a
    change of each number, or within a fusion of its own; none of a buffer that it updates."""
    total = 0
    for user, position in users.get(name, []):
        if user.operation in ("dynamic-slice", "gather") and position == 0:
            total += size(user.shape)
        elif user.operation == "fusion":
            inner = computations.get(called(user, "calls") or "", {})
            total += _bytes_read(computations, _users(inner), parameter(inner, position), whole) if inner else whole
        elif user.operation in VIEWS | ONE_BY_ONE and not user.root:
            total += _bytes_read(computations, users, user.name, whole)
        elif not (user.operation == "dynamic-update-slice" and position == 0):
            return whole
    return min(total, whole)


def _users(computation: dict[str, Instruction]) -> Users:
    users: Users = {}
    for user in computation.values():
        for position, operand in enumerate(user.operands):
            users.setdefault(operand, []).append((user, position))
    return users


def parameter(computation: dict[str, Instruction], number: int) -> str:
    """The name of a computation's parameter of that number."""
    return next(
        i.name for i in computation.values() if i.operation == "parameter" and i.attributes.startswith(f"{number})")
    )


def _written(fused: dict[str, Instruction], instruction: Instruction) -> int:
    """Bytes that a fused kernel writes of a result: all of it, or the update of a buffer."""
    operands = [fused[o] for o in instruction.operands if o in fused]
    if instruction.operation == "tuple":
        return sum(_written(fused, operand) for operand in operands)
    if instruction.operation == "dynamic-update-slice":
        return size(operands[1].shape)
    if instruction.operation in VIEWS and operands and operands[0].operation in VIEWS | {"dynamic-update-slice"}:
        return min(size(instruction.shape), _written(fused, operands[0]))
    return size(instruction.shape)
