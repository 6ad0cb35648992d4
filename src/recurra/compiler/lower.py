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
from recurra.compiler.ir import Node, Op, Program
from recurra.compiler.operations import POINTWISE, as_bool, as_float
from recurra.compiler.rows import Rows
from recurra.compiler.rules import RULES, refusal
from recurra.compiler.stages import Compiled

_aten = torch.ops.aten
# The same numbers of each row, whatever its axes.
_SAME = {
    _aten.view, _aten._unsafe_view, _aten.reshape, _aten.unsqueeze, _aten.squeeze, _aten.permute, _aten.transpose,
    _aten.t, _aten.expand, _aten.clone, _aten.alias, _aten.detach, _aten._to_copy, _aten.lift_fresh_copy,
}  # fmt: skip
_TURNS = {_aten.t, _aten.transpose, _aten.permute}
# What the core table leaves whole, and no rule is needed for once it is taken apart.
_MORE = [_aten.elu, _aten.leaky_relu, _aten.hardtanh, _aten.linalg_vector_norm]


@dataclass(frozen=True)
class Lowered:
    """A loop as a program, and the node of each carry's old value, input, row constant, vector, matrix and output.

    An operand is the value of its node, converted to the type of the carries and reshaped: the batch first, then
    the features; a matrix to the shape that the program declares. An output is converted and reshaped back.
    """

    program: Program
    carries: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    rows: tuple[fx.Node, ...]
    vectors: tuple[fx.Node, ...]
    matrices: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table with which to trace a step that is to be lowered: all but what there is a rule for is taken apart."""
    core = torch._decomp.core_aten_decompositions()
    table: dict[Any, Callable[..., Any]] = {**core, **torch._decomp.get_decompositions(_MORE)}
    rules = POINTWISE.keys() | RULES.keys()
    return {t: how for t, how in table.items() if not {t, getattr(t, "overloadpacket", t)} & rules}


def lower(compiled: Compiled, rows: Mapping[fx.Node, Rows | None]) -> Lowered:
    """The program of a loop stage, forward or backward. ``rows`` says where the batch lies in every value.

    Raises BackendError, with the operation and the user's line, for what the loop IR has no words for.
    """
    return Lowering(compiled, rows).run()


class Lowering:
    """One loop on its way to a program, as the rules see it."""

    def __init__(self, compiled: Compiled, rows: Mapping[fx.Node, Rows | None]) -> None:
        self.compiled, self.rows = compiled, rows
        self.b = Builder()
        count = len(compiled.stage.carries)
        self.old, self.new = compiled.inputs[:count], compiled.outputs[:count]
        self.by_step = set(compiled.slices)
        self.mine = set(compiled.stage.nodes)
        self.dtype = self.old[0].meta["val"].dtype
        self.values: dict[fx.Node, Value | tuple[Value, ...]] = {}
        self.operands: dict[str, list[fx.Node]] = {"input": [], "row": [], "vector": [], "matrix": []}

    def run(self) -> Lowered:
        for old, new in zip(self.old, self.new, strict=True):
            if old.meta["val"].dtype is not self.dtype or self.dtype not in (torch.float32, torch.float64):
                raise refusal(new, f"{old.name} is {old.meta['val'].dtype}, not all carries are float32, or float64")
            if len(self.features(old)) > 1:
                shape = ", ".join(map(str, old.meta["val"].shape[1:]))
                raise refusal(new, f"{old.name} is (B, {shape}), and a carry is (B, D)")
            self.values[old] = self.b.carry(self.width(old))
        for node in self.compiled.stage.nodes:
            self.values[node] = self.lowered(node)
        kept = self.compiled.outputs[len(self.old) :]
        outputs: list[Value] = []
        for node in kept:
            value = self.number(node)
            # Two names for one value are two outputs.
            outputs.append(self.own(value) if value in outputs else value)
        program = self.b.finish(outputs, [self.number(node) for node in self.new])
        inputs, rows, vectors, matrices = (tuple(nodes) for nodes in self.operands.values())
        return Lowered(program, self.old, inputs, rows, vectors, matrices, tuple(kept))

    # --- values ---

    def features(self, node: fx.Node) -> list[int]:
        """The axes of features of a tensor; an axis of one entry is none."""
        shape, rows = node.meta["val"].shape, self.rows[node]
        return [axis for axis, size in enumerate(shape) if size != 1 and (rows is None or axis != rows.axis)]

    def width(self, node: fx.Node) -> int:
        """The number of features of each row."""
        rows = self.rows[node]
        if rows is not None and rows.factor != 1:
            raise refusal(node, f"{node.name} has {rows.factor} entries of its batch axis for each row")
        return prod(node.meta["val"].shape[axis] for axis in self.features(node))

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
        width, rows = self.width(node), self.rows[node]
        if node.meta["val"].is_complex():
            raise refusal(node, f"{node.name} is {node.meta['val'].dtype}")
        if node in self.by_step:
            return self.settled(node, self.leaf("input", node, self.b.input(width)))
        if rows is None:
            return self.settled(node, self.leaf("vector", node, self.b.vector(width)))
        source = node.all_input_nodes[0] if node.target is _aten.expand.default else node
        if source is not node and _is_given(source) and self.rows[source] is None:
            return self.settled(node, self.value(source))
        return self.settled(node, self.leaf("row", node, self.b.row(width)))

    def leaf(self, kind: str, node: fx.Node, value: Value) -> Value:
        self.operands[kind].append(node)
        return value

    def settled(self, node: fx.Node, value: Value) -> Value:
        """The value in the kind and the width that the node has."""
        dtype = node.meta["val"].dtype
        if node in self.mine and dtype not in (torch.bool, self.dtype):
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
        rule: Callable[..., Any]
        first: tuple[Any, ...]
        if packet in RULES:
            rule, first, args, named = RULES[packet], (self, node), node.args, node.kwargs
        elif packet in POINTWISE or target in POINTWISE:
            rule, first = POINTWISE[packet if packet in POINTWISE else target], (self.b,)
            self.check_alike(node)
            args = tuple(self.argument(node, a) for a in node.args)
            named = {name: self.argument(node, a) for name, a in node.kwargs.items()}
        else:
            raise refusal(node, "there is no rule for this operation")
        try:
            inspect.signature(rule).bind(*first, *args, **named)
        except TypeError:
            raise refusal(node, f"there is no rule for this form of it, {target}") from None
        result = rule(*first, *args, **named)
        return result if isinstance(result, tuple) else self.settled(node, result)

    def argument(self, node: fx.Node, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.value(argument)
        if argument is None or isinstance(argument, (bool, int, float)):
            return argument if argument is None else float(argument)
        raise refusal(node, f"an argument of it is {argument!r}")

    # --- features ---

    def same(self, node: fx.Node, source: fx.Node) -> Value:
        """The source, of which the node is a view or a copy that has the features in the same order."""
        order = _order(node, source)
        if order is not None:
            axes = [axis for axis in order if axis in self.features(source)]
            if axes != sorted(axes):
                raise refusal(node, "it changes the order of the features")
        return self.value(source)

    def check_alike(self, node: fx.Node) -> None:
        """Operands of a pointwise operation have the features of its result, or one."""
        sizes = [self.width(operand) for operand in node.all_input_nodes]
        odd = [size for size in sizes if size not in (1, max(sizes))]
        if odd or (isinstance(node.meta["val"], Tensor) and max(sizes) != self.width(node)):
            raise refusal(node, f"it spreads {(odd or sizes)[0]} features of each row over more")

    def inner(self, source: fx.Node, node: fx.Node, axis: int) -> int:
        """How many neighbouring features there are for each entry of an axis of the source."""
        shape, axes = source.meta["val"].shape, self.features(source)
        axis %= len(shape)
        rows = self.rows[source]
        if rows is not None and axis == rows.axis:
            raise refusal(node, "it works along the batch")
        if any(before < axis for before in axes):
            raise refusal(node, "it takes features that are no neighbours")
        return prod(shape[after] for after in axes if after > axis)

    def cut(self, source: fx.Node, node: fx.Node, axis: int, start: int, size: int) -> Value:
        """``size`` entries of an axis, from ``start`` on."""
        value, shape = self.value(source), source.meta["val"].shape
        if size == shape[axis]:
            return value
        inner = self.inner(source, node, axis)
        return self.b.slice(value, start * inner, size * inner)

    def paste(self, base: Value, part: Value, node: fx.Node, axis: int, start: int) -> Value:
        """``base``, like the node, with ``part`` in place of what it has from ``start`` on of an axis."""
        begin = start * self.inner(node, node, axis)
        stop = begin + part.width
        parts = [base[:begin]] if begin else []
        parts += [part] + ([base[stop:]] if stop < base.width else [])
        return self.b.concat(parts) if len(parts) > 1 else part

    def over_features(self, node: fx.Node, source: fx.Node, axes: Sequence[int] | int | None) -> bool:
        """Whether a reduction over ``axes`` is over the features."""
        dimensions, rows = source.meta["val"].dim(), self.rows[source]
        every = range(dimensions) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
        given = {axis % dimensions for axis in every}
        if rows is not None and rows.axis in given:
            raise refusal(node, "it works along the batch")
        features = set(self.features(source))
        if given & features and not given >= features:
            raise refusal(node, "it works along some features of a row at a time")
        return bool(given & features)

    def product(self, node: fx.Node, a: fx.Node, m: fx.Node) -> Value:
        """a @ m, of which one is constant over time and the same for all rows."""
        left, right = self.rows[a], self.rows[m]
        dimensions = node.meta["val"].dim()
        self.width(node)
        if any(prod(factor.meta["val"].shape[:-2]) != 1 for factor in (a, m)):
            raise refusal(node, "it is more than one product")
        if left is not None and right is None and left.axis == dimensions - 2:
            return self.times(self.number(a), m, False)
        if right is not None and left is None and right.axis == dimensions - 1:
            return self.times(self.number(m), a, True)
        raise refusal(node, "neither factor is a matrix that is the same at all steps and for all rows")

    def times(self, x: Value, matrix: fx.Node, transposed: bool) -> Value:
        source, turned = _turned_back(matrix)
        matrices = self.operands["matrix"]
        if source not in matrices:
            matrices.append(source)
            self.b.matrix(*source.meta["val"].shape[-2:])
        return self.b.matmul(x, matrices.index(source), transposed=transposed != turned)


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
