"""The hoisted loop against the published equations, and against the reference loop where it is one of two.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from agreement import (
    assert_agree,
    assert_identical,
    distances,
    draw,
    draw_in_training,
    loses_in_float32,
    record,
    values,
)
from catalogue import BY_NAME, CATALOGUE
from paths import Case, by_hoisted, by_plain, by_recurrent, in_chunks
from recurra import cells
from recurra.cell import Cell, leaves
from recurra.compiler import door, stages
from recurra.errors import BackendError
from recurra.unroll import Bidirectional, Recurrent

every_cell = pytest.mark.parametrize("entry", CATALOGUE, ids=str)

# T, B, inputs, H, options. Every option meets every other, and each odd size is there.
SIZES = [
    (2, 5, 3, 7, "state lengths resets"),
    (7, 5, 5, 1, "state lengths resets reverse"),
]
MORE = [
    (1, 1, 3, 4, "reverse"),
    (1, 0, 5, 1, "state"),
    (63, 5, 3, 7, "lengths reverse"),
    (2, 0, 7, 3, "lengths resets"),
    (63, 1, 5, 100, "state resets"),
]
SOME = ["LSTM", "GRU", "MinGRU", "SLSTM heads", "MLSTM heads", "deep", "user: Attending", "user: Leaky"]


def check_hoisted(case: Case) -> None:
    """The hoisted loop gives what the published equations give, in float64 and in float32, gradients included."""
    expected = record(by_plain, case)
    assert_agree(record(by_hoisted, case), expected, 1e-12)
    single = case.to(torch.float32)
    far = distances(record(by_hoisted, single), expected)
    lost = distances(record(by_recurrent, single), expected) if loses_in_float32(case) else dict.fromkeys(far, 0.0)
    assert all(off <= max(1e-5, 10 * lost[name]) for name, off in far.items()), far


@pytest.mark.parametrize(("T", "B", "inputs", "H", "options"), SIZES)
@every_cell
def test_the_hoisted_loop_agrees_with_the_published_equations(entry, T, B, inputs, H, options):
    check_hoisted(draw(entry, T, B, inputs, H, *options.split()))


@pytest.mark.parametrize(("T", "B", "inputs", "H", "options"), MORE)
@pytest.mark.parametrize("name", SOME)
def test_at_sizes_that_are_empty_long_or_wide(name, T, B, inputs, H, options):
    case = draw(BY_NAME[name], T, B, inputs, H, *options.split())
    assert_agree(record(by_hoisted, case), record(by_recurrent, case), 1e-11)


@every_cell
def test_without_gradients_the_numbers_are_the_same(entry):
    case = draw(entry, 5, 3, 3, 4, "state", "lengths", "resets")
    with torch.no_grad():
        assert_agree(values(by_hoisted, case), values(by_recurrent, case), 1e-12)
    with torch.inference_mode():
        assert_agree(values(by_hoisted, case), values(by_recurrent, case), 1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("name", SOME)
def test_nan_in_the_padding_changes_no_bit(name, direction):
    case = draw(BY_NAME[name], 6, 4, 3, 4, "state", "lengths", "resets", direction)
    padding = torch.arange(6)[:, None] >= case.lengths
    spoilt = replace(case, x=case.x.detach().masked_fill(padding[:, :, None], torch.nan).requires_grad_())
    clean = record(by_hoisted, case)
    assert_identical(record(by_hoisted, spoilt), clean)
    assert not clean["gradient of x"][padding].any()


@pytest.mark.parametrize("name", SOME)
def test_memory_that_nobody_wrote_is_read_by_nobody(name, monkeypatch):
    right = torch.empty
    case = draw(BY_NAME[name], 6, 4, 3, 4, "state", "lengths", "resets")
    expected = record(by_hoisted, case)
    monkeypatch.setattr(stages.torch, "empty", lambda *sizes, **like: right(*sizes, **like).fill_(torch.nan))
    assert_identical(record(by_hoisted, case), expected)


def test_one_trace_serves_every_length_batch_and_weight():
    case = draw(BY_NAME["LSTM"], 4, 3, 3, 4, "state")
    rnn = Recurrent(case.cell, backend="hoisted")
    rnn(case.x)
    plans = dict(rnn._path._plans)
    for T, B in ((1, 1), (9, 2), (3, 12), (2, 0)):
        other = draw(BY_NAME["LSTM"], T, B, 3, 4, seed=T)
        rnn.load_state_dict(Recurrent(other.cell).state_dict())
        other = replace(other, cell=case.cell)

        def again(case: Case):
            return rnn(case.x)

        assert_agree(record(again, other), record(by_plain, other), 1e-12)
    assert rnn._path._plans == plans


def test_a_change_of_mode_dtype_or_attribute_is_noticed():
    case = draw_in_training(lambda i, h: cells.Zoneout(cells.LSTM(i, h), 0.5))
    rnn = Recurrent(case.cell.eval(), backend="hoisted")
    y, _ = rnn(case.x)
    torch.testing.assert_close(y, Recurrent(case.cell)(case.x)[0], rtol=0, atol=1e-12)
    case.cell.shares = (0.0, 0.9)
    torch.testing.assert_close(rnn(case.x)[0], Recurrent(case.cell)(case.x)[0], rtol=0, atol=1e-12)
    rnn.train()
    assert not torch.equal(rnn(case.x)[0], rnn(case.x)[0])
    rnn.eval().float()
    assert rnn(case.x.float())[0].dtype == torch.float32


def test_only_what_is_asked_for_has_a_gradient():
    case = draw(BY_NAME["deep"], 5, 3, 3, 4, "state", "lengths", "resets")
    expected = record(by_recurrent, case)
    for name, asked in case.wanted.items():
        for other in case.wanted.values():
            other.requires_grad_(other is asked)
        y, final = by_hoisted(case)
        total = case.x.new_zeros(())
        for k, value in enumerate([y, *leaves(final)]):
            weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(k)).double()
            total = total + (value * weights).sum()
        (got,) = torch.autograd.grad(total, [asked], allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(got, expected[f"gradient of {name}"], rtol=0, atol=1e-11)


def test_a_tensor_given_in_two_places_gets_both_gradients():
    class Tied(Cell):
        """Two weights that are one, and the context is that one too."""

        input_size = output_size = 4

        def __init__(self):
            super().__init__()
            self.one = torch.nn.Linear(4, 4, bias=False)
            self.two = torch.nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight
            self.same = self.one

        def initial_state(self, batch_size):
            return self.zeros(batch_size, 4)

        def step(self, state, x, context=None):
            h = torch.tanh(self.one(x) + self.two(state) + self.same(state) @ context)
            return h, h

    cell, x = Tied().double(), torch.randn(5, 3, 4, dtype=torch.float64)
    grads = []
    for backend in ("loop", "hoisted"):
        y, final = Recurrent(cell, backend=backend)(x, context=cell.one.weight)
        grads.append(torch.autograd.grad(y.square().sum() + final.sum(), cell.one.weight)[0])
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    assert isinstance(cell.one.weight, torch.nn.Parameter)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LearnedInitialState", "user: Attending", "user: Counting"])
def test_second_derivatives_go_through_the_loop(name):
    case = draw(BY_NAME[name], 4, 3, 3, 4, "lengths", "resets")
    found = []
    for path in (by_recurrent, by_hoisted):
        wanted = [value.requires_grad_() for value in case.wanted.values()]
        y, final = path(case)
        total = y.square().sum() + sum(leaf.sum() for leaf in leaves(final) if leaf.is_floating_point())
        first = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
        second = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(second, wanted, allow_unused=True, materialize_grads=True))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_second_derivatives_of_what_draws_are_refused():
    case = draw_in_training(lambda i, h: cells.Zoneout(cells.LSTM(i, h), 0.5))
    y, _ = by_hoisted(case)
    with pytest.raises(BackendError, match="draws random numbers in its step"):
        torch.autograd.grad(y.sum(), case.x, create_graph=True)


def test_masks_of_a_sequence_are_those_of_the_loop_and_masks_of_a_step_are_drawn_at_once():
    case = draw_in_training(lambda i, h: cells.WeightDrop(cells.VariationalDropout(cells.LSTM(i, h), 0.3, 0.3), 0.5,
                                                          ("cell.weight_hh",)), "lengths", "resets")  # fmt: skip
    runs = []
    for path in (by_recurrent, by_hoisted):
        torch.manual_seed(3)
        runs.append(record(path, case))
    assert_agree(*runs, 1e-12)


def test_zoneout_keeps_each_unit_as_often_as_it_should():
    case = draw_in_training(lambda i, h: cells.Zoneout(cells.LSTM(i, h), (0.3, 0.0)))
    x = torch.randn(200, 40, 3, dtype=torch.float64)
    y, _ = Recurrent(case.cell, backend="hoisted")(x)
    kept = (y[1:] == y[:-1]).double().mean()
    assert abs(kept - 0.3) < 0.02
    (gradient,) = torch.autograd.grad(y.sum(), [case.cell.cell.bias])
    assert torch.isfinite(gradient).all()


def test_functional_call_lends_weights_and_gives_them_back():
    case = draw(BY_NAME["GRU"], 4, 3, 3, 4)
    rnn = Recurrent(case.cell, backend="hoisted")
    own = {name: value.clone() for name, value in rnn.state_dict().items()}
    lent = {name: (2 * value).requires_grad_() for name, value in own.items()}
    y, _ = functional_call(rnn, lent, (case.x,))
    expected, _ = functional_call(Recurrent(case.cell), lent, (case.x,))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for name, value in rnn.named_parameters():
        assert torch.equal(value, own[name])
    got = torch.autograd.grad(y.sum(), list(lent.values()))
    for a, b in zip(got, torch.autograd.grad(expected.sum(), list(lent.values())), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_copies_and_files_carry_no_trace():
    case = draw(BY_NAME["LSTM"], 4, 3, 3, 4)
    rnn = Recurrent(case.cell, backend="hoisted")
    y, _ = rnn(case.x)
    twin = copy.deepcopy(rnn)
    assert twin._path._plans == {}
    assert torch.equal(twin(case.x)[0], y)
    size = io.BytesIO()
    torch.save(rnn, size)
    fresh = io.BytesIO()
    torch.save(Recurrent(case.cell, backend="hoisted"), fresh)
    assert abs(len(size.getvalue()) - len(fresh.getvalue())) < 100
    assert "_path" not in rnn.state_dict()


@pytest.mark.parametrize("name", ["LSTM", "GRU", "SLSTM", "LayerNorm", "user: Attending"])
def test_autocast_keeps_the_precision_of_the_state(name):
    case = draw(BY_NAME[name], 5, 3, 3, 4, "lengths").to(torch.float32)
    expected = record(by_recurrent, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = by_hoisted(case)
        plain, _ = by_recurrent(case)
    assert y.dtype == plain.dtype
    assert [leaf.dtype for leaf in leaves(final)] == [torch.float32] * len(leaves(final))
    torch.testing.assert_close(y.float(), expected["y"], rtol=0.1, atol=0.1)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in case.cell.parameters() if p.grad is not None)
    assert by_hoisted(case)[0].dtype == torch.float32


def test_an_output_may_be_written_on():
    case = draw(BY_NAME["LSTM"], 4, 3, 3, 4)
    y, final = by_hoisted(case)
    y.mul_(2)
    final.h.mul_(3)
    got = torch.autograd.grad(y.sum() + final.h.sum(), case.x)
    y, final = by_recurrent(case)
    torch.testing.assert_close(got, torch.autograd.grad((2 * y).sum() + 3 * final.h.sum(), case.x), rtol=0, atol=1e-12)


def test_outputs_and_states_share_no_memory_with_what_was_given():
    class Delay(Cell):
        """Shows what it saw one step ago; its state is its input, twice."""

        input_size = output_size = 3

        def initial_state(self, batch_size):
            return self.zeros(batch_size, 3), self.zeros(batch_size, 3)

        def step(self, state, x, context=None):
            return (x, x), state[0]

    for learning in (True, False):
        x = torch.randn(1, 2, 3, requires_grad=learning)
        state = (torch.ones(2, 3), torch.ones(2, 3))
        before = x.detach().clone()
        y, (one, two) = Recurrent(Delay(), backend="hoisted")(x, state)
        with torch.no_grad():
            y.zero_()
            one.zero_()
        assert torch.equal(two, before[0])
        assert torch.equal(x, before)
        assert all(leaf.all() for leaf in state)
    x = torch.randn(6, 2, 3, requires_grad=True)
    lengths, resets = torch.tensor([6, 4]), torch.rand(6, 2) < 0.4
    runs = []
    for backend in ("loop", "hoisted"):
        y, (one, two) = Recurrent(Delay(), backend=backend)(x, lengths=lengths, resets=resets)
        runs.append([y, one, *torch.autograd.grad((y * y).sum() + one.sum() + (3 * two).sum(), x)])
    torch.testing.assert_close(*runs)


def test_tracing_draws_no_random_number_and_may_happen_in_inference_mode():
    case = draw_in_training(lambda i, h: cells.Zoneout(cells.WeightDrop(cells.LSTM(i, h), 0.5), 0.5))
    rnn = Recurrent(case.cell, backend="hoisted")
    ys = []
    for _ in range(2):
        torch.manual_seed(4)
        with torch.inference_mode():
            ys.append(rnn(case.x.detach())[0])
    assert torch.equal(*ys)
    rnn(case.x)[0].sum().backward()
    assert case.x.grad.any()


def test_only_so_many_kinds_of_input_are_remembered():
    cell = cells.Zoneout(cells.Vanilla(3, 4), 0.5).eval()
    rnn, x = Recurrent(cell, backend="hoisted"), torch.randn(2, 2, 3)
    for k in range(door._KEPT + 3):
        cell.shares = (k / 100,)
        rnn(x)
    assert len(rnn._path._plans) == len(rnn._path._analyses) == door._KEPT


def test_chunks_and_both_directions_take_the_hoisted_loop():
    case = draw(BY_NAME["Stack"], 7, 4, 3, 4, "state", "lengths", "resets")
    rnn = Recurrent(case.cell, backend="hoisted")
    first, state = rnn(case.x[:3], case.state, lengths=case.lengths.clamp(max=3), resets=case.resets[:3])
    second, final = rnn(case.x[3:], state, lengths=(case.lengths - 3).clamp(min=0), resets=case.resets[3:])
    expected, expected_final = in_chunks()(case)
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(leaves(final), leaves(expected_final), rtol=0, atol=1e-12)
    pair = copy.deepcopy(case.cell)
    y, _ = Bidirectional(case.cell, pair, backend="hoisted")(case.x, lengths=case.lengths)
    torch.testing.assert_close(y, Bidirectional(case.cell, pair)(case.x, lengths=case.lengths)[0], rtol=0, atol=1e-12)


def test_an_empty_sequence_and_a_state_of_nothing():
    class Stateless(Cell):
        input_size, output_size = 3, 2

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)

        def initial_state(self, batch_size):
            return ()

        def step(self, state, x, context=None):
            return (), self.linear(x)

    rnn, x = Recurrent(Stateless(), backend="hoisted"), torch.randn(4, 2, 3)
    y, final = rnn(x, lengths=[4, 2])
    expected = rnn.cell.linear(x)
    expected[2:, 1] = 0
    torch.testing.assert_close(y, expected)
    assert final == ()
    assert rnn(x[:0])[0].shape == (0, 2, 2)
