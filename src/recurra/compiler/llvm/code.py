"""A little language on top of llvmlite's builder: vectors of floats, loops, memory with and without tails.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
from llvmlite import ir

from recurra.compiler.llvm.target import Target

I64 = ir.IntType(64)
I32 = ir.IntType(32)
I8 = ir.IntType(8)
BIT = ir.IntType(1)
POINTER = ir.PointerType()
VOID = ir.VoidType()


class Floats:
    """The float type of a module, and vectors of it: as wide as the target's, or of so many ``lanes``."""

    def __init__(self, module: ir.Module, dtype: np.dtype[Any], target: Target, lanes: int | None = None) -> None:
        self.module, self.dtype, self.target = module, dtype, target
        self.double = dtype == np.float64
        self.scalar: ir.Type = ir.DoubleType() if self.double else ir.FloatType()
        self.bytes = dtype.itemsize
        self.lanes = target.vector_bytes // self.bytes if lanes is None else lanes
        self.registers = target.registers
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.integers = ir.VectorType(I64 if self.double else I32, self.lanes)
        self.bits = ir.VectorType(BIT, self.lanes)
        self._short = f"v{self.lanes}f{8 * self.bytes}"

    def splat(self, number: float) -> ir.Constant:
        # llvmlite prints a float exactly; rounding to the type is ours to do.
        rounded = float(number) if self.double else float(np.float32(number))
        return ir.Constant(self.vector, [rounded] * self.lanes)

    def integer(self, number: int) -> ir.Constant:
        return ir.Constant(self.integers, [number] * self.lanes)

    def tail(self, count: int) -> ir.Constant:
        """The mask of the first ``count`` lanes."""
        return ir.Constant(self.bits, [lane < count for lane in range(self.lanes)])

    def intrinsic(self, name: str, arity: int = 1) -> ir.Function:
        """``llvm.name`` on vectors."""
        return self.declared(f"llvm.{name}.{self._short}", ir.FunctionType(self.vector, [self.vector] * arity))

    def masked_load(self) -> ir.Function:
        kind = ir.FunctionType(self.vector, [POINTER, I32, self.bits, self.vector])
        return self.declared(f"llvm.masked.load.{self._short}.p0", kind)

    def gather(self) -> ir.Function:
        pointers = ir.VectorType(POINTER, self.lanes)
        kind = ir.FunctionType(self.vector, [pointers, I32, self.bits, self.vector])
        return self.declared(f"llvm.masked.gather.{self._short}.v{self.lanes}p0", kind)

    def table(self, numbers: Sequence[int]) -> ir.GlobalVariable:
        """Whole numbers in the module, and zeros, so that a vector can be read from each of them on."""
        padded = [*numbers, *[0] * self.lanes]
        kind = ir.ArrayType(I64, len(padded))
        made = ir.GlobalVariable(self.module, kind, self.module.get_unique_name("table"))
        made.linkage, made.global_constant, made.initializer = "internal", True, ir.Constant(kind, padded)
        return made

    def masked_store(self) -> ir.Function:
        kind = ir.FunctionType(VOID, [self.vector, POINTER, I32, self.bits])
        return self.declared(f"llvm.masked.store.{self._short}.p0", kind)

    def function(self, name: str, arguments: Sequence[ir.Type], result: ir.Type = VOID) -> ir.Function:
        """A new function that only this module calls."""
        made = ir.Function(self.module, ir.FunctionType(result, arguments), name)
        made.linkage = "internal"
        return made

    def declared(self, name: str, kind: ir.FunctionType) -> ir.Function:
        found = self.module.globals.get(name)
        return found if found is not None else ir.Function(self.module, kind, name)


