"""What native loops take over from the batched stages around them, so that a value is not written and read again.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from recurra.compiler.operations import POINTWISE
from recurra.compiler.rows import VIEWS, Rows
from recurra.compiler.schedule import BATCHED, LOOP, Stage
from recurra.compiler.stages import ROWS

_aten = torch.ops.aten
_WORTH = POINTWISE.keys() | {_aten.cat, _aten.slice_scatter, _aten.sum}
# What may make less of a matrix, and how much less that is at least.
_SHRINKS = {_aten.bmm, _aten.sum}
_LEAST = 8
_VIEWS = {view.overloadpacket for view in VIEWS} | {_aten.unsqueeze, _aten.squeeze}


def absorb(
    stages: Sequence[Stage[fx.Node]],
    rows: Mapping[fx.Node, Rows | None],
    given: Mapping[fx.Node, str],
) -> list[Stage[fx.Node]]:
    """The stages with what works row by row, next to a loop, moved into that loop: arithmetic and sums on what it
    takes or has just calculated, joins, and what makes of a matrix in each row a few numbers.

    ``given`` has the values that exist before the first stage, each with its form.
    """
    result = list(stages)
    before = set(given)
    varying = {node for node, form in given.items() if form == ROWS}
    varying.update(node for stage in stages if stage.kind in (BATCHED, LOOP) for node in stage.nodes)
    place = 0
    while place < len(result):
        stage = result[place]
        if stage.kind == LOOP:
            before -= _pull(result, place, before - varying, rows)
            later = [k for k in range(place + 1, len(result)) if result[k].kind == BATCHED]
            taken, ahead = _taken(
                result[place], [node for k in later for node in result[k].nodes], before, varying, rows
            )
            for k in later:
                result[k] = replace(result[k], nodes=tuple(n for n in result[k].nodes if n not in {*taken, *ahead}))
            result[place] = replace(result[place], nodes=(*result[place].nodes, *taken))
            if ahead:
                result.insert(place, Stage(BATCHED, tuple(ahead)))
                before.update(ahead)
                place += 1
            # Now of what only they need that it has taken over, too.
            before -= _pull(result, place, before - varying, rows)
            stage = result[place]
        before.update(stage.nodes)
        place += 1
    return [stage for stage in result if stage.nodes or stage.kind == LOOP]


def _taken(
    stage: Stage[fx.Node],
    later: Sequence[fx.Node],
    before: set[fx.Node],
    varying: set[fx.Node],
    rows: Mapping[fx.Node, Rows | None],
) -> tuple[list[fx.Node], list[fx.Node]]:
    """What the loop takes over, and what must be calculated before it for that."""
    body = set(stage.nodes)
    # What does not need the loop, and of that what the loop may calculate as well.
    free = set(before)
    light: set[fx.Node] = set()
    found: list[fx.Node] = []
    # What needs nothing that is not there before the loop, either.
    ready = body | before
    same = before - varying
    for node in later:
        operands = node.all_input_nodes
        # A matrix that is the same at all steps is better multiplied with all of them at once.
        fits = _shrinks(node, varying) or _packet(node) in _WORTH | _VIEWS
        fits = fits and _by_row(node, rows) and all(_by_row(n, rows) or n in same for n in operands)
        if free.issuperset(operands):
            free.add(node)
            if fits and not _shrinks(node) and ready.issuperset(operands):
                light.add(node)
                ready.add(node)
        elif fits and body.intersection(operands) and body.union(free).issuperset(operands):
            body.add(node)
            found.append(node)
            if ready.issuperset(operands):
                ready.add(node)
    kept: list[fx.Node] = []
    for node in reversed(found):
        worth = _shrinks(node) or (_packet(node) in _WORTH and node in ready)
        if worth or any(node in user.all_input_nodes for user in kept):
            kept.append(node)
    kept.reverse()
    ahead = _ahead(kept, later, free, light)
    if any(map(_is_matrix, stage.nodes)):
        for node in later:
            # What is large, and only there to be summed, is better never written, and a matrix for each row is no
            # matter for a product of matrices. The loop may as well do it.
            operands = node.all_input_nodes
            worth = _packet(node) is _aten.bmm or any(_is_summed(each, later) for each in operands)
            if node in free - ahead and _shrinks(node) and worth:
                more = _ahead([node], later, free)
                if more.isdisjoint(kept) and all(_by_row(each, rows) for each in (node, *operands)):
                    kept.append(node)
                    ahead |= more
    taken = set(kept)
    for node in reversed(later):
        if node in light - ahead and taken.intersection(node.users):
            taken.add(node)
    return [node for node in later if node in taken], [node for node in later if node in ahead]


def _pull(
    stages: list[Stage[fx.Node]], place: int, same: Container[fx.Node], rows: Mapping[fx.Node, Rows | None]
) -> set[fx.Node]:
    """Moves pointwise arithmetic that only a loop, and what comes after it, needs into that loop."""
    body = set(stages[place].nodes)
    rest = {node for stage in stages[:place] for node in stage.nodes}
    pulled: list[fx.Node] = []
    for node in reversed([node for stage in stages[:place] if stage.kind == BATCHED for node in stage.nodes]):
        fits = _packet(node) in _WORTH and _by_row(node, rows)
        fits = fits and all(_by_row(n, rows) or n in same for n in node.all_input_nodes)
        if fits and body.intersection(node.users) and rest.isdisjoint(node.users):
            pulled.append(node)
            rest.remove(node)
            body.add(node)
    for k in range(place):
        stages[k] = replace(stages[k], nodes=tuple(n for n in stages[k].nodes if n in rest))
    stages[place] = replace(stages[place], nodes=(*reversed(pulled), *stages[place].nodes))
    return set(pulled)


def _ahead(
    taken: Iterable[fx.Node], later: Sequence[fx.Node], free: set[fx.Node], light: Container[fx.Node] = ()
) -> set[fx.Node]:
    """What must be calculated before the loop that takes these nodes over, and what is ``light`` with them."""
    ahead = {operand for node in taken for operand in node.all_input_nodes if operand in free and operand not in light}
    for node in reversed(later):
        if node in free and any(user in ahead for user in node.users):
            ahead.add(node)
            # Parts of one result stay together.
            ahead.update(user for user in node.users if user.target is operator.getitem)
    return ahead.intersection(later)


def _shrinks(node: fx.Node, among: Container[fx.Node] | None = None) -> bool:
    """Whether a node makes of a matrix, one of those ``among`` which it must be, much less than it is."""
    if _packet(node) not in _SHRINKS or not isinstance(node.meta.get("val"), Tensor):
        return False
    given = [operand for operand in node.all_input_nodes if _is_matrix(operand) and (among is None or operand in among)]
    return any(operand.meta["val"].numel() >= _LEAST * node.meta["val"].numel() for operand in given)


def _is_summed(node: fx.Node, later: Sequence[fx.Node]) -> bool:
    """Whether a matrix is calculated later, and nobody takes it who does not shrink it."""
    return node in later and _is_matrix(node) and _packet(node) in POINTWISE and all(map(_shrinks, node.users))


def _is_matrix(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 2


def _by_row(node: fx.Node, rows: Mapping[fx.Node, Rows | None]) -> bool:
    """Whether what belongs to a row of the batch lies together in a value, row after row."""
    where = rows.get(node)
    return isinstance(node.meta.get("val"), Tensor) and where is not None and where.axis == 0 and where.apart == 1


def _packet(node: fx.Node) -> Any:
    return node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
