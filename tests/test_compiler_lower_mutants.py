"""Lowerings that are wrong on purpose. The comparison with the hoisted loop must notice every one of them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import pytest
import torch

from lowered_loops import check, make
from recurra.compiler import lower as lower_module
from recurra.compiler import operations
from recurra.compiler.ir import Op
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


_pointwise = dict(operations.POINTWISE)
_rules = dict(RULES)
MUTANTS = {
    "split offsets swapped": ("LSTM", changed(RULES, _aten.split, lambda *args: _rules[_aten.split](*args)[::-1])),
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
        "LSTM",
        changed(RULES, _aten.cat, lambda to, node, parts, axis: _rules[_aten.cat](to, node, parts[::-1], axis)),
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
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_lowering_that_is_wrong_on_purpose_is_told_apart(monkeypatch, name):
    cell, change = MUTANTS[name]
    change(monkeypatch)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(monkeypatch, make(cell, 3, 5))