class Code:
    """Instructions at the end of a function."""

    def __init__(self, floats: Floats, function: ir.Function) -> None:
        self.floats = floats
        self.b = ir.IRBuilder(function.append_basic_block("entry"))

    def of_lanes(self, lanes: int) -> Code:
        """The same place, with narrower vectors."""
        made = copy(self)
        made.floats = Floats(self.floats.module, self.floats.dtype, self.floats.target, lanes)
        return made

    # Whole numbers

    def number(self, value: int | ir.Value) -> ir.Value:
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def times(self, left: ir.Value, right: int | ir.Value) -> ir.Value:
        return self.b.mul(left, self.number(right))

    def plus(self, left: ir.Value, right: int | ir.Value) -> ir.Value:
        return self.b.add(left, self.number(right))

    def smaller(self, left: ir.Value, right: int | ir.Value) -> ir.Value:
        right = self.number(right)
        return self.b.select(self.b.icmp_unsigned("<", left, right), left, right)

    # Flow

    @contextmanager
    def loop(self, stop: int | ir.Value, start: int | ir.Value = 0) -> Iterator[ir.Value]:
        """The body, for each whole number from start to stop."""
        with self.sums([], stop, start) as (index, _, _):
            yield index

    @contextmanager
    def sums(
        self, first: Sequence[ir.Value], stop: int | ir.Value, start: int | ir.Value = 0
    ) -> Iterator[tuple[ir.Value, list[ir.Value], list[ir.Value]]]:
        """A loop that carries values. The body gets them, and puts the next ones in the empty list it gets.

        After the loop that list has the last ones.
        """
        b = self.b
        before = b.block
        head, body, end = (b.append_basic_block(name) for name in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(self.number(start), before)
        carried = [b.phi(value.type) for value in first]
        for phi, value in zip(carried, first, strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_unsigned("<", index, self.number(stop)), body, end)
        b.position_at_end(body)
        following: list[ir.Value] = []
        yield index, list(carried), following
        index.add_incoming(b.add(index, ir.Constant(I64, 1)), b.block)
        for phi, value in zip(carried, following, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(end)
        following[:] = carried

    @contextmanager
    def tickets(self, draw: Callable[[], ir.Value], stop: ir.Value) -> Iterator[ir.Value]:
        """The body, for each ticket that is drawn, until one is not below stop."""
        b = self.b
        head, body, end = (b.append_basic_block(name) for name in ("draw", "work", "sold_out"))
        b.branch(head)
        b.position_at_end(head)
        ticket = draw()
        b.cbranch(b.icmp_unsigned("<", ticket, stop), body, end)
        b.position_at_end(body)
        yield ticket
        b.branch(head)
        b.position_at_end(end)

    # Memory, counted in floats

    def at(self, base: ir.Value, offset: int | ir.Value) -> ir.Value:
        return self.b.gep(base, [self.number(offset)], source_etype=self.floats.scalar)

    def entry(self, table: ir.Value, index: int | ir.Value, kind: ir.Type = POINTER) -> ir.Value:
        """Entry ``index`` of a table of pointers or of whole numbers."""
        return self.b.load(self.b.gep(table, [self.number(index)], source_etype=kind), typ=kind)

    def load(self, pointer: ir.Value, mask: ir.Value | None = None) -> ir.Value:
        """A vector; lanes outside the mask are not read and are zero."""
        f = self.floats
        if mask is None:
            return self.b.load(pointer, typ=f.vector, align=f.bytes)
        return self.b.call(f.masked_load(), [pointer, ir.Constant(I32, f.bytes), mask, f.splat(0.0)])

    def store(self, value: ir.Value, pointer: ir.Value, mask: ir.Value | None = None) -> None:
        """A vector; lanes outside the mask are not written."""
        f = self.floats
        if mask is None:
            self.b.store(value, pointer, align=f.bytes)
        else:
            self.b.call(f.masked_store(), [value, pointer, ir.Constant(I32, f.bytes), mask])

    def first_lanes(self, count: ir.Value) -> ir.Value:
        """The mask of the first ``count`` lanes, which is known when it runs."""
        lanes = self.floats.lanes
        words = ir.VectorType(I32, lanes)
        first = self.b.insert_element(ir.Constant(words, ir.Undefined), self.b.trunc(count, I32), ir.Constant(I32, 0))
        same = self.b.shuffle_vector(first, first, ir.Constant(words, [0] * lanes))
        return self.b.icmp_unsigned("<", ir.Constant(words, [*range(lanes)]), same)

    def gather(self, base: ir.Value, places: Sequence[int], offset: ir.Value, mask: ir.Value | None = None) -> ir.Value:
        """The numbers at ``places`` from ``base``, a vector of them from ``offset`` on."""
        b, f = self.b, self.floats
        words = ir.VectorType(I64, f.lanes)
        places_here = b.load(b.gep(f.table(places), [offset], source_etype=I64), typ=words, align=8)
        start = self.b.ptrtoint(base, I64)
        first = b.insert_element(ir.Constant(words, ir.Undefined), start, ir.Constant(I32, 0))
        same = b.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, f.lanes), [0] * f.lanes))
        bytes_ = b.mul(places_here, ir.Constant(words, [f.bytes] * f.lanes))
        pointers = b.inttoptr(b.add(same, bytes_), ir.VectorType(POINTER, f.lanes))
        mask = f.tail(f.lanes) if mask is None else mask
        return b.call(f.gather(), [pointers, ir.Constant(I32, f.bytes), mask, f.splat(0.0)])

    def load_splat(self, pointer: ir.Value) -> ir.Value:
        """One number in all lanes."""
        return self.spread(self.b.load(pointer, typ=self.floats.scalar, align=self.floats.bytes))

    def spread(self, number: ir.Value) -> ir.Value:
        f = self.floats
        empty = ir.Constant(f.vector, ir.Undefined)
        first = self.b.insert_element(empty, number, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, empty, ir.Constant(ir.VectorType(I32, f.lanes), [0] * f.lanes))

    def store_first(self, value: ir.Value, pointer: ir.Value) -> ir.Value:
        """Lane 0 alone. Gives it."""
        number = self.b.extract_element(value, ir.Constant(I32, 0))
        self.b.store(number, pointer, align=self.floats.bytes)
        return number

    def prefetch(self, pointer: ir.Value, to_write: bool = False) -> None:
        """Asks for memory that is read soon, or written. It need not exist."""
        kind = ir.FunctionType(VOID, [POINTER, I32, I32, I32])
        words = [ir.Constant(I32, number) for number in (int(to_write), 3, 1)]
        self.b.call(self.floats.declared("llvm.prefetch.p0", kind), [pointer, *words])

    def copy(self, source: ir.Value | None, target: ir.Value, width: int) -> None:
        """``width`` numbers from source to target; zeros without a source."""
        lanes = self.floats.lanes

        def move(offset: int | ir.Value, mask: ir.Value | None) -> None:
            value = self.floats.splat(0.0) if source is None else self.load(self.at(source, offset), mask)
            self.store(value, self.at(target, offset), mask)

        if width >= lanes:
            with self.loop(width // lanes) as index:
                move(self.times(index, lanes), None)
        if width % lanes:
            move(width - width % lanes, self.floats.tail(width % lanes))

    # Arithmetic

    def fma(self, left: ir.Value, right: ir.Value, more: ir.Value) -> ir.Value:
        """left * right + more, in one rounding where the machine can."""
        return self.b.call(self.floats.intrinsic("fmuladd", 3), [left, right, more])
