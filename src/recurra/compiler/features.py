"""Where the features of a row come from, go to and meet: what moves, spreads, reduces and accumulates them.

The features of a row have numbers, in the order of the axes, for a batch of one row. An operation that only moves
features is run once on their numbers, and so says itself which feature goes where.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from recurra.compiler.build import Builder, Value
from recurra.compiler.ir import Kind, Node, Op
from recurra.compiler.lines import origin_of
from recurra.compiler.operations import as_bool, as_float
from recurra.compiler.rows import Rows
from recurra.errors import BackendError

Meet = Callable[[list[Value], list[Value]], list[Value]]
# More pieces than these are gathered one by one.
_PIECES = 16
# Axes that are shorter are better taken apart.
LEAST = 8
_WHOLE: dict[Op, Op] = {Op.ADD: Op.SUM, Op.MAXIMUM: Op.MAX}


def refusal(node: fx.Node, why: str) -> BackendError:
    return BackendError(f"the time loop cannot be compiled at {origin_of(node)}: {why}; use backend='hoisted'")


@dataclass(frozen=True)
class Groups:
    """A reduction over some axes: ``count`` groups of ``size`` features.

    order: all features, the first of each group, then the second of each, and so on. member: of each feature, the
    group. inner: how far the features of a group are apart, if they are what a node of the loop IR takes together.
    """

    count: int
    size: int
    order: list[int]
    member: list[int]
    inner: int | None


class Features:
    """The part of a lowering that knows about features. A value is a node's, a batch of one row has its numbers."""

    b: Builder
    rows: Mapping[fx.Node, Rows | None]

    def value(self, node: fx.Node) -> Value:
        raise NotImplementedError

    def shape(self, node: fx.Node) -> list[int]:
        """The shape of a tensor at a batch of one row."""
        shape, rows = list(node.meta["val"].shape), self.rows[node]
        if rows is not None:
            shape[rows.axis] = rows.factor
        return shape

    def width(self, node: fx.Node) -> int:
        """The number of features of each row."""
        return prod(self.shape(node))

    def numbers(self, node: fx.Node, first: int = 0) -> Tensor:
        """The number of each feature, from ``first`` on, in the shape of the tensor."""
        shape = self.shape(node)
        return torch.arange(first, first + prod(shape)).view(shape)

    # --- moving ---

    def moved(self, node: fx.Node) -> Value | tuple[Value, ...]:
        """The value of a node that only moves features of its operands, or fills with zeros."""
        target: Any = node.target
        given: dict[fx.Node, Any] = {}
        sources, first = [], 1
        for operand in node.all_input_nodes:
            if isinstance(operand.meta.get("val"), Tensor):
                given[operand] = known(operand)
                if given[operand] is None:
                    sources.append(operand)
                    given[operand] = self.numbers(operand, first)
                    first += self.width(operand)
        try:
            result = target(*_real(node.args, given), **_real(node.kwargs, given))
        except (RuntimeError, IndexError, TypeError) as error:
            raise refusal(node, f"its features cannot be followed ({str(error).splitlines()[0]})") from error
        if not all(part.numel() for part in (result if isinstance(result, (tuple, list)) else [result])):
            raise refusal(node, "nothing is left of its features")
        kind = Kind.BOOL if _dtype(node) is torch.bool else Kind.FLOAT
        values = [self.of_kind(self.value(source), kind) for source in sources]
        if isinstance(result, (tuple, list)):
            return tuple(self.pick(values, part.flatten().tolist()) for part in result)
        return self.pick(values, result.flatten().tolist())

    def of_float(self, value: Value) -> Value:
        return self.of_kind(value, Kind.FLOAT)

    def of_kind(self, value: Value, kind: Kind) -> Value:
        found = (as_bool if kind is Kind.BOOL else as_float)(self.b, value)
        assert isinstance(found, Value)
        return found

    def pick(self, values: Sequence[Value], numbers: Sequence[int], fill: float = 0.0) -> Value:
        """The features of these numbers. The values' are counted on from one to the next, from 1 on; 0 is ``fill``."""
        asked = np.asarray(numbers)
        if len(asked) > 1 and (asked == asked[0]).all():
            return self.b.broadcast(self.pick(values, numbers[:1], fill), len(numbers))
        nothing = self.of_kind(self.b.constant(fill), values[0].node.kind)
        firsts = np.array(list(accumulate((value.width for value in values[:-1]), initial=1)))
        # Which value each is of, 0 of none; and its number in that value.
        which = np.searchsorted(firsts, asked, side="right")
        inside = asked - np.concatenate([[0], firsts])[which]
        if which[0] and (which == which[0]).all() and (axes := _axes(inside)) is not None:
            width, inner = axes
            return self.b.broadcast(self.part(values[which[0] - 1], int(inside[0]), width), len(asked), inner)
        runs_on = (which[1:] == which[:-1]) & (np.diff(inside) == (which[1:] != 0))
        starts = np.flatnonzero(np.concatenate([[True], ~runs_on]))
        if len(starts) <= _PIECES:
            pieces = []
            for start, size in zip(starts, np.diff([*starts, len(asked)]).tolist(), strict=True):
                if which[start] == 0:
                    pieces.append(self.b.broadcast(nothing, size))
                else:
                    pieces.append(self.part(values[which[start] - 1], int(inside[start]), size))
            return self.join(pieces)
        used = np.unique(which)
        parts = [values[number - 1] for number in used if number] + ([nothing] if used[0] == 0 else [])
        widths = np.array([0 if number == 0 else values[number - 1].width for number in range(len(values) + 1)])
        places = np.zeros(len(values) + 1, np.int64)
        places[used] = np.cumsum(widths[used]) - widths[used]
        places[0] = sum(widths[used])
        return self.b.gather(self.join(parts), (places[which] + inside).tolist())

    def part(self, value: Value, start: int, size: int) -> Value:
        return value if size == value.width else self.b.slice(value, start, size)

    def join(self, parts: Sequence[Value]) -> Value:
        return parts[0] if len(parts) == 1 else self.b.concat(parts)

    def spread(self, operand: fx.Node, shape: Sequence[int]) -> Value:
        """A tensor broadcast to a shape; one of a single feature is left as it is."""
        value, own = self.value(operand), self.shape(operand)
        if prod(own) == 1 or prod(own) == prod(shape):
            return value
        return self.pick([value], self.numbers(operand, 1).broadcast_to(list(shape)).flatten().tolist())

    # --- reducing ---

    def groups(self, node: fx.Node, source: fx.Node, axes: Sequence[int] | int | None) -> Groups:
        """What a reduction over ``axes`` of the source, all where there is none, takes together."""
        shape, rows = self.shape(source), self.rows[source]
        every = range(len(shape)) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
        gone = sorted({axis % max(1, len(shape)) for axis in every}) if shape else []
        if rows is not None and rows.axis in gone:
            raise refusal(node, "it works along the batch")
        kept = [axis for axis in range(len(shape)) if axis not in gone]
        size, count = prod(shape[axis] for axis in gone), prod(shape[axis] for axis in kept)
        longer = [axis for axis, length in enumerate(shape) if length > 1]
        at = [place for place, axis in enumerate(longer) if axis in gone]
        neighbours = not at or at[-1] - at[0] == len(at) - 1
        inner = prod(shape[axis] for axis in longer[at[-1] + 1 :]) if at else 1
        order = self.numbers(source).permute([*gone, *kept]).flatten().tolist()
        member = torch.arange(count).view([1 if axis in gone else n for axis, n in enumerate(shape)]).expand(shape)
        return Groups(count, size, order, member.flatten().tolist(), inner if neighbours else None)

    def reduce(self, value: Value, groups: Groups, op: Op) -> Value:
        """One number for each group, by ADD, MUL, MAXIMUM, MINIMUM."""
        if groups.size == 1:
            return value
        if op in _WHOLE and groups.inner is not None:
            apart = groups.size >= LEAST and (groups.inner == 1 or groups.inner >= LEAST)
            if groups.count == 1 or apart:
                return self.b.add(Node(_WHOLE[op], (value.place,), groups.count, inner=groups.inner))
        parts = [self.regroup(value, groups)]
        return self.fold(parts, groups.size, lambda low, high: [self.b.apply(op, low[0], high[0])])[0]

    def total(self, value: Value, size: int) -> Value:
        """The sum of ``size`` stretches of features."""
        width = value.width // size
        if width == 1 or (size >= LEAST and width >= LEAST):
            return self.b.sum(value, width, width)
        return self.fold([value], size, lambda low, high: [self.b.apply(Op.ADD, low[0], high[0])])[0]

    def regroup(self, value: Value, groups: Groups) -> Value:
        """The features in the order of the groups."""
        return self.pick([value], [1 + number for number in groups.order])

    def fold(self, values: list[Value], size: int, meet: Meet) -> list[Value]:
        """``size`` stretches of features made one, half of them with the other half again and again."""
        while size > 1:
            count, half = values[0].width // size, size // 2
            rest = size - half
            low = [value[: half * count] for value in values]
            high = [value[rest * count :] for value in values]
            found = meet(low, high)
            if rest > half:
                middle = [value[half * count : rest * count] for value in values]
                found = [self.join(each) for each in zip(found, middle, strict=True)]
            values, size = found, rest
        return values

    def mean(self, value: Value, groups: Groups) -> Value:
        return self.reduce(value, groups, Op.ADD) * (1.0 / groups.size)

    def back(self, value: Value, groups: Groups) -> Value:
        """A number for each group, spread over the features of the group."""
        return value if groups.count == 1 else self.pick([value], [1 + member for member in groups.member])

    def scan(self, value: Value, groups: Groups, op: Op) -> Value:
        """What ``op`` makes of each feature and all before it in its group."""
        value, count, step = self.regroup(value, groups), groups.count, 1
        while step < groups.size:
            shift = step * count
            value = self.join([value[:shift], self.b.apply(op, value[shift:], value[:-shift])])
            step *= 2
        return self.ungroup(value, groups)

    def ungroup(self, value: Value, groups: Groups) -> Value:
        """The features out of the order of the groups."""
        numbers = [0] * len(groups.order)
        for place, number in enumerate(groups.order):
            numbers[number] = 1 + place
        return self.pick([value], numbers)

    # --- accumulating ---

    def accumulate(self, base: Value, value: Value, places: Sequence[int]) -> Value:
        """``base``, and each feature of the value added to the one at its place."""
        layers: list[list[int]] = []
        depth = [0] * base.width
        for number, place in enumerate(places, start=1):
            if depth[place] == len(layers):
                layers.append([0] * base.width)
            layers[depth[place]][place] = number
            depth[place] += 1
        total = base
        for layer in layers:
            total = self.b.apply(Op.ADD, total, self.pick([value], layer))
        return total


