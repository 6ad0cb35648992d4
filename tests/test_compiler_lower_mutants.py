"""Lowerings that are wrong on purpose. The comparison with the hoisted loop must notice every one of them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from invented_cells import FOREIGN, foreign
from lowered_loops import check, make
from recurra.compiler import lower as lower_module
from recurra.compiler import operations
from recurra.compiler.features import Features
from recurra.compiler.ir import Op
from recurra.compiler.lower import Lowering
from recurra.compiler.rules import RULES

_aten = torch.ops.aten


def changed(table, key, rule):
    return lambda monkeypatch: monkeypatch.setitem(table, key, rule)


def a_matrix_transposed(monkeypatch):
    right = lower_module._turned_back
    monkeypatch.setattr(lower_module, "_turned_back", lambda matrix: (right(matrix)[0], not right(matrix)[1]))


def new_carries_in_another_order(monkeypatch):
    right = lower_module.Lowering.number
    monkeypatch.setattr(
        lower_module.Lowering,
        "number",
        lambda self, node: right(self, self.new[~self.new.index(node)] if node in self.new else node),
    )


def method(owner, name, wrong):
    """The method, given the right one and what it is called with."""
    right = getattr(owner, name)
    return lambda monkeypatch: monkeypatch.setattr(owner, name, lambda self, *args: wrong(right, self, *args))


def the_first_instead_of_each_before(right, self, value, groups, op):
    return self.ungroup(self.regroup(value, groups), groups)


def the_parts_swapped(right, self, node):
    found = right(self, node)
    return found[::-1] if isinstance(found, tuple) else found


def without_the_middle(right, self, values, size, meet):
    return right(self, [value[: value.width // size * (size - size % 2)] for value in values], size - size % 2, meet)


def groups_of_neighbours(right, self, node, source, axes):
    found = right(self, node, source, axes)
    return replace(found, order=sorted(found.order))


def places_apart(right, self, base, value, places):
    return right(self, base, value, sorted(places))


_pointwise = dict(operations.POINTWISE)
_rules = dict(RULES)
MUTANTS = {
    "split offsets swapped": ("LSTM", method(Features, "moved", the_parts_swapped)),
    "a matrix transposed": ("Vanilla", a_matrix_transposed),
    "sigmoid_backward as sigmoid": (
        "GRU",
        changed(operations.POINTWISE, _aten.sigmoid_backward, lambda b, g, y: _pointwise[_aten.sigmoid](b, g)),
    ),
    "tanh_backward with its operands swapped": (
        "LSTM",
        changed(operations.POINTWISE, _aten.tanh_backward, lambda b, g, y: _pointwise[_aten.tanh_backward](b, y, g)),
    ),
    "a threshold the wrong way round": (
        "Vanilla relu",
        changed(operations.POINTWISE, _aten.threshold_backward, lambda b, g, x, t: b.apply(Op.WHERE, x > t, 0.0, g)),
    ),
    "rsub as sub": ("CoupledLSTM", changed(operations.POINTWISE, _aten.rsub, _pointwise[_aten.sub])),
    "parts joined in another order": (
        "BlockDiagonal",
        method(Features, "join", lambda right, self, parts: right(self, parts[::-1])),
    ),
    "a product without its bias": (
        "RecurrentHighway",
        changed(RULES, _aten.addmm, lambda to, node, c, a, m: _rules[_aten.mm](to, node, a, m)),
    ),
    "a variance with a correction": (
        "LayerNormLSTM",
        changed(
            RULES,
            _aten.native_layer_norm,
            lambda to, node, x, shape, *rest: _rules[_aten.native_layer_norm](to, node, x, shape, *rest[:2], 1e-3),
        ),
    ),
    "new carries in another order": ("LSTM", new_carries_in_another_order),
    "features taken in another order": (
        "Moved",
        method(Features, "pick", lambda right, self, values, numbers, *fill: right(self, values, numbers[::-1], *fill)),
    ),
    "fill that is another": (
        "Moved",
        method(Features, "pick", lambda right, self, values, numbers, fill=0.0: right(self, values, numbers, fill + 1)),
    ),
    "a sum that forgets what is before": ("ONLSTM", method(Features, "scan", the_first_instead_of_each_before)),
    "a maximum that forgets the middle": ("Maxout", method(Features, "fold", without_the_middle)),
    "groups of other features": ("Counted", method(Features, "groups", groups_of_neighbours)),
    "gradients added in other places": ("Moved", method(Features, "accumulate", places_apart)),
    "heads that share a matrix": (
        "HeadedSLSTM",
        method(Lowering, "times", lambda right, self, x, matrix, head, *rest: right(self, x, matrix, 0, *rest)),
    ),
    "blocks of a matrix the wrong way round": (
        "BlockDiagonal",
        method(Lowering, "times", lambda right, self, x, m, head, turned, n: right(self, x, m, head, not turned, n)),
    ),
    "numbers of one group for all": (
        "BlockDiagonal",
        method(Features, "back", lambda right, self, value, groups: self.b.broadcast(value[:1], len(groups.member))),
    ),
    "a remainder with the other sign": (
        "Rounded",
        changed(operations.POINTWISE, _aten.remainder, lambda b, x, y: _pointwise[_aten.remainder](b, x, -y)),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_lowering_that_is_wrong_on_purpose_is_told_apart(monkeypatch, name):
    cell, change = MUTANTS[name]
    change(monkeypatch)
    make_cell = make(cell, 3, 5) if cell not in FOREIGN else foreign(cell)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(monkeypatch, make_cell)
