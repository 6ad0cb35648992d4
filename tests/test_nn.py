"""recurra.nn beside torch.nn: numbers and gradients, in every form of input.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

import recurra.nn
from oracles_torch import KINDS, a_state, close, everything, numbers, packed, pair, tensors
from recurra import Cell, Recurrent, cells


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_directions_agree(kind: str, num_layers: int, bidirectional: bool, bias: bool) -> None:
    ours, theirs = pair(kind, 3, 7, num_layers=num_layers, bidirectional=bidirectional, bias=bias)
    x, hx = numbers(4, 5, 3), a_state(theirs, 5)
    assert close(everything(ours, x, hx), everything(theirs, x, hx))


@pytest.mark.parametrize(("T", "B", "H"), list(product([1, 2, 63], [1, 5], [1, 7])))
@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes_agree(kind: str, T: int, B: int, H: int) -> None:
    if kind == "projected" and H == 1:
        H = 3  # the projection must be smaller
    ours, theirs = pair(kind, 2, H, num_layers=2)
    x, hx = numbers(T, B, 2), a_state(theirs, B)
    assert close(everything(ours, x, hx), everything(theirs, x, hx))


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("form", ["time first", "batch first", "unbatched", "unbatched, batch first"])
@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_input_agree(kind: str, form: str, bidirectional: bool, with_state: bool) -> None:
    batch_first = form.endswith("batch first")
    ours, theirs = pair(kind, 3, 7, num_layers=2, batch_first=batch_first, bidirectional=bidirectional)
    sizes = (4, 3) if form.startswith("unbatched") else (5, 4, 3) if batch_first else (4, 5, 3)
    x = numbers(*sizes)
    hx = a_state(theirs, *(() if len(sizes) == 2 else (5,))) if with_state else None
    assert close(everything(ours, x, hx), everything(theirs, x, hx))


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("lengths", "enforce_sorted"),
    [([6, 4, 4, 1], True), ([4, 1, 6, 4, 2], False), ([6, 4, 4, 1], False), ([1], True), ([3, 3], False)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_agree(
    kind: str, lengths: list[int], enforce_sorted: bool, bidirectional: bool, with_state: bool
) -> None:
    # batch_first says nothing about a packed input.
    ours, theirs = pair(kind, 3, 7, num_layers=2, bidirectional=bidirectional, batch_first=True)
    x = packed(lengths, enforce_sorted)
    hx = a_state(theirs, len(lengths)) if with_state else None
    assert close(everything(ours, x, hx), everything(theirs, x, hx))
    mine, other = ours(x, hx)[0], theirs(x, hx)[0]
    assert isinstance(mine, PackedSequence)
    assert mine.batch_sizes.equal(other.batch_sizes)
    for index in ("sorted_indices", "unsorted_indices"):
        a, b = getattr(mine, index), getattr(other, index)
        assert (a is None and b is None) or a.equal(b)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_near_float64(kind: str) -> None:
    ours, theirs = pair(kind, 5, 7, num_layers=2, bidirectional=True)
    # Both start from the same numbers; what is measured is the arithmetic.
    theirs.load_state_dict(ours.float().state_dict())
    x, hx = numbers(63, 5, 5), a_state(theirs, 5)
    given = [tensor.detach().float() for tensor in (x, *tensors(hx))]
    exact = [tensor.double().requires_grad_() for tensor in given]
    single = [tensor.requires_grad_() for tensor in given]

    def results(module: nn.Module, x: Tensor, *states: Tensor) -> list[Tensor]:
        return everything(module, x, states if len(states) == 2 else states[0])

    for a, b in zip(results(ours, *single), results(theirs, *exact), strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_gives_empty_results(kind: str) -> None:
    ours, theirs = pair(kind, 3, 7, num_layers=2, bidirectional=True)
    x = numbers(4, 0, 3)
    assert [t.shape for t in tensors(ours(x))] == [t.shape for t in tensors(theirs(x))]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_agrees_in_training_for_the_same_seed(kind: str, bidirectional: bool) -> None:
    ours, theirs = pair(kind, 3, 7, num_layers=3, dropout=0.5, bidirectional=bidirectional)
    x = numbers(4, 5, 3)

    def drawn(module: torch.nn.Module) -> list[Tensor]:
        torch.manual_seed(11)
        return everything(module, x)

    assert close(drawn(ours), drawn(theirs))
    assert not close(everything(ours, x), drawn(theirs))
    assert close(everything(ours.eval(), x), everything(theirs.eval(), x))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_all_leaves_the_upper_layers_nothing(kind: str) -> None:
    ours, theirs = pair(kind, 3, 7, num_layers=2, dropout=1.0, bidirectional=True)
    x = packed([4, 1, 6], False)
    assert close(everything(ours, x), everything(theirs, x))


def as_function(module: nn.RNNBase, x: Any, hx: Any) -> tuple[Any, list[Tensor]]:
    """``module(x, hx)`` as a function of all tensors it depends on, and these tensors."""
    states, weights = tensors(hx), dict(module.named_parameters())

    def function(data: Tensor, *rest: Tensor) -> list[Tensor]:
        given = PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data
        state = rest[:2] if len(states) == 2 else rest[0]
        named = dict(zip(weights, rest[len(states) :], strict=True))
        y, final = functional_call(module, named, (given, state))
        return [y.data if isinstance(y, PackedSequence) else y, *tensors(final)]

    return function, [x.data if isinstance(x, PackedSequence) else x, *states, *weights.values()]


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_first_derivatives_are_right(kind: str, form: str) -> None:
    if form == "packed":
        ours, x = pair(kind, 3, 3, bidirectional=True)[0], packed([1, 3], False)
    else:
        ours, x = pair(kind, 2, 3, num_layers=2)[0], numbers(2, 2, 2)
    assert torch.autograd.gradcheck(*as_function(ours, x, a_state(ours, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_right(kind: str) -> None:
    ours, _ = pair(kind, 2, 3)
    assert torch.autograd.gradgradcheck(*as_function(ours, numbers(2, 1, 2), a_state(ours, 1)), fast_mode=True)


def test_second_derivatives_go_through_packed_sequences() -> None:
    ours, _ = pair("lstm", 3, 2, bidirectional=True)
    x = packed([1, 2], False)
    assert torch.autograd.gradgradcheck(*as_function(ours, x, a_state(ours, 2)), fast_mode=True)


# Wrong modules: each must be told apart from torch.nn by the comparison that the tests above make.


class OneBiasInsideTheReset(recurra.nn.GRU):
    def _cell_biases(self, bias_ih, bias_hh):
        return {"bias": bias_ih + bias_hh, "bias_hn": torch.zeros_like(bias_hh[: self.hidden_size])}


class BiasForgotten(recurra.nn.LSTM):
    def _cell_biases(self, bias_ih, bias_hh):
        return {"bias": bias_ih + 0 * bias_hh}


class BothDirectionsForward(recurra.nn.LSTM):
    def _build(self, index: int) -> Recurrent:
        return Recurrent(super()._build(index).cell)


class AnotherCell(recurra.nn.LSTM):
    def _cell(self, input_size: int) -> Cell:
        return type("Swapped", (cells.LSTM,), {"step": _gates_swapped})(input_size, self.hidden_size)


def _gates_swapped(self, state, x, context=None):
    i, f, g, o = (F.linear(x, self.weight_ih, self.bias) + F.linear(state.h, self.weight_hh)).chunk(4, dim=1)
    c = torch.sigmoid(i) * state.c + torch.sigmoid(f) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return cells.LSTMState(h, c), h


class ReluForTanh(recurra.nn.RNN):
    def _cell(self, input_size: int) -> Cell:
        return cells.Vanilla(input_size, self.hidden_size, torch.relu)


class StateOfTheOtherRows(recurra.nn.GRU):
    def forward(self, input, hx=None):
        y, state = super().forward(input, hx)
        return y, state.flip(1)


class StateOfTheOtherLayers(recurra.nn.GRU):
    def _check_state(self, hx, batch):
        return super()._check_state(hx, batch).flip(0)


class StateInTheOrderOfThePack(recurra.nn.GRU):
    def forward(self, input, hx=None):
        plain = PackedSequence(input.data, input.batch_sizes)
        y, state = super().forward(plain, hx)
        return PackedSequence(y.data, *input[1:]), state


class NoGradientToTheState(recurra.nn.GRU):
    def _check_state(self, hx, batch):
        return super()._check_state(hx, batch).detach() + 0 * hx


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("gru", OneBiasInsideTheReset),
        ("lstm", BiasForgotten),
        ("lstm", BothDirectionsForward),
        ("lstm", AnotherCell),
        ("tanh", ReluForTanh),
        ("gru", StateOfTheOtherRows),
        ("gru", StateOfTheOtherLayers),
        ("gru", StateInTheOrderOfThePack),
        ("gru", NoGradientToTheState),
    ],
)
def test_a_wrong_module_is_told_apart(kind: str, wrong: type) -> None:
    ours, theirs = pair(kind, 3, 7, cls=wrong, bidirectional=True)
    x = packed([1, 4, 2], False)
    hx = a_state(theirs, 3)
    expected = everything(theirs, x, hx)
    assert not close(everything(ours, x, hx), expected)
    ours.__class__ = wrong.__mro__[1]
    ours._free = [[ours._build(index)] for index in range(2)]
    assert close(everything(ours, x, hx), expected)
