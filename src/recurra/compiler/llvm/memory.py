"""Pointers to the rows of every array, as generated code finds them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llvmlite import ir

from recurra.compiler.ir import Op
from recurra.compiler.llvm.code import POINTER, Code
from recurra.compiler.llvm.layout import Layout
from recurra.compiler.regions import View

Rows = Callable[[ir.Value], ir.Value]


class Memory:
    """Pointers to the rows of arrays, at time t. Bases are read from the table once, at the start."""

    def __init__(
        self, code: Code, layout: Layout, table: ir.Value, work: ir.Value, B: ir.Value, t: ir.Value | None = None
    ) -> None:
        self.code, self.layout, self.B, self.table, self.work, self.t = code, layout, B, table, work, t
        self._bases: dict[tuple[str, int], ir.Value] = {}

    def base(self, kind: str, index: int = 0) -> ir.Value:
        key = (kind, index)
        if key not in self._bases:
            code = self.code
            if key in self.layout.slots:
                self._bases[key] = code.at(self.base("scratch"), self.layout.slots[key][0])
            elif kind == "old":
                offset = code.times(self.B, 1 + index)
                self._bases[key] = code.b.gep(self.work, [offset], source_etype=POINTER)
            else:
                self._bases[key] = code.entry(self.table, self.layout.entries[key])
        return self._bases[key]

    def old(self, carry: int, row: ir.Value) -> ir.Value:
        """Where the pointer to a row's carry is kept."""
        return self.code.b.gep(self.base("old", carry), [row], source_etype=POINTER)

    def find_partials(self, places: Iterable[int]) -> None:
        """Reads where the partial results of reductions lie, for all blocks that come after this one."""
        for place in places:
            self.base("partial", place)

    def partial(self, place: int, row: ir.Value) -> ir.Value:
        return self.code.at(self.base("partial", place), self.code.times(row, self.layout.scratch))

    def rows(self, view: View) -> Rows:
        """Gives the pointer to a row of what is seen."""
        code, program = self.code, self.layout.program
        node = program.nodes[view.place]
        if not view.home and node.op is Op.CARRY:
            base = self.base("old", node.index)
            return lambda row: code.at(code.entry(base, row), view.start)
        if view.home and view.place in program.outputs:
            index, stride = program.outputs.index(view.place), node.width
            start = self._timed(self.base("output", index), stride)
        elif view.home:
            stride = self.layout.scratch
            start = self.base("home", view.place)
            if view.place in program.new:
                odd = code.b.and_(self._t(), code.number(1))
                start = code.at(start, code.times(odd, self.layout.slots["home", view.place][1]))
        elif node.op is Op.VECTOR:
            start, stride = self.base("vector", node.index), 0
        else:
            start, stride = self.base(node.op.value, node.index), node.width
            if node.op is Op.INPUT:
                start = self._timed(start, stride)
        start = code.at(start, view.start)
        return lambda row: code.at(start, code.times(row, stride)) if stride else start

    def _timed(self, base: ir.Value, stride: int) -> ir.Value:
        return self.code.at(base, self.code.times(self.code.b.mul(self._t(), self.B), stride))

    def _t(self) -> ir.Value:
        assert self.t is not None, "no step has been given"
        return self.t
