"""What an optimized program does, read from its text (HLO): kernels, bytes, collectives, cycles.

Loops count as often as they run. XLA's own `cost_analysis` counts their bodies once, and says
nothing at all about GPUs that are not there.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

_BITS = {"pred": 8, "bf16": 16}
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+)\w*\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start|-done)?"
)
# These neither run anything nor move anything themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
    *("partition-id", "replica-id", "iota", "opt-barrier"),
}
# The kind of a kernel is the first whose instructions it holds.
_KINDS = {
    "scatters": ("scatter",),
    "gathers": ("gather",),
    "sorts": ("sort", "topk"),
    "products": ("convolution", "dot"),
    "copies": ("copy", "copy-start", "slice-start", "dynamic-update-slice"),
}
_PRODUCTS = re.compile(r'custom_call_target="__(cudnn|cublas)')
_OWN = re.compile(r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton)"')
# Cycles a row on a v5e, for which its compiler gives no estimate (docs/scaling.md says more).
_GATHER_FROM_VMEM, _GATHER, _SCATTER = 4.5, 12.0, 22.0
# Nor for Pallas kernels: a v5e multiplies and adds so much in a cycle (4 x 128 x 128 pairs), and
# ours do little that does not wait for that.
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_FLOPS = 131_072.0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `text` is all that follows the opening parenthesis."""

    name: str
    type: str
    opcode: str
    text: str

    @property
    def operands(self) -> list[str]:
        """Names of the arguments."""
        return re.findall(r"%([\w.\-]+)", self.text.partition(")")[0])

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs as a part of itself."""
        return _CALLED.findall(self.text)


Computation = Mapping[str, Instruction]
Sums = defaultdict[str, float]


def _sums() -> Sums:
    return defaultdict(float)


@dataclasses.dataclass
class Work:
    """What a program, or a part of it, does on one device.

    Attributes:
      kernels: how many times something is launched.
      bytes: read and written, by kind of kernel; each kernel by itself.
      cycles: estimates of the TPU's compiler, by kind; those of gathers and scatters by rows.
      collectives: bytes that arrive, by kind of collective.
      collective_counts: how many there are, by kind.
    """

    kernels: int = 0
    bytes: Sums = dataclasses.field(default_factory=_sums)
    cycles: Sums = dataclasses.field(default_factory=_sums)
    collectives: Sums = dataclasses.field(default_factory=_sums)
    collective_counts: Sums = dataclasses.field(default_factory=_sums)

    @property
    def multiplies(self) -> bool:
        """Whether there are products in it."""
        return any(self.bytes.get(kind) for kind in ("products", "own kernels"))

    def add(self, other: Work, times: int = 1) -> None:
        """Adds what another part does, so many times."""
        self.kernels += times * other.kernels
        for name in ("bytes", "cycles", "collectives", "collective_counts"):
            for kind, value in getattr(other, name).items():
                getattr(self, name)[kind] += times * value


def array_bytes(text: str) -> float:
    """Bytes of all arrays of a type, such as `(f32[2,3]{1,0}, pred[])`."""
    return sum(_bits(kind) * _elements(sides) for kind, sides in _ARRAY.findall(text)) / 8


def _bits(kind: str) -> int:
    return _BITS.get(kind) or int(kind[1:])


def _elements(sides: str) -> int:
    return math.prod(int(side) for side in sides.split(",") if side)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of the one that it begins with."""
    computations: dict[str, Computation] = {}
    current: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, type_, opcode, rest = found.groups()
            current[name] = Instruction(name, type_, opcode, rest)
    return computations, entry


def work_of(text: str, choose: Callable[..., Any] = min) -> Work:
    """What one run of an optimized program does on one device.

    Of the branches of a conditional that multiply (recomputation has one that gives up instead)
    the cheaper one counts; with `choose=max`, the dearer one. A loop whose turns depend on data
    counts no turn; with `choose=max`, one.
    """
    computations, entry = parse(text)
    return _Reader(computations, choose, by_cycles="estimated_cycles" in text).work(entry)


