"""What a compiled program moves: collectives and HBM traffic, read from its HLO text with loops counted.

XLA's own `cost_analysis` counts the body of a loop once, so a scanned model looks as if it had one layer. Here each
instruction counts as often as its loops run; a loop's count is the constant its condition compares with (what
`jax.lax.scan` compiles to).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
"""Instructions that move nothing themselves: what they call, or their start, is counted."""

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=\{?%?([\w.\-]+)")
_HOLDS_OPERANDS = ("copy-start", "all-gather-start", "collective-permute-start", "send")
"""Instructions whose value is their operands beside what they make."""
_NOT_RUN = ("reduce", "sort", "scatter", "reduce-window", "async-update", "async-done")
"""Their computation is a rule for pairs of elements, or has run at the start already."""


class Instruction(NamedTuple):
    """One line of a computation: name, result (text of its shape), opcode, everything after the opening parenthesis."""

    name: str
    result: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        depth, end = 1, 0
        for end, character in enumerate(self.rest):
            depth += (character == "(") - (character == ")")
            if depth == 0:
                break
        return re.findall(r"%([\w.\-]+)", self.rest[:end])


class Program(NamedTuple):
    """Computations by name, each a list of instructions, and how often every one that runs is run."""

    computations: dict[str, list[Instruction]]
    times: dict[str, int]


class Traffic(NamedTuple):
    """Of one kind of collective, per device and step: how many run, and bytes sent over the links (`wire`), the part of
    them between slices (`between_slices`), and the largest single result.
    """

    count: int
    wire: float
    between_slices: float
    largest: int


def size(shapes: str, hbm_only: bool = False) -> int:
    """Bytes of all arrays in the text of a shape; hbm_only leaves out what the compiler placed on the chip (S(1), ...)."""
    total = 0
    for dtype, dimensions, layout in _SHAPE.findall(shapes):
        if dtype in BYTES and not (hbm_only and re.search(r"S\([1-9]\)", layout)):
            total += BYTES[dtype] * math.prod(int(n) for n in dimensions.split(",") if n)
    return total


def read(text: str) -> Program:
    """The text of a compiled module (`compiled.as_text()`). Raises ValueError where a loop's count cannot be told."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and (found := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations[found.group(2)] = []
            entry = found.group(2) if found.group(1) else entry
        elif found := _INSTRUCTION.match(line):
            current.append(Instruction(*found.groups()))
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
    """How often a while runs."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest).group(1)
    bounds = [re.match(r"(\d+)\)", one.rest) for one in computations[condition] if one.opcode == "constant"]
    bounds = [int(bound.group(1)) for bound in bounds if bound]
    compared = any("direction=LT" in one.rest for one in computations[condition])
    if len(bounds) != 1 or not compared:
        raise ValueError(f"the loop {loop.name} does not count up to a constant: its traffic cannot be told")
    return bounds[0]


def device_groups(rest: str) -> list[list[int]]:
    """Device groups of a collective; [] where the text does not list them."""
    if found := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found.group(1))]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        ids, (*_, n) = _iota(found.group(2), found.group(3)), found.group(1).split(",")
        return [ids[i : i + int(n)] for i in range(0, len(ids), int(n))]
    if found := _MESH_GROUPS.search(rest):
        axes = [(name, int(n)) for name, n in re.findall(r"'(\w+)'=(\d+)", found.group(1))]
        wanted = re.findall(r"'(\w+)'", found.group(4))
        total = math.prod(n for _, n in axes)
        ids = _iota(found.group(2), found.group(3)) if found.group(2) else list(range(total))
        groups: dict[tuple[int, ...], list[int]] = {}
        for position, device in enumerate(ids):
            rest_, key = position, []
            for name, n in reversed(axes):
                rest_, coordinate = divmod(rest_, n)
                key.append(-1 if name in wanted else coordinate)
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


def collectives(program: Program, slice_of: Sequence[Any]) -> dict[str, Traffic]:
    """Collectives by kind. slice_of: the slice of every device in the order of the mesh; a group that crosses slices
    counts between them too. Raises ValueError where the devices of a collective cannot be read.

    Bytes on the wire per device with n devices in a group, ring or bidirectional: all-gather (n-1)/n of the result,
    reduce-scatter (n-1)/n of the operand, all-reduce twice that, all-to-all (n-1)/n, permute the operand. A TPU program
    hands what crosses slices to its host ("megascale"): kind "send", the bytes handed over.
    """
    found: dict[str, Traffic] = {}
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
            part = (n - 1) / n
            sent = {"all-reduce": 2 * part, "reduce-scatter": n * part if not scattered else part}
            wire = result * sent.get(kind, part)
            slices = len({slice_of[device] for device in groups[0]})
            share = (slices - 1) / slices / part if slices > 1 else 0.0
        was = found.get(kind, Traffic(0, 0.0, 0.0, 0))
        found[kind] = Traffic(
            was.count + times,
            was.wire + times * wire,
            was.between_slices + times * wire * share,
            max(was.largest, result),
        )
    return found


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
    """Bytes read from and written to HBM by one device in a step: operands and results of every instruction that is
    not inside a fusion. A slice read or written inside a fusion counts as the slice, not as the array it is taken from.
    """
    fused = {
        called
        for body in program.computations.values()
        for one in body
        if one.opcode == "fusion"
        for called in _CALLED.findall(one.rest)
    }
    total = 0.0
    for name, times in program.times.items():
        if name in fused:
            continue
        shapes = {one.name: one.result for one in program.computations[name]}
        for one in program.computations[name]:
            if one.opcode in FREE:
                continue
            if one.opcode == "fusion":
                moved = _fusion_bytes(program.computations, one, shapes)
            elif one.opcode in ("dynamic-slice", "slice", "gather"):
                moved = 2 * size(one.result, True)
            elif one.opcode == "dynamic-update-slice":
                moved = 2 * size(shapes.get(one.operands[1], ""), True)
            elif one.opcode in _HOLDS_OPERANDS:
                moved = size(one.result, True)
            else:
                moved = size(one.result, True) + sum(size(shapes.get(name_, ""), True) for name_ in one.operands)
            total += times * moved
    return total


def _read(body: list[Instruction], name: str, computations: dict[str, list[Instruction]]) -> int:
    """Bytes that a fused computation reads of its value `name`: slices, where it only slices it; nothing, where it only
    writes slices into it.
    """
    total = 0
    for use in body:
        for position, operand in enumerate(use.operands):
            if operand != name:
                continue
            if use.opcode in ("dynamic-slice", "slice", "gather"):
                total += size(use.result)
            elif use.opcode == "fusion":
                called = computations[_CALLED.search(use.rest).group(1)]
                parameter = next(
                    one.name for one in called if one.opcode == "parameter" and one.rest.startswith(f"{position})")
                )
                total += _read(called, parameter, computations)
            elif use.opcode == "bitcast":
                total += _read(body, use.name, computations)
            elif use.opcode != "dynamic-update-slice" or position:
                total += size(next(one.result for one in body if one.name == name))
    return total


def _fusion_bytes(computations: dict[str, list[Instruction]], fusion: Instruction, shapes: dict[str, str]) -> int:
    """HBM bytes of one fusion: whole operands but for those that are only sliced, and the result but for slices written
    in place.
    """
    body = computations[_CALLED.search(fusion.rest).group(1)]
    inner = {one.name: one for one in body}
    read = 0
    for one in body:
        if one.opcode != "parameter":
            continue
        outer = shapes.get(fusion.operands[int(re.match(r"\d+", one.rest).group())], "")
        if not size(outer, True):
            continue
        read += min(size(outer, True), _read(body, one.name, computations))
    root = body[-1]
    while root.opcode in ("bitcast", "copy") and root.operands and root.operands[0] in inner:
        root = inner[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and size(fusion.result, True):
        return read + size(inner[root.operands[1]].result)
    return read + size(fusion.result, True)
