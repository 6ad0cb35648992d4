"""Where a tap must end: exceptions, refusals, other threads, cells within cells.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from recurra import Cell, Recurrent, Stream, cells, detach, tap, watch
from recurra import taps as taps_module
from recurra.errors import BackendError, ShapeError
from tapped import B, H, I, T, Tapped, agree, doubled, numbers, seen_by


class Fails(Tapped):
    fails = True

    def step(self, state, x, context=None):
        found = super().step(state, x, context)
        if self.fails:
            raise ArithmeticError("in the step")
        return found


def watched_then_failing(rnn, x, seen):
    rnn(x)
    assert len(seen)
    rnn.cell.fails = True
    rnn(x)


@pytest.mark.parametrize("backend", ["loop", "auto"])
def test_an_exception_leaves_nothing_switched_on(backend):
    rnn = Recurrent(Fails(), backend=backend)
    x = torch.randn(T, B, I)
    rnn.cell.fails = False
    with pytest.raises(ArithmeticError) as raised, watch(rnn) as seen:
        watched_then_failing(rnn, x, seen)
    assert str(raised.value) == "in the step"
    assert not len(seen)
    assert taps_module.recording() is None
    assert taps_module._here.watches == ()
    rnn.cell.fails = False
    rnn(x)
    assert not len(seen)


def test_a_tap_that_fits_no_batch_or_not_every_step_is_refused():
    class Wrong(Tapped):
        what = "features"

        def step(self, state, x, context=None):
            found = super().step(state, x, context)
            tap("wrong", {"features": self.gain, "number": x.sum(), "list": [x]}[self.what])
            return found

    for backend in ("loop", "hoisted", "compiled", "auto"):
        rnn = Recurrent(Wrong(I, 9), backend=backend)
        for what, got in {"features": r"\(9,\)", "number": r"\(\)", "list": "list"}.items():
            rnn.cell.what = what
            rnn(torch.randn(T, B, I))
            with pytest.raises(ShapeError, match=rf"'wrong' in Wrong needs a value \(B, ...\).*got {got}"), watch(rnn):
                rnn(torch.randn(T, B, I))

    class Sometimes(Tapped):
        def step(self, state, x, context=None):
            if x.sum() > 0:
                tap("sometimes", x)
            return super().step(state, x, context)

    rnn = Recurrent(Sometimes(), backend="loop")
    with pytest.raises(ShapeError, match="'sometimes' in Sometimes is not reached in every step"), watch(rnn):
        rnn(torch.stack([torch.ones(B, I), -torch.ones(B, I)]))
    with pytest.raises(ShapeError, match="watch takes a Recurrent, or a module that has some, got int"), watch(3):
        pass


def test_where_a_step_cannot_be_traced_the_loop_is_watched():
    class Branches(Tapped):
        def step(self, state, x, context=None):
            return super().step(state, x if x.sum() > 0 else -x, context)

    cell, x = doubled(Branches()), numbers(T, B, I)
    rnn = Recurrent(cell, backend="auto")
    found = seen_by(rnn, x)
    assert rnn.explain().ran == "loop"
    agree(found, seen_by(Recurrent(cell, backend="loop"), x))
    with pytest.raises(BackendError), watch(rnn):
        Recurrent(cell, backend="compiled")(x)


def test_watching_in_one_thread_taps_no_other():
    rnn = Recurrent(doubled(cells.Stack(cells.LSTM(I, H), Tapped(H))), backend="auto")
    x = [numbers(T, B, I, seed=k) for k in range(4)]
    expected = [seen_by(rnn, each) for each in x]
    found: dict[int, dict[str, Tensor]] = {}
    begin, problems = threading.Barrier(4), []

    def work(number: int) -> None:
        begin.wait()
        try:
            for _ in range(5):
                if number % 2:
                    found[number] = seen_by(rnn, x[number])
                else:
                    rnn(x[number])
                    assert taps_module._here.watches == ()
                    assert not rnn._path._plans or taps_module.recording() is None
        except Exception as error:
            problems.append(error)

    with watch(rnn) as seen:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems
    assert not len(seen)
    for number in (1, 3):
        agree(found[number], expected[number])


def test_a_recurrent_in_a_step_is_not_the_one_that_is_watched():
    class Nested(Cell):
        input_size = output_size = 2

        def __init__(self):
            super().__init__()
            self.within = Recurrent(cells.GRU(2, 2), backend="loop")

        def initial_state(self, batch_size):
            return self.zeros(batch_size, 2)

        def step(self, state, x, context=None):
            _, h = self.within(torch.stack([x, x]), state)
            return tap("h", h), h

    rnn, x = Recurrent(Nested(), backend="loop"), torch.randn(4, 3, 2)
    found = seen_by(rnn, x)
    assert list(found) == ["h"]
    torch.testing.assert_close(found["h"], rnn(x)[0].detach())


def test_a_stream_and_second_derivatives_run_beside_a_watch():
    rnn = Recurrent(doubled(cells.LSTM(I, 2)), backend="compiled")
    x = numbers(3, 2, I).requires_grad_()
    with watch(rnn) as seen:
        Stream(rnn.cell, 2).push(x[0].detach())
        y, state = rnn(x)
        before = {name: seen[name].clone() for name in seen}
        (gradient,) = torch.autograd.grad(y.square().sum() + detach(state).c.sum(), x, create_graph=True)
        gradient.square().sum().backward()
        agree({name: seen[name] for name in seen}, before)
