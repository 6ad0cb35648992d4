"""Native calls one after the other as one: between two of them, Python would cost more than a small one takes.

Legend: D any feature.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir

from recurra.compiler.llvm.code import I8, I64, POINTER, VOID, Code, Floats
from recurra.compiler.llvm.divide import LINE
from recurra.compiler.llvm.target import Engine, host
from recurra.compiler.llvm.team import openmp

# What a section begins with: how many calls it has, how many times they are made, how many words move in between. Of a
# call: the address of a function, that of its words, and how many threads call it. Of a move: which word, what of it is
# kept (as bits), and what is added.
SECTION = CALL = MOVE = 3
# The words of a copy: from where, to where, how many bytes, in how many parts, and which of them has been drawn, in a
# cache line of its own; and of zeros: where, how many bytes.
COPY, DRAWN, ZEROS = 2 * LINE, LINE, 2
I32 = ir.IntType(32)


class Calls:
    """The native code. ``run`` takes the address of words: how many sections there are, what starts a team, where each
    section begins, and the sections: their calls, then their moves."""

    def __init__(self) -> None:
        module = ir.Module("recurra")
        floats = Floats(module, np.dtype(np.float32), host())
        _run(floats)
        _copy(floats)
        _zeros(floats)
        self._engine = Engine(str(module), host())
        self.run: Callable[[int], None] = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._engine.address("sequence"))
        self.copy, self.zeros = (self._engine.address(name) for name in ("copy", "zeros"))


@cache
def calls() -> Calls:
    """The native code for this machine, made at first use."""
    return Calls()


@cache
def team() -> int:
    """The address of what starts a team of PyTorch's threads; 0 where there is none."""
    library = openmp()
    return 0 if library is None else ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0


def _run(floats: Floats) -> None:
    function = ir.Function(floats.module, ir.FunctionType(VOID, [POINTER]), "sequence")
    code = Code(floats, function)
    b, words = code.b, function.args[0]
    sections, start = (code.entry(words, each, I64) for each in range(2))
    alone = ir.FunctionType(VOID, [POINTER]).as_pointer()
    together = ir.FunctionType(VOID, [I64, POINTER, I32, I32]).as_pointer()
    with code.loop(sections) as section:
        begin = code.entry(words, code.plus(section, 2), I64)
        count, times, moves = (code.entry(words, code.plus(begin, each), I64) for each in range(3))
        first = code.plus(begin, SECTION)
        last = code.plus(first, code.times(count, CALL))
        with code.loop(times):
            with code.loop(count) as index:
                place = code.plus(first, code.times(index, CALL))
                address, members = (code.entry(words, code.plus(place, each), I64) for each in (0, 2))
                argument = code.entry(words, code.plus(place, 1))
                with b.if_else(b.icmp_unsigned("==", members, code.number(1))) as (one, many):
                    with one:
                        b.call(b.inttoptr(address, alone), [argument])
                    with many:
                        share, nothing = b.trunc(members, I32), ir.Constant(I32, 0)
                        b.call(b.inttoptr(start, together), [address, argument, share, nothing])
            with code.loop(moves) as index:
                place = code.plus(last, code.times(index, MOVE))
                word, mask, more = (code.entry(words, code.plus(place, each), I64) for each in range(3))
                target = b.gep(words, [word], source_etype=I64)
                b.store(b.add(b.and_(b.load(target, typ=I64), mask), more), target)
    b.ret_void()


def _copy(floats: Floats) -> None:
    function = ir.Function(floats.module, ir.FunctionType(VOID, [POINTER]), "copy")
    code = Code(floats, function)
    b, words, no = code.b, function.args[0], ir.Constant(ir.IntType(1), 0)
    kind = ir.FunctionType(VOID, [POINTER, POINTER, I64, ir.IntType(1)])
    move = floats.declared("llvm.memcpy.p0.p0.i64", kind)
    source, target = (code.entry(words, each) for each in range(2))
    size, parts = (code.entry(words, each, I64) for each in (2, 3))
    drawn = b.gep(words, [code.number(DRAWN)], source_etype=I64)
    with code.tickets(lambda: b.atomic_rmw("add", drawn, code.number(1), "monotonic"), parts) as part:
        begin, end = (b.udiv(b.mul(each, size), parts) for each in (part, code.plus(part, 1)))
        here, there = (b.gep(each, [begin], source_etype=I8) for each in (source, target))
        b.call(move, [there, here, b.sub(end, begin), no])
    b.ret_void()


def _zeros(floats: Floats) -> None:
    function = ir.Function(floats.module, ir.FunctionType(VOID, [POINTER]), "zeros")
    code = Code(floats, function)
    words, no = function.args[0], ir.Constant(ir.IntType(1), 0)
    kind = ir.FunctionType(VOID, [POINTER, I8, I64, ir.IntType(1)])
    fill = floats.declared("llvm.memset.p0.i64", kind)
    code.b.call(fill, [code.entry(words, 0), ir.Constant(I8, 0), code.entry(words, 1, I64), no])
    code.b.ret_void()
