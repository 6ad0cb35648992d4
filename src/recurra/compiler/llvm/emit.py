"""A whole program as one native function: the loop over time, and who takes part in each step.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from recurra.compiler.llvm.chain import Links, narrow
from recurra.compiler.llvm.code import I8, I64, POINTER, VOID, Code, Floats
from recurra.compiler.llvm.divide import Words, bound_function, drive_function
from recurra.compiler.llvm.layout import Chain, Layout, Sweep
from recurra.compiler.llvm.memory import Memory
from recurra.compiler.llvm.pack import pack_function
from recurra.compiler.llvm.stretches import Stretches
from recurra.compiler.llvm.sweep import Swept
from recurra.compiler.llvm.target import Target
from recurra.compiler.regions import Plan, View

# f(table, B, t, work, active, count, begin, end): a stage of time t, for the ``count`` rows that ``active`` lists, in
# pieces from begin to end. ``work`` is the thread's own memory.
STAGE = ir.FunctionType(VOID, [POINTER, I64, I64, POINTER, POINTER, I64, I64, I64])


def stage_function(floats: Floats, layout: Layout, stage: Sweep | Chain, name: str) -> ir.Function:
    """A stage whose pieces are the steps of a region's sweep, or of a chain the rows."""
    function = floats.function(name, STAGE.args)
    # A step of a small cell is so short that the call would be felt.
    function.attributes.add("alwaysinline")
    table, B, t, work, active, count, begin, end = function.args
    code = Code(floats, function)
    memory = Memory(code, layout, table, work, B, t)
    if isinstance(stage, Chain):
        Links(code, layout, stage, memory, active, count).emit(begin, end)
        return function
    kind = Swept if stage.chunks == 0 else Stretches
    kind(narrow(code, stage), layout, stage, memory, active, count).emit(begin, end)
    return function


def emit(plan: Plan, dtype: np.dtype[Any], target: Target) -> tuple[str, Layout]:
    """LLVM assembly of two functions, and what its caller must know.

    ``run(words, begin, end, member, members)`` takes the rows begin to end through time, or that part of their
    features that is the member's, in that member's own memory. ``share(words)`` is for each thread of a team: it packs,
    and runs.
    """
    module = ir.Module("recurra")
    floats = Floats(module, dtype, target)
    layout = Layout(plan, floats)
    run = ir.Function(module, ir.FunctionType(VOID, [POINTER, I64, I64, I64, I64]), "run")
    _Run(floats, layout, run).emit()
    _share(floats, layout, run)
    return str(module), layout


def _share(floats: Floats, layout: Layout, run: ir.Function) -> None:
    share = ir.Function(floats.module, ir.FunctionType(VOID, [POINTER]), "share")
    pack, bound = pack_function(floats, layout), bound_function(floats)
    code = Code(floats, share)
    b, words = code.b, Words(code, share.args[0])
    T, B, units, parts, members = (words.header(name) for name in ("T", "B", "units", "parts", "members"))
    table = words.table()
    lengths = code.entry(table, layout.entries["lengths", 0])
    place = words.add("arrived")
    with code.tickets(lambda: words.add("begun", "monotonic"), units) as unit:
        b.call(pack, [table, unit])
        words.add("packed")
    words.wait("packed", units)
    with b.if_else(b.icmp_unsigned("!=", parts, code.number(0))) as (rows, features):
        with rows, code.tickets(lambda: words.add("taken", "monotonic"), parts) as part:
            first, last = (b.call(bound, [lengths, T, B, each, parts]) for each in (part, code.plus(part, 1)))
            b.call(run, [words.pointer, first, last, part, code.number(1)])
        with features, b.if_then(b.icmp_unsigned("<", place, members)):
            b.call(run, [words.pointer, code.number(0), B, place, members])
    b.ret_void()


