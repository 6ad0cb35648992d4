"""What a user may do with a run by one of the faster paths, and with a Recurrent that has run.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from agreement import assert_agree, draw, draw_in_training, record, values
from catalogue import BY_NAME
from faster import BACKENDS, MODES, by, fill_memory_with_nan, path_of
from paths import by_recurrent
from recurra import cells
from recurra.cell import Cell, leaves
from recurra.errors import BackendError
from recurra.unroll import Recurrent

both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _nan(monkeypatch):
    fill_memory_with_nan(monkeypatch)


def total_of(y, final):
    """A number that all of a run goes into, each part by its square and itself."""
    ends = [y, *(leaf for leaf in leaves(final) if leaf.is_floating_point())]
    return sum((end.square() + (k + 1) * end).sum() for k, end in enumerate(ends))


def gradients(rnn, case, wanted=None):
    wanted = list(case.wanted.values()) if wanted is None else wanted
    return torch.autograd.grad(total_of(*by(rnn)(case)), wanted, allow_unused=True, materialize_grads=True)


def close(got, expected, tolerance=1e-12):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


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


class Delay(Cell):
    """Shows what it saw one step ago; its state is its input, twice."""

    input_size = output_size = 3

    def initial_state(self, batch_size):
        return self.zeros(batch_size, 3), self.zeros(batch_size, 3)

    def step(self, state, x, context=None):
        return (x, x), state[0]


@both
def test_only_what_is_asked_for_has_a_gradient(backend):
    case = draw(BY_NAME["deep"], 5, 3, 3, 4, "state", "lengths", "resets")
    expected = dict(zip(case.wanted, gradients(Recurrent(case.cell, backend="loop"), case), strict=True))
    rnn = Recurrent(case.cell, backend=backend)
    for name in ("x", "state 0", *list(expected)[1:-1:5]):
        asked = case.wanted[name]
        for other in case.wanted.values():
            other.requires_grad_(other is asked)
        close(gradients(rnn, case, [asked]), [expected[name]], 1e-11)
    for other in case.wanted.values():
        other.requires_grad_(False)
    assert not by(rnn)(case)[0].requires_grad


@both
@pytest.mark.parametrize("frozen", ["weight_hh", "weight_ih", "bias", "x"])
def test_what_is_frozen_changes_no_other_gradient(frozen, backend):
    case = draw(BY_NAME["LSTM"], 5, 3, 3, 4, "lengths", "resets")
    tensor = case.x if frozen == "x" else case.parameters[frozen]
    expected = record(by_recurrent, case)
    tensor.requires_grad_(False)
    y, final = path_of(backend)(case)
    total = sum((value * torch.randn(value.shape, generator=torch.Generator().manual_seed(k)).to(value.dtype)).sum()
                for k, value in enumerate([y, *leaves(final)]))  # fmt: skip
    wanted = {name: value for name, value in case.wanted.items() if value is not tensor}
    got = torch.autograd.grad(total, list(wanted.values()))
    close(got, [expected[f"gradient of {name}"] for name in wanted])
    assert tensor.grad is None


@both
def test_a_tensor_given_in_two_places_gets_both_gradients(backend):
    cell, x = Tied().double(), torch.randn(5, 3, 4, dtype=torch.float64)
    grads = []
    for each in ("loop", backend):
        y, final = Recurrent(cell, backend=each)(x, context=cell.one.weight)
        grads.append(torch.autograd.grad(y.square().sum() + final.sum(), cell.one.weight)[0])
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    assert isinstance(cell.one.weight, torch.nn.Parameter)


@both
def test_x_may_be_the_state_as_well(backend):
    case = draw(BY_NAME["user: Rotor"], 4, 3, 4, 4)
    found = []
    for each in ("loop", backend):
        rnn = Recurrent(case.cell, backend=each)
        found.append(torch.autograd.grad(total_of(*rnn(case.x, (case.x[0], case.x[0]))), case.x))
    close(*found)


@both
@pytest.mark.parametrize("name", ["LSTM", "GRU", "LearnedInitialState", "user: Attending", "user: Leaky"])
def test_second_derivatives_go_through_the_loop(name, backend):
    case = draw(BY_NAME[name], 4, 3, 3, 4, "lengths", "resets")
    found = []
    for path in (by_recurrent, path_of(backend)):
        wanted = [value.requires_grad_() for value in case.wanted.values()]
        first = torch.autograd.grad(
            total_of(*path(case)), wanted, create_graph=True, allow_unused=True, materialize_grads=True
        )
        second = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(second, wanted, allow_unused=True, materialize_grads=True))
    close(*found, tolerance=1e-10)


@both
def test_second_derivatives_of_what_draws_are_refused(backend):
    case = draw_in_training(lambda i, h: cells.Zoneout(cells.LSTM(i, h), 0.5))
    y, _ = path_of(backend)(case)
    with pytest.raises(BackendError, match="draws random numbers in its step"):
        torch.autograd.grad(y.sum(), case.x, create_graph=True)


@both
@pytest.mark.parametrize("memory", MODES)
def test_a_backward_pass_may_run_twice(backend, memory):
    case = draw(BY_NAME["GRU"], 5, 3, 3, 4, "state", "lengths", "resets")
    rnn, wanted = Recurrent(case.cell, backend=backend, memory=memory), list(case.wanted.values())
    total = total_of(*by(rnn)(case))
    first = torch.autograd.grad(total, wanted, retain_graph=True)
    second = torch.autograd.grad(total, wanted)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, wanted)
    close(first, gradients(Recurrent(case.cell, backend="loop"), case))


@both
@pytest.mark.parametrize("memory", MODES)
def test_calls_may_lie_between_a_run_and_its_backward_pass(backend, memory):
    """Of another length, another batch, and with other weights, which PyTorch notices."""
    case = draw(BY_NAME["LSTM"], 5, 3, 3, 4, "state")
    other = replace(draw(BY_NAME["LSTM"], 9, 2, 3, 4, "lengths", seed=8), cell=case.cell)
    rnn, loop = Recurrent(case.cell, backend=backend, memory=memory), Recurrent(case.cell, backend="loop")
    one, two = total_of(*by(rnn)(case)), total_of(*by(rnn)(other))
    with torch.no_grad():
        by(rnn)(replace(other, reverse=True))
    close(torch.autograd.grad(one, list(case.wanted.values())), gradients(loop, case))
    close(torch.autograd.grad(two, list(other.wanted.values())), gradients(loop, other))
    total = total_of(*by(rnn)(case))
    with torch.no_grad():
        case.cell.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@both
@pytest.mark.parametrize("change", ["in place", "by name", "loaded", "by .data"])
def test_weights_that_have_changed_are_taken_as_they_are_now(change, backend):
    case = draw(BY_NAME["GRU"], 5, 3, 3, 4, "state", "lengths", "resets")
    rnn = Recurrent(case.cell, backend=backend)
    before = values(by(rnn), case)
    if change == "in place":
        with torch.no_grad():
            case.cell.weight_hh.add_(0.25)
    elif change == "by name":
        case.cell.weight_hh = torch.nn.Parameter(case.cell.weight_hh.detach() + 0.25)
    elif change == "loaded":
        rnn.load_state_dict({name: value + 0.25 for name, value in rnn.state_dict().items()})
    else:
        case.cell.weight_hh.data = case.cell.weight_hh.data + 0.25
    got = record(by(rnn), case)
    assert (got["y"] - before["y"]).abs().max() > 1e-3
    assert_agree(got, record(by_recurrent, case), 1e-12)


@both
def test_one_recurrent_may_change_its_precision_and_its_mode(backend):
    case = draw(BY_NAME["LSTM"], 4, 3, 3, 4)
    rnn = Recurrent(case.cell, backend=backend)
    double = rnn(case.x)[0]
    single = rnn.float()(case.x.float())[0]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)
    case.cell.load_state_dict(draw(BY_NAME["LSTM"], 1, 1, 3, 4).cell.state_dict())
    torch.testing.assert_close(rnn.double()(case.x)[0], double, rtol=0, atol=1e-6)
    drawn = draw_in_training(lambda i, h: cells.Zoneout(cells.LSTM(i, h), 0.5))
    rnn = Recurrent(drawn.cell.eval(), backend=backend)
    torch.testing.assert_close(rnn(drawn.x), by_recurrent(drawn), rtol=0, atol=1e-12)
    drawn.cell.shares = (0.0, 0.9)
    torch.testing.assert_close(rnn(drawn.x), by_recurrent(drawn), rtol=0, atol=1e-12)
    rnn.train()
    assert not torch.equal(rnn(drawn.x)[0], rnn(drawn.x)[0])


@both
@pytest.mark.parametrize("memory", MODES)
def test_tensors_need_not_be_contiguous(backend, memory):
    case = draw(BY_NAME["LSTM"], 5, 4, 3, 4, "state", "lengths", "resets")
    rnn = Recurrent(case.cell, backend=backend, memory=memory)
    expected = record(by(rnn), case)

    def strided(tensor):
        """The same numbers, every second of a larger tensor whose axes are turned."""
        turned = tensor.detach().movedim(0, -1)
        whole = torch.full((*turned.shape, 2), torch.nan if tensor.is_floating_point() else 0).to(tensor.dtype)
        whole[..., 0] = turned
        return whole[..., 0].movedim(-1, 0)

    x, state = strided(case.x).requires_grad_(), type(case.state)(*(strided(s).requires_grad_() for s in case.state))
    assert not x.is_contiguous()
    for name in ("weight_hh", "weight_ih"):
        setattr(case.cell, name, torch.nn.Parameter(strided(getattr(case.cell, name))))
    resets = strided(case.resets)
    lengths = torch.stack([case.lengths, case.lengths * 0], 1)[:, 0]
    got = record(by(rnn), replace(case, x=x, state=state, resets=resets, lengths=lengths))
    assert_agree(got, expected, 1e-14)


@both
def test_gradients_need_not_be_contiguous_or_there_at_all(backend):
    case = draw(BY_NAME["LSTM"], 5, 3, 3, 4, "state")
    found = []
    for each in ("loop", backend):
        y, final = Recurrent(case.cell, backend=each)(case.x, case.state)
        grads = [
            torch.autograd.grad(end, case.x, retain_graph=True)[0] for end in (y.sum(), y[:2].sum(), final.c.sum())
        ]
        turned = torch.arange(60.0).double().view(4, 3, 5).permute(2, 1, 0)
        grads += torch.autograd.grad(
            [y, final.h], [case.x, case.state.h], [turned, torch.ones(3, 1).double().expand(3, 4)]
        )
        found.append(grads)
    close(*found)


@both
@pytest.mark.parametrize("memory", MODES)
def test_an_output_may_be_written_on(backend, memory):
    case = draw(BY_NAME["LSTM"], 6, 3, 3, 4)
    wanted = [case.x, *case.parameters.values()]
    y, final = by_recurrent(case)
    expected = torch.autograd.grad((2 * y).sum() + (3 * final.h).sum(), wanted)
    y, final = Recurrent(case.cell, backend=backend, memory=memory)(case.x)
    y.mul_(2)
    final.h.mul_(3)
    ends = [y.sum(), final.h.sum()]
    with torch.no_grad():
        y.fill_(torch.nan)
        final.h.fill_(torch.nan)
        final.c.fill_(torch.nan)
    close(torch.autograd.grad(ends, wanted), expected)


@both
def test_outputs_and_states_share_no_memory_with_what_was_given(backend):
    for learning in (True, False):
        x = torch.randn(1, 2, 3, requires_grad=learning)
        state = (torch.ones(2, 3), torch.ones(2, 3))
        before = x.detach().clone()
        y, (one, two) = Recurrent(Delay(), backend=backend)(x, state)
        with torch.no_grad():
            y.zero_()
            one.zero_()
        assert torch.equal(two, before[0])
        assert torch.equal(x, before)
        assert all(leaf.all() for leaf in state)
    x = torch.randn(6, 2, 3, requires_grad=True)
    lengths, resets = torch.tensor([6, 4]), torch.rand(6, 2) < 0.4
    runs = []
    for each in ("loop", backend):
        y, (one, two) = Recurrent(Delay(), backend=each)(x, lengths=lengths, resets=resets)
        runs.append([y, one, *torch.autograd.grad((y * y).sum() + one.sum() + (3 * two).sum(), x)])
    torch.testing.assert_close(*runs)


@both
def test_backward_in_another_thread_and_runs_in_several_at_once(backend):
    case = draw(BY_NAME["LSTM"], 20, 5, 3, 8, "state", "lengths", "resets")
    rnn = Recurrent(case.cell, backend=backend)
    cases = [replace(draw(BY_NAME["LSTM"], 20, 5, 3, 8, "lengths", "state", seed=k), cell=case.cell) for k in range(3)]
    expected = [gradients(Recurrent(case.cell, backend="loop"), each) for each in cases]
    found: dict[int, list] = {}

    def work(k: int) -> None:
        # The first of them trace; all the others meet kernels that somebody else is using.
        found[k] = [gradients(rnn, cases[k]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, each in enumerate(expected):
        for again in found[k]:
            close(again, each)
    total = total_of(*by(rnn)(cases[0]))
    apart = threading.Thread(
        target=lambda: found.update({9: torch.autograd.grad(total, list(cases[0].wanted.values()))})
    )
    apart.start()
    apart.join()
    close(found[9], expected[0])


class Shifted(cells.Vanilla):
    """Takes a context, or none."""

    def step(self, state, x, context=None):
        return super().step(state, x if context is None else x + context)


@both
def test_a_call_with_context_is_none_without(backend):
    """A call without context is remembered, and one with it must not be taken for the same; nor the other way."""
    cell, x, shift = Shifted(3, 4).double(), torch.randn(5, 2, 3).double(), torch.randn(2, 3).double()
    rnn, loop = Recurrent(cell, backend=backend), Recurrent(cell, backend="loop")
    for context in (None, shift, None, None, 2 * shift, shift[:, :1]):
        torch.testing.assert_close(rnn(x, context=context), loop(x, context=context), rtol=1e-12, atol=1e-12)


@both
def test_copies_and_files_carry_no_trace(backend):
    case = draw(BY_NAME["LSTM"], 4, 3, 3, 4)
    rnn = Recurrent(case.cell, backend=backend, memory="sqrt")
    y, _ = rnn(case.x)
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert twin._path._plans == {}
        assert (twin.backend, twin.memory) == (backend, "sqrt")
        assert torch.equal(twin(case.x)[0], y)
        with torch.no_grad():
            twin.cell.bias.add_(1)
        assert not torch.equal(twin(case.x)[0], y)
        assert torch.equal(rnn(case.x)[0], y)
    used, fresh = io.BytesIO(), io.BytesIO()
    torch.save(rnn, used)
    torch.save(Recurrent(case.cell, backend=backend, memory="sqrt"), fresh)
    assert abs(len(used.getvalue()) - len(fresh.getvalue())) < 100
    assert "_path" not in rnn.state_dict()


@both
def test_functional_call_lends_weights_and_gives_them_back(backend):
    case = draw(BY_NAME["GRU"], 4, 3, 3, 4)
    rnn = Recurrent(case.cell, backend=backend)
    own = {name: value.clone() for name, value in rnn.state_dict().items()}
    lent = {name: (2 * value).requires_grad_() for name, value in own.items()}
    y, _ = functional_call(rnn, lent, (case.x,))
    expected, _ = functional_call(Recurrent(case.cell, backend="loop"), lent, (case.x,))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for name, value in rnn.named_parameters():
        assert torch.equal(value, own[name])
    ends = list(lent.values())
    close(torch.autograd.grad(y.sum(), ends), torch.autograd.grad(expected.sum(), ends))
