"""A call of one size, written down: which native function is called on what, and where in that the addresses are of
the tensors and the memory of each call.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from recurra.compiler.block import Block
from recurra.compiler.llvm import gemm
from recurra.compiler.llvm.divide import HEADER, TABLE
from recurra.compiler.llvm.gemm_emit import PRODUCT, SUMS, WORDS
from recurra.compiler.llvm.kernel import Kernel, give_way
from recurra.compiler.llvm.sequence import CALL, COPY, ZEROS, calls, team
from recurra.compiler.native import NativeLoop
from recurra.compiler.places import NOWHERE, Place, Total, Value, moved, strides_of
from recurra.compiler.pool import LEAST

# Bytes of all values above which a call is long, and memory is better given back on the way.
MOST = 1 << 26
# Bytes between two values in one piece of memory: at multiples of a page they would fall into the same cache lines.
_APART = 320
_TURNS = {torch.permute, torch.t}
_SIZES = {getattr, operator.mul}
_LINE = 8
# What a room has, before the workspaces of the loops.
ROOM = "words", "memory", "scratch"


class Unfit(Exception):
    """What cannot be written down."""


@dataclass(frozen=True)
class Script:
    """A call of one size: its words, and where in them is the address of what: of memory that ``fixed`` has for all
    calls in the same room, or of tensors (``slots``). ``shapes`` are those of the tensors that it makes, and whether
    they are for the pool, ``results`` which of them are the results, ``block`` what is in the one of all that is kept.
    What nobody sees takes ``scratch`` numbers of the room, or if they are many ``spare`` ones of a tensor behind all
    others."""

    words: np.ndarray
    fixed: tuple[tuple[int, int, int], ...]
    slots: tuple[tuple[int, int, int], ...]
    shapes: tuple[tuple[tuple[int, ...], bool], ...]
    results: tuple[int | None, ...]
    block: Block | None
    loops: tuple[Kernel, ...]
    members: int
    scratch: int
    spare: int


class Writer:
    """A script on its way: the operations of a segment, on places instead of tensors. ``kept`` has the number of every
    result that may lie in one tensor with others, None for what is the caller's."""

    def __init__(
        self,
        graph: fx.Graph,
        sums: Callable[..., Tensor],
        dtype: torch.dtype,
        call: Any,
        given: Sequence[Value],
        kept: Sequence[int | None],
    ) -> None:
        self.graph, self.sums, self.call, self.given, self.kept = graph, sums, call, given, kept
        self.products = gemm.products(dtype)
        self.itemsize = dtype.itemsize
        self.threads = torch.get_num_threads()
        self.shapes: list[tuple[int, ...]] = []
        self.words: list[int] = []
        self.slots: list[tuple[int, Place]] = []
        self.list: list[tuple[int, int, int]] = []
        self.loops: list[Kernel] = []
        self.members = 1

    def run(self) -> Script:
        env: dict[fx.Node, Any] = {}
        inputs = iter([self.call, *self.given])
        for node in self.graph.nodes:
            args = fx.node.map_arg(node.args, env.__getitem__)
            if node.op == "placeholder":
                env[node] = next(inputs)
            elif node.op == "output":
                return self.finish(args[0])
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
            return Value(value.place, value.shape[::-1], value.strides[::-1])
        if target is torch.reshape:
            value, shape = args
            if not value.contiguous or -1 in shape:
                raise Unfit
            return Value(value.place, tuple(shape), strides_of(shape))
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
        if self.products.lanes > N or 1 not in b.strides or K == 0:
            raise Unfit
        row, column = 0, 1
        if start is not None and start.shape == (N,):
            (column,) = start.strides
        elif start is not None and start.shape == (M, N):
            row, column = start.strides
        if column != 1 or (start is not None and start.shape not in ((N,), (M, N))):
            raise Unfit
        down, across = gemm.grid(M, -(-N // self.products.lanes), self.threads if M * K * N >= gemm.WAKE else 1)
        c = self.value((M, N))
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
        words = [numbers.get(name, 0) for name in PRODUCT]
        self.add(
            self.products.addresses[0],
            words + [0] * (WORDS - len(words)),
            {PRODUCT.index(name): place for name, place in places.items()},
            down * across,
        )
        return c

    def total(self, value: Value, R: int, shape: tuple[int, ...]) -> Value:
        D = prod(shape)
        if self.products.lanes > D:
            raise Unfit
        out = self.value(shape)
        parts = min(self.threads, -(-D // self.products.lanes)) if R * D >= gemm.LEAST_SUMS else 1
        numbers = {"R": R, "D": D, "a_row": D, "parts": parts}
        words = [numbers.get(name, 0) for name in SUMS]
        places = {SUMS.index("a"): value.place, SUMS.index("out"): out.place}
        self.add(self.products.addresses[1], words + [0] * (WORDS - len(words)), places, parts)
        return out

    def copy(self, source: Place, target: Place, numbers: int) -> None:
        self.add(calls().copy, [0] * (COPY - 1) + [numbers * self.itemsize], {0: source, 1: target}, 1)

    def forward(
        self, loop: NativeLoop, operands: Sequence[Value], state: Sequence[Value], fresh: Sequence[Value]
    ) -> list[Value]:
        T, B, reverse = self.call.T, self.call.B, self.call.reverse
        last, outputs = self.loop(loop, operands, state, reverse, loop.both)
        for kept in loop.kept:
            value, width = outputs[kept.output], outputs[kept.output].shape[1]
            if kept.output in loop.both:
                size = B * width * self.itemsize
                # Where the state before the first step lies, and where all others' new values, or old ones.
                first = T * size if reverse else 0
                old = kept.carry is not None
                if kept.carry is not None:
                    self.copy(state[kept.carry].place, moved(value, first).place, B * width)
                begin = size if old == reverse else 0
                value = Value(moved(value, begin).place, (T * B, width), value.strides)
            last.append(value)
        return last

    def backward(
        self, loop: NativeLoop, summed: frozenset[int], operands: Sequence[Value], gradient: Sequence[Value]
    ) -> list[Any]:
        first, outputs = self.loop(loop, operands, gradient, not self.call.reverse, set(), summed)
        return [*first, *[None] * len(first), *(outputs[kept.output] for kept in loop.kept)]

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
        kernel, T, B = loop.kernel(summed=summed), self.call.T, self.call.B
        if not loop.is_plain or not all(value.contiguous for value in (*operands, *state)):
            raise Unfit
        last = [self.value(leaf.shape) for leaf in state]
        for begin, end in zip(state, last, strict=True):
            if begin.place == NOWHERE:
                self.fill(end)
            else:
                self.copy(begin.place, end.place, prod(begin.shape))
        totals = {k: self.zeros((B, loop.widths[k])) for k in sorted(summed)}
        widths = {k: width for k, width in enumerate(loop.widths) if k not in totals}
        outputs = {k: self.value(((T + (k in both)) * B, width)) for k, width in widths.items()}
        skip = {k: B * width * self.itemsize if k in both and not reverse else 0 for k, width in widths.items()}
        carried = [*last, *totals.values()]
        parts, members = kernel.divide(T, B, self.threads)
        place = len(ROOM) + 3 * len(self.loops)
        self.loops.append(kernel)
        table: list[int | Place] = [
            *(value.place for value in operands),
            *kernel.strides,
            *(value.place for value in carried),
            *[0] * len(carried),
            *(moved(value, skip[k]).place for k, value in outputs.items()),
            *(0, 0),
            *(Place("room", place + each) for each in range(3)),
        ]
        header = (T, B, int(reverse), kernel.layout.units, parts, members, give_way())
        words = [*header, *[0] * (TABLE - len(HEADER)), *(0 if isinstance(each, Place) else each for each in table)]
        places = {TABLE + k: each for k, each in enumerate(table) if isinstance(each, Place)}
        self.add(kernel.address, words + [0] * (kernel.claims + members * _LINE - len(words)), places, members)
        return last, {**outputs, **{k: Total(value) for k, value in totals.items()}}

    # What there is by then

    def value(self, shape: tuple[int, ...]) -> Value:
        self.shapes.append(shape)
        return Value(Place("value", len(self.shapes) - 1), shape, strides_of(shape))

    def zeros(self, shape: tuple[int, ...]) -> Value:
        value = self.value(shape)
        self.fill(value)
        return value

    def fill(self, value: Value) -> None:
        self.add(calls().zeros, [0] * (ZEROS - 1) + [prod(value.shape) * self.itemsize], {0: value.place}, 1)

    def add(self, function: int, words: Sequence[int], places: dict[int, Place], members: int) -> None:
        if NOWHERE in places.values():
            raise Unfit
        self.words += [0] * (-len(self.words) % _LINE)
        begin = len(self.words)
        self.words += words
        self.slots += [(begin + at, place) for at, place in places.items()]
        self.list.append((function, begin, members))
        self.members = max(self.members, members)

    def alone(self, result: Value, rest: list[Value]) -> Value:
        """A result for the caller that shares its memory with none of the rest: what is written on it is its own."""
        rest.remove(result)
        index = result.place.index
        if prod(result.shape) == prod(self.shapes[index]) and all(other.place.index != index for other in rest):
            return result
        whole = self.value(result.shape)
        self.copy(result.place, whole.place, prod(result.shape))
        return whole

    def finish(self, found: Sequence[Value | None]) -> Script:
        if self.members > 1 and not team():
            raise Unfit
        rest = [result for result in found if result is not None]
        results = [
            self.alone(result, rest) if result is not None and number is None else result
            for result, number in zip(found, self.kept, strict=True)
        ]
        if sum(map(prod, self.shapes)) * self.itemsize > MOST:
            raise Unfit
        shapes, places, block = self.lay_out(results)
        # What nobody sees. Large memory is better given back.
        scratch = self.pack({*range(len(self.shapes))} - {*places}, len(shapes), places)
        held = scratch * self.itemsize < LEAST
        size = 2 + CALL * len(self.list)
        size += -size % _LINE
        head = [len(self.list), team()]
        fixed: list[tuple[int, int, int]] = []
        slots: list[tuple[int, int, int]] = []
        for function, begin, members in self.list:
            fixed.append((len(head) + 1, ROOM.index("words"), (size + begin) * 8))
            head += [function, 0, members]
        for at, place in self.slots:
            kind, index, skip = place.kind, place.index, place.skip
            if kind == "value":
                index, begin = places[index]
                skip += begin * self.itemsize
                kind = "room" if held and index == len(shapes) else kind
                index = ROOM.index("scratch") if kind == "room" else len(self.given) + index
            (fixed if kind == "room" else slots).append((at + size, index, skip))
        ends = [
            None
            if result is None or (block is not None and number in block.parts and number != block.first)
            else places[result.place.index][0]
            for result, number in zip(results, self.kept, strict=True)
        ]
        return Script(
            words=np.array([*head, *[0] * (size - len(head)), *self.words], np.int64),
            fixed=tuple(fixed),
            slots=tuple(slots),
            shapes=tuple((shape, prod(shape) * self.itemsize >= LEAST) for shape in shapes),
            results=tuple(ends),
            block=block,
            loops=tuple(self.loops),
            members=self.members,
            scratch=scratch if held else 0,
            spare=0 if held else scratch,
        )

    def lay_out(
        self, results: Sequence[Value | None]
    ) -> tuple[list[tuple[int, ...]], dict[int, tuple[int, int]], Block | None]:
        """The shapes of the tensors that are results, or have them; in which of these, and from which number on, each
        value is; and what is in the one of all that is kept."""
        pairs = [(result, number) for result, number in zip(results, self.kept, strict=True) if result is not None]
        alone = [result for result, number in pairs if number is None]
        kept = {number: result for result, number in pairs if number is not None}
        shapes = [result.shape for result in alone]
        places = {result.place.index: (k, 0) for k, result in enumerate(alone)}
        if not kept:
            return shapes, places, None
        shapes.append((self.pack({result.place.index for result in kept.values()}, len(shapes), places),))
        begins = {number: places[result.place.index][1] for number, result in kept.items()}
        parts = {number: (begins[number] + r.place.skip // self.itemsize, r.shape) for number, r in kept.items()}
        return shapes, places, Block(parts)

    def pack(self, values: set[int], into: int, places: dict[int, tuple[int, int]]) -> int:
        """Lays values into one tensor, number ``into``, one behind the other; gives its size."""
        size = 0
        for index in sorted(values):
            places[index] = into, size
            size += prod(self.shapes[index]) + _APART // self.itemsize
            size += -size % (64 // self.itemsize)
        return size
