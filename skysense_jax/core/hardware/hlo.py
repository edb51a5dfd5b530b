"""What a compiled program moves: collectives and HBM traffic, read from its HLO text with loops counted.

XLA's own `cost_analysis` counts the body of a loop once, so a scanned model looks as if it had a single layer. In this
module each instruction counts as often as its loops run. The count of a loop is the constant that its condition
compares with, which is what `jax.lax.scan` compiles to.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

BYTES = {
    "pred": 1,
    "s4": 1,
    "u4": 1,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "all-gather-done",
    "all-reduce-done",
    "collective-permute-done",
    "copy-done",
    "async-start",
    "async-update",
    "async-done",
    "send-done",
    "recv-done",
    "iota",
)
"""Instructions that move nothing themselves: the computation they call, or their start, is counted instead."""

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=\{?%?([\w.\-]+)")
_HOLDS_OPERANDS = ("copy-start", "all-gather-start", "collective-permute-start", "send")
"""Instructions whose value holds their operands beside their result."""
_NOT_RUN = ("reduce", "sort", "scatter", "reduce-window", "async-update", "async-done")
"""Instructions whose computation is a rule for pairs of elements, or has already run at the start."""


class Instruction(NamedTuple):
    """One line of a computation: name, result (text of its shape), opcode, everything after the opening parenthesis."""

    name: str
    result: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        depth, inside = 1, []
        for character in self.rest:
            depth += (character == "(") - (character == ")")
            if depth == 0:
                break
            inside.append(character)
        return re.findall(r"%([\w.\-]+)", "".join(inside))


class Program(NamedTuple):
    """Computations by name, each a list of instructions, and how often every one that runs is run."""

    computations: dict[str, list[Instruction]]
    times: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The traffic of one kind of collective, per device and step.

    Attributes:
        count: how many collectives run.
        wire: bytes sent over the links.
        between_slices: bytes of these that are sent between slices.
        largest: bytes of the largest single result.
    """

    count: int
    wire: float
    between_slices: float
    largest: int


def size(shapes: str, hbm_only: bool = False) -> int:
    """Bytes of all arrays in the text of a shape.

    Args:
        shapes: as the compiler writes it, "bf16[8,128]{1,0}" or a tuple of such.
        hbm_only: whether to leave out arrays that the compiler placed on the chip (S(1), ...).

    Returns:
        Bytes.
    """
    total = 0
    for dtype, dimensions, layout in _SHAPE.findall(shapes):
        if dtype in BYTES and not (hbm_only and re.search(r"S\([1-9]\)", layout)):
            total += BYTES[dtype] * math.prod(int(n) for n in dimensions.split(",") if n)
    return total


def read(text: str) -> Program:
    """Parses the text of a compiled module (`compiled.as_text()`).

    Raises:
        ValueError: the count of a loop cannot be told.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", list[Instruction]()
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations[head.group(2)] = []
            entry = head.group(2) if head.group(1) else entry
        elif instruction_line := _INSTRUCTION.match(line):
            current.append(Instruction(*instruction_line.groups()))
    times: dict[str, int] = {}

    def run(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for instruction in computations[name]:
            loop = _trips(computations, instruction) if instruction.opcode == "while" else 1
            for called in _CALLED.findall(instruction.rest):
                if called in computations and instruction.opcode not in _NOT_RUN:
                    run(called, count * loop)

    run(entry, 1)
    return Program(computations, times)


def _trips(computations: dict[str, list[Instruction]], loop: Instruction) -> int:
    """How often a while loop runs."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known.group(1))
    condition = computations[_matched(re.search(r"condition=%?([\w.\-]+)", loop.rest)).group(1)]
    constants = [
        re.match(r"(\d+)\)", instruction.rest) for instruction in condition if instruction.opcode == "constant"
    ]
    bounds = [int(constant.group(1)) for constant in constants if constant]
    compared = any("direction=LT" in instruction.rest for instruction in condition)
    if len(bounds) != 1 or not compared:
        raise ValueError(f"the loop {loop.name} does not count up to a constant: its traffic cannot be told")
    return bounds[0]


