"""What native loops take over from the batched stages behind them, so that a value is not written and read again.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from recurra.compiler.operations import POINTWISE
from recurra.compiler.rows import VIEWS, Rows
from recurra.compiler.schedule import BATCHED, LOOP, Stage

_aten = torch.ops.aten
_WORTH = POINTWISE.keys() | {_aten.cat}
_VIEWS = {view.overloadpacket for view in VIEWS} | {_aten.unsqueeze, _aten.squeeze}


def absorb(
    stages: Sequence[Stage[fx.Node]],
    rows: Mapping[fx.Node, Rows | None],
    given: Iterable[fx.Node],
) -> list[Stage[fx.Node]]:
    """The stages with pointwise arithmetic and joins on what a loop has just calculated moved into that loop.

    ``given`` are the values that exist before the first stage.
    """
    result = list(stages)
    before = set(given)
    for place, stage in enumerate(result):
        if stage.kind == LOOP:
            later = [k for k in range(place + 1, len(result)) if result[k].kind == BATCHED]
            taken = _taken(stage, [node for k in later for node in result[k].nodes], before, rows)
            stage = result[place] = replace(stage, nodes=(*stage.nodes, *taken))
            for k in later:
                result[k] = replace(result[k], nodes=tuple(n for n in result[k].nodes if n not in taken))
        before.update(stage.nodes)
    return [stage for stage in result if stage.nodes or stage.kind == LOOP]


def _taken(
    stage: Stage[fx.Node], later: Sequence[fx.Node], before: set[fx.Node], rows: Mapping[fx.Node, Rows | None]
) -> list[fx.Node]:
    body = set(stage.nodes)
    found: list[fx.Node] = []
    for node in later:
        operands = node.all_input_nodes
        fits = _packet(node) in _WORTH | _VIEWS and _by_row(node, rows) and all(_by_row(n, rows) for n in operands)
        if fits and body.intersection(operands) and body.union(before).issuperset(operands):
            body.add(node)
            found.append(node)
    kept: list[fx.Node] = []
    for node in reversed(found):
        if _packet(node) in _WORTH or any(node in user.all_input_nodes for user in kept):
            kept.append(node)
    return kept[::-1]


def _by_row(node: fx.Node, rows: Mapping[fx.Node, Rows | None]) -> bool:
    """Whether a value has one entry of its batch axis for each row."""
    where = rows.get(node)
    return isinstance(node.meta.get("val"), Tensor) and where is not None and where.factor == 1


def _packet(node: fx.Node) -> Any:
    return node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
