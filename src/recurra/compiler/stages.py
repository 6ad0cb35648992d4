"""The stages of a schedule as graphs, and the forms of the values that go from one to the next.

A value has one of three forms. ONCE: as in one step. ROWS: all steps, T * B rows where one step has B. TOTAL: the
sum over all steps, in the shape of one step.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from recurra.compiler.lines import at_line
from recurra.compiler.rows import VIEWS, Rows
from recurra.compiler.schedule import BATCHED, LOOP, ONCE, Stage
from recurra.compiler.trace import Step
from recurra.errors import BackendError

ROWS, TOTAL = "rows", "total"

_aten = torch.ops.aten
# The same operations by a shorter way through Python, which is what a loop of small steps waits for.
SHORT: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: torch.mm,
    _aten.bmm.default: torch.bmm,
    _aten.addmm.default: torch.addmm,
    _aten.add.Tensor: torch.add,
    _aten.sub.Tensor: torch.sub,
    _aten.mul.Tensor: torch.mul,
    _aten.div.Tensor: torch.div,
    _aten.neg.default: torch.neg,
    _aten.exp.default: torch.exp,
    _aten.tanh.default: torch.tanh,
    _aten.sigmoid.default: torch.sigmoid,
    _aten.relu.default: torch.relu,
    _aten.maximum.default: torch.maximum,
    _aten.cat.default: torch.cat,
    _aten.where.self: torch.where,
    _aten.permute.default: torch.permute,
    _aten.t.default: torch.t,
    _aten.sum.dim_IntList: torch.sum,
} | dict.fromkeys(VIEWS, torch.reshape)


# Those of them that can write their result where they are told.
_INTO = frozenset(
    {torch.mm, torch.addmm, torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.exp, torch.tanh, torch.sigmoid}
    | {torch.maximum, torch.cat, _aten.tanh_backward.grad_input, _aten.sigmoid_backward.grad_input}
)
_BACKWARD: dict[Any, Any] = {
    _aten.tanh_backward.default: _aten.tanh_backward.grad_input,
    _aten.sigmoid_backward.default: _aten.sigmoid_backward.grad_input,
}

# Functions for operations of ATen that take whatever those take.
Functions = Mapping[Any, Callable[..., Any]]


class Loop(Protocol):
    """A loop stage as it is run."""

    @property
    def needs(self) -> Sequence[fx.Node]:
        """The values that it takes from outside."""
        ...

    @property
    def gives(self) -> Sequence[fx.Node]:
        """The values of all steps that it hands over."""
        ...

    def forward(self, call: Any, operands: Sequence[Tensor], state: Sequence[Tensor], fresh: Sequence[Tensor]) -> Any:
        """The last state, then what it ``gives``, of what it ``needs`` and the first and the fresh state."""
        ...

    def backward(self, call: Any, operands: Sequence[Tensor], gradient: Sequence[Tensor]) -> Any:
        """The gradient of the first state, then that of the fresh one, each None where no row began afresh, then what
        it ``gives``, of what it ``needs`` and the gradient of the last state."""
        ...


@dataclass(frozen=True)
class Compiled:
    """A stage as a function of the batch size and ``inputs``, returning the values of ``outputs``.

    A loop's inputs are, in this order: its carries, then ``slices`` that differ from step to step, then a place for
    each of ``placed``, then the rest. Its outputs are the new values of its carries, then what others need of it;
    those in ``placed`` it has written where it was told. ``native`` is the loop as native code, or None; ``refused``
    says why there is none, where some was asked for.
    """

    stage: Stage[fx.Node]
    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    slices: tuple[fx.Node, ...]
    placed: tuple[fx.Node, ...]
    forms: dict[fx.Node, str]
    native: Loop | None = None
    refused: str = ""

    @cached_property
    def function(self) -> Callable[..., Any]:
        return fx.GraphModule(nn.Module(), self.graph).forward

    @property
    def needs(self) -> Sequence[fx.Node]:
        """The values that it takes, as it will be run."""
        return self.inputs if self.native is None else self.native.needs


# What makes native code of a loop: of the stage, its values' forms, and the nodes that it may calculate itself
# because nobody else needs them. Raises BackendError where it cannot.
Loops = Callable[[Compiled, Mapping[fx.Node, str], frozenset[fx.Node]], Loop]


class Backend(Protocol):
    """Native code for one kind of machine: of loops, and ``functions`` for what is in none."""

    functions: Functions

    def join(
        self, graph: fx.Graph, sums: Callable[..., Tensor], given: Mapping[fx.Node, int], kept: Mapping[int, int], /
    ) -> tuple[fx.Graph, frozenset[fx.Node]]:
        """The graph of a pass, with what can be one native call as one; ``sums`` is what sums over the steps in it.

        The second result are inputs that only the one call takes: what a forward pass has kept of these may lie in one
        tensor, and in place of a state there may be its shape, for zeros. What is kept has numbers: ``given`` has them
        for inputs of a backward pass, ``kept`` those of what may lie in one tensor by their places in the output.
        """
        ...

    def __call__(self, compiled: Compiled, forms: Mapping[fx.Node, str], free: frozenset[fx.Node], /) -> Loop: ...


def build(
    step: Step,
    stages: Sequence[Stage[fx.Node]],
    rows: Mapping[fx.Node, Rows | None],
    carries: Sequence[tuple[fx.Node, fx.Node]],
    forms: dict[fx.Node, str],
    wanted: Sequence[fx.Node],
    backend: Loops | None = None,
    functions: Functions | None = None,
) -> list[Compiled]:
    """Each stage as a function. ``forms`` has the form of every input of the graph, and gets that of every value.

    ``wanted`` are the nodes whose values are needed after the last stage. ``backend`` is asked for native loops, and
    ``functions`` has its own functions for operations outside them.
    """
    for stage in stages:
        for node in stage.nodes:
            many = stage.kind == LOOP or (stage.kind == BATCHED and rows.get(node) is not None)
            forms[node] = ONCE if stage.kind == ONCE else ROWS if many else TOTAL
            meets = stage.kind == LOOP and rows.get(node) is None and isinstance(node.meta["val"], Tensor)
            if stage.kind in (LOOP, BATCHED):
                sums = [operand for operand in node.all_input_nodes if forms.get(operand) == TOTAL]
                meets = meets or any(isinstance(operand.meta["val"], Tensor) for operand in sums)
            if meets:
                raise BackendError(f"the rows of a batch meet in {at_line(node)}, step by step: use backend='loop'")
        for k in stage.carries:
            forms[carries[k][0]] = ROWS
    own = functions or {}
    writers = [_Writer(step, stage, rows, carries, forms, {} if stage.kind == LOOP else own) for stage in stages]
    outside = {node for stage in stages if stage.kind != LOOP for node in stage.nodes}
    needed = set(wanted)
    compiled = []
    for writer in reversed(writers):
        each = writer.finish(needed)
        if backend is not None and each.stage.kind == LOOP:
            try:
                # What only says anew how numbers lie need not be written for a loop, whoever else takes it.
                free = {node for node in outside if node not in needed or node.target is _aten.expand.default}
                each = replace(each, native=backend(each, forms, frozenset(free)))
            except BackendError as error:
                each = replace(each, refused=str(error))
        needed |= set(each.needs)
        compiled.append(each)
    return [each for each in compiled[::-1] if each.stage.kind == LOOP or each.outputs]


class _Writer:
    """Writes the function of one stage."""

    def __init__(
        self,
        step: Step,
        stage: Stage[fx.Node],
        rows: Mapping[fx.Node, Rows | None],
        carries: Sequence[tuple[fx.Node, fx.Node]],
        forms: Mapping[fx.Node, str],
        functions: Functions,
    ) -> None:
        self.step, self.stage, self.rows, self.forms = step, stage, rows, forms
        self.short = {**SHORT, **functions}
        self.carries = [carries[k] for k in stage.carries]
        self.graph = fx.Graph()
        self.mine = set(stage.nodes)
        self.copies: dict[fx.Node, fx.Node] = {}
        self.places: dict[fx.Node, fx.Node] = {}
        pairs = ((node, self._product_in(node)) for node in stage.nodes)
        self.fused = {node: product for node, product in pairs if product is not None}

    def finish(self, needed: set[fx.Node]) -> Compiled:
        """``needed``: the nodes that later stages, or the caller, take from this one or from before it."""
        old = [node for node, _ in self.carries]
        self.batch = self.graph.placeholder("batch")
        for node in old:
            self.copies[node] = self.graph.placeholder(node.name)
        nodes = self._used(needed)
        # A product that somebody else reads must be had alone.
        self.fused = {node: product for node, product in self.fused.items() if product not in needed}
        outside: list[fx.Node] = []
        for node in [*nodes, *(new for _, new in self.carries)]:
            self._collect(node, outside)
        slices = [node for node in outside if self.stage.kind == LOOP and self.forms[node] == ROWS]
        rest = [node for node in outside if node not in slices]
        outputs = [
            node
            for node in (*self.stage.nodes, *old)
            if node in needed and (node in old or isinstance(node.meta["val"], Tensor))
        ]
        placed = [node for node in outputs if self.stage.kind == LOOP and self._can_be_placed(node)]
        for node in slices:
            self.copies[node] = self.graph.placeholder(node.name)
        self.places = {node: self.graph.placeholder(f"place_of_{node.name}") for node in placed}
        for node in rest:
            self.copies[node] = self.graph.placeholder(node.name)
        new = [self._copy(node) for _, node in self.carries]
        for node in nodes:
            if node not in self.fused.values():
                self._copy(node)
        self.graph.output(tuple(new) + tuple(self.copies[node] for node in outputs))
        return Compiled(
            stage=self.stage,
            graph=self.graph,
            inputs=(*old, *slices, *rest),
            outputs=(*(new for _, new in self.carries), *outputs),
            slices=tuple(slices),
            placed=tuple(placed),
            forms={node: self.forms[node] for node in outputs},
        )

    def _used(self, needed: set[fx.Node]) -> list[fx.Node]:
        """The nodes of the stage that a new carry or ``needed`` is computed from, in order."""
        used = {*needed, *(new for _, new in self.carries)}
        for node in reversed(self.stage.nodes):
            if node in used:
                used.update(node.all_input_nodes)
        return [node for node in self.stage.nodes if node in used]

    def _collect(self, node: fx.Node, outside: list[fx.Node]) -> None:
        """Note the values from outside that a node needs."""
        if node in self.mine:
            for operand in node.all_input_nodes:
                if operand not in self.mine:
                    self._collect(operand, outside)
        elif node in self.step.sizes or node in self.copies:
            pass
        elif node not in outside:
            outside.append(node)

    def _product_in(self, node: fx.Node) -> fx.Node | None:
        """The matrix product in a sum, where the two can be had as one operation."""
        if node.target is not _aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
            return None
        for operand in node.all_input_nodes:
            alone = operand in self.mine and len(operand.users) == 1
            shapes = {(n.meta["val"].shape, n.meta["val"].dtype) for n in (node, *node.all_input_nodes)}
            factors = operand.all_input_nodes
            if operand.target is _aten.mm.default and alone and len(shapes) == 1 and len(factors) == 2:
                return operand
        return None

    def _can_be_placed(self, node: fx.Node) -> bool:
        rows = self.rows[node]
        named: Any = node.target
        target = _BACKWARD.get(named, SHORT.get(named))
        return rows is not None and rows.axis == 0 and rows.apart == 1 and target in _INTO

    def _copy(self, node: fx.Node) -> fx.Node:
        if node in self.copies:
            return self.copies[node]
        if node in self.step.sizes:
            copy = self.batch if node is self.step.batch else self.graph.call_function(
                operator.mul, (self.batch, node.args[1])
            )  # fmt: skip
        else:
            product = self.fused.get(node)
            if product is None:
                copy = self.graph.node_copy(node, self._copy)
            else:
                factors = [self._copy(factor) for factor in product.all_input_nodes]
                (rest,) = (operand for operand in node.all_input_nodes if operand is not product)
                copy = self.graph.call_function(_aten.addmm.default, (self._copy(rest), *factors))
            target: Any = copy.target
            copy.target = self.short.get(target, target)
            if node in self.places:
                copy.target = _BACKWARD.get(target, copy.target)
                copy.kwargs = {**copy.kwargs, "grad_input" if target in _BACKWARD else "out": self.places[node]}
        copy.meta["stepped"] = stepped(self.rows.get(node), ROWS if self.stage.kind == BATCHED else ONCE)
        self.copies[node] = copy
        return copy


def stepped(rows: Rows | None, form: str) -> bool | None:
    """Whether the first axis of a value has the rows of all steps, those of each step together; None if another one
    has."""
    if rows is None or form != ROWS:
        return False
    return True if rows.axis == 0 and rows.apart == 1 else None
