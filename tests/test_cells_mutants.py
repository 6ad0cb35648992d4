"""Cells that are wrong on purpose. The oracle must notice every one of them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from agreement import check_oracle, draw, killed
from catalogue import BY_NAME, Attending
from recurra import cells
from recurra.cell import Cell

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class Bent:
    """A cell as its own step sees it, with other parameters."""

    def __init__(self, cell: Cell, parameters: dict[str, torch.Tensor]) -> None:
        self._cell, self._parameters = cell, parameters

    def __getattr__(self, name: str) -> Any:
        return self._parameters[name] if name in self._parameters else getattr(self._cell, name)


def bend(cell: Cell, change: Change) -> Cell:
    """``cell`` with a step that computes on changed parameters; its own are the same as before."""
    step = type(cell).step

    def wrong(state, x, context=None):
        return step(Bent(cell, change(dict(cell.named_parameters(recurse=False)))), state, x, context)

    cell.step = wrong
    return cell


def check_bent(name: str, change: Change) -> None:
    case = draw(BY_NAME[name], 4, 3, 3, 4, "state")
    check_oracle(replace(case, cell=bend(case.cell, change)))


def swap(count: int, one: int, other: int, names: tuple[str, ...], p: dict) -> dict:
    """Two of ``count`` gates for one another, in every parameter of those names."""
    order = list(range(count))
    order[one], order[other] = other, one
    changed = dict(p)
    for name in names:
        axis = -2 if name.startswith("weight") else -1
        blocks = p[name].chunk(count, dim=axis)
        changed[name] = torch.cat([blocks[k] for k in order], dim=axis)
    return changed


USUAL = ("weight_ih", "weight_hh", "bias")
GATES = {
    "LSTM": (4, USUAL),
    "PeepholeLSTM": (4, USUAL),
    "ProjectedLSTM": (4, USUAL),
    "LayerNormLSTM": (4, (*USUAL, "scale_x", "scale_h")),
    "CoupledLSTM": (3, USUAL),
    "GRU": (3, USUAL),
    "GRUResetBefore": (3, USUAL),
    "RecurrentHighway": (2, USUAL),
    "MinGRU": (2, ("weight_ih", "bias")),
    "MinLSTM": (3, ("weight_ih", "bias")),
    "SLSTM": (4, USUAL),
    "SLSTM heads": (4, USUAL),
    "MLSTM": (4, ("weight_ih", "bias")),
    "MLSTM heads": (4, ("weight_ih", "bias")),
}
SWAPS = [
    (name, count, *pair, names) for name, (count, names) in GATES.items() for pair in combinations(range(count), 2)
] + [(name, 2, 0, 1, ("weight_gates", "bias_gates")) for name in ("MLSTM", "MLSTM heads")]


@pytest.mark.parametrize(("name", "count", "one", "other", "names"), SWAPS)
def test_two_gates_swapped_are_noticed(name, count, one, other, names):
    killed(check_bent, name, partial(swap, count, one, other, names))


def test_a_bent_cell_that_is_not_bent_passes():
    for name in GATES:
        check_bent(name, lambda p: p)


def transposed(p: dict) -> dict:
    R = p["weight_hh"]
    return p | {"weight_hh": R.reshape(-1, R.shape[-1], R.shape[-1]).mT.reshape(R.shape)}


@pytest.mark.parametrize("name", ["Vanilla", "LSTM", "CoupledLSTM", "GRU", "RecurrentHighway", "SLSTM"])
def test_a_transposed_recurrent_matrix_is_noticed(name):
    killed(check_bent, name, transposed)


@pytest.mark.parametrize("name", ["Vanilla", "PeepholeLSTM", "LayerNormLSTM", "GRU", "MLSTM", "SLSTM heads"])
def test_every_parameter_that_is_left_out_or_counted_twice_is_noticed(name):
    for parameter in dict(BY_NAME[name].build(3, 4).named_parameters()):
        for factor in (0.0, 2.0, 1 + 1e-9):
            killed(check_bent, name, lambda p, n=parameter, f=factor: p | {n: f * p[n]})


@pytest.mark.parametrize("name", ["LSTM", "SLSTM", "MinLSTM"])
def test_a_forget_gate_opened_twice_is_noticed(name):
    H, begin = 4, 0 if name == "MinLSTM" else 4
    opened = torch.zeros(4 * H).double()
    opened[begin : begin + H] = 1
    killed(check_bent, name, lambda p: p | {"bias": p["bias"] + opened[: len(p["bias"])]})


class OldMemoryPeephole(cells.PeepholeLSTM):
    """Its output gate looks at the memory of the step before."""

    def step(self, state, x, context=None):
        i, f, g, o = (F.linear(x, self.weight_ih, self.bias) + F.linear(state.h, self.weight_hh)).chunk(4, dim=1)
        i, f = torch.sigmoid(i + self.weight_ci * state.c), torch.sigmoid(f + self.weight_cf * state.c)
        c = f * state.c + i * torch.tanh(g)
        h = torch.sigmoid(o + self.weight_co * state.c) * torch.tanh(c)
        return cells.LSTMState(h, c), h


class UpdateTurnedRound(cells.GRU):
    """Takes z for 1 - z."""

    def step(self, state, x, context=None):
        h, _ = super().step(state, x)
        z = torch.sigmoid(F.linear(x, self.weight_ih, self.bias) + F.linear(state, self.weight_hh)).chunk(3, dim=1)[1]
        n = (h - z * state) / (1 - z)
        h = z * n + (1 - z) * state
        return h, h


class ResetsBefore(cells.GRU):
    """Resets before the matrix product, as the other GRU does."""

    def step(self, state, x, context=None):
        a, b = F.linear(x, self.weight_ih, self.bias).chunk(3, dim=1), self.weight_hh.chunk(3)
        r, z = torch.sigmoid(a[0] + state @ b[0].T), torch.sigmoid(a[1] + state @ b[1].T)
        n = torch.tanh(a[2] + (r * state) @ b[2].T + r * self.bias_hn)
        h = (1 - z) * n + z * state
        return h, h


class OtherEpsilon(cells.LayerNorm):
    def step(self, state, x, context=None):
        return self.cell(state, F.layer_norm(x, self.scale.shape, self.scale, self.bias, eps=1.001e-5))


class BlindAttending(Attending):
    """Sends no gradient to its memory."""

    def step(self, state, x, context=None):
        return super().step(state, x, context.detach())


class IgnoresItsFirstState(cells.LearnedInitialState):
    def initial_state(self, batch_size):
        return self.cell.initial_state(batch_size)


class AddsTwice(cells.Residual):
    def step(self, state, x, context=None):
        state, y = super().step(state, x, context)
        return state, x + y


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("PeepholeLSTM", OldMemoryPeephole),
        ("GRU", UpdateTurnedRound),
        ("GRU", ResetsBefore),
        ("user: Attending", BlindAttending),
        ("LayerNorm", lambda i, h: OtherEpsilon(cells.MinGRU(i, h))),
        ("Zoneout", lambda i, h: cells.Zoneout(cells.LSTM(i, h), (0.4, 0.1))),
        ("LearnedInitialState", lambda i, h: IgnoresItsFirstState(cells.PeepholeLSTM(i, h))),
        ("Residual", lambda i, h: AddsTwice(cells.Readout(cells.GRU(i, h), i))),
        ("VariationalDropout", lambda i, h: cells.VariationalDropout(cells.LSTM(i, h), 0.3)),
    ],
)
def test_a_wrong_cell_is_noticed(name, make):
    case = draw(BY_NAME[name], 4, 3, 3, 4)
    wrong = make(3, 4).double()
    wrong.load_state_dict(case.cell.state_dict())
    killed(check_oracle, replace(case, cell=wrong))


def test_keys_left_unscaled_are_noticed():
    def double_keys(p):
        scale = torch.tensor([1.0, 2, 1, 1]).double().repeat_interleave(4)
        return p | {"weight_ih": scale[:, None] * p["weight_ih"], "bias": scale * p["bias"]}

    killed(check_bent, "MLSTM", double_keys)