def _matched(match: re.Match[str] | None) -> re.Match[str]:
    """A match that the compiler's grammar promises."""
    if match is None:
        raise ValueError("the text of the compiled program has a form that this reader does not know")
    return match


def device_groups(rest: str) -> list[list[int]]:
    """Device groups of a collective; [] where the text does not list them."""
    if listed := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))]
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        ids, (*_, group_size) = _iota(counted.group(2), counted.group(3)), counted.group(1).split(",")
        return [ids[i : i + int(group_size)] for i in range(0, len(ids), int(group_size))]
    if by_mesh := _MESH_GROUPS.search(rest):
        axes = [(name, int(n)) for name, n in re.findall(r"'(\w+)'=(\d+)", by_mesh.group(1))]
        grouped = re.findall(r"'(\w+)'", by_mesh.group(4))
        total = math.prod(n for _, n in axes)
        ids = _iota(by_mesh.group(2), by_mesh.group(3)) if by_mesh.group(2) else list(range(total))
        groups: dict[tuple[int, ...], list[int]] = {}
        for position, device in enumerate(ids):
            remainder, key = position, []
            for name, n in reversed(axes):
                remainder, coordinate = divmod(remainder, n)
                key.append(-1 if name in grouped else coordinate)
            groups.setdefault(tuple(key), []).append(device)
        return list(groups.values())
    return []


def _iota(dimensions: str, order: str | None) -> list[int]:
    """XLA's [dims]T(order): 0..n-1 as an array of `dimensions`, transposed, flattened."""
    dims = [int(n) for n in dimensions.split(",")]
    order_ = [int(n) for n in order.split(",")] if order else list(range(len(dims)))
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    ids = [0]
    for axis in order_:
        ids = [base + strides[axis] * i for base in ids for i in range(dims[axis])]
    return ids


def collectives(program: Program, slice_of: Sequence[int]) -> dict[str, Traffic]:
    """The traffic of a program's collectives by kind.

    Bytes on the wire per device with n devices in a group, ring or bidirectional: all-gather (n-1)/n of the result,
    reduce-scatter (n-1)/n of the operand, all-reduce twice that, all-to-all (n-1)/n, permute the operand. A TPU program
    hands what crosses slices to its host ("megascale"): kind "send", the bytes handed over.

    Args:
        program: of :func:`read`.
        slice_of: the slice of every device in the order of the mesh; a group that crosses slices counts between them
            too.

    Returns:
        Kind of a collective ("all-gather", ..., "send") -> its traffic.

    Raises:
        ValueError: the devices of a collective cannot be read.
    """
    traffic: dict[str, Traffic] = {}
    for kind, times, instruction, scattered in _all_collectives(program):
        shapes = [size(f"{t}[{d}]") for t, d, _ in _SHAPE.findall(instruction.result)]
        groups = device_groups(instruction.rest) or [[]]
        n = len(groups[0])
        if instruction.opcode == "all-gather-start":  # its value: the operands, each 1/n of its result, and the results
            result = sum(shapes) * n // (n + 1)
        else:  # a permute's start: operand and result; an all-reduce's start: its results alone
            result = max(shapes) if instruction.opcode in ("collective-permute-start", "send") else sum(shapes)
        if kind == "send":
            wire, share = float(result), 1.0
        elif kind == "collective-permute":
            wire, pairs = float(result), re.findall(r"\{(\d+),(\d+)\}", instruction.rest)
            share = sum(slice_of[int(a)] != slice_of[int(b)] for a, b in pairs) / max(len(pairs), 1)
        else:
            if not n:
                raise ValueError(f"{instruction.name}: its replica groups cannot be read: {instruction.rest[:200]}")
            fraction = (n - 1) / n
            sent = {"all-reduce": 2 * fraction, "reduce-scatter": n * fraction if not scattered else fraction}
            wire = result * sent.get(kind, fraction)
            slices = len({slice_of[device] for device in groups[0]})
            share = (slices - 1) / slices / fraction if slices > 1 else 0.0
        earlier = traffic.get(kind, Traffic(0, 0.0, 0.0, 0))
        traffic[kind] = Traffic(
            earlier.count + times,
            earlier.wire + times * wire,
            earlier.between_slices + times * wire * share,
            max(earlier.largest, result),
        )
    return traffic


