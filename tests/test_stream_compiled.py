"""Compiled streams give what the loop gives, see every change that can be known, and refuse what they cannot run.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from agreement import assert_agree, draw, killed, values
from catalogue import BY_NAME, CATALOGUE
from paths import Case, by_plain
from recurra.cell import Cell, leaves, map_state
from recurra.cells import GRU, LSTM
from recurra.stream import Stream


def inputs(T: int, B: int, size: int = 3) -> torch.Tensor:
    return torch.randn(T, B, size).double()


def soil(stream: Stream) -> None:
    """Fill the scratch memory of a bound stream with NaN; the packed weights stay."""
    for array in stream._step.workspace.arrays[1:]:
        array.view(np.uint8)[...] = 0xFF


def streamed_by(kind: type[Stream], backend: str, rows: slice = slice(None)):
    """Pushed step by step with the case's resets, in the middle of which the stream goes back two steps, once."""

    def path(case: Case):
        x = case.x[:, rows].detach()
        context = None if case.context is None else case.context[rows].detach()
        stream = kind(case.cell, x.shape[1], context, backend=backend)
        if case.state is not None:
            stream.restore(map_state(lambda leaf: leaf[rows], case.state))
        ys, again = [], [*range(4), 2, 3, *range(4, len(x))]
        kept = None
        for place, t in enumerate(again):
            if place == 2:
                kept = stream.snapshot()
            if place == 4:
                stream.restore(kept)
            if case.resets is not None:
                stream.reset(case.resets[t, rows])
            if stream._step is not None:
                soil(stream)
            ys.append(stream.push(x[t]))
        assert stream.explain().ran == backend
        return torch.stack([ys[again.index(t)] if t < 4 else ys[t + 2] for t in range(len(x))]), stream.snapshot()

    return path


def cut(case: Case, b: int) -> Case:
    """One row of a case."""
    only = slice(b, b + 1)
    return Case(
        case.entry,
        case.cell,
        case.x[:, only],
        None if case.state is None else map_state(lambda leaf: leaf[only], case.state),
        None,
        None if case.resets is None else case.resets[:, only],
        False,
        None if case.context is None else case.context[only],
    )


# Its state counts in whole numbers.
NATIVE = [entry for entry in CATALOGUE if entry.name != "user: Counting"]


@pytest.mark.parametrize("entry", NATIVE, ids=str)
def test_streams_give_what_the_equations_give(entry):
    case = draw(entry, 7, 3, 3, 4, "state", "resets")
    with torch.no_grad():
        expected = values(by_plain, case)
    for backend in ("loop", "compiled"):
        assert_agree(values(streamed_by(Stream, backend), case), expected, 1e-12)
    for b in range(3):
        row = values(streamed_by(Stream, "compiled", slice(b, b + 1)), case)
        assert_agree(
            row, {name: v[:, b : b + 1] if name == "y" else v[b : b + 1] for name, v in expected.items()}, 1e-12
        )


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LayerNormLSTM", "MLSTM heads", "deep"])
def test_single_precision_is_near_the_equations(name):
    case = draw(BY_NAME[name], 7, 3, 5, 7, "resets")
    with torch.no_grad():
        expected = values(by_plain, case)
    assert_agree(values(streamed_by(Stream, "compiled"), case.to(torch.float32)), expected, 1e-5)


def test_a_large_step_divided_among_threads_is_the_same():
    cell = LSTM(64, 512).double().eval()
    x = inputs(3, 1, 64)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            stream = Stream(cell, backend="compiled")
            found.append(torch.stack([stream.push(step) for step in x]))
            assert stream._step._members == threads
        torch.set_num_threads(1)
        found.append(stream.push(x[0]))
        assert stream._step._members == 1
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    loop = Stream(cell, backend="loop")
    for step, y in zip([*x, x[0]], [*found[0], found[2]], strict=True):
        torch.testing.assert_close(y, loop.push(step), rtol=0, atol=1e-12)


# --- wrong on purpose ---


class ForgetsItsState(Stream):
    """The kernel works on a state of its own, which starts afresh at each push."""

    def push(self, x):
        for leaf in leaves(self._state):
            leaf.zero_()
        return super().push(x)


