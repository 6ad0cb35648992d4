"""A region as one native function: products on register tiles, and the pointwise arithmetic right behind them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llvmlite import ir

from recurra.compiler.ir import COMPARISONS, Kind, Node, Op
from recurra.compiler.llvm import maths
from recurra.compiler.llvm.code import I32, I64, POINTER, Code, Floats
from recurra.compiler.llvm.layout import Group, Layout, Sweep
from recurra.compiler.llvm.product import product
from recurra.compiler.regions import View


def sweep_function(floats: Floats, layout: Layout, sweep: Sweep, name: str) -> ir.Function:
    """``f(table, B, t, active, count)``: the region at step t, for the rows that ``active`` lists."""
    function = floats.function(name, [POINTER, I64, I64, POINTER, I64])
    _Sweep(Code(floats, function), layout, sweep, function).emit()
    return function


class Memory:
    """Pointers to the rows of arrays, at one step. Bases are read from the table once, at the start."""

    def __init__(self, code: Code, layout: Layout, table: ir.Value, B: ir.Value) -> None:
        self.code, self.layout, self.B, self.table = code, layout, B, table
        self._bases: dict[tuple[str, int], ir.Value] = {}

    def base(self, kind: str, index: int) -> ir.Value:
        key = (kind, index)
        if key not in self._bases:
            if key in self.layout.slots:
                offset = self.code.times(self.B, self.layout.slots[key][0])
                self._bases[key] = self.code.at(self.base("scratch", 0), offset)
            else:
                self._bases[key] = self.code.entry(self.table, self.layout.entries[key])
        return self._bases[key]

    def array(self, view: View) -> tuple[str, int, int, bool]:
        """Kind, index and row stride of the array behind a view, and whether it has a slice for each step."""
        program = self.layout.program
        node = program.nodes[view.place]
        if view.home:
            if view.place in program.outputs:
                return "output", program.outputs.index(view.place), node.width, True
            return "home", view.place, self.layout.slots["home", view.place][1], False
        if node.op is Op.CARRY:
            return "old", node.index, self.layout.slots["old", node.index][1], False
        if node.op is Op.VECTOR:
            return "vector", node.index, 0, False
        return node.op.value, node.index, node.width, node.op is Op.INPUT

    def start(self, view: View, step: ir.Value) -> tuple[ir.Value, int]:
        """The pointer to row 0 of a view at the step whose rows begin at ``step`` = t B, and the row stride."""
        kind, index, stride, timed = self.array(view)
        base = self.base(kind, index)
        if timed:
            base = self.code.at(base, self.code.times(step, stride))
        return (self.code.at(base, view.start) if view.start else base), stride


@dataclass(frozen=True)
class Pointers:
    """Where one row has what the body reads and writes."""

    views: Mapping[View, ir.Value]
    partials: Mapping[int, ir.Value]


class _Sweep:
    def __init__(self, code: Code, layout: Layout, sweep: Sweep, function: ir.Function) -> None:
        self.code, self.floats, self.layout, self.sweep = code, code.floats, layout, sweep
        self.region, self.plan, self.nodes = sweep.region, layout.plan, layout.program.nodes
        table, B, t, self.active, self.count = function.args
        self.memory = Memory(code, layout, table, B)
        self.step = code.times(t, B)
        self.here = {*self.region.products, *self.region.pointwise}
        self.starts = {view: self.memory.start(view, self.step) for view in self._views()}
        self.finals = {place: self.memory.start(View(place, True), self.step) for place in self.region.reductions}
        self.partials = {place: self.memory.base("partial", place) for place in self.region.reductions}

    def emit(self) -> None:
        code, sweep = self.code, self.sweep
        for place in self.region.reductions:
            with code.loop(self.count) as row:
                code.store(self.floats.splat(_NEUTRAL[self.nodes[place].op]), self._partial(place, self._row(row)))
        if sweep.groups:
            self._products()
        elif self.region.stores or self.region.reductions:
            with code.loop(self.count) as index:
                pointers = self._pointers(self._row(index))
                with code.loop(sweep.vectors) as vector:
                    self._body(vector, pointers, {})
        for place in self.region.reductions:
            with code.loop(self.count) as index:
                self._finish(place, self._row(index))
        code.b.ret_void()

    # Rows and views

    def _row(self, index: ir.Value) -> ir.Value:
        return self.code.entry(self.active, index, I64)

    def _views(self) -> list[View]:
        """Everything that the body reads or writes row by row."""
        args = [arg for place in self.region.pointwise for arg in self.nodes[place].args]
        args += [arg for place in self.region.reductions for arg in self.nodes[place].args]
        args += [store.value for store in self.region.stores]
        views = [self.plan.view(arg) for arg in args if arg not in self.here]
        views = [view for view in views if view.home or self.nodes[view.place].op is not Op.CONST]
        views += [View(store.home, True, store.start) for store in self.region.stores]
        return list(dict.fromkeys(views))

    def _pointers(self, row: ir.Value) -> Pointers:
        code = self.code
        views = {
            view: code.at(start, code.times(row, stride)) if stride else start
            for view, (start, stride) in self.starts.items()
        }
        return Pointers(views, {place: self._partial(place, row) for place in self.region.reductions})

    def _partial(self, place: int, row: ir.Value) -> ir.Value:
        stride = self.layout.slots["partial", place][1]
        return self.code.at(self.partials[place], self.code.times(row, stride))

    # Products

    def _products(self) -> None:
        code, sweep, lanes = self.code, self.sweep, self.floats.lanes
        sources = [self.memory.start(group.source, self.step) for group in sweep.groups]
        panels = [self.memory.base("panel", self.layout.groups.index(group)) for group in sweep.groups]
        buffers = []
        for group in sweep.groups:
            size = len(group.products) * sweep.stride * sweep.rows
            buffer = code.b.alloca(self.floats.vector, size)
            buffer.align = lanes * self.floats.bytes
            buffers.append(buffer)
        # Tiles of nearly equal height: 8 rows are 4 and 4, not 6 and 2.
        tiles = code.b.udiv(code.plus(self.count, sweep.rows - 1), code.number(sweep.rows))
        height = code.b.udiv(self.count, tiles)
        higher = code.b.urem(self.count, tiles, name="higher")
        with code.loop(-(-sweep.vectors // sweep.stride)) as step:
            first = code.times(step, sweep.stride)
            vectors = code.smaller(code.b.sub(code.number(sweep.vectors), first), sweep.stride)
            with code.sums([code.number(0)], tiles) as (tile, (begin,), following):
                extra = code.b.zext(code.b.icmp_unsigned("<", tile, higher), I64)
                rows = code.plus(height, extra)
                chosen = code.b.gep(self.active, [begin], source_etype=I64)
                for group, (source, stride), panel, buffer in zip(sweep.groups, sources, panels, buffers, strict=True):
                    offset = code.times(step, group.length * len(group.products) * sweep.stride * lanes)
                    arguments = [code.at(panel, offset), source, code.number(stride), chosen, rows]
                    self._call(group, vectors, [*arguments, code.number(group.length), buffer])
                with code.loop(rows) as index:
                    pointers = self._pointers(self._row(code.plus(begin, index)))
                    with code.loop(vectors) as vector:
                        tiled = self._tiled(buffers, index, vector, vectors)
                        self._body(code.plus(first, vector), pointers, tiled)
                following.append(code.plus(begin, rows))

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

    def _body(self, vector: ir.Value, pointers: Pointers, tiled: Mapping[int, ir.Value]) -> None:
        code, vectors = self.code, self.sweep.vectors
        rest = self.region.width % self.floats.lanes
        offset = code.times(vector, self.floats.lanes)
        if not rest or vectors == 1:
            self._lanes(offset, pointers, tiled, self.floats.tail(rest) if rest else None)
            return
        last = code.b.icmp_unsigned("==", vector, code.number(vectors - 1))
        with code.b.if_else(last, likely=False) as (then, otherwise):
            with then:
                self._lanes(offset, pointers, tiled, self.floats.tail(rest))
            with otherwise:
                self._lanes(offset, pointers, tiled, None)

    def _lanes(
        self,
        offset: ir.Value,
        pointers: Pointers,
        tiled: Mapping[int, ir.Value],
        mask: ir.Value | None,
    ) -> None:
        code, b = self.code, self.code.b
        values = {place: code.load(pointer) for place, pointer in tiled.items()}
        read: dict[tuple[View, Kind], ir.Value] = {}

        def operand(place: int) -> ir.Value:
            if place in self.here:
                return values[place]
            view, kind = self.plan.view(place), self.nodes[place].kind
            if (view, kind) not in read:
                read[view, kind] = self._read(view, kind, pointers, offset, mask)
            return read[view, kind]

        for place in self.region.pointwise:
            node = self.nodes[place]
            values[place] = pointwise(code, node, [operand(arg) for arg in node.args])
        for place in self.region.reductions:
            node = self.nodes[place]
            value = operand(node.args[0])
            if mask is not None:
                value = b.select(mask, value, self.floats.splat(_NEUTRAL[node.op]))
            kept = pointers.partials[place]
            code.store(_REDUCE[node.op](code, code.load(kept), value), kept)
        for store in self.region.stores:
            value = operand(store.value)
            if self.nodes[store.value].kind is Kind.BOOL:
                value = b.select(value, self.floats.splat(1.0), self.floats.splat(0.0))
            code.store(value, code.at(pointers.views[View(store.home, True, store.start)], offset), mask)

    def _read(self, view: View, kind: Kind, pointers: Pointers, offset: ir.Value, mask: ir.Value | None) -> ir.Value:
        code, node = self.code, self.nodes[view.place]
        if node.op is Op.CONST and not view.home:
            return self.floats.splat(node.number)
        if view.splat:
            value = code.load_splat(pointers.views[view])
        else:
            value = code.load(code.at(pointers.views[view], offset), mask)
            if node.op is Op.INPUT and not view.home and self.sweep.groups:
                # A tile reads a few features of many rows, too many streams for the machine to foresee.
                code.prefetch(code.at(pointers.views[view], code.plus(offset, self.floats.lanes * self.sweep.stride)))
        return code.b.fcmp_unordered("!=", value, self.floats.splat(0.0)) if kind is Kind.BOOL else value

    def _finish(self, place: int, row: ir.Value) -> None:
        """One number from the partial ones of each lane."""
        code, node = self.code, self.nodes[place]
        value = code.load(self._partial(place, row))
        lanes = self.floats.lanes
        half = lanes // 2
        while half:
            order = [(lane + half) % lanes for lane in range(lanes)]
            order = ir.Constant(ir.VectorType(I32, lanes), order)
            value = _REDUCE[node.op](code, value, code.b.shuffle_vector(value, value, order))
            half //= 2
        start, stride = self.finals[place]
        code.store_first(value, code.at(start, code.times(row, stride)))


def pointwise(code: Code, node: Node, args: list[ir.Value]) -> ir.Value:
    """One operation on whole vectors."""
    b, op = code.b, node.op
    if op in COMPARISONS:
        if op is Op.NE:
            return b.fcmp_unordered("!=", *args)
        return b.fcmp_ordered(_COMPARE[op], *args)
    if op in _SIMPLE:
        return _SIMPLE[op](code, *args)
    if op is Op.POW:
        return maths.power(code, args[0], node.number)
    return maths.call(code, op.value, args[0])


def _extreme(code: Code, sign: str, left: ir.Value, right: ir.Value) -> ir.Value:
    # The comparison with NaN is false and gives right: that is NaN if right is; left has to be asked.
    b = code.b
    chosen = b.select(b.fcmp_ordered(sign, left, right), left, right)
    return b.select(b.fcmp_unordered("uno", left, left), left, chosen)


def _maximum(code: Code, left: ir.Value, right: ir.Value) -> ir.Value:
    return _extreme(code, ">", left, right)


_COMPARE = {Op.LT: "<", Op.LE: "<=", Op.GT: ">", Op.GE: ">=", Op.EQ: "=="}
_NEUTRAL = {Op.SUM: 0.0, Op.MAX: -math.inf}
_REDUCE: dict[Op, Callable[[Code, ir.Value, ir.Value], ir.Value]] = {
    Op.SUM: lambda code, left, right: code.b.fadd(left, right),
    Op.MAX: _maximum,
}
_SIMPLE: dict[Op, Callable[..., ir.Value]] = {
    Op.ADD: lambda code, left, right: code.b.fadd(left, right),
    Op.SUB: lambda code, left, right: code.b.fsub(left, right),
    Op.MUL: lambda code, left, right: code.b.fmul(left, right),
    Op.DIV: lambda code, left, right: code.b.fdiv(left, right),
    Op.NEG: lambda code, x: code.b.fneg(x),
    Op.MAXIMUM: _maximum,
    Op.MINIMUM: lambda code, left, right: _extreme(code, "<", left, right),
    Op.AND: lambda code, left, right: code.b.and_(left, right),
    Op.OR: lambda code, left, right: code.b.or_(left, right),
    Op.NOT: lambda code, x: code.b.not_(x),
    Op.WHERE: lambda code, chosen, left, right: code.b.select(chosen, left, right),
}
