"""A region as one native function: products on register tiles, and the pointwise arithmetic right behind them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Mapping

from llvmlite import ir

from recurra.compiler.llvm.body import Body
from recurra.compiler.llvm.code import I64, POINTER
from recurra.compiler.llvm.layout import Group
from recurra.compiler.llvm.product import product
from recurra.compiler.regions import View


class Swept(Body):
    """A sweep that is no chain's, and not in stretches. Pieces are its steps."""

    def emit(self, begin: ir.Value, end: ir.Value) -> None:
        code = self.code
        self.memory.find_partials(self.region.reductions)
        if self.sweep.groups:
            self._products(begin, end)
        elif self.region.stores:
            with code.loop(self.count) as index:
                row = self.row(index)
                with code.loop(end, begin) as step:
                    self._row_of_step(step, row, index, [])
        code.b.ret_void()

    def _vectors(self, step: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The first vector of a step, and how many it has."""
        code, sweep = self.code, self.sweep
        first = code.times(step, sweep.stride)
        return first, code.smaller(code.b.sub(code.number(sweep.vectors), first), sweep.stride)

    def _row_of_step(self, step: ir.Value, row: ir.Value, index: ir.Value, buffers: list[ir.Value]) -> None:
        """All vectors of a step in one row, the one of number ``index`` in the tiles in ``buffers``."""
        code = self.code
        # Each step has its own partial results, so that the sum does not depend on who takes which steps.
        offset = code.times(step, self.floats.lanes)
        partials = [code.at(self.memory.partial(place, row), offset) for place in self.region.reductions]
        pointers = {view: rows(row) for view, rows in self.views.items()}
        first, vectors = self._vectors(step)
        rest = self.region.width % self.floats.lanes
        whole = code.smaller(code.b.sub(code.number(self.sweep.vectors - bool(rest)), first), self.sweep.stride)

        def body(vector: ir.Value, sums: list[ir.Value], mask: ir.Value | None) -> list[ir.Value]:
            tiled = self._tiled(buffers, index, vector, vectors)
            return self._lanes(code.times(code.plus(first, vector), self.floats.lanes), pointers, tiled, sums, mask)

        sums = [self.neutral(place) for place in self.region.reductions]
        if self.sweep.vectors > bool(rest):
            with code.sums(sums, whole) as (vector, carried, following):
                following += body(vector, carried, None)
            sums = following
        for total, partial in zip(sums, partials, strict=True):
            code.store(total, partial)
        if rest:
            with code.b.if_then(code.b.icmp_unsigned("<", whole, vectors), likely=False):
                sums = body(whole, [code.load(partial) for partial in partials], self.floats.tail(rest))
                for total, partial in zip(sums, partials, strict=True):
                    code.store(total, partial)

    # Products

    def _products(self, begin: ir.Value, end: ir.Value) -> None:
        code, sweep, lanes = self.code, self.sweep, self.floats.lanes
        rows_of = [self.memory.rows(group.source) for group in sweep.groups]
        panels = [code.at(self.memory.base("panels"), group.offset) for group in sweep.groups]
        buffers, sources = [], []
        for group in sweep.groups:
            size = len(group.products) * sweep.stride * sweep.rows
            buffer = code.b.alloca(self.floats.vector, size)
            buffer.align = lanes * self.floats.bytes
            buffers.append(buffer)
            sources.append(code.b.alloca(POINTER, sweep.rows))
        # Tiles of nearly equal height: 8 rows are 4 and 4, not 6 and 2.
        tiles = code.b.udiv(code.plus(self.count, sweep.rows - 1), code.number(sweep.rows))
        height = code.b.udiv(self.count, tiles)
        higher = code.b.urem(self.count, tiles, name="higher")
        with code.loop(end, begin) as step:
            _, vectors = self._vectors(step)
            with code.sums([code.number(0)], tiles) as (tile, (top,), following):
                rows = code.plus(height, code.b.zext(code.b.icmp_unsigned("<", tile, higher), I64))
                with code.loop(rows) as index:
                    row = self.row(code.plus(top, index))
                    for found, source in zip(rows_of, sources, strict=True):
                        code.b.store(found(row), code.b.gep(source, [index], source_etype=POINTER))
                for group, panel, source, buffer in zip(sweep.groups, panels, sources, buffers, strict=True):
                    offset = code.times(step, group.length * len(group.products) * sweep.stride * lanes)
                    self._call(
                        group, vectors, [code.at(panel, offset), source, rows, code.number(group.length), buffer]
                    )
                with code.loop(rows) as index:
                    self._row_of_step(step, self.row(code.plus(top, index)), index, buffers)
                following.append(code.plus(top, rows))

    def _call(self, group: Group, vectors: ir.Value, arguments: list[ir.Value]) -> None:
        """The product with as many columns as this step has."""
        b, sweep = self.code.b, self.sweep
        whole = product(self.floats, len(group.products) * sweep.stride, sweep.rows)
        rest = sweep.vectors % sweep.stride
        if not rest:
            b.call(whole, arguments)
            return
        partial = product(self.floats, len(group.products) * rest, sweep.rows)
        with b.if_else(b.icmp_unsigned("==", vectors, self.code.number(sweep.stride))) as (then, otherwise):
            with then:
                b.call(whole, arguments)
            with otherwise:
                b.call(partial, arguments)

    def _tiled(
        self, buffers: list[ir.Value], index: ir.Value, vector: ir.Value, vectors: ir.Value
    ) -> dict[int, ir.Value]:
        """Where the tiles have each product, for row ``index`` of the tile and one vector of the step."""
        code, found = self.code, {}
        for group, buffer in zip(self.sweep.groups, buffers, strict=True):
            row = code.b.mul(index, code.times(vectors, len(group.products)))
            for column, place in enumerate(group.products):
                at = code.plus(code.plus(row, code.times(vectors, column)), vector)
                found[place] = code.at(buffer, code.times(at, self.floats.lanes))
        return found

    # One vector of features of one row

    def _lanes(
        self,
        offset: ir.Value,
        pointers: Mapping[View, ir.Value],
        tiled: Mapping[int, ir.Value],
        sums: list[ir.Value],
        mask: ir.Value | None,
    ) -> list[ir.Value]:
        """Gives the sums, and this vector."""
        code = self.code
        given = {place: code.load(pointer) for place, pointer in tiled.items()}
        operand = self.values(given, lambda view, kind: self._read(view, pointers, offset, mask))
        pairs = zip(self.region.reductions, sums, strict=True)
        found = [self.reduced(place, operand, so_far, mask) for place, so_far in pairs]
        self.keep(operand, lambda view: code.at(pointers[view], offset), mask)
        return found

    def _read(self, view: View, pointers: Mapping[View, ir.Value], offset: ir.Value, mask: ir.Value | None) -> ir.Value:
        code, pointer = self.code, pointers[view]
        if view.splat:
            return code.load_splat(pointer)
        if view.features:
            return code.gather(pointer, view.features, offset, mask)
        pointer = code.at(pointer, offset)
        self.foresee(view, pointer)
        return code.load(pointer, mask)
