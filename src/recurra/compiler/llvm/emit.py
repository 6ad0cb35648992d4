"""A whole program as one native function: the loop over time, and who takes part in each step.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir

from recurra.compiler.llvm.code import I8, I64, POINTER, VOID, Code, Floats
from recurra.compiler.llvm.layout import Layout
from recurra.compiler.llvm.sweep import Memory, sweep_function
from recurra.compiler.llvm.target import Target
from recurra.compiler.regions import Plan, View


def emit(plan: Plan, dtype: np.dtype[Any], target: Target) -> tuple[str, Layout]:
    """LLVM assembly of ``run(table, T, B, begin, end, reverse)``, which takes the rows begin to end through time.

    ``table`` holds the pointers that ``Layout.entries`` lists; resets may be null.
    """
    module = ir.Module("recurra")
    floats = Floats(module, dtype, target)
    layout = Layout(plan, floats)
    sweeps = [sweep_function(floats, layout, sweep, f"region_{place}") for place, sweep in enumerate(layout.sweeps)]
    run = ir.Function(module, ir.FunctionType(VOID, [POINTER, I64, I64, I64, I64, I64]), "run")
    _Run(Code(floats, run), layout, run.args, sweeps).emit()
    _share(module, floats, run)
    return str(module), layout


# What share reads: 64-bit words, in this order. Part k is the rows from bounds[k] to bounds[k + 1]; the last word
# counts the parts that are taken.
SHARED = ("table", "bounds", "T", "B", "reverse", "parts", "taken")


def _share(module: ir.Module, floats: Floats, run: ir.Function) -> None:
    """``share(words)``: one thread of a team. It takes parts of the rows until all are taken."""
    share = ir.Function(module, ir.FunctionType(VOID, [POINTER]), "share")
    code = Code(floats, share)
    b, words = code.b, share.args[0]
    table, bounds = code.entry(words, 0), code.entry(words, 1)
    T, B, reverse, parts = (code.entry(words, place, I64) for place in range(2, 6))
    taken = b.gep(words, [code.number(6)], source_etype=I64)
    take, work, end = (b.append_basic_block(name) for name in ("take", "work", "end"))
    b.branch(take)
    b.position_at_end(take)
    part = b.atomic_rmw("add", taken, code.number(1), "monotonic")
    b.cbranch(b.icmp_unsigned("<", part, parts), work, end)
    b.position_at_end(work)
    first, last = (code.entry(bounds, each, I64) for each in (part, code.plus(part, 1)))
    b.call(run, [table, T, B, first, last, reverse])
    b.branch(take)
    b.position_at_end(end)
    b.ret_void()


class _Run:
    def __init__(
        self, code: Code, layout: Layout, arguments: Sequence[ir.Value], sweeps: Sequence[ir.Function]
    ) -> None:
        self.code, self.layout, self.sweeps = code, layout, sweeps
        self.table, self.T, self.B, self.begin, self.end, self.reverse = arguments
        self.memory = Memory(code, layout, self.table, self.B)
        self.carries = range(len(layout.program.carries))
        memory, b = self.memory, code.b
        self.lengths, self.resets, self.active = (memory.base(name, 0) for name in ("lengths", "resets", "active"))
        self.has_resets = b.icmp_unsigned("!=", self.resets, ir.Constant(POINTER, None))
        self.active = b.gep(self.active, [self.begin], source_etype=I64)
        # Read here, where every later block sees them.
        for name, index in (*layout.entries, *layout.slots):
            memory.base(name, index)

    def emit(self) -> None:
        code, b = self.code, self.code.b
        with code.loop(self.end, self.begin) as row:
            self._restore("state", row)
        with code.loop(self.T) as step:
            last_first = b.sub(b.sub(self.T, code.number(1)), step)
            t = b.select(b.icmp_unsigned("!=", self.reverse, code.number(0)), last_first, step)
            first = code.times(t, self.B)
            with code.sums([code.number(0)], self.end, self.begin) as (row, (count,), following):
                following.append(self._gather(t, first, row, count))
            (count,) = following
            with b.if_then(b.icmp_unsigned("!=", count, code.number(0)), likely=True):
                for sweep in self.sweeps:
                    b.call(sweep, [self.table, self.B, t, self.active, count])
                self._advance(first, count)
        with code.loop(self.end, self.begin) as row:
            for carry in self.carries:
                code.copy(self._old(carry, row), self._given("state", carry, row), self._width(carry))
        b.ret_void()

    def _gather(self, t: ir.Value, first: ir.Value, row: ir.Value, count: ir.Value) -> ir.Value:
        """Lists the row as active at step t, or zeroes its outputs. Gives the number of active rows so far."""
        code, b = self.code, self.code.b
        here = b.icmp_signed("<", t, code.entry(self.lengths, row, I64))
        b.store(row, b.gep(self.active, [count], source_etype=I64))
        with b.if_else(here, likely=True) as (then, otherwise):
            with then, b.if_then(self.has_resets):
                flag = code.entry(self.resets, code.plus(first, row), I8)
                with b.if_then(b.icmp_unsigned("!=", flag, ir.Constant(I8, 0)), likely=False):
                    self._restore("fresh", row)
            with otherwise:
                for output, place in enumerate(self.layout.program.outputs):
                    width = self.layout.program.nodes[place].width
                    start = code.times(code.plus(first, row), width)
                    code.copy(None, code.at(self.memory.base("output", output), start), width)
        return code.plus(count, b.zext(here, I64))

    def _advance(self, first: ir.Value, count: ir.Value) -> None:
        """What was new is old now, in the rows that took part."""
        code = self.code
        homes = [self.memory.start(View(place, True), first) for place in self.layout.program.new]
        with code.loop(count) as index:
            row = code.entry(self.active, index, I64)
            for carry, (start, stride) in enumerate(homes):
                source = code.at(start, code.times(row, stride))
                code.copy(source, self._old(carry, row), self._width(carry))

    def _restore(self, name: str, row: ir.Value) -> None:
        for carry in self.carries:
            self.code.copy(self._given(name, carry, row), self._old(carry, row), self._width(carry))

    def _given(self, name: str, carry: int, row: ir.Value) -> ir.Value:
        return self.code.at(self.memory.base(name, carry), self.code.times(row, self._width(carry)))

    def _old(self, carry: int, row: ir.Value) -> ir.Value:
        stride = self.layout.slots["old", carry][1]
        return self.code.at(self.memory.base("old", carry), self.code.times(row, stride))

    def _width(self, carry: int) -> int:
        return self.layout.program.carries[carry]
