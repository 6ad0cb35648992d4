"""How the cells begin, what becomes of them at extreme numbers, and what they refuse.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import inspect

import pytest
import torch

import plain
from catalogue import BY_NAME, CATALOGUE
from recurra import cells
from recurra.cell import Cell, leaves, map_state
from recurra.errors import ShapeError
from recurra.unroll import Recurrent

HOUSE = [entry for entry in CATALOGUE if not entry.name.startswith("user")]


def modules_of(entry) -> set[type]:
    return {type(module) for module in entry.make(3, 4).modules()}


def test_no_cell_of_the_house_is_without_an_oracle():
    house = {getattr(cells, name) for name in cells.__all__}
    house = {kind for kind in house if inspect.isclass(kind) and issubclass(kind, Cell)}
    assert house == set.union(*map(modules_of, HOUSE)) & house
    assert len(house) >= 19


# --- how they begin ---


ONE_MATRIX = ["Vanilla", "LSTM", "GRU", "GRUResetBefore", "CoupledLSTM", "RecurrentHighway"]


@pytest.mark.parametrize("name", ONE_MATRIX)
def test_recurrent_matrices_begin_orthogonal_gate_by_gate(name):
    weight = BY_NAME[name].make(3, 6).weight_hh.detach().reshape(-1, 6, 6)
    torch.testing.assert_close(weight @ weight.mT, torch.eye(6).expand_as(weight), rtol=0, atol=1e-5)
    assert len(weight) == 1 or not torch.allclose(weight[0], weight[1])


def test_recurrent_matrices_of_heads_and_projections_begin_orthogonal_too():
    blocks = cells.SLSTM(3, 8, heads=2).weight_hh.detach().reshape(2, 4, 4, 4)
    torch.testing.assert_close(blocks @ blocks.mT, torch.eye(4).expand_as(blocks), rtol=0, atol=1e-5)
    blocks = cells.ProjectedLSTM(3, 6, 2).weight_hh.detach().reshape(4, 6, 2)
    torch.testing.assert_close(blocks.mT @ blocks, torch.eye(2).expand(4, 2, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*ONE_MATRIX, "PeepholeLSTM", "MinGRU", "MinLSTM", "SLSTM", "MLSTM"])
def test_input_matrices_begin_uniform_by_fan_in_and_fan_out(name):
    bound = (6 / (30 + 50)) ** 0.5
    for gate in BY_NAME[name].make(50, 30).weight_ih.detach().split(30):
        assert 0.95 * bound < gate.abs().max() <= bound
        assert gate.var().item() == pytest.approx(bound**2 / 3, rel=0.15)


@pytest.mark.parametrize(
    ("make", "bias", "opened"),
    [
        (cells.LSTM, "bias", slice(4, 8)),
        (cells.PeepholeLSTM, "bias", slice(4, 8)),
        (cells.LayerNormLSTM, "bias", slice(4, 8)),
        (lambda i, h: cells.ProjectedLSTM(i, h, 2), "bias", slice(4, 8)),
        (cells.CoupledLSTM, "bias", slice(0, 4)),
        (cells.MinLSTM, "bias", slice(0, 4)),
        (cells.SLSTM, "bias", slice(4, 8)),
        (lambda i, h: cells.MLSTM(i, h, heads=2), "bias_gates", slice(2, 4)),
    ],
)
def test_forget_gates_begin_open_and_other_biases_at_zero(make, bias, opened):
    value = getattr(make(3, 4), bias)
    expected = torch.zeros_like(value)
    expected[opened] = 1
    assert torch.equal(value, expected)


def test_the_other_vectors_begin_at_their_stated_values():
    highway = cells.RecurrentHighway(3, 4, depth=2)
    assert torch.equal(highway.bias, torch.tensor([[0.0] * 4 + [-2.0] * 4] * 2))
    norm = cells.LayerNormLSTM(3, 4)
    assert all((scale == 1).all() for scale in (norm.scale_x, norm.scale_h, norm.scale_c))
    assert not norm.bias_c.any()
    peephole = cells.PeepholeLSTM(3, 4)
    assert not any(p.any() for p in (peephole.weight_ci, peephole.weight_cf, peephole.weight_co))
    assert not cells.GRU(3, 4).bias.any()
    assert not cells.GRU(3, 4).bias_hn.any()


@pytest.mark.parametrize("kind", [cells.LSTM, cells.CoupledLSTM, cells.PeepholeLSTM, cells.LayerNormLSTM])
def test_parameters_drawn_anew_are_as_at_the_beginning(kind):
    cell, other = kind(3, 4), kind(3, 4)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.fill_(7.0)
    cell.reset_parameters()
    for name, parameter in cell.named_parameters():
        if parameter.dim() < 2:
            assert torch.equal(parameter, getattr(other, name))
        else:
            assert (parameter != 7).all()
            assert not torch.equal(parameter, getattr(other, name))


@pytest.mark.parametrize("entry", HOUSE, ids=str)
def test_states_begin_at_zero_but_for_the_running_maximum(entry):
    cell = entry.make(3, 4)
    state = cell.initial_state(2)
    for k, leaf in enumerate(leaves(state)):
        expected = -1e4 if "SLSTM" in entry.name and k == 3 else 0.0
        assert (leaf == expected).all()
        assert leaf.shape[0] == 2


@pytest.mark.parametrize("entry", CATALOGUE, ids=str)
def test_a_step_is_a_pure_function(entry):
    cell = entry.build(3, 4)
    state, x = cell.initial_state(2), torch.randn(2, 3).double()
    context = torch.randn(2, 3, 4).double() if entry.memory else None
    context = cell.draw_context(2, context)
    kept = map_state(torch.clone, state)
    first, y = cell(state, x, context)
    again, y_again = cell(state, x, context)
    assert torch.equal(y, y_again)
    assert y.shape == (2, cell.output_size)
    for one, other in ((first, again), (state, kept)):
        assert all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


# --- cells that are special cases of others ---


def test_a_peephole_lstm_begins_as_an_lstm():
    peephole, lstm = cells.PeepholeLSTM(3, 4), cells.LSTM(3, 4)
    lstm.load_state_dict({name: getattr(peephole, name) for name in lstm.state_dict()})
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(Recurrent(peephole)(x)[0], Recurrent(lstm)(x)[0])


def test_a_vanilla_cell_takes_any_activation():
    cell = cells.Vanilla(2, 2, activation=lambda z: z.clamp(-0.5, 0.5))
    y, _ = Recurrent(cell)(100 * torch.randn(9, 2, 2))
    assert y.abs().max() == 0.5


def test_heads_do_not_see_one_another():
    cell = BY_NAME["SLSTM heads"].build(3, 8)
    state = cell.initial_state(1)._replace(h=torch.ones(1, 8).double())
    nudged = state._replace(h=state.h + torch.tensor([[0.0, 0, 1, 0, 0, 0, 0, 0]]).double())
    x = torch.randn(1, 3).double()
    moved = (cell(state, x)[1] != cell(nudged, x)[1])[0].reshape(4, 2).any(1)
    assert moved.tolist() == [False, True, False, False]


# --- extreme numbers ---


@pytest.mark.parametrize("size", [1e-30, 1e2, 5e3])
@pytest.mark.parametrize("entry", [e for e in HOUSE if e.name != "Vanilla relu"], ids=str)
def test_large_and_tiny_inputs_give_finite_outputs_and_gradients(entry, size):
    cell = entry.build(3, 4).float()
    x = (size * torch.randn(30, 2, 3)).requires_grad_()
    y, final = Recurrent(cell)(x)
    (y.sum() + sum(leaf.sum() for leaf in leaves(final))).backward()
    for value in (y, *leaves(final), x.grad, *(p.grad for p in cell.parameters() if p.grad is not None)):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("name", ["SLSTM", "MLSTM"])
def test_the_running_maximum_does_what_the_plain_exponentials_cannot(name):
    entry = BY_NAME[name]
    cell = entry.build(3, 4)
    x = 1000 * torch.randn(20, 2, 3).double()
    plainly, _ = plain.unroll(entry.oracle, dict(cell.named_parameters()), x, 4)
    assert not torch.isfinite(plainly).all()
    assert torch.isfinite(Recurrent(cell)(x)[0]).all()


def test_two_gates_that_are_both_shut_still_share_one_between_them():
    cell = cells.MinLSTM(1, 1)
    with torch.no_grad():
        cell.weight_ih.zero_()
        # Both sigmoids are zero in float32; their ratio is that of exp(-200) to exp(-201).
        cell.bias.copy_(torch.tensor([-200.0, -201.0, 1.0]))
    h, _ = cell(torch.full((1, 1), 3.0), torch.zeros(1, 1))
    share = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(h, (3 * share + 1 - share).view(1, 1))


# --- what is refused ---


@pytest.mark.parametrize("make", [cells.SLSTM, cells.MLSTM])
@pytest.mark.parametrize("heads", [0, 3, -2])
def test_heads_divide_the_hidden_size(make, heads):
    with pytest.raises(ShapeError, match=f"=8 does not divide among {heads} heads: choose a divisor"):
        make(3, 8, heads=heads)
