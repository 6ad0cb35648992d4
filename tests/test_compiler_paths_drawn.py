"""The faster paths where a cell draws random numbers, in lower precision, and where there is nothing to carry.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import pytest
import torch

from agreement import assert_agree, draw, draw_in_training, record
from catalogue import BY_NAME
from faster import BACKENDS, MODES, by, fill_memory_with_nan, path_of
from paths import by_recurrent
from recurra import cells
from recurra.cell import Cell, leaves
from recurra.unroll import Recurrent

both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _nan(monkeypatch):
    fill_memory_with_nan(monkeypatch)


class Stateless(Cell):
    input_size, output_size = 3, 2

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def initial_state(self, batch_size):
        return ()

    def step(self, state, x, context=None):
        return (), self.linear(x)


@both
@pytest.mark.parametrize("memory", MODES)
def test_masks_of_a_sequence_are_those_of_the_loop(backend, memory):
    case = draw_in_training(lambda i, h: cells.WeightDrop(cells.VariationalDropout(cells.LSTM(i, h), 0.3, 0.3), 0.5,
                                                          ("cell.weight_hh",)), "lengths", "resets")  # fmt: skip
    runs = []
    for path in (by_recurrent, path_of(backend, memory)):
        torch.manual_seed(3)
        runs.append(record(path, case))
    assert_agree(*runs, 1e-12)


@both
@pytest.mark.parametrize("memory", MODES)
def test_masks_of_a_step_are_the_same_in_the_backward_pass(backend, memory):
    """Where no unit is kept but one in two, the gradient of a sum of states goes through the same units."""
    case = draw_in_training(lambda i, h: cells.Zoneout(Summing(i, h), 0.5))
    y, _ = Recurrent(case.cell, backend=backend, memory=memory)(torch.ones(40, 3, 3, dtype=torch.float64))
    (found,) = torch.autograd.grad(y[-1].sum(), case.cell.cell.step_size)
    # y grows by the step size at each step that is not left out.
    torch.testing.assert_close(found, (y[-1] / case.cell.cell.step_size).sum(0), rtol=1e-9, atol=1e-9)
    assert (y[-1] < 39 * case.cell.cell.step_size.abs()).all()


class Summing(Cell):
    """Adds the same at every step."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.step_size = torch.nn.Parameter(torch.ones(hidden_size))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.output_size)

    def step(self, state, x, context=None):
        h = state + self.step_size.abs() * x[:, :1]
        return h, h


@both
def test_zoneout_keeps_each_unit_as_often_as_it_should(backend):
    case = draw_in_training(lambda i, h: cells.Zoneout(cells.LSTM(i, h), (0.3, 0.0)))
    x = torch.randn(200, 40, 3, dtype=torch.float64)
    y, _ = Recurrent(case.cell, backend=backend)(x)
    kept = (y[1:] == y[:-1]).double().mean()
    assert abs(kept - 0.3) < 0.02
    (gradient,) = torch.autograd.grad(y.sum(), [case.cell.cell.bias])
    assert torch.isfinite(gradient).all()


@both
def test_tracing_draws_no_random_number_and_may_happen_in_inference_mode(backend):
    case = draw_in_training(lambda i, h: cells.Zoneout(cells.WeightDrop(cells.LSTM(i, h), 0.5), 0.5))
    rnn = Recurrent(case.cell, backend=backend)
    ys = []
    for _ in range(2):
        torch.manual_seed(4)
        with torch.inference_mode():
            ys.append(rnn(case.x.detach())[0])
    assert torch.equal(*ys)
    rnn(case.x)[0].sum().backward()
    assert case.x.grad.any()


@both
@pytest.mark.parametrize("name", ["LSTM", "GRU", "SLSTM", "LayerNorm", "user: Attending"])
def test_autocast_keeps_the_precision_of_the_state(name, backend):
    """Native code takes no step whose precision changes on the way; then, and only then, it is refused."""
    case = draw(BY_NAME[name], 5, 3, 3, 4, "lengths").to(torch.float32)
    expected = record(by_recurrent, case)
    # What native code cannot do, "auto" leaves to the hoisted loop.
    rnn = Recurrent(case.cell, backend="auto" if backend == "compiled" else backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = by(rnn)(case)
        plain, _ = by_recurrent(case)
    assert y.dtype == plain.dtype
    assert [leaf.dtype for leaf in leaves(final)] == [torch.float32] * len(leaves(final))
    torch.testing.assert_close(y.float(), expected["y"], rtol=0.1, atol=0.1)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in case.cell.parameters() if p.grad is not None)
    assert by(rnn)(case)[0].dtype == torch.float32


@both
def test_an_empty_sequence_and_a_state_of_nothing(backend):
    rnn, x = Recurrent(Stateless(), backend=backend), torch.randn(4, 2, 3)
    y, final = rnn(x, lengths=[4, 2])
    expected = rnn.cell.linear(x)
    expected[2:, 1] = 0
    torch.testing.assert_close(y, expected)
    assert final == ()
    assert rnn(x[:0])[0].shape == (0, 2, 2)
