"""A pass of a plan as one function: its stages one after the other, each value handed on in the form that is taken.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from recurra.compiler.eager import EagerLoop
from recurra.compiler.rows import Rows
from recurra.compiler.schedule import BATCHED, LOOP, ONCE, SUMMED
from recurra.compiler.stages import ROWS, SHORT, Backend, Compiled, Loop, stepped

# What a pass gives: a value, and the kind of stage that would take it as it is wanted.
Ends = Sequence[tuple[fx.Node, str]]
Sum = Callable[[Tensor, list[int]], Tensor]


@dataclass(frozen=True)
class Assembled:
    """A pass as a function; the numbers of what it is given that may lie in one tensor, see ``assemble``; and of the
    carries in whose place it takes a shape, for zeros."""

    function: Callable[..., tuple[Any, ...]]
    together: frozenset[int]
    zeros: frozenset[int]


def assemble(
    stages: Sequence[Compiled],
    rows: Mapping[fx.Node, Rows | None],
    forms: Mapping[fx.Node, str],
    given: Sequence[fx.Node],
    carries: Sequence[bool],
    ends: Ends,
    kept: Sequence[fx.Node],
    backend: Backend | None = None,
    backward: Assembled | None = None,
) -> Assembled:
    """The function of a call, of the values of ``given``, and of the carries' first and fresh states. Values of all
    steps are (T, B, ...).

    It gives the ``ends``, the carries' last states, and what is ``kept`` for the ``backward`` pass. Backward, where
    there is none, ``kept`` is among what is given; it is of the gradients of the carries' last states, and after the
    ends it gives those of their first and, None where no row began afresh, of their fresh states. ``forms`` has the
    form of every value; ``carries`` says of each carry whether its last state is asked for.
    """
    return _Assembly(rows, forms, backend).run(stages, given, carries, ends, kept, backward)


class _Assembly:
    """A pass on its way to a function: ``values`` has the variable of every value that there is by now."""

    def __init__(
        self, rows: Mapping[fx.Node, Rows | None], forms: Mapping[fx.Node, str], backend: Backend | None
    ) -> None:
        self.rows, self.forms, self.backend = rows, forms, backend
        functions = {} if backend is None else backend.functions
        self.sum = summing(functions.get(torch.ops.aten.sum.dim_IntList, torch.sum))
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.taken: dict[tuple[fx.Node, str], fx.Node] = {}

    def run(
        self,
        stages: Sequence[Compiled],
        given: Sequence[fx.Node],
        carries: Sequence[bool],
        ends: Ends,
        kept: Sequence[fx.Node],
        backward: Assembled | None,
    ) -> Assembled:
        back = backward is None
        self.call_ = self.graph.placeholder("call")
        places = {node: self.graph.placeholder(node.name) for node in given}
        states = [self.graph.placeholder(f"carry_{k}") for k, _ in enumerate(carries)]
        last: list[Any] = [*states]
        fresh: list[Any] = [None if back else self.graph.placeholder(f"fresh_{k}") for k, _ in enumerate(carries)]
        for node, place in places.items():
            place.meta["stepped"] = stepped(self.rows.get(node), self.forms[node])
        for state in (*states, *fresh):
            if state is not None:
                state.meta["stepped"] = False
        self.steps, self.batch = (self.call(getattr, self.call_, name) for name in ("T", "B"))
        self.size = self.call(operator.mul, self.steps, self.batch)
        for node, place in places.items():
            steps = self.forms[node] == ROWS and node not in kept
            self.values[node] = self.call(torch.reshape, place, [self.size, *_features(node)]) if steps else place
        for stage in stages:
            if stage.stage.kind == LOOP:
                self.loop(stage, last, fresh, back)
            else:
                self.straight(stage, self.size if stage.stage.kind == BATCHED else self.batch)
        last = [value if asked else None for value, asked in zip(last, carries, strict=True)]
        results = [*(self.end(node, kind) for node, kind in ends), *last]
        held: dict[int, int] = {}
        if backward is None:
            results += [value if asked else None for value, asked in zip(fresh, carries, strict=True)]
        else:
            held = {len(results) + number: number for number in range(len(kept)) if number in backward.together}
            results += [self.take(node, LOOP) for node in kept]
        self.graph.output(tuple(results))
        _share_once(self.graph)
        _turn_once(self.graph)
        graph, numbers = self.graph, {places[node]: number for number, node in enumerate(kept)} if back else {}
        inside = frozenset[fx.Node]()
        if self.backend is not None:
            graph, inside = self.backend.join(graph, self.sum, numbers, held)
        together = frozenset(number for node, number in numbers.items() if node in inside)
        zeros = frozenset(k for k, state in enumerate(states) if state in inside)
        return Assembled(fx.GraphModule(nn.Module(), graph).forward, together, zeros)

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(function, args)

    def loop(self, compiled: Compiled, last: list[Any], fresh: list[Any], backward: bool) -> None:
        numbers = compiled.stage.carries
        path: Loop = EagerLoop(compiled, self.rows) if compiled.native is None else compiled.native
        operands = tuple(self.value(node) for node in path.needs)
        states = tuple(last[k] for k in numbers)
        if backward:
            results = self.call(path.backward, self.call_, operands, states)
        else:
            results = self.call(path.forward, self.call_, operands, states, tuple(fresh[k] for k in numbers))
        count = len(numbers)
        for place, k in enumerate(numbers):
            last[k] = self.call(operator.getitem, results, place)
            if backward:
                fresh[k] = self.call(operator.getitem, results, count + place)
        count *= 2 if backward else 1
        for place, node in enumerate(path.gives):
            self.values[node] = self.call(operator.getitem, results, count + place)

    def straight(self, compiled: Compiled, size: fx.Node) -> None:
        """The operations of a stage that is no loop."""
        batch, *places = [node for node in compiled.graph.nodes if node.op == "placeholder"]
        copies: dict[fx.Node, fx.Node] = {batch: size}
        for place, node in zip(places, compiled.inputs, strict=True):
            copies[place] = self.take(node, compiled.stage.kind)
        results: Any = self.graph.graph_copy(compiled.graph, copies)
        self.values.update(zip(compiled.outputs, results, strict=True))

    def value(self, node: fx.Node) -> fx.Node:
        """A value as it is. What only shows a given one in another way need not be given."""
        if node not in self.values:
            self.values[node] = self.graph.node_copy(node, self.value)
            self.values[node].meta["stepped"] = stepped(self.rows.get(node), self.forms[node])
            self.values[node].target = SHORT.get(node.target, node.target)
        return self.values[node]

    def end(self, node: fx.Node, kind: str) -> fx.Node:
        """A value as the caller takes it."""
        value = self.take(node, kind)
        if kind != BATCHED:
            return value
        return self.call(torch.reshape, value, [self.steps, self.batch, *_features(node)])

    def take(self, node: fx.Node, kind: str) -> fx.Node:
        """A value as a stage of that kind takes it, a loop's kind being as it is."""
        value, form, rows = self.value(node), self.forms[node], self.rows[node]
        found = self.taken.get((node, kind))
        if found is not None:
            return found
        if kind == BATCHED and form == ONCE and rows is not None:
            value = self.call(spread, value, self.steps, rows.axis, rows.apart)
            value.meta["stepped"] = stepped(rows, ROWS)
        elif kind == SUMMED and form == ROWS:
            assert rows is not None
            if value.target is torch.bmm and rows.axis == 0 and rows.apart == 1:
                value = self.call(product_over_time, *value.args, self.steps)
            else:
                value = self.call(self.sum, value, self.steps, rows.axis, rows.apart)
        self.taken[node, kind] = value
        return value