def _all_collectives(program: Program) -> Iterator[tuple[str, int, Instruction, bool]]:
    """(kind, times, instruction, whether it is the all-reduce inside a reduce-scatter as TPU programs spell it)."""
    for name, times in program.times.items():
        scatters = name.startswith("all-reduce-scatter")
        for instruction in program.computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES or (kind == "send" and "megascale" in instruction.rest):
                scattered = scatters and kind == "all-reduce"
                yield ("reduce-scatter" if scattered else kind), times, instruction, scattered


def hbm_bytes(program: Program) -> float:
    """Bytes that one device reads from and writes to HBM in a step.

    The operands and results of every instruction that is not inside a fusion count. A slice that is read or written
    inside a fusion counts as the slice, not as the array it is taken from.
    """
    fused = {
        called
        for body in program.computations.values()
        for instruction in body
        if instruction.opcode == "fusion"
        for called in _CALLED.findall(instruction.rest)
    }
    total = 0.0
    for name, times in program.times.items():
        if name in fused:
            continue
        shapes = {instruction.name: instruction.result for instruction in program.computations[name]}
        for instruction in program.computations[name]:
            opcode, result = instruction.opcode, instruction.result
            if opcode in FREE:
                continue
            if opcode == "fusion":
                moved = _fusion_bytes(program.computations, instruction, shapes)
            elif opcode in ("dynamic-slice", "slice", "gather"):
                moved = 2 * size(result, True)
            elif opcode == "dynamic-update-slice":
                moved = 2 * size(shapes.get(instruction.operands[1], ""), True)
            elif opcode in _HOLDS_OPERANDS:
                moved = size(result, True)
            else:
                moved = size(result, True) + sum(size(shapes.get(name, ""), True) for name in instruction.operands)
            total += times * moved
    return total


def _read(body: list[Instruction], name: str, computations: dict[str, list[Instruction]]) -> int:
    """Bytes that a fused computation reads of its value `name`.

    Only the slices count where it only slices the value, and nothing where it only writes slices into it.
    """
    total = 0
    for use in body:
        for position, operand in enumerate(use.operands):
            if operand != name:
                continue
            if use.opcode in ("dynamic-slice", "slice", "gather"):
                total += size(use.result)
            elif use.opcode == "fusion":
                called = computations[_matched(_CALLED.search(use.rest)).group(1)]
                parameter = next(
                    instruction.name
                    for instruction in called
                    if instruction.opcode == "parameter" and instruction.rest.startswith(f"{position})")
                )
                total += _read(called, parameter, computations)
            elif use.opcode == "bitcast":
                total += _read(body, use.name, computations)
            elif use.opcode != "dynamic-update-slice" or position:
                total += size(next(instruction.result for instruction in body if instruction.name == name))
    return total


def _fusion_bytes(computations: dict[str, list[Instruction]], fusion: Instruction, shapes: dict[str, str]) -> int:
    """HBM bytes of a fusion.

    Operands count whole but for those that are only sliced, the result counts but for slices written in place.
    """
    body = computations[_matched(_CALLED.search(fusion.rest)).group(1)]
    inner = {instruction.name: instruction for instruction in body}
    read = 0
    for instruction in body:
        if instruction.opcode != "parameter":
            continue
        number = int(_matched(re.match(r"\d+", instruction.rest)).group())
        outer = shapes.get(fusion.operands[number], "")
        if not size(outer, True):
            continue
        read += min(size(outer, True), _read(body, instruction.name, computations))
    root = body[-1]
    while root.opcode in ("bitcast", "copy") and root.operands and root.operands[0] in inner:
        root = inner[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and size(fusion.result, True):
        return read + size(inner[root.operands[1]].result)
    return read + size(fusion.result, True)
