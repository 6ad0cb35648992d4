"""A traced graph made simpler, before anything is planned.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

_aten = torch.ops.aten


def tidy(graph: fx.Graph) -> None:
    """Choices that are always the same made, axes that are put back left alone, and operations taken apart whose
    results are wanted at different times."""
    _split_masked(graph)
    _choose(graph)
    _put_back(graph)
    graph.eliminate_dead_code()


def _choose(graph: fx.Graph) -> None:
    """The gradient of what takes one entry of an axis that has only that one asks which entry it is."""
    for node in list(graph.nodes):
        mask: Any = node.args[0] if node.target is _aten.where.self else None
        if not _is_fixed(mask):
            continue
        found = _fixed(mask)
        chosen = node.args[1 if bool(found.all()) else 2]
        alike = all(chosen.meta[size].shape == node.meta[size].shape for size in ("val", "other"))
        if bool(found.all()) == bool(found.any()) and alike and chosen.meta["val"].dtype is node.meta["val"].dtype:
            node.replace_all_uses_with(chosen)


def _put_back(graph: fx.Graph) -> None:
    """einsum gives axes another order and then, as often as not, the one that they had."""
    for node in graph.nodes:
        if node.target is not _aten.permute.default:
            continue
        order, source = _order(node), node.args[0]
        while source.target is _aten.permute.default:
            order, source = [_order(source)[axis] for axis in order], source.args[0]
        if order == sorted(order):
            node.replace_all_uses_with(source)


def _order(node: fx.Node) -> list[int]:
    """Where each axis of a permuted value comes from."""
    axes: Any = node.args[1]
    return [axis % len(axes) for axis in axes]


def _is_fixed(node: Any) -> bool:
    """Whether a value depends on nothing, not even on a constant of the module, which somebody may change."""
    made = isinstance(node, fx.Node) and node.op == "call_function"
    return made and all(map(_is_fixed, node.all_input_nodes))


def _fixed(node: fx.Node) -> Any:
    target: Any = node.target
    return target(*fx.node.map_arg(node.args, _fixed), **fx.node.map_arg(node.kwargs, _fixed))


def _split_masked(graph: fx.Graph) -> None:
    """Make two of an operation that gives the gradient of its first input along with those of its weights.

    The first may have to wait for the step after; the others need not.
    """
    for node in list(graph.nodes):
        if not isinstance(node.target, OpOverload):
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        if "output_mask" not in names or names.index("output_mask") >= len(node.args):
            continue
        at = names.index("output_mask")
        parts = {part.args[1]: part for part in node.users}
        for numbers in ([0], [number for number in parts if number != 0]):
            with graph.inserting_before(node):
                copy = graph.node_copy(node)
            asked: Any = node.args[at]
            mask = [given and number in numbers for number, given in enumerate(asked)]
            copy.args = (*node.args[:at], mask, *node.args[at + 1 :])
            for number in numbers:
                if number in parts:
                    parts[number].args = (copy, number)
