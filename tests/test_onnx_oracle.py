"""The cells over time against ONNX's reference evaluator, and wrong cells that it must tell from them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import NamedTuple

import numpy as np
import pytest
import torch

from oracles_onnx import Gate, onnx_gru, onnx_lstm, onnx_rnn, random_gates, row_by_row
from recurra import Cell, Recurrent
from recurra.cell import leaves
from recurra.cells import GRU, LSTM, GRUResetBefore, LSTMState, PeepholeLSTM, Vanilla

Gates = dict[str, Gate]


def with_weights(cell: Cell, order: str, gates: Gates) -> Cell:
    """``cell`` in float64 with the weights of ``gates``, put together in the order of its own gates."""
    cell = cell.double()
    values = {
        "weight_ih": [gates[gate].W for gate in order],
        "weight_hh": [gates[gate].R for gate in order],
        "bias": [gates[gate].Wb + gates[gate].Rb for gate in order],
    }
    if isinstance(cell, GRU):
        values["bias"][order.index("h")] = gates["h"].Wb
        values["bias_hn"] = [gates["h"].Rb]
    if isinstance(cell, PeepholeLSTM):
        values |= {f"weight_c{gate}": [gates[gate].P] for gate in "ifo"}
    cell.load_state_dict({name: torch.from_numpy(np.concatenate(parts)) for name, parts in values.items()})
    return cell


class Case(NamedTuple):
    """A cell, the order of its gates in ONNX's letters, and its oracle."""

    make: Callable[..., Cell]
    order: str
    oracle: Callable[..., tuple]
    states: int = 1


CASES = {
    "vanilla tanh": Case(Vanilla, "a", partial(onnx_rnn, activation="Tanh")),
    "vanilla relu": Case(partial(Vanilla, activation=torch.relu), "a", partial(onnx_rnn, activation="Relu")),
    "lstm": Case(LSTM, "ifco", onnx_lstm, 2),
    "peephole lstm": Case(PeepholeLSTM, "ifco", partial(onnx_lstm, peepholes=True), 2),
    "gru": Case(GRU, "rzh", partial(onnx_gru, linear_before_reset=1)),
    "gru reset before": Case(GRUResetBefore, "rzh", partial(onnx_gru, linear_before_reset=0)),
}


def numbers(case: Case, T: int, B: int, D: int, H: int) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(1)
    return rng.standard_normal((T, B, D)), [rng.standard_normal((B, H)) for _ in range(case.states)]


def run(rnn: Recurrent, x: np.ndarray, states: list[np.ndarray], lengths: list[int] | None = None) -> list[np.ndarray]:
    """y and the leaves of the final state."""
    state = tuple(map(torch.from_numpy, states))
    with torch.no_grad():
        y, final = rnn(torch.from_numpy(x), state if len(state) > 1 else state[0], lengths=lengths)
    return [tensor.numpy() for tensor in (y, *leaves(final))]


def agree(ours: list[np.ndarray], theirs: tuple) -> bool:
    assert [array.shape for array in ours] == [array.shape for array in theirs]
    return all(np.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 5, 3, 7), (63, 1, 2, 7), (5, 3, 1, 100)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cell_agrees_with_onnx(case: Case, sizes: tuple[int, ...], reverse: bool) -> None:
    _, _, D, H = sizes
    gates = random_gates(case.order, D, H)
    if case.make is CASES["vanilla relu"].make:
        # Nothing bounds a ReLU: keep 63 steps of it in range.
        gates = {name: replace(gate, R=gate.R / (3 * H**0.5)) for name, gate in gates.items()}
    x, states = numbers(case, *sizes)
    rnn = Recurrent(with_weights(case.make(D, H), case.order, gates), reverse=reverse)
    assert agree(run(rnn, x, states), case.oracle(gates, x, *states, reverse=reverse))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_of_unequal_length_agree_with_each_row_alone(case: Case, reverse: bool) -> None:
    lengths = [3, 6, 0, 1]
    gates = random_gates(case.order, 3, 5)
    x, states = numbers(case, 6, 4, 3, 5)
    rnn = Recurrent(with_weights(case.make(3, 5), case.order, gates), reverse=reverse)
    expected = row_by_row(partial(case.oracle, gates, reverse=reverse), x, lengths, *states)
    for row, length in enumerate(lengths):
        x[length:, row] = np.nan
    assert agree(run(rnn, x, states, lengths), expected)
    wrong = [length + (1 if reverse else -1) * (0 < length < 6) for length in lengths]
    x = np.nan_to_num(x)
    assert not agree(run(rnn, x, states, wrong), expected)


# From here on, wrong cells. I equals H, so that every exchange of matrices has a fitting shape.
SIZE = 5


def told_apart(case: Case, cell: Cell, gates: Gates, reverse: bool = False) -> bool:
    x, states = numbers(case, 3, 2, SIZE, SIZE)
    return not agree(run(Recurrent(cell, reverse=reverse), x, states), case.oracle(gates, x, *states))


def orders(name: str) -> list[tuple[str, str]]:
    return [(name, "".join(order)) for order in permutations(CASES[name].order) if "".join(order) != CASES[name].order]


WRONG_ORDERS = [wrong for name in ("lstm", "peephole lstm", "gru", "gru reset before") for wrong in orders(name)]


