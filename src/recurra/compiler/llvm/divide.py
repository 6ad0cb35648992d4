"""Threads that work on one call together: who takes part, who takes which rows, and where they wait.

The words of a call are 64-bit whole numbers: a header that the caller writes, counters that begin at zero, the table
of ``Layout.entries``, and claims, which begin at zero.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import llvmlite.binding as binding
from llvmlite import ir

from recurra.compiler.llvm.code import I32, I64, POINTER, VOID, Code, Floats
from recurra.compiler.llvm.layout import Layout

# units: pieces of packing, 0 if the panels are packed. parts: ranges of rows; 0: all threads take all rows, and divide
# the features. members: how many threads may then take part. give_way: the address of a function that lets others run.
HEADER = ("T", "B", "reverse", "units", "parts", "members", "give_way")
# A counter has a cache line of its own.
COUNTERS = ("begun", "packed", "taken", "arrived", "done")
LINE = 8
TABLE = LINE * (1 + len(COUNTERS))
# How many times a thread looks whether all is done before it does what others have left.
PATIENCE = 64


class Words:
    """The words of a call, read by generated code."""

    def __init__(self, code: Code, pointer: ir.Value) -> None:
        self.code, self.pointer = code, pointer

    def header(self, name: str) -> ir.Value:
        return self.code.entry(self.pointer, HEADER.index(name), I64)

    def counter(self, name: str) -> ir.Value:
        return self._at(LINE * (1 + COUNTERS.index(name)))

    def table(self) -> ir.Value:
        return self._at(TABLE)

    def add(self, name: str, ordering: str = "acq_rel") -> ir.Value:
        """Counts one more. Gives the number before."""
        return self.code.b.atomic_rmw("add", self.counter(name), self.code.number(1), ordering)

    def value(self, name: str) -> ir.Value:
        return self.code.b.load_atomic(self.counter(name), "acquire", 8, typ=I64)

    def wait(self, name: str, least: ir.Value, patience: int = 0) -> None:
        """Until a counter is ``least`` or more, or has been looked at ``patience`` times, if that is not 0."""
        function = _wait(self.code.floats)
        give_way = self.header("give_way")
        self.code.b.call(function, [self.counter(name), least, self.code.number(patience), give_way])

    def _at(self, word: int) -> ir.Value:
        return self.code.b.gep(self.pointer, [self.code.number(word)], source_etype=I64)


def onward(code: Code, table: ir.Value, B: ir.Value) -> ir.Value:
    """How many rows it is from those of this step to those of the next one."""
    reverse = code.entry(table, HEADER.index("reverse") - TABLE, I64)
    return code.b.select(code.b.icmp_unsigned("!=", reverse, code.number(0)), code.b.neg(B), B)


def drive_function(floats: Floats, layout: Layout, stage: ir.FunctionType) -> ir.Function:
    """``f(words, stage, total, t, work, active, count, member, members, number)``: a stage, divided into pieces.

    ``stage(table, B, t, work, active, count, begin, end)`` is called for pieces of 0 to ``total``, one for each
    member; it is the call's stage ``number``, counted from 1. Every thread that does this returns when all pieces are
    done. A piece whose own thread has not come, because the machine gave it to somebody else or there never was one,
    is done by another: nobody waits for a thread that holds no piece.
    """
    kinds = [POINTER, stage.as_pointer(), I64, I64, POINTER, POINTER, I64, I64, I64, I64]
    function = floats.function("drive", kinds)
    function.attributes.add("noinline")
    code = Code(floats, function)
    b = code.b
    pointer, run, total, t, work, active, count, member, members, number = function.args
    words = Words(code, pointer)
    table, B = words.table(), words.header("B")
    claims = b.gep(table, [code.number(claims_at(layout))], source_etype=I64)
    goal = b.mul(number, members)

    def attempt(piece: ir.Value) -> None:
        claim = b.gep(claims, [code.times(piece, LINE)], source_etype=I64)
        before = b.sub(number, code.number(1))
        won = b.extract_value(b.cmpxchg(claim, before, number, "acq_rel", "monotonic"), 1)
        with b.if_then(won):
            begin, end = (b.udiv(b.mul(each, total), members) for each in (piece, code.plus(piece, 1)))
            b.call(run, [table, B, t, work, active, count, begin, end])
            words.add("done")

    attempt(member)
    look, help_out, leave = (b.append_basic_block(name) for name in ("look", "help", "leave"))
    b.branch(look)
    b.position_at_end(look)
    words.wait("done", goal, PATIENCE)
    b.cbranch(b.icmp_unsigned("<", words.value("done"), goal), help_out, leave)
    b.position_at_end(help_out)
    with code.loop(members) as piece:
        attempt(piece)
    words.wait("done", goal, 1024)
    b.branch(look)
    b.position_at_end(leave)
    b.ret_void()
    return function


def claims_at(layout: Layout) -> int:
    """Where the claims begin, in words from the table: a line for each member, the last stage it was claimed for."""
    return -(-len(layout.entries) // LINE) * LINE


def _wait(floats: Floats) -> ir.Function:
    found = floats.module.globals.get("wait")
    if found is not None:
        return found
    function = floats.function("wait", [POINTER, I64, I64, I64])
    code = Code(floats, function)
    b = code.b
    counter, least, patience, give_way = function.args
    look, enough, rest, yielding, done = (
        b.append_basic_block(name) for name in ("look", "enough", "rest", "give_way", "done")
    )
    entry = b.block
    b.branch(look)
    b.position_at_end(look)
    looks = b.phi(I64)
    value = b.load_atomic(counter, "acquire", 8, typ=I64)
    next_look = code.plus(looks, 1)
    b.cbranch(b.icmp_unsigned("<", value, least), enough, done)
    b.position_at_end(enough)
    b.cbranch(b.icmp_unsigned("==", next_look, patience), done, rest)
    b.position_at_end(rest)
    _pause(code)
    # Where there are more threads than cores, what is waited for may need this one.
    often = b.icmp_unsigned("==", b.and_(next_look, code.number(1023)), code.number(0))
    able = b.icmp_unsigned("!=", give_way, code.number(0))
    b.cbranch(b.and_(often, able), yielding, look)
    b.position_at_end(yielding)
    b.call(b.inttoptr(give_way, ir.FunctionType(VOID, []).as_pointer()), [])
    b.branch(look)
    looks.add_incoming(code.number(0), entry)
    looks.add_incoming(next_look, rest)
    looks.add_incoming(next_look, yielding)
    b.position_at_end(done)
    b.ret_void()
    return function


def bound_function(floats: Floats) -> ir.Function:
    """``f(lengths, T, B, part, parts)``: the first row of a part, so that each has nearly as many steps.

    ``lengths`` may be null: all rows take T steps.
    """
    function = floats.function("bound", [POINTER, I64, I64, I64, I64], I64)
    code = Code(floats, function)
    b = code.b
    lengths, T, B, part, parts = function.args
    given = b.icmp_unsigned("!=", lengths, ir.Constant(POINTER, None))
    whole = b.alloca(I64)
    b.store(T, whole)

    def cost(row: ir.Value) -> ir.Value:
        own = b.gep(lengths, [row], source_etype=I64)
        # A row costs a little even where it has no step.
        return code.plus(code.times(b.load(b.select(given, own, whole), typ=I64), 2), 1)

    with code.sums([code.number(0)], B) as (row, (total,), following):
        following.append(b.add(total, cost(row)))
    wanted = b.udiv(b.mul(following[0], part), parts)
    with code.sums([code.number(0), code.number(0)], B) as (row, (before, count), following):
        own = cost(row)
        middle = b.add(before, b.udiv(own, code.number(2)))
        lower = b.icmp_unsigned("<", middle, wanted)
        following += [b.add(before, own), b.add(count, b.zext(lower, I64))]
    b.ret(following[1])
    return function


def _pause(code: Code) -> None:
    """Tells the core that this is a loop that waits."""
    machine = binding.get_default_triple().partition("-")[0]
    if machine == "x86_64":
        code.b.call(code.floats.declared("llvm.x86.sse2.pause", ir.FunctionType(VOID, [])), [])
    elif machine in ("aarch64", "arm64"):
        hint = code.floats.declared("llvm.aarch64.hint", ir.FunctionType(VOID, [I32]))
        code.b.call(hint, [ir.Constant(I32, 1)])
