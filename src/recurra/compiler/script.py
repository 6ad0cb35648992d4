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

from recurra.compiler.llvm import gemm
from recurra.compiler.llvm.divide import HEADER, TABLE
from recurra.compiler.llvm.gemm_emit import PRODUCT, SUMS, WORDS
from recurra.compiler.llvm.kernel import give_way
from recurra.compiler.llvm.sequence import CALL, COPY, calls, team
from recurra.compiler.native import NativeLoop

# Bytes of all values above which a call is long, and memory is better given back on the way.
MOST = 1 << 26
_TURNS = {torch.permute, torch.t}
_SIZES = {getattr, operator.mul}
_LINE = 8


class Unfit(Exception):
    """What cannot be written down."""


@dataclass(frozen=True)
class _Place:
    """Where something lies: in which tensor or memory of the call, and how many bytes from its beginning."""

    kind: str
    index: int
    skip: int = 0


@dataclass(frozen=True)
class _Value:
    """A tensor whose numbers are at a place; strides count numbers."""

    place: _Place
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        return self.strides == _strides(self.shape)


@dataclass(frozen=True)
class Script:
    """A call of one size: its words, where in them is the address of what, how large its values are, which parts of
    them are the results, and what memory it works in."""

    words: np.ndarray
    slots: tuple[tuple[int, int, int], ...]
    shapes: tuple[tuple[int, ...], ...]
    results: tuple[tuple[int, int, int] | None, ...]
    loops: tuple[NativeLoop, ...]
    members: int


