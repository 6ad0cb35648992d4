"""From a loop stage of a schedule to a program of the loop IR, and which node each of its operands is.

A value of the stage has the batch on one axis. All others, taken in their order, are the features of a row: moving
axes of one entry, or the batch, about changes nothing.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from recurra.compiler.build import Builder, Value
from recurra.compiler.features import LEAST, Features, refusal
from recurra.compiler.ir import Node, Op, Program
from recurra.compiler.operations import POINTWISE, as_bool, as_float, truncated
from recurra.compiler.passes import drop_unused, optimise
from recurra.compiler.rows import Rows
from recurra.compiler.rules import ADVICE, MOVES, MOVING, RULES
from recurra.compiler.stages import ROWS, Compiled
from recurra.errors import BackendError

_aten = torch.ops.aten
# The same features in the same order.
_SAME = {
    _aten.view, _aten._unsafe_view, _aten.reshape, _aten.unsqueeze, _aten.squeeze, _aten.clone, _aten.alias,
    _aten.detach, _aten._to_copy, _aten.lift_fresh_copy,
}  # fmt: skip
_TURNS = {_aten.t, _aten.transpose, _aten.permute}


@dataclass(frozen=True)
class Lowered:
    """A loop as a program, and the node of each carry's old value, input, row constant, vector, matrix and output.

    An operand is the value of its node, converted to the type of the carries and reshaped: the batch first, then
    the features; a matrix to the shape that the program declares. An output is converted and reshaped back.
    ``sunk`` are nodes from before the loop that it calculates itself.
    """

    program: Program
    carries: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    rows: tuple[fx.Node, ...]
    vectors: tuple[fx.Node, ...]
    matrices: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    sunk: tuple[fx.Node, ...] = ()


def lower(
    compiled: Compiled,
    rows: Mapping[fx.Node, Rows | None],
    forms: Mapping[fx.Node, str] | None = None,
    free: frozenset[fx.Node] = frozenset(),
) -> Lowered:
    """The program of a loop stage, forward or backward. ``rows`` says where the batch lies in every value.

    Of the nodes in ``free``, which nobody else needs, the loop calculates itself what is pointwise or only moves
    features: so they need not be written to memory and read again. ``forms`` then has the form of every value.

    Raises BackendError, with the operation and the user's line, for what the loop IR has no words for.
    """
    return Lowering(compiled, rows, forms or dict.fromkeys(compiled.slices, ROWS), free).run()


class Lowering(Features):
    """One loop on its way to a program, as the rules see it."""

    def __init__(
        self,
        compiled: Compiled,
        rows: Mapping[fx.Node, Rows | None],
        forms: Mapping[fx.Node, str],
        free: frozenset[fx.Node],
    ) -> None:
        self.compiled, self.rows, self.forms, self.free = compiled, rows, forms, free
        self.b = Builder()
        count = len(compiled.stage.carries)
        self.old, self.new = compiled.inputs[:count], compiled.outputs[:count]
        self.mine = set(compiled.stage.nodes)
        self.dtype = self.old[0].meta["val"].dtype
        self.values: dict[fx.Node, Value | tuple[Value, ...]] = {}
        self.operands: dict[str, list[fx.Node]] = {"input": [], "row": [], "vector": [], "matrix": []}
        self.sunk: list[fx.Node] = []

    def run(self) -> Lowered:
        for old, new in zip(self.old, self.new, strict=True):
            if old.meta["val"].dtype is not self.dtype or self.dtype not in (torch.float32, torch.float64):
                raise refusal(new, f"{old.name} is {old.meta['val'].dtype}, not all carries are float32, or float64")
            self.values[old] = self.b.carry(self.width(old))
        for node in self.compiled.stage.nodes:
            self.values[node] = self.lowered(node)
        kept = self.compiled.outputs[len(self.old) :]
        outputs: list[Value] = []
        for node in kept:
            value = self.number(node)
            # Two names for one value are two outputs.
            outputs.append(self.own(value) if value in outputs else value)
        program = optimise(self.b.finish(outputs, [self.number(node) for node in self.new]))
        program, used = drop_unused(program)
        inputs, rows, vectors, matrices = (
            tuple(nodes[index] for index in used[kind]) for kind, nodes in self.operands.items()
        )
        return Lowered(program, self.old, inputs, rows, vectors, matrices, tuple(kept), tuple(self.sunk))

    # --- values ---

    def value(self, node: fx.Node) -> Value:
        """A tensor as a value of the program."""
        if node not in self.values:
            self.values[node] = self.outside(node)
        found = self.values[node]
        if isinstance(found, tuple):
            raise refusal(node, "its results are used as one")
        return found

    def number(self, node: fx.Node) -> Value:
        found = as_float(self.b, self.value(node))
        assert isinstance(found, Value)
        return found

    def own(self, value: Value) -> Value:
        return self.b.add(Node(Op.SLICE, (value.place,), value.width))

    def outside(self, node: fx.Node) -> Value:
        """A value from outside of the loop, as an operand."""
        if node.target in (_aten.full.default, _aten.scalar_tensor.default):
            number: Any = node.args[-1]
            return self.settled(node, self.b.constant(float(number)))
        if (sunk := self.sink(node)) is not None:
            return sunk
        width, rows = self.width(node), self.rows[node]
        if node.meta["val"].is_complex():
            raise refusal(node, f"{node.name} is {node.meta['val'].dtype}")
        if self.forms.get(node) == ROWS:
            return self.settled(node, self.leaf("input", node, self.b.input(width)))
        if rows is None:
            return self.settled(node, self.leaf("vector", node, self.b.vector(width)))
        source = node.all_input_nodes[0] if node.target is _aten.expand.default else node
        if source is not node and _is_given(source) and self.rows[source] is None:
            return self.settled(node, self.spread(source, self.shape(node)))
        return self.settled(node, self.leaf("row", node, self.b.row(width)))

    def sink(self, node: fx.Node) -> Value | None:
        """A value from before the loop, calculated in it, where that is cheaper than to read it."""
        if node not in self.free:
            return None
        target: Any = node.target
        packet = target.overloadpacket if isinstance(target, OpOverload) else target
        moves = packet in _SAME or packet in MOVES or target is operator.getitem
        by_step = self.forms.get(node) == ROWS
        grows = packet is _aten.bmm and self.width(node) >= LEAST * max(map(self.width, node.all_input_nodes))
        if not moves and not (by_step and (grows or packet in POINTWISE or target in POINTWISE)):
            return None
        dtype = node.meta["val"].dtype
        if by_step and dtype not in (torch.bool, self.dtype):
            return None
        before = dict(self.values)
        try:
            if target is operator.getitem:
                source = node.all_input_nodes[0]
                if source not in self.free or _packet(source) not in MOVES:
                    return None
                if source not in self.values:
                    self.values[source] = self.lowered(source)
            found = self.lowered(node)
        except BackendError:
            self.values = before
            return None
        self.sunk.append(node)
        return found if isinstance(found, Value) else None

    def leaf(self, kind: str, node: fx.Node, value: Value) -> Value:
        self.operands[kind].append(node)
        return value

    def settled(self, node: fx.Node, value: Value) -> Value:
        """The value in the kind and the width that the node has."""
        dtype = node.meta["val"].dtype
        # Whole numbers are indices; they and truth values are the same in any type.
        exact = node.target is _aten._to_copy.default and not node.all_input_nodes[0].meta["val"].is_floating_point()
        other = dtype.is_complex or (dtype.is_floating_point and dtype is not self.dtype and not exact)
        if node in self.mine and other:
            raise refusal(node, f"it gives {dtype} where the carries are {self.dtype}")
        kind = as_bool if dtype is torch.bool else as_float
        found = kind(self.b, value)
        assert isinstance(found, Value)
        width = self.width(node)
        if found.width not in (1, width):
            raise refusal(node, f"{found.width} features of each row are spread over {width}")
        return self.b.broadcast(found, width)

    def lowered(self, node: fx.Node) -> Value | tuple[Value, ...]:
        """A node of the loop."""
        if node.target is operator.getitem:
            at: Any = node.args[1]
            parts: Any = self.values[node.all_input_nodes[0]]
            return self.settled(node, parts[at])
        target = node.target
        packet = target.overloadpacket if isinstance(target, OpOverload) else target
        if packet in _SAME:
            return self.settled(node, self.same(node, node.all_input_nodes[0]))
        if packet in MOVES or packet in MOVING:
            moved = self.moved(node)
            return moved if isinstance(moved, tuple) else self.settled(node, moved)
        rule: Callable[..., Any]
        first: tuple[Any, ...]
        if packet in RULES:
            rule, first, args, named = RULES[packet], (self, node), node.args, node.kwargs
        elif packet in POINTWISE or target in POINTWISE:
            rule, first = POINTWISE[packet if packet in POINTWISE else target], (self.b,)
            tensors = [operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), Tensor)]
            shape = torch.broadcast_shapes(*(self.shape(operand) for operand in tensors))
            args = tuple(self.argument(node, a, shape) for a in node.args)
            named = {name: self.argument(node, a, shape) for name, a in node.kwargs.items()}
            kind = node.meta["val"].dtype if isinstance(node.meta["val"], Tensor) else self.dtype
            selects = packet in (_aten.where, _aten.maximum, _aten.minimum)
            if not kind.is_floating_point and kind is not torch.bool and not selects:
                raise refusal(node, "it calculates with whole numbers: convert them to the type of the state first")
        else:
            raise refusal(node, ADVICE.get(packet, "there is no rule for this operation"))
        try:
            inspect.signature(rule).bind(*first, *args, **named)
        except TypeError:
            raise refusal(node, f"there is no rule for this form of it, {target}") from None
        result = rule(*first, *args, **named)
        return result if isinstance(result, tuple) else self.settled(node, result)

    def argument(self, node: fx.Node, argument: Any, shape: Sequence[int]) -> Any:
        """An argument of a pointwise operation that works on tensors of this shape."""
        if isinstance(argument, fx.Node):
            return self.spread(argument, shape)
        if argument is None or isinstance(argument, (bool, int, float, str)):
            return float(argument) if isinstance(argument, (bool, int)) else argument
        raise refusal(node, f"an argument of it is {argument!r}")

    # --- features ---

    def same(self, node: fx.Node, source: fx.Node) -> Value:
        """The source, of which the node is a view or a copy that has the features in the same order."""
        dtype = node.meta["val"].dtype
        whole = not dtype.is_floating_point and dtype is not torch.bool and source.meta["val"].is_floating_point()
        return truncated(self.b, self.number(source)) if whole else self.value(source)

    def product(self, node: fx.Node, a: fx.Node, m: fx.Node) -> Value:
        """a @ m. The best is when one of them is the same at all steps and for all rows."""
        if self.rows[node] is None:
            raise refusal(node, "the rows of the batch meet in it")
        heads, n, k = (1, *self.shape(a))[-3:]
        p = self.shape(m)[-1]
        left, right = self.numbers(a, 1).view(heads, n, k), self.numbers(m, 1).view(heads, k, p)
        # With a single column, or a row, a product of several rows at once is as good as one of matrices.
        slight = n > 1 and (k == 1 or p == 1)
        if not slight and (matrix := self.shared(m)) is not None:
            x = self.number(a)
            rows = [(head, row) for head in range(heads) for row in left[head]]
            return self.join([self.times(self.pick([x], r.tolist()), matrix, head, False, p) for head, r in rows])
        if not slight and (matrix := self.shared(a)) is not None:
            x = self.number(m)
            columns = [(head, column) for head in range(heads) for column in right[head].T]
            found = [self.times(self.pick([x], c.tolist()), matrix, head, True, n) for head, c in columns]
            order = torch.arange(1, heads * p * n + 1).view(heads, p, n).transpose(1, 2)
            return self.pick([self.join(found)], order.flatten().tolist())
        if n == 1 or p == 1:
            sums = self.matrix_of_row(m, a, 0) if n == 1 else self.matrix_of_row(a, m, 1)
            if sums is not None:
                return sums
        if p >= LEAST:
            # As (heads, n, k, p).
            x = self.b.broadcast(self.number(a), heads * n * k * p)
            y = self.b.broadcast(self.number(m), heads * n * k * p, k * p)
            return self.b.sum(x * y, heads * n * p, p)
        shape = (k, heads, n, p)
        x = self.pick([self.number(a)], left.permute(2, 0, 1)[..., None].expand(shape).flatten().tolist())
        y = self.pick([self.number(m)], right.permute(1, 0, 2)[:, :, None].expand(shape).flatten().tolist())
        return self.total(self.b.apply(Op.MUL, x, y), k)

    def matrix_of_row(self, matrix: fx.Node, vector: fx.Node, over: int) -> Value | None:
        """The sums over rows (0) or columns (1) of each row's own matrices, times a vector; None where they are small.

        Whether the matrices are turned changes only which of the two it is.
        """
        node = matrix
        while _packet(node) in _SAME | {_aten.expand} and self.shape(node) == self.shape(node.all_input_nodes[0]):
            node = node.all_input_nodes[0]
        turned = _order(node, node.all_input_nodes[0]) if node.all_input_nodes else None
        dimensions = len(self.shape(node))
        source = next(iter(node.all_input_nodes), node)
        at_hand = source in self.mine or source in self.values or source in self.forms
        if turned == [*range(dimensions - 2), dimensions - 1, dimensions - 2] and at_hand:
            node, over = source, 1 - over
        heads, rows, columns = (1, *self.shape(node))[-3:]
        if columns < LEAST:
            return None
        width = heads * rows * columns
        x, y = self.number(node), self.number(vector)
        if over == 1:
            return self.b.sum(x * self.b.broadcast(y, width, columns), heads * rows)
        return self.b.sum(x * self.b.broadcast(y, width), heads * columns, columns)

    def shared(self, matrix: fx.Node) -> fx.Node | None:
        """What the matrix, or each of a batch of them, is, where that is the same at all steps and for all rows."""
        node = matrix
        while self.rows[node] is not None and node not in self.mine and _packet(node) in _SAME | {_aten.expand}:
            node = node.all_input_nodes[0]
        if self.rows[node] is not None or node in self.mine:
            return None
        alike = self.width(node) == self.width(matrix) and self.shape(node)[-2:] == self.shape(matrix)[-2:]
        return node if alike else None

    def times(self, x: Value, matrix: fx.Node, head: int, transposed: bool, width: int) -> Value:
        """x @ M or x @ M^T, of one of a batch of matrices."""
        source, turned = _turned_back(matrix)
        rows, columns = source.meta["val"].shape[-2:]
        matrices = self.operands["matrix"]
        if source not in matrices:
            matrices.append(source)
            self.b.matrix(prod(source.meta["val"].shape[:-1]), columns)
        index = matrices.index(source)
        if transposed != turned:
            return self.b.matmul(x, index, transposed=True, start=head * rows, width=width)
        return self.b.matmul(x, index, top=head * rows, width=width)


def _packet(node: fx.Node) -> Any:
    target: Any = node.target
    return target.overloadpacket if isinstance(target, OpOverload) else target


def _is_given(node: fx.Node) -> bool:
    """Whether a value is an input of the graph, and need not be kept for the loop."""
    return node.op in ("placeholder", "get_attr")


def _order(node: fx.Node, source: fx.Node) -> list[int] | None:
    """The axes of the source in the order in which the node has them; None where it does not move axes."""
    packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else None
    if packet not in _TURNS:
        return None
    dimensions = source.meta["val"].dim()
    order = list(range(dimensions))
    given: Any = node.args[1:]
    if packet is _aten.permute:
        return [axis % dimensions for axis in given[0]]
    if dimensions > 1:
        one, other = (axis % dimensions for axis in given or (0, 1))
        order[one], order[other] = order[other], order[one]
    return order


def _turned_back(matrix: fx.Node) -> tuple[fx.Node, bool]:
    """The input of the graph whose transpose, or transpose of a transpose, a matrix is, and whether it is turned;
    the matrix itself where it is something else."""
    node, turned = matrix, False
    while not _is_given(node):
        source = next(iter(node.all_input_nodes), node)
        order = _order(node, source)
        if order is None or order[:-2] != list(range(len(order) - 2)):
            return matrix, False
        turned ^= order[-2] > order[-1]
        node = source
    return node, turned
