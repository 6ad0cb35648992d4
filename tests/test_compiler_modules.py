"""PyTorch's own modules in a step: attention, cells, products of two vectors. The plain loop's numbers by native code.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from agreement import assert_agree, draw, record
from catalogue import Entry
from faster import by, fill_memory_with_nan, path_of
from foreign_cells import Foreign
from paths import by_recurrent
from recurra.compiler import decompose
from recurra.compiler import trace as trace_module
from recurra.unroll import Recurrent


class Mogrifier(Foreign):
    """Input and state scale one another before the step (Melis et al. 2020, "Mogrifier LSTM", section 2)."""

    leaves = (1, 1)

    def make(self, H):
        self.cell, self.q, self.r = nn.LSTMCell(H, H), nn.Linear(H, H), nn.Linear(H, H)

    def step(self, state, x, context=None):
        (h, c), x = state, self.x(x)
        for _ in range(2):
            x = 2 * torch.sigmoid(self.q(h)) * x
            h = 2 * torch.sigmoid(self.r(x)) * h
        h, c = self.cell(x, (h, c))
        return (h, c), h


class Bilinear(Foreign):
    """A product of the state, the input and a weight of three axes."""

    def make(self, H):
        self.both, self.norm = nn.Bilinear(H, H, H), nn.RMSNorm(H, eps=0.1)

    def step(self, h, x, context=None):
        h = self.norm(torch.tanh(self.both(h, self.x(x))) + h)
        return h, h


class Queried(Foreign):
    """What a recurrence looks at in its context, behind the loop."""

    multiple = 2

    def make(self, H):
        self.cell, self.attention = nn.GRUCell(H, H), nn.MultiheadAttention(H, 2, batch_first=True)

    def step(self, h, x, context=None):
        h = self.cell(self.x(x), h)
        seen, _ = self.attention(h[:, None], context, context, need_weights=False)
        return h, h + seen[:, 0]


class Fed(Queried):
    """And in the loop, where it is part of the next state."""

    def step(self, h, x, context=None):
        h = self.cell(self.x(x), h)
        seen, _ = self.attention(h[:, None], context, context, need_weights=False)
        h = torch.tanh(h + seen[:, 0])
        return h, h


CELLS = {cell.__name__: cell for cell in (Mogrifier, Bilinear, Queried, Fed)}
RUNS = [(5, 5, "state lengths resets"), (7, 3, "state resets reverse"), (1, 5, "state lengths"), (9, 1, "state")]


def case_of(name: str, T: int, B: int, options: str):
    return draw(Entry(name, CELLS[name], None, memory=name in ("Queried", "Fed")), T, B, 3, 6, *options.split())


@pytest.fixture(autouse=True)
def _nan(monkeypatch):
    fill_memory_with_nan(monkeypatch)


@pytest.mark.parametrize("backend", ["compiled", "hoisted"])
@pytest.mark.parametrize("name", CELLS)
def test_a_module_of_pytorch_in_a_step_gives_the_loops_numbers(name, backend):
    for T, B, options in RUNS:
        case = case_of(name, T, B, options)
        assert_agree(record(path_of(backend), case), record(by_recurrent, case), 1e-12)


@pytest.mark.parametrize("name", ["Queried", "Fed"])
def test_attention_on_many_rows_and_places(name):
    make = CELLS[name]
    torch.manual_seed(3)
    cell = make(5, 16).double()
    x, context = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((20, 9, 5), (9, 33, 16)))
    found = []
    for backend in ("loop", "compiled"):
        y, _ = Recurrent(cell, backend=backend)(x, context=context)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [x, context, *cell.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_fused_attention_that_is_half_taken_apart_is_told_apart(monkeypatch):
    """PyTorch's table has the forward pass of its fused attention, and gives the backward pass something else."""
    monkeypatch.setattr(trace_module, "sdpa_kernel", lambda _: nullcontext())
    case = case_of("Queried", 5, 5, "state")
    with pytest.raises(AssertionError):
        assert_agree(record(by(Recurrent(case.cell, backend="compiled")), case), record(by_recurrent, case), 1e-6)


def test_a_bilinear_product_with_axes_exchanged_is_told_apart(monkeypatch):
    right = decompose._trilinear

    def wrong(one, two, three, *axes):
        return right(one, two.transpose(1, 2) if two.dim() == 3 else two, three, *axes)

    monkeypatch.setattr(decompose, "_trilinear", wrong)
    case = case_of("Bilinear", 5, 5, "state")
    with pytest.raises(AssertionError):
        assert_agree(record(by(Recurrent(case.cell, backend="compiled")), case), record(by_recurrent, case), 1e-6)