def _features(node: fx.Node) -> tuple[int, ...]:
    """The sizes of the axes behind that of the batch."""
    return tuple(node.meta["val"].shape[1:])


def _turn_once(graph: fx.Graph) -> None:
    """A matrix that is turned and turned again is itself. What has been had otherwise nobody takes."""
    for node in graph.nodes:
        source = node.args[0] if node.target is torch.permute else None
        if isinstance(source, fx.Node) and source.target is torch.permute and [1, 0] == node.args[1] == source.args[1]:
            node.replace_all_uses_with(source.args[0])
    graph.eliminate_dead_code(lambda node: node.target not in (torch.permute, torch.bmm, spread))


def _share_once(graph: fx.Graph) -> None:
    """A row's matrix that is the same at all steps is multiplied with those of all steps at once."""
    for node in list(graph.nodes):
        for place in (1, 0) if node.target is torch.bmm else ():
            given = node.args[place]
            turned = given.target is torch.permute and list(given.args[1]) == [0, 2, 1]
            value = given.args[0] if turned else given
            if value.target is spread and value.args[2:] == (0, 1):
                with graph.inserting_before(node):
                    same = graph.call_function(torch.permute, (value.args[0], [0, 2, 1])) if turned else value.args[0]
                    taken = (same, node.args[1]) if place == 0 else (node.args[0], same)
                    found = graph.call_function(product_with_same, (*taken, value.args[1], place == 0))
                found.meta.update(node.meta)
                node.replace_all_uses_with(found)
                break


def spread(value: Tensor, T: int, axis: int, apart: int) -> Tensor:
    """A value of one step, with its rows on an axis in so many parts, for T steps."""
    parts = value.unflatten(axis, (apart, 1, value.shape[axis] // apart))
    shape = [*parts.shape]
    shape[axis + 1] = T
    whole: Tensor = parts.expand(shape).flatten(axis, axis + 2)
    return whole


def product_with_same(a: Tensor, b: Tensor, T: int, first: bool) -> Tensor:
    """The products of T steps, a (T * B, N, K) times b (B, K, M); with ``first`` a (B, N, K) times b (T * B, K, M)."""
    if first:
        return product_with_same(b.mT, a.mT, T, False).mT
    (B, K, M), N = b.shape, a.shape[1]
    rows = a.reshape(T, B, N, K).transpose(0, 1).reshape(B, T * N, K)
    return torch.bmm(rows, b).view(B, T, N, M).transpose(0, 1).reshape(T * B, N, M)


def product_over_time(a: Tensor, b: Tensor, T: int) -> Tensor:
    """The sum over T steps of the products of a (T * B, N, K) and b (T * B, K, M): (B, N, M), none of them written."""
    B = a.shape[0] // T
    left, right = a.reshape(T, B, *a.shape[1:]), b.reshape(T, B, *b.shape[1:])
    return torch.bmm(left.permute(1, 2, 0, 3).flatten(2), right.transpose(0, 1).flatten(1, 2))


def summing(total: Sum) -> Callable[[Tensor, int, int, int], Tensor]:
    """The sum over T steps of a value with its rows on an axis in so many parts, by a sum over the first axis."""

    def sum_of_steps(value: Tensor, T: int, axis: int, apart: int) -> Tensor:
        if axis == 0 and apart == 1 and value.is_contiguous():
            # As a matrix with a row for each step.
            shape = (value.shape[0] // T, *value.shape[1:])
            return torch.reshape(total(value.view(T, prod(shape)), [0]), shape)
        whole: Tensor = Rows(axis, apart, apart).by_step(value, T).sum(axis + 1).flatten(axis, axis + 1)
        return whole

    return sum_of_steps
