"""Streams: many side by side, reset, kept and restored, and what happens when something is wrong.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catalogue import BY_NAME, CATALOGUE
from recurra.cell import Cell, describe, leaves, map_state
from recurra.cells import GRU, LSTM, LearnedInitialState, Stack, VariationalDropout
from recurra.errors import BackendError, ShapeError
from recurra.stream import Stream
from recurra.unroll import Bidirectional, Recurrent


def inputs(T: int, B: int) -> torch.Tensor:
    return torch.randn(T, B, 3).double()


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


def opened(name: str, batch_size: int, kind: type[Stream] = Stream) -> Stream:
    """A stream that is under way."""
    entry = BY_NAME[name]
    context = torch.randn(batch_size, 3, 4).double() if entry.memory else None
    stream = kind(entry.build(3, 4), batch_size, context)
    for x in inputs(2, batch_size):
        stream.push(x)
    return stream


# --- the checks, each of which test_stream_mutants also runs on streams that are wrong ---


def check_reset_rows(kind: type[Stream] = Stream) -> None:
    """The rows named start afresh; the others go on as if nothing had happened."""
    for rows in (
        torch.tensor([True, False, True, False]),
        [0, 2],
        torch.tensor([2, 0, 2]),
        [True, False, True, False],
    ):
        stream, x = opened("PeepholeLSTM", 4, kind), inputs(3, 4)
        fresh, onward = kind(stream.cell, 4), kind(stream.cell, 4)
        onward.restore(stream.snapshot())
        stream.reset(rows)
        for step in x:
            y, y_fresh, y_onward = stream.push(step), fresh.push(step), onward.push(step)
            assert torch.equal(y[[0, 2]], y_fresh[[0, 2]])
            assert torch.equal(y[[1, 3]], y_onward[[1, 3]])
    before = stream.snapshot()
    stream.reset([])
    assert same(stream.state, before)
    stream.reset()
    assert same(stream.state, stream.cell.initial_state(4))


def check_kept_and_restored(kind: type[Stream] = Stream) -> None:
    """From a snapshot on, the stream does the same again, whatever it did in between."""
    for name in ("LSTM", "SLSTM heads", "MLSTM", "deep", "user: Counting", "user: Attending"):
        stream = opened(name, 3, kind)
        kept, x = stream.snapshot(), inputs(4, 3)
        first = [stream.push(step) for step in x]
        stream.restore(kept)
        assert same(stream.state, kept)
        again = [stream.push(step) for step in x]
        assert all(map(torch.equal, first, again))


def check_independent_copies(kind: type[Stream] = Stream) -> None:
    """Writing on a snapshot, on what was restored, on y or on x does not reach the stream."""
    stream = opened("GRU", 2, kind)
    before = stream.state.clone()
    kept = stream.snapshot()
    kept.zero_()
    assert torch.equal(stream.state, before)
    given = before.clone()
    stream.restore(given)
    given.zero_()
    assert torch.equal(stream.state, before)
    x = inputs(1, 2)[0]
    y = stream.push(x)
    after = stream.state.clone()
    y.zero_()
    x.zero_()
    assert torch.equal(stream.state, after)


def check_errors_change_nothing(kind: type[Stream] = Stream) -> None:
    """After whatever is refused the state is what it was, and the stream goes on."""
    stream = opened("LSTM", 2, kind)
    before = stream.snapshot()
    attempts = [
        lambda: stream.push(torch.randn(3, 3).double()),
        lambda: stream.push(torch.randn(2, 4).double()),
        lambda: stream.push(torch.randn(2, 3)),
        lambda: stream.push(torch.randn(3).double()),
        lambda: stream.reset([0, 5]),
        lambda: stream.reset(torch.tensor([True])),
        lambda: stream.restore(map_state(lambda leaf: leaf[:1], before)),
        lambda: stream.restore(before.h),
        lambda: stream.restore(map_state(lambda leaf: leaf.float(), before)),
    ]
    for attempt in attempts:
        try:
            attempt()
        except (ShapeError, RuntimeError):
            pass
        else:
            raise AssertionError("something wrong was taken")
        assert same(stream.state, before)
    stream.cell.train()
    with pytest.raises(BackendError):
        stream.push(inputs(1, 2)[0])
    stream.cell.eval()
    assert same(stream.state, before)
    stream.push(inputs(1, 2)[0])


def check_rows_apart(kind: type[Stream] = Stream) -> None:
    """A row of NaN changes no bit of the others, and is well again after its reset."""
    for name in ("LSTM", "MLSTM", "LayerNormLSTM", "user: Attending"):
        clean = opened(name, 3, kind)
        spoilt = kind(clean.cell, 3, clean._context)
        spoilt.restore(clean.snapshot())
        x = inputs(4, 3)
        bad = x.clone()
        bad[:3, 1] = torch.nan
        for step, spoilt_step in zip(x[:3], bad[:3], strict=True):
            y, y_spoilt = clean.push(step), spoilt.push(spoilt_step)
            assert torch.equal(y[[0, 2]], y_spoilt[[0, 2]])
            assert y_spoilt[1].isnan().all()
        clean.reset([1])
        spoilt.reset([1])
        assert torch.equal(clean.push(x[3]), spoilt.push(bad[3]))


@pytest.mark.parametrize(
    "check",
    [
        check_reset_rows,
        check_kept_and_restored,
        check_independent_copies,
        check_errors_change_nothing,
        check_rows_apart,
    ],
)
def test_a_stream_keeps_its_promises(check):
    check()


# --- any history ---

EVENTS = st.sampled_from(["push", "reset", "keep", "back"])


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["push", "reset", "keep", "back"]), st.integers(0, 7)), max_size=25))
def test_any_history_of_a_batch_is_that_of_its_rows(history):
    """Three rows in one stream, and each in a stream of its own, driven through the same random events."""
    cell = BY_NAME["Zoneout"].build(3, 4)
    together, alone = Stream(cell, 3), [Stream(cell) for _ in range(3)]
    kept, kept_alone = together.snapshot(), [stream.snapshot() for stream in alone]
    generator = torch.Generator().manual_seed(1)
    for event, number in history:
        if event == "push":
            x = torch.randn(3, 3, generator=generator).double()
            y = torch.cat([stream.push(x[b : b + 1]) for b, stream in enumerate(alone)])
            torch.testing.assert_close(together.push(x), y, rtol=0, atol=1e-12)
        elif event == "reset":
            rows = [b for b in range(3) if number >> b & 1]
            together.reset(rows)
            for b in rows:
                alone[b].reset()
        elif event == "keep":
            kept, kept_alone = together.snapshot(), [stream.snapshot() for stream in alone]
        else:
            together.restore(kept)
            for stream, state in zip(alone, kept_alone, strict=True):
                stream.restore(state)
    for b, stream in enumerate(alone):
        for leaf, row in zip(leaves(together.state), leaves(stream.state), strict=True):
            torch.testing.assert_close(leaf[b : b + 1], row, rtol=0, atol=1e-12)


# --- forms ---


def test_a_single_stream_takes_and_gives_a_single_row():
    cell = BY_NAME["LSTM"].build(3, 4)
    bare, batched, x = Stream(cell), Stream(cell), inputs(4, 1)
    for step in x:
        y = bare.push(step[0])
        assert y.shape == (4,)
        assert torch.equal(y, batched.push(step)[0])
    assert same(bare.state, batched.state)


def test_a_stream_of_a_recurrent_is_one_of_its_cell():
    cell, x = BY_NAME["GRU"].build(3, 4), inputs(5, 2)
    stream = Stream(Recurrent(cell), 2)
    assert stream.cell is cell
    expected, final = Recurrent(cell)(x)
    torch.testing.assert_close(torch.stack([stream.push(step) for step in x]), expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(stream.state, final.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("entry", CATALOGUE, ids=str)
def test_a_stream_of_no_rows_runs(entry):
    context = torch.zeros(0, 3, 4).double() if entry.memory else None
    stream = Stream(entry.build(3, 4), 0, context)
    assert stream.push(torch.zeros(0, 3).double()).shape == (0, stream.cell.output_size)
    stream.reset([])
    assert describe(stream.snapshot()) == describe(stream.cell.initial_state(0))


def test_nothing_is_differentiated_yet_a_snapshot_may_enter_a_graph():
    cell = BY_NAME["LearnedInitialState"].build(3, 4)
    stream, x = Stream(cell, 2), inputs(3, 2).requires_grad_()
    assert not stream.push(x[0]).requires_grad
    kept = stream.snapshot()
    assert not any(leaf.requires_grad or leaf.is_inference() for leaf in leaves(kept))
    y, _ = Recurrent(cell)(x[1:], kept)
    y.sum().backward()
    assert cell.cell.weight_hh.grad.abs().sum() > 0


def test_a_state_that_carries_a_graph_is_restored_without_it():
    cell = BY_NAME["GRU"].build(3, 4)
    _, state = Recurrent(cell)(inputs(3, 2))
    stream = Stream(cell, 2)
    stream.restore(state)
    assert state.requires_grad
    assert not stream.state.requires_grad


def test_a_change_of_a_learned_first_state_reaches_a_stream_only_at_its_reset():
    cell = LearnedInitialState(GRU(3, 4)).eval()
    stream = Stream(cell, 2)
    with torch.no_grad():
        cell.first.add_(1)
    assert not stream.state.any()
    stream.reset([1])
    assert stream.state.tolist() == [[0.0] * 4, [1.0] * 4]


def test_the_context_is_drawn_once():
    class Drawing(Cell):
        drawn = 0

        def initial_state(self, batch_size):
            return self.zeros(batch_size, 3)

        def draw_context(self, batch_size, context=None):
            self.drawn += 1
            return context

        def step(self, state, x, context=None):
            return state, x + context

    cell = Drawing().eval()
    stream = Stream(cell, 2, context=torch.ones(2, 3))
    for _ in range(3):
        assert torch.equal(stream.push(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    stream.reset()
    assert cell.drawn == 1


# --- what is refused ---


@pytest.mark.parametrize("cell", [GRU(3, 4), Stack(GRU(3, 4), VariationalDropout(LSTM(4, 4), 0.1))])
def test_a_cell_in_training_mode_is_refused(cell):
    with pytest.raises(BackendError, match=r"is in training mode, .*: call \.eval\(\) on the cell"):
        Stream(cell)
    cell.eval()
    stream = Stream(cell)
    list(cell.modules())[-1].train()
    with pytest.raises(BackendError, match=r"call \.eval\(\)"):
        stream.push(torch.zeros(3))


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(BackendError, match="the last input, which is still to come: use reverse=False"):
        Stream(Recurrent(GRU(3, 4).eval(), reverse=True))
    for wrong in (torch.nn.GRU(3, 4).eval(), Bidirectional(GRU(3, 4), GRU(3, 4)).eval(), None):
        name = type(wrong).__name__
        with pytest.raises(ShapeError, match=rf"Stream takes a recurra\.Cell or a Recurrent, got {name}"):
            Stream(wrong)
    with pytest.raises(ShapeError, match="a batch_size of at least 0, got -1"):
        Stream(GRU(3, 4).eval(), -1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.push(torch.zeros(3, 3)), "expected x (2, 3), a row for each stream, got (3, 3)"),
        (lambda s: s.push(torch.zeros(2, 4)), "expected x (2, 3), a row for each stream, got (2, 4)"),
        (lambda s: s.push(torch.zeros(3)), "expected x (2, 3), a row for each stream, got (3,)"),
        (lambda s: s.push(torch.zeros(1, 2, 3)), "expected x (2, 3), a row for each stream, got (1, 2, 3)"),
        (lambda s: s.reset([2]), "there is no row 2 among 2 streams, which are numbered from 0"),
        (lambda s: s.reset([-1]), "there is no row -1 among 2 streams"),
        (lambda s: s.reset([0.5]), "there is no row 0.5 among 2 streams"),
        (lambda s: s.reset([True]), "expected a bool mask (2,) or row numbers, got (1,)"),
        (lambda s: s.reset(1), "expected a bool mask (2,) or row numbers, got ()"),
        (lambda s: s.reset(torch.zeros(2, 2)), "expected a bool mask (2,) or row numbers, got (2, 2)"),
        (lambda s: s.restore(torch.zeros(2, 4)), "expected a state LSTMState(h=(2, 4), c=(2, 4))"),
        (lambda s: s.restore((torch.zeros(3, 4),) * 2), "got ((3, 4), (3, 4))"),
        (lambda s: s.restore((torch.zeros(2, 4).double(),) * 2), "expected a state of torch.float32 on cpu"),
        (lambda s: s.restore([torch.zeros(2, 4)] * 2), "a state is a tensor or a tuple of states, got list"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected_and_what_came(call, message):
    stream = Stream(LSTM(3, 4).eval(), 2)
    with pytest.raises(ShapeError, match=re.escape(message)):
        call(stream)
