"""What a compiled stream refuses, what it says about itself, and what streams share.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
import weakref

import pytest
import torch
from torch import nn

import recurra.compiler.step as step_module
from catalogue import BY_NAME, Entry
from recurra.cell import Cell
from recurra.cells import GRU, LSTM, Stack, Zoneout
from recurra.errors import BackendError
from recurra.stream import Stream
from test_stream_compiled import Odd, inputs


class Stateless(Cell):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def initial_state(self, batch_size):
        return ()

    def step(self, state, x, context=None):
        return state, self.linear(x)


class Embedded(Cell):
    output_size = 3

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)

    def initial_state(self, batch_size):
        return self.zeros(batch_size, 3)

    def step(self, state, x, context=None):
        h = torch.tanh(state + self.embedding(x[:, 0]))
        return h, h


class Noisy(Odd):
    def step(self, state, x, context=None):
        return state, x + torch.rand_like(x)


@pytest.mark.parametrize(
    ("cell", "x", "why"),
    [
        (Odd("x"), torch.zeros(2, 3), "y is the same at every step, or x as it is"),
        (Odd("once"), torch.zeros(2, 3), "y is the same at every step, or x as it is"),
        (Stateless(), torch.zeros(2, 3), "this cell carries none"),
        (Embedded(), torch.zeros(2, 1, dtype=torch.int64), "embedding"),
        (Noisy("x"), torch.zeros(2, 3), "rand"),
        (BY_NAME["user: Counting"].build(3, 4), torch.zeros(2, 3).double(), "state_1 is torch.int64"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_compiled_says_why_and_auto_takes_the_loop(cell, x, why):
    cell.eval()
    for _ in range(2):
        stream = Stream(cell, 2, backend="compiled")
        for _ in range(2):
            with pytest.raises(BackendError, match=f"{why}.*use backend='loop'"):
                stream.push(x)
        assert why in stream.explain().why
        auto, loop = Stream(cell, 2), Stream(cell, 2, backend="loop")
        for _ in range(2):
            torch.manual_seed(1)
            y = auto.push(x)
            torch.manual_seed(1)
            assert torch.equal(y, loop.push(x))
        assert auto.explain().ran == "loop"
        assert why in auto.explain().why


def test_autocast_takes_the_loop_and_the_state_goes_along():
    cell = GRU(3, 4).eval()
    auto, loop, x = Stream(cell, 2), Stream(cell, 2, backend="loop"), torch.randn(6, 2, 3)
    for t, step in enumerate(x):
        with torch.autocast("cpu", enabled=t in (2, 3)):
            torch.testing.assert_close(auto.push(step), loop.push(step), rtol=0, atol=1e-6)
        assert auto.explain().ran == ("loop" if t in (2, 3) else "compiled")
        assert ("autocast" in auto.explain().why) == (t in (2, 3))


def test_a_hook_sees_every_step_of_an_auto_stream():
    cell, seen = GRU(3, 4).eval(), []
    stream = Stream(cell)
    stream.push(torch.zeros(3))
    cell.register_forward_hook(lambda *called: seen.append(called))
    for _ in range(3):
        stream.push(torch.zeros(3))
    assert len(seen) == 3
    assert stream.explain().ran == "loop"
    assert "hooks" in stream.explain().why


def test_under_a_transform_the_loop_steps_and_later_pushes_are_compiled_again():
    stream, x = Stream(BY_NAME["GRU"].build(3, 4), 2), inputs(2, 2)
    loop = Stream(stream.cell, 2, backend="loop")
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(stream.push(x[0]), loop.push(x[0]))
    assert "forward-mode" in stream.explain().why
    stream.refresh()
    torch.testing.assert_close(stream.push(x[1]), loop.push(x[1]), rtol=0, atol=1e-12)
    assert stream.explain().ran == "compiled"


def test_an_input_of_another_type_is_refused_as_the_loop_refuses_it():
    stream = Stream(GRU(3, 4).double().eval(), 2)
    stream.push(inputs(1, 2)[0])
    before = stream.snapshot()
    with pytest.raises(RuntimeError, match="same dtype"):
        stream.push(torch.zeros(2, 3))
    assert torch.equal(stream.state, before)
    stream.push(inputs(1, 2)[0])
    assert stream.explain().ran == "compiled"


def test_a_cell_made_in_inference_mode_is_left_to_the_loop():
    with torch.inference_mode():
        cell = GRU(3, 4).eval()
    stream = Stream(cell)
    stream.push(torch.zeros(1, 3))
    assert "was made in inference mode" in stream.explain().why


def test_explain_says_what_runs():
    stream = Stream(LSTM(3, 4).eval())
    assert str(stream.explain()) == "backend='auto' runs 'auto': the step is traced at its first push"
    stream.push(torch.zeros(3))
    told = stream.explain()
    assert (told.asked, told.ran) == ("auto", "compiled")
    assert re.search(r"at each push:\n.*sigmoid\(.*# lstm.py:\d+", told.schedule, re.DOTALL)
    assert "once:" in told.schedule
    assert Stream(LSTM(3, 4).eval(), backend="loop").explain().ran == "loop"


def test_a_backend_that_there_is_not_is_refused():
    with pytest.raises(BackendError, match="of a single step nothing can be hoisted"):
        Stream(LSTM(3, 4).eval(), backend="hoisted")
    with pytest.raises(BackendError, match=r"there is no backend 'compield': .*compiled"):
        Stream(LSTM(3, 4).eval(), backend="compield")


# --- copies, sharing, threads ---


def test_copies_of_a_stream_go_their_own_ways():
    stream, x = Stream(GRU(3, 4).eval(), 2, backend="compiled"), torch.randn(3, 2, 3)
    stream.push(x[0])
    before = stream.snapshot()
    others = [copy.copy(stream), copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))]
    y = stream.push(x[1])
    for other in others:
        assert torch.equal(other.state, before)
        assert torch.equal(other.push(x[1]), y)
        assert other.explain().ran == "compiled"
    others[1].push(x[2])
    assert torch.equal(stream.push(x[2]), others[0].push(x[2]))


def test_alike_cells_share_a_trace_and_nothing_else(monkeypatch):
    def stack(share=0.3):
        return Stack(Zoneout(LSTM(3, 5), share), GRU(5, 4)).double().eval()

    first = Stream(stack(), backend="compiled")
    x = inputs(1, 1)[0]
    first.push(x)

    def forbidden(*arguments):
        raise AssertionError("traced again")

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "trace", forbidden)
        cell = stack()
        for size in (1, 3):
            expected = Stream(cell, size, backend="loop").push(x.expand(size, 3))
            found = Stream(cell, size, backend="compiled").push(x.expand(size, 3))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        with pytest.raises(AssertionError, match="traced again"):
            Stream(stack(0.4), backend="compiled").push(x)
    gone = weakref.ref(cell)
    del cell
    gc.collect()
    assert gone() is None


def test_threads_that_push_to_one_stream_wait_for_each_other():
    class Sum(Odd):
        def step(self, state, x, context=None):
            return state + x, state + x

    stream, results = Stream(Sum("new").eval(), backend="compiled"), []
    stream.push(torch.zeros(3))

    def work():
        own = [stream.push(torch.ones(3)) for _ in range(300)]
        results.extend(float(y[0]) for y in own)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [float(2 + k) for k in range(1200)]


def test_streams_of_one_cell_run_in_threads_while_another_is_traced():
    cell = BY_NAME["LSTM"].build(3, 6)
    x = inputs(200, 2)
    loop = Stream(cell, 2, backend="loop")
    expected = torch.stack([loop.push(step) for step in x])
    wrong: list[BaseException] = []

    def work():
        try:
            stream = Stream(cell, 2, backend="compiled")
            found = torch.stack([stream.push(step) for step in x])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        except BaseException as error:
            wrong.append(error)

    def trace_again():
        try:
            for width in (7, 8):
                other = Entry("other", BY_NAME["LSTM"].make, BY_NAME["LSTM"].oracle).build(3, width)
                Stream(other, backend="compiled").push(x[0, :1])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=target) for target in (work, work, trace_again, work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