def _axes(numbers: np.ndarray) -> tuple[int, int] | None:
    """How many features from the first on, and their inner axis, if a broadcast of these gives the numbers."""
    above = numbers - numbers[0]
    width = int(above.max()) + 1
    many = len(above) // width
    inner = int(np.argmax(above != np.arange(len(above))))
    if above.min() < 0 or many < LEAST or 1 < inner < LEAST or len(above) % width or inner < 1 or width % inner:
        return None
    expected = np.arange(width).reshape(-1, 1, inner).repeat(many, axis=1).ravel()
    return (width, inner) if np.array_equal(above, expected) else None


def known(node: fx.Node) -> Tensor | None:
    """The numbers of a tensor of indices, or of a mask, that depends on no input."""
    if _dtype(node) not in (torch.int64, torch.int32, torch.bool):
        return None
    if node.op == "get_attr":
        found = getattr(node.graph.owning_module, str(node.target))
        return found if isinstance(found, Tensor) else None
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    given = {operand: known(operand) for operand in node.all_input_nodes}
    if any(tensor is None for tensor in given.values()):
        return None
    target: Any = node.target
    result = target(*_real(node.args, given), **_real(node.kwargs, given))
    return result if isinstance(result, Tensor) else None


def _real(arguments: Any, given: Mapping[fx.Node, Any]) -> Any:
    """Arguments of an operation, for a batch of one row."""

    def real(operand: fx.Node) -> Any:
        if operand in given:
            return given[operand]
        # The size of the batch, or a multiple of it.
        return operand.args[1] if operand.target is operator.mul else 1

    return fx.node.map_arg(arguments, real)


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = value[0]
    return value.dtype if isinstance(value, Tensor) else None
