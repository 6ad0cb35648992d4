"""Regions without products, one after the other, a row at a time: what they tell one another stays in registers.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from llvmlite import ir

from recurra.compiler.ir import Kind, Node
from recurra.compiler.llvm.body import REDUCE, Body, across
from recurra.compiler.llvm.code import I32, I64, Code
from recurra.compiler.llvm.layout import Chain, Layout, Sweep
from recurra.compiler.llvm.memory import Memory
from recurra.compiler.llvm.stretches import Stretches
from recurra.compiler.regions import View

# Regions of up to so many vectors are written out, and what they calculate is not read from memory.
WRITTEN_OUT = 8


class Row:
    """What is known of a row by now, beside its memory: numbers by their places, and of homes the vectors from a
    feature on, with how many of so many lanes are there."""

    def __init__(self) -> None:
        self.numbers: dict[int, ir.Value] = {}
        self.vectors: dict[tuple[int, int, int], tuple[ir.Value, int]] = {}

    def vector(self, place: int, start: int, lanes: int, least: int) -> ir.Value | None:
        """The vector of a home that has the features from ``start`` on, if at least so many are there."""
        found, count = self.vectors.get((place, start, lanes), (None, 0))
        return found if count >= least else None


class Links:
    """A chain. Pieces are rows."""

    def __init__(
        self, code: Code, layout: Layout, chain: Chain, memory: Memory, active: ir.Value, count: ir.Value
    ) -> None:
        self.code, self.layout, self.memory, self.active, self.before = code, layout, memory, active, chain.before
        self.links = [Link(narrow(code, each), layout, each, memory, active, count) for each in chain.sweeps]
        before = chain.before
        self.body = Stretches(code, layout, before, memory, active, count) if before and before.chunks else None
        self.ends = {place: memory.rows(View(place, True)) for place in before.finished} if before else {}
        memory.find_partials(self.ends)

    def emit(self, begin: ir.Value, end: ir.Value) -> None:
        code = self.code
        with code.loop(end, begin) as index:
            row, known = code.entry(self.active, index, I64), Row()
            for place, rows in self.ends.items():
                self.finish(place, self.memory.partial(place, row), rows(row), known)
            for link in self.links:
                link.emit_row(row, known)
        code.b.ret_void()

    def finish(self, place: int, partials: ir.Value, target: ir.Value, known: Row) -> None:
        """A reduction of the region before, of its partial results."""
        if self.body is not None:
            self.body.finish(place, partials, target)
            return
        assert self.before is not None
        known.numbers[place] = _finish(self.code, self.layout.program.nodes[place], self.before.steps, partials, target)


def _finish(code: Code, node: Node, steps: int, partials: ir.Value, target: ir.Value) -> ir.Value:
    """One number from the partial ones of each step and lane."""
    value = code.load(partials)
    if steps > 1:
        with code.sums([value], steps, 1) as (step, (total,), following):
            more = code.load(code.at(partials, code.times(step, code.floats.lanes)))
            following.append(REDUCE[node.op](code, total, more))
        (value,) = following
    return code.store_first(across(code, node.op, value), target)


def narrow(code: Code, sweep: Sweep) -> Code:
    """For one number: a division of a whole vector takes several times that of the one number that is in it."""
    single = sweep.region.width == 1 and not sweep.groups and not sweep.region.reductions
    return code.of_lanes(1) if single else code


class Link(Body):
    """One region of a chain."""

    def emit_row(self, row: ir.Value, known: Row) -> None:
        code, lanes, width = self.code, self.floats.lanes, self.region.width
        pointers = {view: rows(row) for view, rows in self.views.items()}
        # What is one number for all is read before anything is written, which the compiler could not know.
        splats = {view: self._number(view, pointer, known) for view, pointer in pointers.items() if view.splat}
        whole, rest = divmod(width, lanes)
        sums: list[ir.Value] = [self.neutral(place) for place in self.region.reductions]

        def vector(offset: int | ir.Value, sums: list[ir.Value], count: int) -> list[ir.Value]:
            mask = None if count == lanes else self.floats.tail(count)

            def read(view: View, _: Kind) -> ir.Value:
                if view in splats:
                    return splats[view]
                if view.features:
                    return code.gather(pointers[view], view.features, code.number(offset), mask)
                if view.home and width == 1 and view.place in known.numbers:
                    return code.spread(known.numbers[view.place])
                if view.home and isinstance(offset, int):
                    found = known.vector(view.place, view.start + offset, lanes, count)
                    if found is not None:
                        return found
                pointer = code.at(pointers[view], offset)
                self.foresee(view, pointer)
                return code.load(pointer, mask)

            operand = self.values({}, read)
            pairs = zip(self.region.reductions, sums, strict=True)
            found = [self.reduced(place, operand, so_far, mask) for place, so_far in pairs]
            for view, value in self.stored(operand):
                code.store(value, code.at(pointers[view], offset), mask)
                self.foresee(view, code.at(pointers[view], offset))
                if isinstance(offset, int):
                    known.vectors[view.place, view.start + offset, lanes] = value, count
                    if width == 1 == self.nodes[view.place].width:
                        known.numbers[view.place] = code.b.extract_element(value, ir.Constant(I32, 0))
            return found

        if whole > WRITTEN_OUT:
            with code.sums(sums, whole) as (index, carried, following):
                following += vector(code.times(index, lanes), carried, lanes)
            sums = following
        else:
            for index in range(whole):
                sums = vector(index * lanes, sums, lanes)
        if rest:
            sums = vector(whole * lanes, sums, rest)
        for place, total in zip(self.region.reductions, sums, strict=True):
            target = pointers[View(place, True)]
            known.numbers[place] = code.store_first(across(code, self.nodes[place].op, total), target)

    def _views(self) -> list[View]:
        return list(dict.fromkeys([*super()._views(), *(View(place, True) for place in self.region.reductions)]))

    def _number(self, view: View, pointer: ir.Value, known: Row) -> ir.Value:
        """One number in all lanes."""
        number = known.numbers.get(view.place) if view.home and not view.features else None
        return self.code.load_splat(pointer) if number is None else self.code.spread(number)