class SetsNothing(Stream):
    def _set(self, state):
        if self._step is None:
            super()._set(state)


class SharesItsOutput(Stream):
    def push(self, x):
        y = super().push(x)
        return y if self._step is None else self._step._y.copy_(y)


@pytest.mark.parametrize("kind", [ForgetsItsState, SetsNothing, SharesItsOutput])
def test_a_wrong_compiled_stream_is_noticed(kind):
    case = draw(BY_NAME["LSTM"], 7, 3, 3, 4, "state", "resets")
    with torch.no_grad():
        expected = values(by_plain, case)

    def check(kind):
        assert_agree(values(streamed_by(kind, "compiled"), case), expected, 1e-12)

    check(Stream)
    killed(check, kind)


# --- inputs ---


def test_an_input_may_lie_anyhow():
    cell = GRU(4, 5).double().eval()
    x = inputs(8, 3, 4)
    expected = torch.stack([Stream(cell, 3, backend="loop").push(step) for step in x])
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    several = torch.cat([x, x], dim=2)[:, :, :4]
    unaligned = torch.cat([torch.zeros(1).double(), x.flatten()])[1:].view(x.shape)
    learned = x.clone().requires_grad_()
    negative = torch.complex(x, -x).conj().imag
    for given in (x, turned, several, unaligned, learned, negative, [nn.Parameter(step) for step in x]):
        stream = Stream(cell, 3, backend="compiled")
        for step, y in zip(given, expected, strict=True):
            stream.reset()
            found = stream.push(step)
            torch.testing.assert_close(found, y, rtol=0, atol=1e-12)
            assert not found.requires_grad
    with torch.inference_mode():
        made_there = Stream(cell, 3, backend="compiled")
        torch.testing.assert_close(made_there.push(x[0] + 0), expected[0], rtol=0, atol=1e-12)
        stream.push(x[0])
    kept = made_there.snapshot()
    assert not any(leaf.is_inference() for leaf in leaves(kept))
    made_there.reset([0])
    made_there.push(x[1])


def test_one_row_with_the_sign_kept_apart_is_read_right():
    cell = GRU(1, 2).double().eval()
    x = torch.complex(torch.ones(1, 1), torch.ones(1, 1)).to(torch.complex128).conj().imag
    assert x.is_neg()
    assert x.is_contiguous()
    pushed, expected = (Stream(cell, backend=backend).push(x) for backend in ("compiled", "loop"))
    torch.testing.assert_close(pushed, expected, rtol=0, atol=1e-12)


def test_outputs_are_the_callers_own():
    stream, x = Stream(GRU(3, 4).eval(), 2, backend="compiled"), torch.randn(5, 2, 3)
    ys = [stream.push(step) for step in x]
    copies = [y.clone() for y in ys]
    kept = stream.snapshot()
    for y in ys[:-1]:
        y.fill_(torch.nan)
    stream.push(x[0])
    assert torch.equal(ys[-1], copies[-1])
    stream.restore(kept)
    again = stream.push(x[0])
    assert not again.isnan().any()
    assert len({y.data_ptr() for y in [*ys, again]}) == 6


class Odd(Cell):
    """y is what it is told to be."""

    input_size, output_size = 3, 3

    def __init__(self, y):
        super().__init__()
        self.y = y
        self.weight = nn.Parameter(torch.randn(3, 3))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, 3) + 1

    def step(self, state, x, context=None):
        new = torch.tanh(state @ self.weight + x)
        ys = {
            "old": state,
            "new": new,
            "above": new > 0,
            "x": x,
            "once": self.weight[:1].expand(len(x), 3),
            "all": x + 0,
        }
        return new, ys[self.y]


@pytest.mark.parametrize("y", ["old", "new", "above", "all"])
def test_y_may_be_anything_that_is_calculated(y):
    cell = Odd(y).double().eval()
    compiled, loop = Stream(cell, 2, backend="compiled"), Stream(cell, 2, backend="loop")
    for x in inputs(3, 2):
        found, expected = compiled.push(x), loop.push(x)
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