class Writer:
    """A script on its way: the operations of a segment, on places instead of tensors."""

    def __init__(
        self, graph: fx.Graph, sums: Callable[..., Tensor], dtype: torch.dtype, call: Any, given: Sequence[Tensor]
    ) -> None:
        self.graph, self.sums, self.call = graph, sums, call
        self.products = gemm.products(dtype)
        self.itemsize = dtype.itemsize
        self.threads = torch.get_num_threads()
        self.given = [_Value(_Place("given", k), tuple(t.shape), _strides(t.shape)) for k, t in enumerate(given)]
        self.shapes: list[tuple[int, ...]] = []
        self.words: list[int] = []
        self.slots: list[tuple[int, _Place]] = []
        self.list: list[tuple[int, int, int]] = []
        self.loops: list[NativeLoop] = []
        # What is taken by a later call of the same list.
        self.taken: set[_Place] = set()
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
                env[node] = self.operation(node.target, args, node.kwargs)
        raise AssertionError("a graph ends with its output")

    def operation(self, target: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        loop = getattr(target, "__self__", None)
        if isinstance(loop, NativeLoop):
            return self.forward(loop, *args[1:]) if target.__name__ == "forward" else self.backward(loop, *args[1:])
        if target in _SIZES or target is operator.getitem:
            return target(*args)
        if named:
            raise Unfit
        if target in _TURNS:
            (value, *_) = args
            if len(value.shape) != 2 or args[1:] not in ((), ([1, 0],)):
                raise Unfit
            return _Value(value.place, value.shape[::-1], value.strides[::-1])
        if target is torch.reshape:
            value, shape = args
            if not value.contiguous or -1 in shape:
                raise Unfit
            return _Value(value.place, tuple(shape), _strides(shape))
        if target is gemm.mm:
            return self.product(None, *args)
        if target is gemm.addmm:
            return self.product(*args)
        if target is self.sums:
            value, T, axis, apart = args
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

    def product(self, start: _Value | None, a: _Value, b: _Value) -> _Value:
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
        self.taken.update([a.place, b.place])
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
        places = {"a": a.place, "b": b.place, "c": c.place, "memory": _Place("room", 1)}
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

    def total(self, value: _Value, R: int, shape: tuple[int, ...]) -> _Value:
        D = prod(shape)
        if self.products.lanes > D:
            raise Unfit
        self.taken.add(value.place)
        out = self.value(shape)
        parts = min(self.threads, -(-D // self.products.lanes)) if R * D >= gemm.LEAST_SUMS else 1
        numbers = {"R": R, "D": D, "a_row": D, "parts": parts}
        words = [numbers.get(name, 0) for name in SUMS]
        places = {SUMS.index("a"): value.place, SUMS.index("out"): out.place}
        self.add(self.products.addresses[1], words + [0] * (WORDS - len(words)), places, parts)
        return out

    def copy(self, source: _Place, target: _Place, numbers: int) -> None:
        self.add(calls().copy, [0] * (COPY - 1) + [numbers * self.itemsize], {0: source, 1: target}, 1)

    def forward(
        self, loop: NativeLoop, operands: Sequence[_Value], state: Sequence[_Value], fresh: Sequence[_Value]
    ) -> list[_Value]:
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
                    self.copy(state[kept.carry].place, _moved(value, first).place, B * width)
                begin = size if old == reverse else 0
                value = _Value(_moved(value, begin).place, (T * B, width), value.strides)
            last.append(value)
        return last

    def backward(self, loop: NativeLoop, operands: Sequence[_Value], gradient: Sequence[_Value]) -> list[Any]:
        first, outputs = self.loop(loop, operands, gradient, not self.call.reverse, set())
        return [*first, *[None] * len(first), *(outputs[kept.output] for kept in loop.kept)]

    def loop(
        self, loop: NativeLoop, operands: Sequence[_Value], state: Sequence[_Value], reverse: bool, both: set[int]
    ) -> tuple[list[_Value], list[_Value]]:
        """The last state, and the outputs; those in ``both`` have room for one step more."""
        kernel, T, B = loop.kernel(), self.call.T, self.call.B
        if not loop.is_plain or not all(value.contiguous for value in (*operands, *state)):
            raise Unfit
        self.taken.update(value.place for value in operands)
        last = [self.value(leaf.shape) for leaf in state]
        for begin, end in zip(state, last, strict=True):
            self.copy(begin.place, end.place, prod(begin.shape))
        outputs = [self.value(((T + (k in both)) * B, width)) for k, width in enumerate(loop.widths)]
        skip = [B * width * self.itemsize if k in both and not reverse else 0 for k, width in enumerate(loop.widths)]
        parts, members = kernel.divide(T, B, self.threads)
        place = 2 + 3 * len(self.loops)
        self.loops.append(loop)
        table: list[int | _Place] = [
            *(value.place for value in operands),
            *kernel.strides,
            *(value.place for value in last),
            *[0] * len(last),
            *(_moved(value, each).place for value, each in zip(outputs, skip, strict=True)),
            *(0, 0),
            *(_Place("room", place + each) for each in range(3)),
        ]
        header = (T, B, int(reverse), kernel.layout.units, parts, members, give_way())
        words = [*header, *[0] * (TABLE - len(HEADER)), *(0 if isinstance(each, _Place) else each for each in table)]
        places = {TABLE + k: each for k, each in enumerate(table) if isinstance(each, _Place)}
        self.add(kernel.address, words + [0] * (kernel.claims + members * _LINE - len(words)), places, members)
        return last, outputs

    # What there is by then

    def value(self, shape: tuple[int, ...]) -> _Value:
        self.shapes.append(shape)
        return _Value(_Place("value", len(self.shapes) - 1), shape, _strides(shape))

    def add(self, function: int, words: Sequence[int], places: dict[int, _Place], members: int) -> None:
        self.words += [0] * (-len(self.words) % _LINE)
        begin = len(self.words)
        self.words += words
        self.slots += [(begin + at, place) for at, place in places.items()]
        self.list.append((function, begin, members))
        self.members = max(self.members, members)

    def alone(self, result: _Value, results: Sequence[Any]) -> _Value:
        """A result for the caller that shares its memory with none that is kept: what is written on it is its own."""
        index = result.place.index
        others = [other for other in results if other is not None and other is not result]
        first = result.place.skip == 0
        # Of old and new values the new ones are shown, and nobody else takes them.
        is_new = result.shape != self.shapes[index] and first == self.call.reverse
        if is_new and result.place not in self.taken and any(other.place.index == index for other in others):
            whole = self.value(result.shape)
            self.copy(result.place, whole.place, prod(result.shape))
            return whole
        return result

    def finish(self, results: Sequence[Any]) -> Script:
        results = [None if result is None else self.alone(result, results) for result in results]
        if self.members > 1 and not team():
            raise Unfit
        if sum(map(prod, self.shapes)) * self.itemsize > MOST:
            raise Unfit
        size = 2 + CALL * len(self.list)
        size += -size % _LINE
        head = [len(self.list), team()]
        slots = [(at + size, place) for at, place in self.slots]
        for function, begin, members in self.list:
            slots.append((len(head) + 1, _Place("room", 0, (size + begin) * 8)))
            head += [function, 0, members]
        words = np.array([*head, *[0] * (size - len(head)), *self.words], np.int64)
        room = 2 + 3 * len(self.loops)
        before = {"room": 0, "given": room, "value": room + len(self.given)}
        found: list[tuple[int, int, int] | None] = []
        for result in results:
            if result is None:
                found.append(None)
                continue
            index, skip, whole = result.place.index, result.place.skip, self.shapes[result.place.index]
            if whole == result.shape:
                found.append((index, -1, 0))
            else:
                row = skip // (prod(whole[1:]) * self.itemsize)
                found.append((index, row, row + result.shape[0]))
        return Script(
            words,
            tuple((at, before[place.kind] + place.index, place.skip) for at, place in slots),
            tuple(self.shapes),
            tuple(found),
            tuple(self.loops),
            self.members,
        )


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[k + 1 :]) for k in range(len(shape)))


def _moved(value: _Value, skip: int) -> _Value:
    place = value.place
    return _Value(_Place(place.kind, place.index, place.skip + skip), value.shape, value.strides)
