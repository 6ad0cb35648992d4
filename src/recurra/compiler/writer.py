"""How the operations of a segment are written down as native calls, on all steps or on a piece of time.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from recurra.compiler.llvm import gemm
from recurra.compiler.llvm.divide import COUNTERS, HEADER, LINE, TABLE
from recurra.compiler.llvm.gemm_emit import COUNTERS as COUNTED
from recurra.compiler.llvm.gemm_emit import PRODUCT, SUMS, WORDS
from recurra.compiler.llvm.kernel import Kernel, give_way
from recurra.compiler.llvm.sequence import COPY, DRAWN, ZEROS, calls
from recurra.compiler.native import NativeLoop
from recurra.compiler.places import NOWHERE, Place, Total, Value, cut, moved, strides_of
from recurra.compiler.script import ROOM, Called

# Measured. Bytes from which on a copy is worth a second thread.
SHARED = 1 << 18
_TURNS = {torch.permute, torch.t}
_SIZES = {getattr, operator.mul}


class Unfit(Exception):
    """What cannot be written down."""


class Writer:
    """The operations of a segment, on places instead of tensors. ``divisible`` says that it is known which of the given
    values have rows of all steps, and then whether what has been written down could be in pieces."""

    def __init__(
        self,
        graph: fx.Graph,
        sums: Callable[..., Tensor],
        dtype: torch.dtype,
        call: Any,
        given: Sequence[Value],
        divisible: bool,
    ) -> None:
        self.graph, self.sums, self.call, self.given = graph, sums, call, given
        self.products = gemm.products(dtype)
        self.itemsize = dtype.itemsize
        self.threads = torch.get_num_threads()
        # Of every value its shape for all steps, by the operation that makes it; whether it is of every step, and
        # needs no room but for those that are at work; and whether it is there only after the last of them.
        self.shapes: list[tuple[int, ...]] = []
        self.made: dict[tuple[fx.Node, int], int] = {}
        self.brief: set[int] = set()
        self.late: set[int] = set()
        self.loops: dict[fx.Node, Kernel] = {}
        self.directions: set[bool] = set()
        self.divisible = divisible

    def write(self, steps: int, again: bool = False) -> tuple[dict[fx.Node, Any], Sequence[Value | None]]:
        """Writes down what is called on so many steps; ``again`` if it is not for the first time, and goes on with what
        there is. Gives the values of all nodes, and the results."""
        # What is called. What is of no step is so before the first piece, or after the last; all of it in the order of
        # the graph as long as there are no pieces.
        self.list: list[Called] = []
        self.first: list[Called] = [] if again else self.list
        self.last: list[Called] = self.list if steps == self.call.T else []
        self.steps, self.again = steps, again
        env: dict[fx.Node, Any] = {}
        inputs = iter([replace(self.call, T=steps), *(cut(value, steps, self.call.T) for value in self.given)])
        for node in self.graph.nodes:
            self.node, self.count = node, 0
            args = fx.node.map_arg(node.args, env.__getitem__)
            if node.op == "placeholder":
                env[node] = next(inputs)
            elif node.op == "output":
                return env, args[0]
            else:
                env[node] = self.operation(node, args)
        raise AssertionError("a graph ends with its output")

    def operation(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        target: Any = node.target
        loop = getattr(target, "__self__", None)
        if isinstance(loop, NativeLoop):
            if target.__name__ == "forward":
                return self.forward(loop, *args[1:])
            return self.backward(loop, self.summed(node, loop), *args[1:])
        if target in _SIZES or target is operator.getitem:
            return target(*args)
        if node.kwargs:
            raise Unfit
        if target in _TURNS:
            (value, *_) = args
            if len(value.shape) != 2 or args[1:] not in ((), ([1, 0],)):
                raise Unfit
            time = None if value.time is None else 1 - value.time
            return Value(value.place, value.shape[::-1], value.strides[::-1], time)
        if target is torch.reshape:
            value, shape = args
            if not value.contiguous or -1 in shape or value.time == 1:
                raise Unfit
            return Value(value.place, tuple(shape), strides_of(shape), value.time)
        if target is gemm.mm:
            return self.product(None, *args)
        if target is gemm.addmm:
            return self.product(*args)
        if target is self.sums:
            value, T, axis, apart = args
            if isinstance(value, Total):
                return value.value
            if not value.contiguous or axis or apart != 1:
                raise Unfit
            shape = (value.shape[0] // T, *value.shape[1:])
            return self.total(value, T, shape)
        if target is gemm.total:
            value, axes, *keep = args
            if not value.contiguous or list(axes) != [0] or len(value.shape) != 2:
                raise Unfit
            R, D = value.shape
            return self.total(value, R, (1, D) if keep and keep[0] else (D,))
        raise Unfit

    # What is called

    def product(self, start: Value | None, a: Value, b: Value) -> Value:
        (M, K), N = a.shape, b.shape[1]
        if 1 not in b.strides or K == 0:
            raise Unfit
        summed = a.time == 1 and b.time == 0
        after = self.is_after(a, b, start)
        if not summed and (a.time == 1 or b.time is not None):
            self.divisible = False
        if start is not None and start.time != (0 if a.time == 0 and len(start.shape) == 2 else None):
            self.divisible = False
        c = self.value((M, N), M * N // self.steps if a.time == 0 else 0, summed or after)
        start = c if self.again and summed else start
        row, column = 0, 1
        if start is not None and start.shape == (N,):
            (column,) = start.strides
        elif start is not None and start.shape == (M, N):
            row, column = start.strides
        if column != 1 or (start is not None and start.shape not in ((N,), (M, N))):
            raise Unfit
        down, across = gemm.grid(M, -(-N // self.products.lanes), self.threads if M * K * N >= gemm.WAKE else 1)
        numbers = {
            "M": M,
            "N": N,
            "K": K,
            "a_row": a.strides[0],
            "a_column": a.strides[1],
            "b_row": b.strides[0],
            "b_column": b.strides[1],
            "c_row": N,
            "start": self.products.zeros,
            "start_row": row,
            "start_column": 0 if start is None else 1,
            "row_parts": down,
            "column_parts": across,
            "apart": self.products.memory,
        }
        places = {"a": a.place, "b": b.place, "c": c.place, "memory": Place("room", ROOM.index("memory"))}
        if start is not None:
            places["start"] = start.place
        when = self.when(after, a.time is not None)
        self.call_products(when, 0, PRODUCT, numbers, places, down * across)
        return c

    def total(self, value: Value, R: int, shape: tuple[int, ...]) -> Value:
        D = prod(shape)
        after = self.is_after(value)
        out = self.value(shape, 0, value.time == 0 or after)
        # A last vector that is moved back needs its neighbour in its own part, where it is read before it is written.
        vectors = -(-D // self.products.lanes)
        parts = min(self.threads, max(1, vectors // 2)) if R * D >= gemm.LEAST_SUMS else 1
        numbers = {"R": R, "D": D, "a_row": D, "parts": parts, "more": int(self.again and value.time == 0)}
        when = self.when(after, value.time is not None)
        self.call_products(when, 1, SUMS, numbers, {"a": value.place, "out": out.place}, parts)
        return out

    def call_products(
        self,
        when: list[Called],
        number: int,
        names: Sequence[str],
        numbers: dict[str, int],
        places: dict[str, Place],
        members: int,
    ) -> None:
        words = [numbers.get(name, 0) for name in names]
        words += [0] * (WORDS - len(words))
        found = {names.index(name): place for name, place in places.items()}
        self.add(when, self.products.addresses[number], words, found, range(COUNTED, WORDS, LINE), members)

    def copy(self, when: list[Called], source: Place, target: Place, numbers: int) -> None:
        size = numbers * self.itemsize
        parts = self.threads if size >= SHARED else 1
        words = [0, 0, size, parts, *[0] * (COPY - 4)]
        self.add(when, calls().copy, words, {0: source, 1: target}, [DRAWN], parts)

    def fill(self, when: list[Called], value: Value) -> None:
        self.add(when, calls().zeros, [0] * (ZEROS - 1) + [prod(value.shape) * self.itemsize], {0: value.place})

    def forward(
        self, loop: NativeLoop, operands: Sequence[Value], state: Sequence[Value], fresh: Sequence[Value]
    ) -> list[Value]:
        T, B, reverse = self.steps, self.call.B, self.call.reverse
        last, outputs = self.loop(loop, operands, state, reverse, loop.both)
        for kept in loop.kept:
            value, width = outputs[kept.output], outputs[kept.output].shape[1]
            if kept.output in loop.both:
                size = B * width * self.itemsize
                # Where the state before the first step lies, and where all others' new values, or old ones.
                first = T * size if reverse else 0
                old = kept.carry is not None
                if kept.carry is not None:
                    self.copy(self.first, state[kept.carry].place, moved(value, first).place, B * width)
                value = replace(moved(value, size if old == reverse else 0), shape=(T * B, width))
            last.append(_as(loop, kept.node, value))
        return last

    def backward(
        self, loop: NativeLoop, summed: frozenset[int], operands: Sequence[Value], gradient: Sequence[Value]
    ) -> list[Any]:
        first, outputs = self.loop(loop, operands, gradient, not self.call.reverse, set(), summed)
        return [*first, *[None] * len(first), *(_as(loop, kept.node, outputs[kept.output]) for kept in loop.kept)]

    def summed(self, node: fx.Node, loop: NativeLoop) -> frozenset[int]:
        """The outputs of a backward loop of which only the sum over the steps is taken."""
        begin = 2 * len(loop.program.carries)
        parts = {part.args[1]: part for part in node.users}
        taken = [(kept.output, parts.get(begin + k)) for k, kept in enumerate(loop.kept)]
        users = [(output, user) for output, part in taken if part is not None for user in part.users]
        others = {output for output, user in users if user.target is not self.sums or user.args[2:] != (0, 1)}
        return frozenset(output for output, _ in users) - others

    def loop(
        self,
        loop: NativeLoop,
        operands: Sequence[Value],
        state: Sequence[Value],
        reverse: bool,
        both: set[int],
        summed: frozenset[int] = frozenset(),
    ) -> tuple[list[Value], dict[int, Any]]:
        """The last state, and the outputs; those in ``both`` have room for one step more, and of those ``summed`` there
        is the sum."""
        kernel, T, B = loop.kernel(summed=summed), self.steps, self.call.B
        if not loop.is_plain or not all(value.contiguous for value in (*operands, *state)):
            raise Unfit
        self.directions.add(reverse)
        inputs = len(kernel.program.inputs)
        rest = [*operands[inputs:], *state]
        late = self.is_after(*operands, *state)
        if late or any(value.time != 0 for value in operands[:inputs]) or any(value.time is not None for value in rest):
            self.divisible = False
        last = [self.value(leaf.shape, 0, True) for leaf in state]
        for begin, end in zip(state, last, strict=True):
            if begin.place == NOWHERE:
                self.fill(self.first, end)
            else:
                self.copy(self.first, begin.place, end.place, prod(begin.shape))
        totals = {k: self.value((B, loop.widths[k]), 0, True) for k in sorted(summed)}
        for total in totals.values():
            self.fill(self.first, total)
        widths = {k: width for k, width in enumerate(loop.widths) if k not in totals}
        outputs = {k: self.value(((T + (k in both)) * B, width), B * width) for k, width in widths.items()}
        # Its last step is the next piece's step before the first.
        self.brief -= {outputs[k].place.index for k in both}
        skip = {k: B * width * self.itemsize if k in both and not reverse else 0 for k, width in widths.items()}
        carried = [*last, *totals.values()]
        parts, members = kernel.divide(T, B, self.threads)
        self.loops[self.node] = kernel
        place = len(ROOM) + 3 * [*self.loops].index(self.node)
        table: list[int | Place] = [
            *(value.place for value in operands),
            *kernel.strides,
            *(value.place for value in carried),
            *[0] * len(carried),
            *(moved(value, skip[k]).place for k, value in outputs.items()),
            *(0, 0),
            *(Place("room", place + each) for each in range(3)),
        ]
        units = 0 if self.again else kernel.layout.units
        header = (T, B, int(reverse), units, parts, members, give_way())
        words = [*header, *[0] * (TABLE - len(HEADER)), *(0 if isinstance(each, Place) else each for each in table)]
        words += [0] * (kernel.claims + members * LINE - len(words))
        places = {TABLE + k: each for k, each in enumerate(table) if isinstance(each, Place)}
        counters = [*range(LINE, LINE * (1 + len(COUNTERS)), LINE), *range(kernel.claims, len(words), LINE)]
        self.add(self.list, kernel.address, words, places, counters, members)
        return last, {**outputs, **{k: Total(value) for k, value in totals.items()}}

    # What there is by then

    def is_after(self, *values: Value | None) -> bool:
        """Whether what takes these values comes after all pieces."""
        taken = [value for value in values if value is not None]
        after = any(value.place.kind == "value" and value.place.index in self.late for value in taken)
        if after and any(value.time is not None for value in taken):
            self.divisible = False
        return after

    def when(self, after: bool, stepped: bool) -> list[Called]:
        """Where a call is written down: what is of no step is called once, before the first piece or after the last."""
        return self.last if after else self.list if stepped else self.first

    def value(self, shape: tuple[int, ...], step: int, late: bool = False) -> Value:
        """A value of this operation. Of one step it has ``step`` numbers, 0 if it is of none."""
        key = self.node, self.count
        self.count += 1
        if key not in self.made:
            self.made[key] = len(self.shapes)
            self.shapes.append(shape)
            if step:
                self.brief.add(self.made[key])
            if late:
                self.late.add(self.made[key])
        place = Place("value", self.made[key], 0, step * self.itemsize)
        return Value(place, shape, strides_of(shape), 0 if step else None)

    def add(
        self,
        when: list[Called],
        function: int,
        words: Sequence[int],
        places: dict[int, Place],
        counters: Sequence[int] = (),
        members: int = 1,
    ) -> None:
        if NOWHERE in places.values():
            raise Unfit
        when.append(Called(function, words, places, counters, members))

    def results(self, found: Sequence[Value | None], shared: Sequence[int]) -> list[Value | None]:
        """The results, those that are ``shared`` copied to memory of their own."""
        results = [*found]
        for k in shared:
            result = found[k]
            assert result is not None
            numbers = prod(result.shape)
            own = self.value(result.shape, 0 if result.time is None else numbers // self.steps)
            self.copy(self.last if result.time is None else self.list, result.place, own.place, numbers)
            results[k] = own
        return results


def _as(loop: NativeLoop, node: fx.Node, value: Any) -> Any:
    """Rows of features with the axes that the node has."""
    if isinstance(value, Total):
        return Total(_as(loop, node, value.value))
    shape = loop.shape(node, value.shape[0])
    return replace(value, shape=shape, strides=strides_of(shape))
