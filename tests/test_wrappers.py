"""Cells around cells: what they do in training, what is left of it in evaluation, and what they refuse.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agreement import assert_agree, check_gradients, check_training, draw, draw_in_training, record
from catalogue import BY_NAME, Leaky
from paths import by_recurrent, dropout_by_hand, seeded, weights_dropped_by_hand, zoneout_by_hand
from recurra.cell import Cell, leaves, map_state
from recurra.cells import (
    GRU,
    LSTM,
    LayerNorm,
    LearnedInitialState,
    Readout,
    Residual,
    Stack,
    Vanilla,
    VariationalDropout,
    WeightDrop,
    Zoneout,
)
from recurra.errors import ConfigError, ShapeError
from recurra.unroll import Recurrent, truncated


class Echo(Cell):
    """Shows its input and keeps it: a window onto what a wrapper does to x, y and state."""

    def __init__(self, size: int):
        super().__init__()
        self.input_size = self.output_size = size

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.output_size)

    def step(self, state, x, context=None):
        return 0 * state + x, x + 0


# --- variational dropout ---


@pytest.mark.parametrize("options", ["", "state lengths reverse"])
def test_variational_dropout_is_one_mask_on_every_step(options):
    case = draw_in_training(lambda i, h: VariationalDropout(LSTM(i, h), 0.4, 0.3), *options.split())
    check_training(dropout_by_hand, case)


def test_variational_dropout_draws_a_mask_for_each_row_and_sequence():
    rnn = Recurrent(VariationalDropout(Echo(200), input=0.5).train())
    y, _ = rnn(torch.ones(7, 4, 200))
    assert all(torch.equal(y[0], y[t]) for t in range(7))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(row) for row in y[0].tolist()}) == 4
    assert not torch.equal(rnn(torch.ones(7, 4, 200))[0], y)


@pytest.mark.parametrize("side", ["input", "output"])
def test_variational_dropout_drops_its_share_and_keeps_the_mean(side):
    y, state = Recurrent(VariationalDropout(Echo(500), **{side: 0.3}).train())(torch.ones(1, 400, 500))
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert (state == 1).all() if side == "output" else torch.equal(state, y[0])


# --- zoneout ---


@pytest.mark.parametrize("share", [0.3, (0.5, 0.2), (0.0, 0.6), (0.4, 0.0)])
def test_zoneout_keeps_old_values_leaf_by_leaf_and_shows_what_it_left(share):
    case = draw_in_training(lambda i, h: Zoneout(LSTM(i, h), share), "state")
    check_training(zoneout_by_hand, case)


def test_zoneout_keeps_its_share_anew_at_each_step():
    cell = Zoneout(Vanilla(300, 300, lambda z: 0 * z + 1), 0.25).train()
    y, _ = Recurrent(cell)(torch.zeros(3, 400, 300))
    assert (y[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    # Kept at all three steps: the share to the third power.
    assert (y[2] == 0).float().mean().item() == pytest.approx(0.25**3, abs=0.005)


def test_zoneout_with_nearly_all_kept_holds_the_state():
    state = torch.randn(2, 3)
    for cell in (Zoneout(Vanilla(3, 3), 1 - 1e-12).train(), Zoneout(Vanilla(3, 3), 1 - 1e-12).eval()):
        _, final = Recurrent(cell)(torch.randn(9, 2, 3), state)
        torch.testing.assert_close(final, state, rtol=0, atol=1e-6)


def test_zoneout_of_nothing_is_the_bare_cell():
    case = draw(BY_NAME["LSTM"], 5, 3, 3, 4, "state", "lengths")
    for make in (lambda c: Zoneout(c, 0.0), VariationalDropout, lambda c: WeightDrop(c, 0.0)):
        wrapped = make(case.cell).train()
        got = by_recurrent(replace(case, cell=wrapped))
        assert_agree({"y": got[0].detach()}, {"y": by_recurrent(case)[0].detach()}, 0.0)


def test_zoneout_leaves_a_y_that_is_no_leaf_of_the_state_as_it_was():
    torch.manual_seed(3)
    cell = Leaky(3, 4).eval()
    state, x = cell.initial_state(2), torch.randn(2, 3)
    _, bare = cell(state, x)
    _, y = Zoneout(cell, 0.5).eval()(state, x)
    assert torch.equal(y, bare)


def test_evaluation_is_the_expectation_of_training():
    cell = LSTM(3, 4)
    state = map_state(lambda leaf: torch.randn(1, 4).expand(20000, 4), cell.initial_state(1))
    x = torch.randn(1, 3).expand(20000, 3)
    wrapped = Zoneout(cell, (0.3, 0.6))
    drawn, _ = wrapped.train().step(state, x)
    expected, _ = wrapped.eval().step(state, x)
    for got, mean in zip(drawn, expected, strict=True):
        torch.testing.assert_close(got.mean(0), mean[0], rtol=0, atol=0.02)


# --- dropped weights ---


@pytest.mark.parametrize("names", [("weight_hh",), ("weight_hh", "weight_ih")])
def test_weight_drop_is_the_cell_with_those_weights_scaled_or_zero(names):
    case = draw_in_training(lambda i, h: WeightDrop(LSTM(i, h), 0.4, names), "state", "lengths", "reverse")
    check_training(weights_dropped_by_hand, case)


def test_weight_drop_drops_its_share():
    dropped, _ = WeightDrop(GRU(3, 200), 0.3).train().draw_context(1)
    assert (dropped["weight_hh"] == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)


def test_weight_drop_reaches_a_parameter_inside_other_cells():
    cell = WeightDrop(Stack(LSTM(3, 4), GRU(4, 4)), 0.5, ("cells.1.weight_hh",)).train()
    y, _ = Recurrent(cell)(torch.randn(4, 2, 3))
    y.sum().backward()
    assert (cell.cell.cells[1].weight_hh.grad == 0).any()
    assert not (cell.cell.cells[0].weight_hh.grad == 0).any()


# --- all that draw ---

DRAWING = {
    "VariationalDropout": lambda i, h: VariationalDropout(LSTM(i, h), 0.4, 0.4),
    "Zoneout": lambda i, h: Zoneout(LSTM(i, h), 0.4),
    "WeightDrop": lambda i, h: WeightDrop(LSTM(i, h), 0.4),
    "all": lambda i, h: Stack(
        Zoneout(WeightDrop(VariationalDropout(LSTM(i, h), 0.4), 0.4, ("cell.weight_hh",)), 0.3), LSTM(h, h)
    ),
}


@pytest.mark.parametrize("make", DRAWING.values(), ids=DRAWING)
def test_one_seed_gives_one_result(make):
    case = draw_in_training(make, "state", "lengths", "resets")
    first, again, other = (record(seeded(by_recurrent, seed), case) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["y"], other["y"])


@pytest.mark.parametrize("make", DRAWING.values(), ids=DRAWING)
def test_in_evaluation_nothing_is_drawn(make):
    case = draw_in_training(make)
    case.cell.eval()
    before = torch.get_rng_state()
    by_recurrent(case)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", DRAWING.values(), ids=DRAWING)
def test_gradients_in_training_are_those_of_numerical_differentiation(make, monkeypatch):
    case = draw_in_training(make, "state", "lengths")
    from recurra import unroll

    forward = unroll.Recurrent.forward

    def same_numbers(self, *arguments, **options):
        torch.manual_seed(5)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(unroll.Recurrent, "forward", same_numbers)
    check_gradients(case)


def test_a_truncated_window_draws_its_own_masks():
    rnn = Recurrent(VariationalDropout(Echo(100), output=0.5).train())
    windows = [y for _, y, _ in truncated(rnn, torch.ones(6, 1, 100), 3)]
    assert torch.equal(windows[0][0], windows[0][2])
    assert not torch.equal(windows[0][0], windows[1][0])


def test_a_step_without_a_drawn_context_drops_nothing():
    for make in (DRAWING["VariationalDropout"], DRAWING["WeightDrop"]):
        cell = make(3, 4).train()
        state, x = cell.initial_state(2), torch.randn(2, 3)
        assert torch.equal(cell(state, x)[1], cell.cell(state, x)[1])
    stack = Stack(VariationalDropout(LSTM(3, 4), 0.5), GRU(4, 2))
    assert stack.step(stack.initial_state(2), torch.randn(2, 3))[1].shape == (2, 2)


def test_wrappers_hand_the_context_on():
    case = draw(BY_NAME["user: Attending"], 4, 3, 3, 4, "state")
    readout = Readout(case.cell, 3)
    wrapped = Stack(VariationalDropout(WeightDrop(Zoneout(Residual(readout), 0.0), 0.0, ())))
    y, _ = Recurrent(wrapped.double())(case.x, (case.state,), context=case.context)
    bare, _ = Recurrent(case.cell)(case.x, case.state, context=case.context)
    torch.testing.assert_close(y, case.x + readout.linear(bare), rtol=0, atol=1e-12)


# --- what is refused ---


def test_shares_lie_from_zero_to_below_one():
    for wrong in (-0.1, 1, 1.5, float("nan")):
        for make in (lambda s: VariationalDropout(LSTM(3, 4), s), lambda s: Zoneout(LSTM(3, 4), s)):
            with pytest.raises(ConfigError, match=r"expected (input|share) from 0 to below 1, got"):
                make(wrong)
        with pytest.raises(ConfigError, match="expected output from 0 to below 1"):
            VariationalDropout(LSTM(3, 4), output=wrong)
        with pytest.raises(ConfigError, match="expected share from 0 to below 1"):
            WeightDrop(LSTM(3, 4), wrong)


def test_zoneout_takes_one_share_or_one_for_each_leaf():
    with pytest.raises(ShapeError, match=r"one for each of the 2 leaves of the state, got \(0\.1,\)"):
        Zoneout(LSTM(3, 4), (0.1,))
    assert Zoneout(LSTM(3, 4), 0.1).shares == (0.1, 0.1)


def test_weight_drop_names_the_nearest_parameter():
    with pytest.raises(ConfigError, match="LSTM has no parameter 'weight_hhh': did you mean 'weight_hh'"):
        WeightDrop(LSTM(3, 4), 0.5, ("weight_hhh",))


def test_sizes_that_do_not_meet_are_refused():
    with pytest.raises(ShapeError, match="LSTM gives 4 features and GRU on top of it takes 5"):
        Stack(LSTM(3, 4), GRU(5, 2))
    with pytest.raises(ShapeError, match="at least one cell"):
        Stack()
    with pytest.raises(ShapeError, match="Residual adds x to y, but LSTM takes 3 and gives 4 features"):
        Residual(LSTM(3, 4))
    with pytest.raises(ShapeError, match=r"Zoneout goes around a recurra\.Cell, got LSTM"):
        Zoneout(torch.nn.LSTM(3, 4), 0.1)


def test_a_cell_without_sizes_is_refused_only_where_they_are_needed():
    class Sizeless(Cell):
        def initial_state(self, batch_size):
            return self.zeros(batch_size, 2)

        def step(self, state, x, context=None):
            return state + x, state + x

    with pytest.raises(ShapeError, match="Sizeless does not say its output_size"):
        Readout(Sizeless(), 3)
    with pytest.raises(ShapeError, match="Sizeless does not say its input_size"):
        LayerNorm(Sizeless())
    with pytest.raises(ShapeError, match="Sizeless does not say its input_size, which a mask needs"):
        VariationalDropout(Sizeless(), input=0.5)
    y, _ = Recurrent(Stack(Sizeless(), Zoneout(Residual(Sizeless()), 0.1)))(torch.randn(3, 2, 2))
    assert y.shape == (3, 2, 2)


# --- how they begin ---


def test_a_learned_initial_state_begins_at_the_inner_one_and_is_shared_by_all_rows():
    inner = BY_NAME["SLSTM"].build(3, 4)
    cell = LearnedInitialState(inner)
    for got, expected in zip(leaves(cell.initial_state(5)), leaves(inner.initial_state(5)), strict=True):
        assert torch.equal(got, expected)
    with torch.no_grad():
        cell.first.normal_()
    h = cell.initial_state(5).h
    assert torch.equal(h, cell.first[:4].expand(5, 4))
    assert cell.initial_state(0).m.shape == (0, 4)


def test_sizes_show_through():
    cell = Readout(Stack(LayerNorm(LSTM(3, 4)), GRU(4, 6)), 2)
    assert (cell.input_size, cell.output_size) == (3, 2)
    assert Residual(GRU(3, 3)).input_size == 3
    assert "shares=(0.1, 0.1)" in repr(Zoneout(LSTM(3, 4), 0.1))
    assert "input=0.2, output=0.0" in repr(VariationalDropout(LSTM(3, 4), 0.2))
    assert "share=0.5, names=('weight_hh',)" in repr(WeightDrop(LSTM(3, 4), 0.5))
