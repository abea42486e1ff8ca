"""Arithmetic and traffic of a compiled program, with the bodies of its loops counted in full.

XLA's own analysis counts the body of a loop once. Here the instructions of the optimized program
are read from its text: products are counted by their shapes, and the bytes of an instruction are
those of its operands and results; an operand of which a fusion reads slices counts as these slices.
``loop_factors`` are the ratios of such counts with and without the numbers of turns, by which XLA's
own figures are multiplied. A loop whose number of turns is not a constant counts once.
"""

import math
import re
from functools import cached_property
from typing import NamedTuple

ITEMSIZE = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f64": 8, "s64": 8, "u64": 8}
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
HEAD = re.compile(r"^(ENTRY )?(%[\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?(%[\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
# They move no bytes, or those of the instructions that they start.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
SLICES = {"slice", "dynamic-slice", "gather"}


def arrays(shapes: str) -> list[tuple[int, tuple[int, ...]]]:
    """Bytes and dimensions of every array in a shape as XLA prints it."""
    found = []
    for kind, dims in ARRAY.findall(shapes):
        shape = tuple(int(n) for n in dims.split(",") if n)
        found.append((ITEMSIZE.get(kind, 4) * math.prod(shape), shape))
    return found


def size(shapes: str) -> int:
    """Bytes of all arrays in a shape as XLA prints it."""
    return sum(count for count, _ in arrays(shapes))


class Cost(NamedTuple):
    """Floating-point operations of products, and bytes read and written."""

    flops: float = 0.0
    bytes: float = 0.0

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        """The sum with ``times`` the ``other``."""
        return Cost(self.flops + times * other.flops, self.bytes + times * other.bytes)


class Instruction(NamedTuple):
    """One line of a program."""

    root: bool
    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%[\w.-]+", self.rest.split("), ")[0])

    def called(self, attribute: str) -> str:
        """The computation that ``attribute`` names."""
        found = re.search(rf"{attribute}=(%[\w.-]+)", self.rest)
        return found.group(1) if found else ""


class Program:
    """A compiled program's text, by computations."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        self.entry = ""
        for line in text.splitlines():
            if head := HEAD.match(line):
                current = self.computations.setdefault(head.group(2), {})
                self.entry = head.group(2) if head.group(1) else self.entry
            elif found := INSTRUCTION.match(line):
                root, name, *rest = found.groups()
                current[name] = Instruction(bool(root), name, *rest)

    @cached_property
    def loop_factors(self) -> tuple[float, float]:
        """Arithmetic and bytes with all turns of all loops, as multiples of those with one."""
        whole, once = (self._cost(self.entry, loops, {}) for loops in (True, False))
        return whole.flops / max(once.flops, 1), whole.bytes / max(once.bytes, 1)

    def _cost(self, name: str, loops: bool, known: dict[str, Cost]) -> Cost:
        if name not in known:
            total = Cost()
            for instruction in self.computations.get(name, {}).values():
                total = total.plus(self._of(instruction, name, loops, known))
            known[name] = total
        return known[name]

    def _of(self, i: Instruction, where: str, loops: bool, known: dict[str, Cost]) -> Cost:
        if i.opcode == "while":
            turns = self._turns(i.called("condition")) if loops else 1
            return Cost().plus(self._cost(i.called("body"), loops, known), turns)
        if i.opcode == "call":
            return self._cost(i.called("to_apply"), loops, known)
        if i.opcode == "fusion":
            inside = self._cost(i.called("calls"), loops, known)
            return Cost(inside.flops, self._boundary(i, where))
        if i.opcode in FREE or i.opcode.endswith("-done"):
            return Cost()
        flops = self._product(i, where) if i.opcode in ("convolution", "dot") else 0.0
        return Cost(flops, size(i.shape) + sum(self._read(i, where)))

    def _read(self, i: Instruction, where: str) -> list[int]:
        inside = self.computations[where]
        if i.opcode in SLICES:
            return [size(i.shape)]
        return [size(inside[name].shape) for name in i.operands if name in inside]

    def _boundary(self, i: Instruction, where: str) -> int:
        """Bytes that a fusion reads and writes."""
        body = self.computations[i.called("calls")]
        total = 0
        for instruction in body.values():
            if instruction.opcode != "parameter":
                continue
            users = [u for u in body.values() if instruction.name in u.operands]
            if users and all(u.opcode in SLICES for u in users):
                total += sum(size(u.shape) for u in users)
            elif not (users and all(u.opcode == "dynamic-update-slice" for u in users)):
                total += size(instruction.shape)
        root = next(instruction for instruction in body.values() if instruction.root)
        if root.opcode == "dynamic-update-slice":
            return total + size(body[root.operands[1]].shape)
        return total + size(i.shape)

    def _product(self, i: Instruction, where: str) -> float:
        inside = self.computations[where]
        result = math.prod(arrays(i.shape)[0][1])
        right = arrays(inside[i.operands[1]].shape)[0][1]
        if i.opcode == "dot":
            axes = re.search(r"rhs_contracting_dims=\{([\d,]*)\}", i.rest)
            contracted = [int(n) for n in axes.group(1).split(",")] if axes else []
            return 2.0 * result * math.prod(right[n] for n in contracted)
        labels = re.search(r"dim_labels=\w+_(\w+)->", i.rest)
        window = re.search(r"window=\{size=([\dx]+)", i.rest)
        taps = math.prod(int(n) for n in window.group(1).split("x")) if window else 1
        return 2.0 * result * taps * right[labels.group(1).index("i")] if labels else 0.0

    def _turns(self, condition: str) -> int:
        """How often a loop runs: the constant that its condition compares the counter with."""
        limits = [
            int(found.group(1))
            for i in self.computations.get(condition, {}).values()
            if i.opcode == "constant" and (found := re.match(r"(\d+)\)", i.rest))
        ]
        return max(limits, default=1)