@pytest.mark.parametrize("part", ["W", "R", "bias", "all"])
@pytest.mark.parametrize(("name", "order"), WRONG_ORDERS)
def test_every_wrong_order_of_gates_is_told_apart(name: str, order: str, part: str) -> None:
    case = CASES[name]
    gates = random_gates(case.order, SIZE, SIZE)
    right = with_weights(case.make(SIZE, SIZE), case.order, gates)
    assert not told_apart(case, right, gates)
    shuffled = dict(zip(case.order, (gates[gate] for gate in order), strict=True))
    fields = {"W": ["W"], "R": ["R"], "bias": ["Wb", "Rb"], "all": ["W", "R", "Wb", "Rb"]}[part]
    taken = {
        gate: replace(gates[gate], **{field: getattr(shuffled[gate], field) for field in fields}) for gate in gates
    }
    assert told_apart(case, with_weights(case.make(SIZE, SIZE), case.order, taken), gates)


WRONG_WEIGHTS: dict[str, Callable[[Gate], Gate]] = {
    "W transposed": lambda gate: replace(gate, W=gate.W.T),
    "R transposed": lambda gate: replace(gate, R=gate.R.T),
    "W and R exchanged": lambda gate: replace(gate, W=gate.R, R=gate.W),
    "input bias forgotten": lambda gate: replace(gate, Wb=0 * gate.Wb),
    "recurrent bias forgotten": lambda gate: replace(gate, Rb=0 * gate.Rb),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_wrong_weights_are_told_apart(case: Case, wrong: str) -> None:
    gates = random_gates(case.order, SIZE, SIZE)
    taken = {name: WRONG_WEIGHTS[wrong](gate) for name, gate in gates.items()}
    assert told_apart(case, with_weights(case.make(SIZE, SIZE), case.order, taken), gates)


@pytest.mark.parametrize("gate", ["i", "f", "o", "c", "r", "z", "h"])
def test_one_gate_transposed_is_told_apart(gate: str) -> None:
    for case in CASES.values():
        if gate in case.order:
            gates = random_gates(case.order, SIZE, SIZE)
            taken = gates | {gate: replace(gates[gate], R=gates[gate].R.T)}
            assert told_apart(case, with_weights(case.make(SIZE, SIZE), case.order, taken), gates)


@pytest.mark.parametrize("order", [order for order in permutations("ifo") if order != tuple("ifo")])
def test_every_wrong_order_of_peepholes_is_told_apart(order: tuple[str, ...]) -> None:
    case = CASES["peephole lstm"]
    gates = random_gates(case.order, SIZE, SIZE)
    moved = {gate: replace(gates[gate], P=gates[other].P) for gate, other in zip("ifo", order, strict=True)}
    assert told_apart(case, with_weights(case.make(SIZE, SIZE), case.order, gates | moved), gates)


def test_the_biases_of_the_gru_exchanged_are_told_apart() -> None:
    case = CASES["gru"]
    gates = random_gates(case.order, SIZE, SIZE)
    taken = {name: replace(gate, Wb=gate.Rb, Rb=gate.Wb) for name, gate in gates.items()}
    assert told_apart(case, with_weights(case.make(SIZE, SIZE), case.order, taken), gates)


class PeepsBeforeWriting(PeepholeLSTM):
    """Its output gate sees the memory of the step before."""

    def step(self, state, x, context=None):
        new, _ = super().step(state, x)
        *_, o = (x @ self.weight_ih.T + self.bias + state.h @ self.weight_hh.T).chunk(4, dim=1)
        h = torch.sigmoid(o + self.weight_co * state.c) * torch.tanh(new.c)
        return LSTMState(h, new.c), h


class KeepsWhatItShouldWrite(GRU):
    """h = z * n + (1 - z) * h, as some papers have it."""

    def step(self, state, x, context=None):
        new, _ = super().step(state, x)
        with torch.no_grad():
            pre = x @ self.weight_ih.T + self.bias + state @ self.weight_hh.T
        z = torch.sigmoid(pre.chunk(3, dim=1)[1])
        n = (new - z * state) / (1 - z)
        h = z * n + (1 - z) * state
        return h, h


WRONG_CELLS = {
    "peepholes missing": ("peephole lstm", LSTM),
    "peepholes where there are none": ("lstm", PeepholeLSTM),
    "output gate peeps too early": ("peephole lstm", PeepsBeforeWriting),
    "reset before instead of after": ("gru", GRUResetBefore),
    "reset after instead of before": ("gru reset before", GRU),
    "update gate inverted": ("gru", KeepsWhatItShouldWrite),
    "relu instead of tanh": ("vanilla tanh", partial(Vanilla, activation=torch.relu)),
    "tanh instead of relu": ("vanilla relu", Vanilla),
}


@pytest.mark.parametrize("wrong", WRONG_CELLS)
def test_a_wrong_cell_is_told_apart(wrong: str) -> None:
    name, make = WRONG_CELLS[wrong]
    case = CASES[name]
    gates = random_gates(case.order, SIZE, SIZE)
    assert told_apart(case, with_weights(make(SIZE, SIZE), case.order, gates), gates)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_wrong_direction_is_told_apart(case: Case) -> None:
    gates = random_gates(case.order, SIZE, SIZE)
    assert told_apart(case, with_weights(case.make(SIZE, SIZE), case.order, gates), gates, reverse=True)
