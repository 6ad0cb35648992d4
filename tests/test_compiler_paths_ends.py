"""The results of a run: a loss of some of them only, whose others' gradients are zeros that nobody need make; and
memory of their own for each.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from agreement import draw
from catalogue import BY_NAME
from faster import BACKENDS, MODES, by, fill_memory_with_nan
from paths import by_recurrent
from recurra.cell import Cell, leaves
from recurra.compiler.writer import Writer
from recurra.unroll import Recurrent

# Rows that lengths, resets and directions leave as they are, and do not.
KINDS = ((), ("state",), ("lengths",), ("resets",), ("reverse",), ("lengths", "resets", "reverse", "state"))
# States of one leaf and of several, of rank 3, with a leaf of whole numbers, and one that a product is taken of first.
CELLS = (
    "LSTM",
    "GRU",
    "LayerNormLSTM",
    "RecurrentHighway",
    "MLSTM",
    "MinGRU",
    "Stack",
    "user: Leaky",
    "user: Counting",
)


@pytest.fixture(autouse=True)
def _nan(monkeypatch):
    fill_memory_with_nan(monkeypatch)


def ends_of(y, final):
    return [y, *(leaf for leaf in leaves(final) if leaf.is_floating_point())]


def gradients(path, case, number, *, again=False):
    """The gradients of the sum of squares of one of the results; with ``again``, those of the sum of their squares."""
    end = ends_of(*path(case))[number]
    wanted = list(case.wanted.values())
    options = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(end.square().sum(), wanted, create_graph=again, **options)
    if again:
        found = torch.autograd.grad(sum(each.square().sum() for each in found), wanted, **options)
    return found


def close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def cases(name, kind, T=5, B=3):
    entry = BY_NAME[name]
    case = draw(entry, T, B, 9, 24, *kind)
    return case, range(len(ends_of(*by_recurrent(case))))


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_result_alone(backend, name, kind):
    case, numbers = cases(name, kind)
    run = by(Recurrent(case.cell, backend="auto" if backend == "compiled" else backend))
    for number in numbers:
        close(gradients(run, case, number), gradients(by_recurrent, case, number))


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_result_alone_in_parts(backend, memory):
    case, numbers = cases("LSTM", ("state",), T=11)
    run = by(Recurrent(case.cell, backend=backend, memory=memory))
    for number in numbers:
        close(gradients(run, case, number), gradients(by_recurrent, case, number))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_result_alone_differentiated_twice(backend):
    case, numbers = cases("LSTM", ())
    run = by(Recurrent(case.cell, backend=backend))
    for number in numbers:
        close(gradients(run, case, number, again=True), gradients(by_recurrent, case, number, again=True))


def test_the_native_call_makes_zeros_itself(monkeypatch):
    """And not the same for a call that has no zeros."""
    filled = []
    fill = Writer.fill

    def noted(self, when, value):
        filled.append(value)
        fill(self, when, value)

    monkeypatch.setattr(Writer, "fill", noted)
    case, _ = cases("LSTM", ())
    run = by(Recurrent(case.cell, backend="compiled"))
    for number, zeros in ((0, 2), (1, 1), (2, 1), (0, 0)):
        filled.clear()
        close(gradients(run, case, number), gradients(by_recurrent, case, number))
        assert len(filled) == zeros
    ends = ends_of(*run(case))
    filled.clear()
    torch.autograd.grad(sum(end.sum() for end in ends), case.x)
    assert not filled


def test_threads_differentiate_one_run_for_different_ends(monkeypatch):
    # What fills memory with NaN would do so while another thread works in it.
    monkeypatch.undo()
    case, numbers = cases("LSTM", (), T=20)
    wanted = list(case.wanted.values())
    ends = ends_of(*by(Recurrent(case.cell, backend="compiled"))(case))
    losses = [end.square().sum() for end in ends]
    expected = [gradients(by_recurrent, case, number) for number in numbers]
    found = [[] for _ in numbers]

    def differentiate(number):
        for _ in range(50):
            found[number].append(torch.autograd.grad(losses[number], wanted, retain_graph=True))

    threads = [threading.Thread(target=differentiate, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in numbers:
        assert len(found[number]) == 50
        for each in found[number]:
            close(each, expected[number])


def test_zeros_that_nobody_made_are_not_anybody_elses():
    """What comes back for a state whose gradient passes through unchanged is the caller's own."""
    case, _ = cases("LSTM", ("state",))
    rnn = Recurrent(case.cell, backend="compiled")
    wanted = list(case.wanted.values())
    expected = gradients(by_recurrent, case, 0)
    for _ in range(3):
        y, _ = by(rnn)(case)
        found = torch.autograd.grad(y.square().sum(), wanted)
        close(found, expected)
        for gradient in found:
            gradient.fill_(torch.nan)


class Cut(Cell):
    """What it says is a part of what it keeps, or all that it hears."""

    input_size = 4

    def __init__(self, heard):
        super().__init__()
        self.heard, self.output_size = heard, 4 if heard else 2
        self.inward, self.inner = nn.Linear(4, 24), nn.Linear(24, 24)

    def initial_state(self, batch_size):
        return self.zeros(batch_size, 24)

    def step(self, h, x, context=None):
        h = torch.tanh(self.inward(x) + self.inner(h))
        return h, x if self.heard else h[:, 1:3]


@pytest.mark.parametrize("heard", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_share_their_memory_with_nothing(backend, heard):
    cell = Cut(heard).double()
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    wanted = [x, *cell.parameters()]

    def gradients_after(backend, change):
        y, final = Recurrent(cell, backend=backend)(x)
        if change:
            y.mul_(2.0)
        else:
            y = y * 2.0
        return y, torch.autograd.grad(y.square().sum() + final.sum(), wanted)

    y, found = gradients_after(backend, change=True)
    assert y.untyped_storage().nbytes() == y.numel() * y.itemsize
    expected, gradients = gradients_after("loop", change=False)
    close([y, *found], [expected, *gradients])
