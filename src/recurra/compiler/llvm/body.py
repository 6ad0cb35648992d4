"""What a region calculates at one vector of features of one row, whichever way it is swept.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from llvmlite import ir

from recurra.compiler.ir import COMPARISONS, Kind, Node, Op
from recurra.compiler.llvm import maths
from recurra.compiler.llvm.code import I32, I64, Code
from recurra.compiler.llvm.divide import onward
from recurra.compiler.llvm.layout import Layout, Sweep
from recurra.compiler.llvm.memory import Memory
from recurra.compiler.regions import View

# The value of a node that the region does not calculate: of its view, as its kind.
Read = Callable[[View, Kind], ir.Value]
Operand = Callable[[int], ir.Value]


class Body:
    """A region, and where a row has what it reads and writes."""

    def __init__(
        self, code: Code, layout: Layout, sweep: Sweep, memory: Memory, active: ir.Value, count: ir.Value
    ) -> None:
        self.code, self.floats, self.layout, self.sweep, self.memory = code, code.floats, layout, sweep, memory
        self.region, self.plan, self.nodes = sweep.region, layout.plan, layout.program.nodes
        self.active, self.count = active, count
        self.here = {*self.region.products, *self.region.pointwise}
        self.views = {view: memory.rows(view) for view in self._views()}
        self.onward = onward(code, memory.table, memory.B)

    def row(self, index: ir.Value) -> ir.Value:
        """The number of an active row."""
        return self.code.entry(self.active, index, I64)

    def view(self, place: int) -> View:
        """Where the region reads a value that it does not calculate."""
        view = self.plan.view(place)
        return view if view.fits(self.region.stretch) else view.one_by_one(self.region.width)

    def values(self, given: Mapping[int, ir.Value], read: Read) -> Operand:
        """Everything pointwise, of the products that are ``given``; what has been calculated, or is read."""
        values, seen = dict(given), dict[tuple[View, Kind], ir.Value]()

        def operand(place: int) -> ir.Value:
            if place in self.here:
                return values[place]
            view, node = self.view(place), self.nodes[place]
            of = self.nodes[view.place]
            if of.op is Op.CONST and not view.home:
                number = self.floats.splat(of.number)
                return self._of_kind(number, node.kind)
            if (view, node.kind) not in seen:
                seen[view, node.kind] = self._of_kind(read(view, node.kind), node.kind)
            return seen[view, node.kind]

        for place in self.region.pointwise:
            node = self.nodes[place]
            values[place] = pointwise(self.code, node, [operand(arg) for arg in node.args])
        return operand

    def stored(self, operand: Operand) -> Iterator[tuple[View, ir.Value]]:
        """What is written of this vector, and where."""
        for store in self.region.stores:
            value = operand(store.value)
            if self.nodes[store.value].kind is Kind.BOOL:
                value = self.code.b.select(value, self.floats.splat(1.0), self.floats.splat(0.0))
            yield View(store.home, True, store.start), value

    def keep(self, operand: Operand, target: Callable[[View], ir.Value], mask: ir.Value | None) -> None:
        """Writes what is stored of this vector."""
        for view, value in self.stored(operand):
            self.code.store(value, target(view), mask)
            self.foresee(view, target(view))

    def reduced(self, place: int, operand: Operand, so_far: ir.Value, mask: ir.Value | None) -> ir.Value:
        """A reduction so far, and this vector."""
        node = self.nodes[place]
        value = operand(node.args[0])
        if mask is not None:
            value = self.code.b.select(mask, value, self.neutral(place))
        return REDUCE[node.op](self.code, so_far, value)

    def neutral(self, place: int) -> ir.Constant:
        return self.floats.splat(_NEUTRAL[self.nodes[place].op])

    def foresee(self, view: View, pointer: ir.Value) -> None:
        """Asks for what the next step reads or writes where this one does at ``pointer``: a row's inputs and outputs
        are too many streams for the machine to foresee."""
        node = self.nodes[view.place]
        if view.place in self.layout.program.outputs if view.home else node.op is Op.INPUT:
            onward = self.code.times(self.onward, node.width)
            self.code.prefetch(self.code.at(pointer, onward), to_write=view.home)

    def _of_kind(self, value: ir.Value, kind: Kind) -> ir.Value:
        return self.code.b.fcmp_unordered("!=", value, self.floats.splat(0.0)) if kind is Kind.BOOL else value

    def _views(self) -> list[View]:
        """Everything that is read or written row by row."""
        args = [arg for place in self.region.pointwise for arg in self.nodes[place].args]
        args += [arg for place in self.region.reductions for arg in self.nodes[place].args]
        args += [store.value for store in self.region.stores]
        views = [self.view(arg) for arg in args if arg not in self.here]
        views = [view for view in views if view.home or self.nodes[view.place].op is not Op.CONST]
        views += [View(store.home, True, store.start) for store in self.region.stores]
        return list(dict.fromkeys(views))


def across(code: Code, op: Op, value: ir.Value) -> ir.Value:
    """A vector whose every lane is the reduction of all lanes."""
    lanes = code.floats.lanes
    half = lanes // 2
    while half:
        order = ir.Constant(ir.VectorType(I32, lanes), [(lane + half) % lanes for lane in range(lanes)])
        value = REDUCE[op](code, value, code.b.shuffle_vector(value, value, order))
        half //= 2
    return value


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
REDUCE: dict[Op, Callable[[Code, ir.Value, ir.Value], ir.Value]] = {
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
