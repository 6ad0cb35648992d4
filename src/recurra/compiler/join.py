"""Which operations of a pass are native, and can be one call.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from recurra.compiler.llvm import gemm
from recurra.compiler.native import NativeLoop
from recurra.compiler.segment import Segment

_PRODUCTS = {gemm.mm, gemm.addmm, gemm.total}
_TURNED = {torch.permute, torch.t, torch.reshape}
# These only say anew where numbers lie, or how many there are.
_ALIASES = {*_TURNED, operator.getitem, getattr, operator.mul}


def join(
    graph: fx.Graph, sums: Callable[..., Tensor], given: Mapping[fx.Node, int], kept: Mapping[int, int]
) -> tuple[fx.Graph, frozenset[fx.Node]]:
    """The graph of a pass with its loops, products and ``sums`` over the steps as one operation, as far as nothing else
    is calculated of one and used by the next; and the inputs that only the one operation takes.

    ``given`` has the inputs that a forward pass has kept, and the number of each; those that only the one operation
    takes may lie in one tensor. ``kept`` has such numbers by their places in the output.
    """
    return _Join(graph, sums, given, kept).run()


class _Join:
    def __init__(
        self, graph: fx.Graph, sums: Callable[..., Tensor], given: Mapping[fx.Node, int], kept: Mapping[int, int]
    ) -> None:
        self.graph, self.sums, self.given, self.kept = graph, sums, given, kept
        # Those that are called, those calculated of their results, and of these those that must come after all.
        self.chosen: list[fx.Node] = []
        self.below: set[fx.Node] = set()
        self.barred: set[fx.Node] = set()

    def run(self) -> tuple[fx.Graph, frozenset[fx.Node]]:
        for node in self.graph.nodes:
            self.place(node)
        loops = [loop for node in self.chosen if (loop := _loop(node)) is not None]
        if len(self.chosen) < 2 or len({loop.dtype for loop in loops}) != 1:
            return self.graph, frozenset()
        # What somebody else takes: of a loop its parts, and of these not what only says anew where their numbers lie.
        parts = [part for node in self.chosen for part in ([node] if _loop(node) is None else node.users)]
        inside = {*self.chosen, *parts}
        output = self.graph.output_node()
        ends: Any = output.args[0]
        # What is kept, and is a result of the one call: by its place, the other results being the caller's.
        held = {at: ends[at] for at in self.kept if ends[at] in parts}
        output.args = (tuple(None if at in held else node for at, node in enumerate(ends)),)
        parts = [_shown(part) for part in parts]
        inside.update(parts)
        for node in reversed(self.graph.nodes):
            if _is_alias(node) and not self.is_given(node) and inside.intersection(node.users):
                inside.add(node)
        body = [node for node in self.graph.nodes if node in inside]
        needed = set(self.barred)
        for node in reversed(self.graph.nodes):
            if node in self.below and node not in self.chosen and node not in parts and needed.intersection(node.users):
                needed.add(node)
        rest = [node for node in self.graph.nodes if node in needed and node is not output]
        results = [node for node in parts if needed.intersection(node.users)]
        call = next(iter(self.graph.nodes))
        inputs = [n for n in dict.fromkeys(o for node in body for o in node.all_input_nodes) if n not in inside]
        inputs.remove(call)
        places = [node for node in self.graph.nodes if node.op == "placeholder" and node is not call]
        taken = frozenset(node for node in places if inside.issuperset(node.users))
        given = [self.given.get(node) if node in taken else None for node in inputs]
        kept = [*[None] * len(results), *(self.kept[at] for at in held)]
        # All results are those of the one call, each its own.
        found = [node for node in ends if node is not None]
        alone = len(found) == len(set(found)) and {*results, *held.values()}.issuperset(found)
        part = _part(call, inputs, body, [*results, *held.values()])
        segment = Segment(part, self.sums, loops[0].dtype, given, kept, [*map(_is_stepped, inputs)], alone)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if node not in self.below and node not in self.barred:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        joined = graph.call_function(segment.run, (copies[call], *(copies[node] for node in inputs)))
        for k, node in enumerate(results):
            copies[node] = graph.call_function(operator.getitem, (joined, k))
        for node in rest:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        own = {at: graph.call_function(operator.getitem, (joined, k)) for k, at in enumerate(held, len(results))}
        graph.output(tuple(own[at] if at in own else node and copies[node] for at, node in enumerate(ends)))
        # What only the one call took.
        graph.eliminate_dead_code(lambda node: not _is_alias(node))
        return graph, taken

    def place(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if node.op == "output" or self.barred.intersection(inputs):
            self.barred.add(node)
        elif self.is_called(node):
            self.chosen.append(node)
            self.below.add(node)
        elif self.below.intersection(inputs):
            (self.below if _is_alias(node) else self.barred).add(node)

    def is_given(self, node: fx.Node) -> bool:
        """Whether what only says anew where numbers lie is done before the one call, or after it."""
        if node in self.below or node in self.barred:
            return node in self.barred
        # Of a tuple from elsewhere its parts are given, and what a loop takes must lie in its own order.
        ordered = node.target is torch.reshape and node.all_input_nodes[0].op == "placeholder"
        return node.target is operator.getitem or (any(map(_loop, node.users)) and not ordered)

    def is_called(self, node: fx.Node) -> bool:
        return _loop(node) is not None or node.target in _PRODUCTS or node.target is self.sums


def _part(call: fx.Node, given: list[fx.Node], body: list[fx.Node], results: list[fx.Node]) -> fx.Graph:
    """A graph of some of the nodes of another."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in (call, *given)}
    for node in body:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    return graph


def _shown(part: fx.Node) -> fx.Node:
    """What everybody else takes of a part of the one call: itself, or the same in another shape."""
    (*users,) = part.users
    return users[0] if len(users) == 1 and users[0].target is torch.reshape else part


def _loop(node: fx.Node) -> NativeLoop | None:
    loop = getattr(node.target, "__self__", None)
    return loop if isinstance(loop, NativeLoop) else None


def _is_stepped(node: fx.Node) -> bool | None:
    """Whether the first axis has rows of all steps, None if that is not known."""
    found: bool | None = node.meta.get("stepped")
    if "stepped" not in node.meta and node.target in _TURNED:
        source = _is_stepped(node.all_input_nodes[0])
        return None if source and node.target is not torch.reshape else source
    return found


def _is_alias(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _ALIASES