class _Reader:
    """Adds up computations; branches are compared by cycles, or else by bytes."""

    def __init__(
        self,
        computations: Mapping[str, Computation],
        choose: Callable[..., Any],
        by_cycles: bool,
    ):
        self._computations, self._choose = computations, choose
        self._weights = "cycles" if by_cycles else "bytes"

    def work(self, name: str) -> Work:
        total, scope = Work(), self._computations.get(name, {})
        for line in scope.values():
            match line.opcode:
                case "while":
                    total.add(self.work(line.called[-1]), self._trips(line))
                case "call" | "async-start":
                    total.add(self.work(line.called[0]))
                case "conditional":
                    names = re.findall(r"%([\w.\-]+)", " ".join(_BRANCHES.findall(line.text)))
                    branches = [self.work(each) for each in names or line.called]
                    working = [each for each in branches if each.multiplies]
                    total.add(self._choose(working or branches, key=self._weight))
                case opcode if opcode not in _FREE:
                    total.add(self._kernel(line, scope))
        return total

    def _weight(self, work: Work) -> float:
        return sum(getattr(work, self._weights).values())

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: as annotated, or N of `i < N`; the text may not tell."""
        if known := _TRIPS.search(loop.text):
            return int(known[1])
        condition = re.search(r"condition=%([\w.\-]+)", loop.text)
        lines = self._all_of(condition[1]) if condition else []
        constants = [
            int(found[1])
            for line in lines
            if line.opcode == "constant" and (found := re.match(r"(\d+)\)", line.text))
        ]
        counts = any("direction=LT" in line.text for line in lines)
        return constants[0] if counts and len(constants) == 1 else self._choose(0, 1)

    def _all_of(self, name: str) -> list[Instruction]:
        """The instructions of a computation and of those inside it."""
        own = list(self._computations.get(name, {}).values())
        return own + [each for line in own for inner in line.called for each in self._all_of(inner)]

    def _kernel(self, line: Instruction, scope: Computation) -> Work:
        work = Work()
        collective = _COLLECTIVE.fullmatch(line.opcode)
        if collective and collective[2] != "-start":  # its end has the type of the result
            work.collectives[collective[1]] += array_bytes(line.type)
            work.collective_counts[collective[1]] += 1
        if line.opcode.endswith(("-done", "-update")):
            return work
        work.kernels = 1
        fused = line.opcode == "fusion"
        inside = [each for name in line.called for each in self._all_of(name)] if fused else [line]
        kind = "collectives" if collective else _kind(line, {each.opcode for each in inside})
        work.bytes[kind] = self._traffic(line, scope)
        estimate = _CYCLES.search(line.text)
        rows = self._rows(line, scope) if kind in ("gathers", "scatters") else 0.0
        own = _COST.search(line.text)
        kernel = float(own[1]) / _FLOPS if own else 0.0
        work.cycles[kind] = max(float(estimate[1]) if estimate else 0.0, rows, kernel)
        return work

    def _body(self, line: Instruction, scope: Computation) -> tuple[list[Instruction], Computation]:
        """The instructions of a kernel, and where the types of their operands stand."""
        if line.opcode == "fusion":
            body = self._computations.get(line.called[0], {})
            return list(body.values()), body
        return [line], scope

    def _traffic(self, line: Instruction, scope: Computation) -> float:
        """Bytes read and written; of an array that is only sliced or gathered from, the slices."""
        body, types = self._body(line, scope)
        names = {}
        for each in body:
            if each.opcode == "parameter" and line.opcode == "fusion":
                names[int(each.text.partition(")")[0])] = each.name
        written = array_bytes(line.type)
        updates = [each for each in body if each.opcode == "dynamic-update-slice"]
        if updates and array_bytes(updates[-1].type) == written:  # in place
            written = sum(array_bytes(_type(types, each.operands[1])) for each in updates)
        read = 0.0
        for number, operand in enumerate(line.operands):
            size = array_bytes(_type(scope, operand))
            name = names.get(number, operand)
            users = [each for each in body if name in each.operands]
            if users and all(_takes_a_part(each, name) for each in users):
                pieces = (x.type for x in users if x.opcode != "dynamic-update-slice")
                size = min(size, sum(map(array_bytes, pieces)))
            read += size
        return read + written

    def _rows(self, line: Instruction, scope: Computation) -> float:
        """Estimated cycles of the gathers and scatters of a kernel."""
        cycles = 0.0
        body, types = self._body(line, scope)
        for each in body:
            if each.opcode == "fusion" and each is not line:
                cycles += self._rows(each, types)
            elif each.opcode == "gather":
                sizes = re.search(r"slice_sizes=\{([\d,]*)\}", each.text)
                taken = sum(_elements(sides) for _, sides in _ARRAY.findall(each.type))
                near = "S(1)" in _type(types, each.operands[0])
                rows = taken / (_elements(sizes[1]) if sizes else 1)
                cycles += rows * (_GATHER_FROM_VMEM if near else _GATHER)
            elif each.opcode == "scatter":
                cycles += _SCATTER * _places(each, types)
        return cycles


def _places(scatter: Instruction, types: Computation) -> int:
    """How many rows a scatter adds; its arguments are operands, indices, updates."""
    indices = _ARRAY.search(_type(types, scatter.operands[len(scatter.operands) // 2]))
    axis = re.search(r"index_vector_dim=(\d+)", scatter.text)
    sides = [int(side) for side in indices[2].split(",") if side] if indices else []
    vector = int(axis[1]) if axis else len(sides)
    return math.prod(sides[:vector] + sides[vector + 1 :])


def _kind(line: Instruction, opcodes: set[str]) -> str:
    """What a kernel of these instructions mostly is."""
    if _OWN.search(line.text):
        return "own kernels"
    if _PRODUCTS.search(line.text):
        return "products"
    return next((kind for kind, names in _KINDS.items() if opcodes & set(names)), "elementwise")


def _takes_a_part(line: Instruction, name: str) -> bool:
    slices = ("dynamic-slice", "slice", "gather", "dynamic-update-slice")
    return line.opcode in slices and line.operands[0] == name


def _type(scope: Computation, name: str) -> str:
    return scope[name].type if name in scope else ""