class _Run:
    def __init__(self, floats: Floats, layout: Layout, run: ir.Function) -> None:
        self.floats, self.layout, self.program = floats, layout, layout.program
        self.stages = [stage_function(floats, layout, each, f"stage_{k}") for k, each in enumerate(layout.stages)]
        self.drive = drive_function(floats, layout, STAGE)
        self.code = code = Code(floats, run)
        b = code.b
        pointer, self.begin, self.end, self.member, self.members = run.args
        self.words = words = Words(code, pointer)
        self.T, self.B, self.reverse = (words.header(name) for name in ("T", "B", "reverse"))
        self.carries = range(len(self.program.carries))
        self.table = words.table()
        # Each member lists the active rows and where their carries are for itself.
        own = code.entry(self.table, layout.entries["work", 0])
        size = b.mul(self.B, code.number(layout.work))
        self.work = b.gep(own, [b.mul(self.member, size)], source_etype=I64)
        self.memory = Memory(code, layout, self.table, self.work, self.B)
        self.active = b.gep(self.work, [self.begin], source_etype=I64)
        self.lengths, self.resets = (self.memory.base(name) for name in ("lengths", "resets"))
        null = ir.Constant(POINTER, None)
        self.has_lengths, self.has_resets = (b.icmp_unsigned("!=", each, null) for each in (self.lengths, self.resets))
        self.divided = b.icmp_unsigned("!=", self.members, code.number(1))
        # Of those who take the same rows, the one who does what is done once.
        self.first = b.or_(b.not_(self.divided), b.icmp_unsigned("==", self.member, code.number(0)))
        self.number = b.alloca(I64)
        b.store(code.number(0), self.number)
        self.count = b.alloca(I64)
        self.whole = b.alloca(I64)
        b.store(self.T, self.whole)
        # Read here, where every later block sees them.
        for name, index in (*layout.entries, *layout.slots):
            self.memory.base(name, index)
        for carry in self.carries:
            self.memory.base("old", carry)

    def emit(self) -> None:
        code, b = self.code, self.code.b
        with code.loop(self.end, self.begin) as row:
            self._restore("state", row)
            b.store(row, b.gep(self.work, [row], source_etype=I64))
        changing = b.or_(self.has_lengths, self.has_resets)
        with code.loop(self.T) as step:
            last_first = b.sub(b.sub(self.T, code.number(1)), step)
            t = b.select(b.icmp_unsigned("!=", self.reverse, code.number(0)), last_first, step)
            self.memory.t = t
            b.store(b.sub(self.end, self.begin), self.count)
            with b.if_then(changing, likely=False):
                b.store(self._gather(t), self.count)
            count = b.load(self.count, typ=I64)
            with b.if_then(b.icmp_unsigned("!=", count, code.number(0)), likely=True):
                self._step(t, count)
                self._advance(count)
        with b.if_then(self.first), code.loop(self.end, self.begin) as row:
            for carry, width in enumerate(self.program.carries):
                code.copy(b.load(self.memory.old(carry, row), typ=POINTER), self._given("state", carry, row), width)
        b.ret_void()

    def _gather(self, t: ir.Value) -> ir.Value:
        """Lists the rows that are active at step t; gives their number. The others' outputs are zero."""
        code, b = self.code, self.code.b
        before = b.mul(t, self.B)
        with code.sums([code.number(0)], self.end, self.begin) as (row, (count,), following):
            length = b.select(self.has_lengths, b.gep(self.lengths, [row], source_etype=I64), self.whole)
            here = b.icmp_signed("<", t, b.load(length, typ=I64))
            b.store(row, b.gep(self.active, [count], source_etype=I64))
            with b.if_else(here, likely=True) as (then, otherwise):
                with then, b.if_then(self.has_resets):
                    flag = code.entry(self.resets, code.plus(before, row), I8)
                    with b.if_then(b.icmp_unsigned("!=", flag, ir.Constant(I8, 0)), likely=False):
                        self._restore("fresh", row)
                with otherwise, b.if_then(self.first):
                    for output, place in enumerate(self.program.outputs):
                        width = self.program.nodes[place].width
                        start = code.times(code.plus(before, row), width)
                        code.copy(None, code.at(self.memory.base("output", output), start), width)
            following.append(code.plus(count, b.zext(here, I64)))
        return following[0]

    def _step(self, t: ir.Value, count: ir.Value) -> None:
        for stage, function in zip(self.layout.stages, self.stages, strict=True):
            total = count if isinstance(stage, Chain) else self.code.number(stage.steps)
            self._stage(function, total, t, count)

    def _stage(self, function: ir.Function, total: ir.Value, t: ir.Value, count: ir.Value) -> None:
        code, b = self.code, self.code.b
        with b.if_else(self.divided, likely=False) as (divided, whole):
            with divided:
                number = code.plus(b.load(self.number, typ=I64), 1)
                b.store(number, self.number)
                own = [t, self.work, self.active, count, self.member, self.members, number]
                b.call(self.drive, [self.words.pointer, function, total, *own])
            with whole:
                b.call(function, [self.table, self.B, t, self.work, self.active, count, code.number(0), total])

    def _advance(self, count: ir.Value) -> None:
        """What was new is old now, in the rows that took part."""
        code, b = self.code, self.code.b
        homes = [self.memory.rows(View(place, True)) for place in self.program.new]
        with code.loop(count) as index:
            row = code.entry(self.active, index, I64)
            for carry, home in enumerate(homes):
                b.store(home(row), self.memory.old(carry, row))

    def _restore(self, name: str, row: ir.Value) -> None:
        for carry in self.carries:
            self.code.b.store(self._given(name, carry, row), self.memory.old(carry, row))

    def _given(self, name: str, carry: int, row: ir.Value) -> ir.Value:
        return self.code.at(self.memory.base(name, carry), self.code.times(row, self.program.carries[carry]))
