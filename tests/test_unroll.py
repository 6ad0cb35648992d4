"""Recurrent, Bidirectional and truncated at their boundary: what they take, refuse and promise.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch

from agreement import assert_agree, draw, record
from catalogue import BY_NAME, CATALOGUE
from paths import by_recurrent, truncated_by_hand
from recurra.cell import Cell, leaves, map_state
from recurra.cells import GRU, LSTM, LSTMState, Vanilla, WeightDrop
from recurra.errors import BackendError, ShapeError
from recurra.unroll import Bidirectional, Recurrent, truncated


class Stateless(Cell):
    """A feed-forward layer, whose state is nothing."""

    input_size, output_size = 3, 2

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def initial_state(self, batch_size):
        return ()

    def step(self, state, x, context=None):
        return (), self.linear(x)


class Bad(Cell):
    """A vanilla cell whose step returns what ``returns`` makes of its state."""

    def __init__(self, returns):
        super().__init__()
        self.inner = Vanilla(3, 4)
        self.returns = returns

    def initial_state(self, batch_size):
        return self.inner.initial_state(batch_size)

    def step(self, state, x, context=None):
        state, y = self.inner(state, x)
        return self.returns(state), y


def x_of(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes)


# --- what comes out ---


@pytest.mark.parametrize("entry", CATALOGUE, ids=str)
def test_an_empty_sequence_gives_no_outputs_and_the_state_back(entry):
    case = draw(entry, 0, 3, 3, 4, "state")
    y, final = by_recurrent(case)
    assert y.shape == (0, 3, case.cell.output_size)
    assert y.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(leaves(final), leaves(case.state), strict=True))


@pytest.mark.parametrize("entry", CATALOGUE, ids=str)
def test_an_empty_batch_has_zero_gradients(entry):
    case = draw(entry, 2, 0, 3, 4, "lengths", "resets")
    run = record(by_recurrent, case)
    assert run["y"].shape == (2, 0, case.cell.output_size)
    assert not any(value.any() for name, value in run.items() if "weight" in name)


def test_rows_of_length_zero_keep_the_state_they_were_given():
    case = draw(BY_NAME["LSTM"], 4, 3, 3, 4, "state")
    y, final = Recurrent(case.cell)(case.x, case.state, lengths=[0, 0, 0])
    assert not y.any()
    assert all(torch.equal(a, b) for a, b in zip(leaves(final), leaves(case.state), strict=True))


def test_the_final_state_has_the_structure_of_the_initial_one_even_where_a_plain_tuple_was_given():
    cell = LSTM(3, 4)
    h, c = torch.randn(2, 4), torch.randn(2, 4)
    _, from_plain = Recurrent(cell)(x_of(3, 2, 3).mul(0), (h, c))
    _, from_named = Recurrent(cell)(x_of(3, 2, 3).mul(0), LSTMState(h, c))
    assert isinstance(from_plain, LSTMState)
    assert torch.equal(from_plain.c, from_named.c)


@pytest.mark.parametrize(
    "lengths", [[4, 0, 2], (4, 0, 2), torch.tensor([4, 0, 2]), torch.tensor([4, 0, 2], dtype=torch.int32)]
)
def test_lengths_come_as_any_whole_numbers(lengths):
    rnn, x = Recurrent(GRU(3, 4)), x_of(5, 3, 3)
    y, _ = rnn(x, lengths=lengths)
    assert (y.abs().sum(2) > 0).sum(0).tolist() == [4, 0, 2]


def test_a_stateless_cell_takes_part_in_everything():
    cell, x = Stateless(), x_of(4, 2, 3)
    y, final = Recurrent(cell)(x, lengths=[4, 2], resets=torch.ones(4, 2, dtype=torch.bool))
    expected = cell.linear(x)
    expected[2:, 1] = 0
    assert final == ()
    torch.testing.assert_close(y, expected)


def test_a_cell_that_says_no_sizes_runs_all_the_same():
    class Sum(Cell):
        def initial_state(self, batch_size):
            return self.zeros(batch_size, 2)

        def step(self, state, x, context=None):
            return state + x, state + x

    x = x_of(3, 2, 2)
    y, _ = Recurrent(Sum())(x)
    torch.testing.assert_close(y, x.cumsum(0))
    with pytest.raises(ShapeError, match=r"Sum does not say its output_size: set self\.output_size"):
        Recurrent(Sum())(x[:0])


@pytest.mark.parametrize("options", ["", "lengths resets"])
@pytest.mark.parametrize("entry", CATALOGUE, ids=str)
def test_autocast_keeps_the_precision_of_the_state(entry, options):
    case = draw(entry, 5, 3, 3, 4, *options.split()).to(torch.float32)
    _, expected = by_recurrent(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = by_recurrent(case)
    assert [leaf.dtype for leaf in leaves(final)] == [leaf.dtype for leaf in leaves(expected)]
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in case.cell.parameters() if p.grad is not None)
    for got, wanted in zip(leaves(final), leaves(expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.1)


def test_a_state_dict_and_a_copy_carry_everything():
    rnn, x = Recurrent(BY_NAME["deep"].build(3, 4)), x_of(4, 2, 3).double()
    other = Recurrent(BY_NAME["deep"].build(3, 4, seed=2))
    assert not torch.equal(rnn(x)[0], other(x)[0])
    other.load_state_dict(rnn.state_dict())
    assert torch.equal(rnn(x)[0], other(x)[0])
    assert torch.equal(rnn(x)[0], copy.deepcopy(rnn)(x)[0])


def test_what_was_given_is_not_written_on():
    case = draw(BY_NAME["SLSTM"], 5, 3, 3, 4, "state", "lengths", "resets")
    given = [case.x, *leaves(case.state), case.lengths, case.resets, *case.cell.parameters()]
    before = [tensor.detach().clone() for tensor in given]
    record(by_recurrent, case)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 3), {}, "expected x (T, B, I), time first, got 2 axes: (4, 3)"),
        ((4, 2, 5), {}, "expected x (T, B, 3), as LSTM has input_size=3, got (4, 2, 5)"),
        (
            (4, 2, 3),
            {"lengths": [4]},
            "lengths (2,), a whole number for each row, got (1,) torch.int64",
        ),
        ((4, 2, 3), {"lengths": [4.0, 2.0]}, "a whole number for each row, got (2,) torch.float32"),
        ((4, 2, 3), {"lengths": [True, False]}, "a whole number for each row, got (2,) torch.bool"),
        ((4, 2, 3), {"lengths": [5, 1]}, "expected lengths from 0 to T=4, got 5"),
        ((4, 2, 3), {"lengths": [-1, 1]}, "expected lengths from 0 to T=4, got -1"),
        (
            (4, 2, 3),
            {"resets": torch.zeros(2, 4, dtype=torch.bool)},
            "expected resets (4, 2) of torch.bool, got (2, 4) of torch.bool",
        ),
        (
            (4, 2, 3),
            {"resets": torch.zeros(4, 2)},
            "expected resets (4, 2) of torch.bool, got (4, 2) of torch.float32",
        ),
        (
            (4, 2, 3),
            {"state": torch.zeros(2, 4)},
            "expected a state LSTMState(h=(2, 4), c=(2, 4)), as initial_state gives it, got (2, 4)",
        ),
        (
            (4, 2, 3),
            {"state": (torch.zeros(1, 4), torch.zeros(1, 4))},
            "expected a state LSTMState(h=(2, 4), c=(2, 4)), as initial_state gives it, got ((1, 4), (1, 4))",
        ),
        (
            (4, 2, 3),
            {"state": (torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.float64))},
            "expected a state of torch.float32 on cpu, got torch.float64 on cpu: move it with state.to(...)",
        ),
        (
            (4, 2, 3),
            {"state": ((torch.zeros(2, 4), torch.zeros(2, 4)),)},
            "two states differ in structure: LSTMState(h=(2, 4), c=(2, 4)) and (((2, 4), (2, 4)),)",
        ),
        (
            (4, 2, 3),
            {"state": [torch.zeros(2, 4), torch.zeros(2, 4)]},
            "a state is a tensor or a tuple of states, got list",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected_and_what_came(arguments, options, message):
    rnn = Recurrent(LSTM(3, 4))
    with pytest.raises(ShapeError, match=re.escape(message)):
        rnn(x_of(*arguments), **options)


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (lambda h: h[:, :2], "a step must keep the shape of its state: (2, 4) went in, (2, 2) came out"),
        (lambda h: h.sum(0), "(2, 4) went in, (4,) came out"),
        (lambda h: (h, h), "two states differ in structure: ((2, 4), (2, 4)) and (2, 4)"),
        (lambda h: [h], "a state is a tensor or a tuple of states, got list"),
        (lambda h: None, "a state is a tensor or a tuple of states, got NoneType"),
    ],
)
def test_a_step_that_changes_the_form_of_its_state_is_refused(returns, message):
    with pytest.raises(ShapeError, match=re.escape(message)):
        Recurrent(Bad(returns))(x_of(3, 2, 3))


def test_only_a_cell_is_taken():
    with pytest.raises(ShapeError, match=r"Recurrent takes a recurra\.Cell, got LSTM: subclass Cell"):
        Recurrent(torch.nn.LSTM(3, 4))
    cell = LSTM(3, 4)
    with pytest.raises(ShapeError, match="the two directions need a cell each, got the same object twice"):
        Bidirectional(cell, cell)


# --- backends ---


def test_explain_says_what_runs_and_why():
    for backend, ran in {"loop": "loop", "hoisted": "hoisted", "compiled": "compiled", "auto": "compiled"}.items():
        for rnn in (
            Recurrent(LSTM(3, 4), backend=backend),
            Bidirectional(LSTM(3, 4), LSTM(3, 4), backend=backend),
        ):
            assert (rnn.explain().asked, rnn.explain().ran, rnn.explain().called) == (backend, ran, ran == "loop")
            runs = "runs" if ran == "loop" else "will run"
            assert str(rnn.explain()).startswith(f"backend={backend!r} {runs} {ran!r}: ")
            rnn(x_of(2, 1, 3))
            assert (rnn.explain().asked, rnn.explain().ran) == (backend, ran)
            assert str(rnn.explain()).startswith(f"backend={backend!r} runs {ran!r}: ")
            assert ("step by step" in str(rnn.explain())) == (ran != "loop")


def test_a_backend_that_does_not_exist_is_refused_with_the_nearest_name():
    with pytest.raises(BackendError, match="there is no backend 'lop': did you mean 'loop'"):
        Recurrent(LSTM(3, 4), backend="lop")
    with pytest.raises(BackendError, match="known: auto, compiled, hoisted, loop"):
        Bidirectional(LSTM(3, 4), LSTM(3, 4), backend="xyz")


@pytest.mark.parametrize("backend", ["loop", "auto"])
def test_direction_and_backend_are_shown(backend):
    assert f"reverse=True, backend={backend!r}" in repr(Recurrent(Vanilla(1, 1), True, backend))


# --- both directions ---


def test_bidirectional_checks_at_its_boundary():
    rnn = Bidirectional(LSTM(3, 4), GRU(3, 4))
    with pytest.raises(ShapeError, match=r"expected a pair \(forward state, backward state\), got \(2, 4\)"):
        rnn(x_of(4, 2, 3), torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"expected resets \(4, 2\) of torch\.bool"):
        rnn(x_of(4, 2, 3), resets=torch.zeros(4, 2))
    with pytest.raises(ShapeError, match="expected lengths from 0 to T=4, got 9"):
        rnn(x_of(4, 2, 3), lengths=[9, 1])
    with pytest.raises(ShapeError, match="time first, got 2 axes"):
        rnn(x_of(4, 2))


def test_bidirectional_takes_cells_of_different_kinds_and_sizes_and_an_empty_sequence():
    rnn = Bidirectional(LSTM(3, 4), GRU(3, 2))
    assert rnn(x_of(5, 2, 3))[0].shape == (5, 2, 6)
    y, (ahead, back) = rnn(x_of(0, 2, 3), lengths=[0, 0], resets=torch.zeros(0, 2, dtype=torch.bool))
    assert y.shape == (0, 2, 6)
    assert (ahead.c.shape, back.shape) == ((2, 4), (2, 2))


# --- truncation ---


def test_truncation_refuses_what_cannot_be_carried_on():
    x = x_of(6, 2, 3)
    with pytest.raises(ShapeError, match="expected a window of at least 1 step, got 0"):
        next(truncated(Recurrent(GRU(3, 4)), x, 0))
    for rnn in (Recurrent(GRU(3, 4), reverse=True), Bidirectional(GRU(3, 4), GRU(3, 4)), GRU(3, 4)):
        with pytest.raises(ShapeError, match="only a forward Recurrent can carry its state"):
            next(truncated(rnn, x, 2))
    with pytest.raises(ShapeError, match=r"expected resets \(6, 2\)"):
        next(truncated(Recurrent(GRU(3, 4)), x, 2, resets=torch.zeros(9, 2, dtype=torch.bool)))
    with pytest.raises(ShapeError, match="expected lengths from 0 to T=6, got 7"):
        next(truncated(Recurrent(GRU(3, 4)), x, 2, lengths=[7, 0]))


def test_truncation_of_an_empty_sequence_has_no_windows():
    assert list(truncated(Recurrent(GRU(3, 4)), x_of(0, 2, 3), 4)) == []


def test_each_window_can_be_trained_on_before_the_next_is_run():
    case = draw(BY_NAME["LearnedInitialState"], 7, 3, 3, 4, "resets", "lengths")
    weights = torch.randn(7, 3, 4).double()
    y, _ = truncated_by_hand(3)(case)
    expected = torch.autograd.grad((y * weights).sum(), list(case.parameters.values()))
    rnn = Recurrent(case.cell)
    for span, y, _ in truncated(rnn, case.x.detach(), 3, lengths=case.lengths, resets=case.resets):
        (y * weights[span]).sum().backward()
    got = {name: parameter.grad for name, parameter in case.parameters.items()}
    assert_agree(got, dict(zip(got, expected, strict=True)), 1e-12)


def test_weights_may_change_between_windows_and_dropped_ones_are_drawn_again():
    cell = WeightDrop(LSTM(3, 4), 0.5).train()
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    seen = []
    for _, y, state in truncated(Recurrent(cell), x_of(6, 2, 3), 2):
        y.square().sum().backward()
        seen.append((cell.cell.weight_hh.grad == 0).clone())
        optimizer.step()
        optimizer.zero_grad()
        assert all(leaf.grad_fn is not None for leaf in leaves(state))
    assert len(seen) == 3
    assert not torch.equal(seen[1], seen[2])


def test_resets_begin_afresh_from_a_learned_first_state_with_its_gradient():
    case = draw(BY_NAME["LearnedInitialState"], 3, 2, 3, 4)
    state = map_state(torch.zeros_like, case.cell.initial_state(2))
    resets = torch.tensor([[False, False], [False, True], [False, False]])
    y, _ = Recurrent(case.cell)(case.x, state, resets=resets)
    y[:, 0].sum().backward(retain_graph=True)
    assert not case.cell.first.grad.any()
    y[:, 1].sum().backward()
    assert case.cell.first.grad.any()


class Faulty(Cell):
    """A cell whose step is given."""

    output_size = 2

    def __init__(self, step, begin=torch.zeros):
        super().__init__()
        self.faulty, self.begin = step, begin

    def initial_state(self, batch_size):
        return self.begin(batch_size, 2)

    def step(self, state, x, context=None):
        return self.faulty(state, x)


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        (lambda h, x: None, "must return the pair (new state, y), got NoneType"),
        (lambda h, x: h + x, "must return the pair (new state, y), got Tensor"),
        (lambda h, x: (h, h, h), "must return the pair (new state, y), got 3 values"),
        (lambda h, x: (h, h[:1]), "must return y (B, O), here (3, 2), got (1, 2)"),
        (lambda h, x: (h, h.sum()), "must return y (B, O), here (3, 2), got ()"),
        (lambda h, x: (h, 1.0), "must return y (B, O), here (3, 2), got float"),
        (lambda h, x: (h, x[:, :1]), "has output_size=2, but its step returned y (3, 1)"),
        (lambda h, x: (h.add_(x), h), "changed its state in place"),
    ],
)
def test_a_mistake_in_a_step_is_named(step, complaint):
    with pytest.raises(ShapeError) as caught:
        Recurrent(Faulty(step))(torch.ones(4, 3, 2))
    assert complaint in str(caught.value)


def test_a_state_of_whole_numbers_is_not_cut_down_in_silence():
    cell = Faulty(lambda h, x: (h + 0.5, x), lambda *sizes: torch.zeros(*sizes, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"returned torch.float32 for a state that began as torch.int64"):
        Recurrent(cell)(torch.ones(4, 3, 2))


@pytest.mark.parametrize("begin", [lambda B, H: torch.zeros(H, B), lambda B, H: torch.zeros(()), lambda B, H: None])
def test_an_initial_state_without_a_row_for_each_of_the_batch_is_refused(begin):
    with pytest.raises(ShapeError, match=r"rows, got|a state is a tensor"):
        Recurrent(Faulty(lambda h, x: (h, x), begin))(torch.ones(4, 3, 2))
