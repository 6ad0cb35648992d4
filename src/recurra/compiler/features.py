"""Where the features of a row come from, go to and meet: what moves, spreads, reduces and accumulates them.

The features of a row have numbers, in the order of the axes, for a batch of one row. An operation that only moves
features is run once on their numbers, and so says itself which feature goes where.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

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
_WHOLE: dict[Op, Op] = {Op.ADD: Op.SUM, Op.MAXIMUM: Op.MAX}


def refusal(node: fx.Node, why: str) -> BackendError:
    return BackendError(f"the time loop cannot be compiled at {origin_of(node)}: {why}; use backend='hoisted'")


@dataclass(frozen=True)
class Groups:
    """A reduction over some axes: ``count`` groups of ``size`` features.

    order: all features, the first of each group, then the second of each, and so on. member: of each feature, the
    group.
    """

    count: int
    size: int
    order: list[int]
    member: list[int]


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
        if len(numbers) > 1 and len(set(numbers)) == 1:
            return self.b.broadcast(self.pick(values, numbers[:1], fill), len(numbers))
        nothing = self.of_kind(self.b.constant(fill), values[0].node.kind)
        firsts = list(accumulate((value.width for value in values[:-1]), initial=1))
        runs: list[list[int]] = []
        for number in numbers:
            if runs and number == (sum(runs[-1]) if runs[-1][0] else 0) and number not in firsts:
                runs[-1][1] += 1
            else:
                runs.append([number, 1])
        if len(runs) <= _PIECES:
            pieces = []
            for number, size in runs:
                if number == 0:
                    pieces.append(self.b.broadcast(nothing, size))
                else:
                    which = bisect_right(firsts, number) - 1
                    pieces.append(self.part(values[which], number - firsts[which], size))
            return self.join(pieces)
        used = sorted({bisect_right(firsts, number) - 1 for number in numbers if number})
        at, place = {}, 0
        for which in used:
            at.update({firsts[which] + k: place + k for k in range(values[which].width)})
            place += values[which].width
        at[0] = place
        parts = [values[which] for which in used] + ([nothing] if 0 in numbers else [])
        return self.b.gather(self.join(parts), [at[number] for number in numbers])

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
        order = self.numbers(source).permute([*gone, *kept]).flatten().tolist()
        member = torch.arange(count).view([1 if axis in gone else n for axis, n in enumerate(shape)]).expand(shape)
        return Groups(count, size, order, member.flatten().tolist())

    def reduce(self, value: Value, groups: Groups, op: Op) -> Value:
        """One number for each group, by ADD, MUL, MAXIMUM, MINIMUM."""
        if groups.size == 1:
            return value
        if groups.count == 1 and op in _WHOLE:
            return self.b.add(Node(_WHOLE[op], (value.place,), 1))
        parts = [self.regroup(value, groups)]
        return self.fold(parts, groups.size, lambda low, high: [self.b.apply(op, low[0], high[0])])[0]

    def total(self, value: Value, size: int) -> Value:
        """The sum of ``size`` stretches of features."""
        if size == value.width:
            return self.b.sum(value)
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
