"""A region of matrices: swept stretch by stretch, along which what is broadcast is one number, or lies side by side.

A step is a few stretches of one block, and a block has all that is reduced together over stretches. Reductions along a
stretch stay in registers; those over stretches have a partial result for each step, so that no number depends on who
takes which steps.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from llvmlite import ir

from recurra.compiler.llvm.body import REDUCE, Body, across
from recurra.compiler.regions import View


class Stretches(Body):
    """A sweep in stretches."""

    def emit(self, begin: ir.Value, end: ir.Value) -> None:
        code, b, sweep = self.code, self.code.b, self.sweep
        self.memory.find_partials(self.region.reductions)
        with code.loop(self.count) as index:
            row = self.row(index)
            pointers = {view: rows(row) for view, rows in self.views.items()}
            # What is one number for all is read before anything is written, which the compiler could not know.
            splats = {view: code.load_splat(pointer) for view, pointer in pointers.items() if view.splat}
            with code.loop(end, begin) as step:
                first = self._first(b.urem(step, code.number(sweep.chunks)))
                last = self._first(code.plus(b.urem(step, code.number(sweep.chunks)), 1))
                block = code.times(b.udiv(step, code.number(sweep.chunks)), sweep.period)
                partials = {}
                for place in self.region.reductions:
                    partials[place] = self.memory.partial(place, row)
                    if self.nodes[place].inner > 1:
                        size = sweep.partial(place, self.layout.program) // sweep.steps
                        partials[place] = code.at(partials[place], code.times(step, size))
                        with code.loop(size // self.floats.lanes) as vector:
                            at = code.at(partials[place], code.times(vector, self.floats.lanes))
                            code.store(self.neutral(place), at)
                homes = {place: self.memory.rows(View(place, True))(row) for place in self.region.reductions}
                with code.loop(last, first) as place_in_block:
                    self._stretch(block, place_in_block, pointers, splats, partials, homes)
        b.ret_void()

    def _first(self, chunk: ir.Value) -> ir.Value:
        code, sweep = self.code, self.sweep
        return code.b.udiv(code.times(chunk, sweep.period), code.number(sweep.chunks))

    def _stretch(
        self,
        block: ir.Value,
        place_in_block: ir.Value,
        pointers: dict[View, ir.Value],
        splats: dict[View, ir.Value],
        partials: dict[int, ir.Value],
        homes: dict[int, ir.Value],
    ) -> None:
        code, stretch, lanes = self.code, self.region.stretch, self.floats.lanes
        number = code.b.add(block, place_in_block)
        here = {view: self._of_stretch(view, pointer, number) for view, pointer in pointers.items()}
        fixed = splats | {
            view: code.load_splat(pointer) for view, pointer in here.items() if view.many > 1 and view.inner == 1
        }
        along = [place for place in self.region.reductions if self.nodes[place].inner == 1]
        over = {
            place: code.at(partial, code.times(self._sum_of(place, place_in_block), self.sweep.vectors * lanes))
            for place, partial in partials.items()
            if place not in along
        }
        origin = code.times(number, stretch)

        def vector(offset: ir.Value, sums: list[ir.Value], mask: ir.Value | None) -> list[ir.Value]:
            def read(view: View, _: object) -> ir.Value:
                if view in fixed:
                    return fixed[view]
                if view.features:
                    return code.gather(here[view], view.features, code.b.add(origin, offset), mask)
                return code.load(code.at(here[view], offset), mask)

            operand = self.values({}, read)
            found = [self.reduced(place, operand, so_far, mask) for place, so_far in zip(along, sums, strict=True)]
            for place, partial in over.items():
                at = code.at(partial, offset)
                code.store(self.reduced(place, operand, code.load(at), mask), at)
            self.keep(operand, lambda view: code.at(here[view], offset), mask)
            return found

        sums: list[ir.Value] = [self.neutral(place) for place in along]
        whole, rest = divmod(stretch, lanes)
        if whole:
            with code.sums(sums, whole) as (index, carried, following):
                following += vector(code.times(index, lanes), carried, None)
            sums = following
        if rest:
            sums = vector(code.number(whole * lanes), sums, self.floats.tail(rest))
        for place, total in zip(along, sums, strict=True):
            into = partials[place] if place in self.sweep.finished else homes[place]
            code.store_first(across(code, self.nodes[place].op, total), code.at(into, number))

    def _of_stretch(self, view: View, pointer: ir.Value, number: ir.Value) -> ir.Value:
        """Where a view has the features of a stretch."""
        code, b, stretch = self.code, self.code.b, self.region.stretch
        if view.splat or view.features:
            return pointer
        if view.many == 1:
            return code.at(pointer, code.times(number, stretch))
        if view.inner == 1:
            return code.at(pointer, b.udiv(number, code.number(view.many // stretch)))
        return code.at(pointer, code.times(self._without_middle(number, view.many, view.inner), stretch))

    def _without_middle(self, number: ir.Value, many: int, inner: int) -> ir.Value:
        """The number of a stretch of (outer, many, inner) in (outer, inner)."""
        code, b, apart = self.code, self.code.b, inner // self.region.stretch
        outer = b.udiv(number, code.number(many * apart))
        return b.add(code.times(outer, apart), b.urem(number, code.number(apart)))

    def _sum_of(self, place: int, place_in_block: ir.Value) -> ir.Value:
        """Which of the stretches of a block's results a stretch is added to."""
        node = self.nodes[place]
        return self._without_middle(place_in_block, self.region.width // node.width, node.inner)

    def finish(self, place: int, partials: ir.Value, target: ir.Value) -> None:
        """A reduction, of its partial results."""
        code, sweep, node, lanes = self.code, self.sweep, self.nodes[place], self.floats.lanes
        if node.inner == 1:
            many = self.region.width // node.width // self.region.stretch
            with code.loop(node.width) as result:
                start = code.at(partials, code.times(result, many))
                with code.sums([code.load_splat(start)], many, 1) as (index, (total,), following):
                    following.append(REDUCE[node.op](code, total, code.load_splat(code.at(start, index))))
                code.store_first(following[0], code.at(target, result))
            return
        size = sweep.partial(place, self.layout.program) // sweep.steps
        stretches = size // (sweep.vectors * lanes)
        rest = self.region.stretch % lanes
        with code.loop(sweep.steps // sweep.chunks) as block, code.loop(stretches) as number:
            start = code.at(partials, code.times(block, sweep.chunks * size))
            start = code.at(start, code.times(number, sweep.vectors * lanes))
            into = code.times(code.plus(code.times(block, stretches), number), self.region.stretch)

            def total(offset: ir.Value, mask: ir.Value | None, start: ir.Value = start, into: ir.Value = into) -> None:
                with code.sums([code.load(code.at(start, offset))], sweep.chunks, 1) as (chunk, (so_far,), following):
                    more = code.load(code.at(code.at(start, offset), code.times(chunk, size)))
                    following.append(REDUCE[node.op](code, so_far, more))
                code.store(following[0], code.at(code.at(target, into), offset), mask)

            with code.loop(self.region.stretch // lanes) as index:
                total(code.times(index, lanes), None)
            if rest:
                total(code.number(self.region.stretch - rest), self.floats.tail(rest))
