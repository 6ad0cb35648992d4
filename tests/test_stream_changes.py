"""What changes between two pushes of a compiled stream is seen.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import recurra.compiler.step as step_module
from agreement import killed
from recurra.cell import Cell
from recurra.stream import Stream
from test_stream_compiled import inputs


class Tempered(Cell):
    """A cell with everything that may change: plain attributes, a list, a buffer, a tensor that is no parameter."""

    def __init__(self, input_size=3, hidden_size=4):
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.inward = nn.Linear(input_size, hidden_size)
        self.back = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("scale", torch.ones(hidden_size))
        self.shift = torch.ones(1).double()
        self.share, self.shares, self.squash = 0.5, [0.1, 0.2], torch.tanh

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.output_size)

    def step(self, state, x, context=None):
        z = self.scale * self.inward(x) + torch.exp(self.gain) * self.back(state) + self.shift
        h = self.share * state + self.shares[1] * self.squash(z)
        return h, h if context is None else h + context["add"]


def optimise(cell):
    cell.inward(torch.ones(2, 3).double()).sum().backward()
    torch.optim.SGD(cell.parameters(), 0.1).step()


def load(cell, assign):
    cell.load_state_dict({name: 2 * value for name, value in cell.state_dict().items()}, assign=assign)


def replace_weight(cell):
    cell.back.weight = nn.Parameter(2 * cell.back.weight.detach())


def replace_gain_and_change_it(cell):
    """The new one is equal to the old one until it is changed, and they count their changes alike."""
    cell.gain = nn.Parameter(cell.gain.detach().clone())
    yield
    with torch.no_grad():
        cell.gain.add_(1)


def replace_shift_and_change_it(cell):
    cell.shift = cell.shift.clone()
    yield
    cell.shift.add_(1)


def give_memory(cell):
    cell.inward.weight.data = 2 * cell.inward.weight.data


def in_place(cell):
    with torch.no_grad():
        cell.inward.bias.add_(1)


def in_inference_mode(cell):
    with torch.inference_mode():
        cell.back.weight.mul_(2)


def add_bias(cell):
    cell.back.bias = nn.Parameter(torch.ones(4).double())


def hook(cell):
    cell.inward.register_forward_hook(lambda module, given, result: result + 1)


def swap_module(cell):
    cell.inward = nn.Linear(3, 4).double().eval()


def write_list(cell):
    cell.shares[1] = 0.4


SEEN = {
    "optimiser": optimise,
    "loaded": lambda cell: load(cell, False),
    "loaded and assigned": lambda cell: load(cell, True),
    "replaced": replace_weight,
    "replaced by an equal one": replace_gain_and_change_it,
    "given other memory": give_memory,
    "in place": in_place,
    "in inference mode": in_inference_mode,
    "a bias where there was none": add_bias,
    "buffer": lambda cell: cell.scale.mul_(2),
    "plain tensor": lambda cell: cell.shift.add_(1),
    "plain tensor replaced": lambda cell: setattr(cell, "shift", cell.shift + 1),
    "plain tensor replaced by an equal one": replace_shift_and_change_it,
    "number": lambda cell: setattr(cell, "share", 0.25),
    "list": write_list,
    "function": lambda cell: setattr(cell, "squash", torch.sigmoid),
    "hook": hook,
    "module": swap_module,
}


def check_change(change, after=lambda stream: None, kind: type[Stream] = Stream) -> None:
    """After it, a compiled stream does what a stream of the loop does, and something else than before."""
    cell = Tempered().double().eval()
    stream, stale = kind(cell, 2, backend="compiled"), Stream(copy.deepcopy(cell), 2, backend="loop")
    x = inputs(3, 2)
    stream.push(x[0])
    loop = Stream(cell, 2, backend="loop")
    loop.restore(stream.snapshot())
    stale.restore(stream.snapshot())
    done = change(cell)
    if inspect.isgenerator(done):
        for _ in done:
            kept = stream.snapshot()
            stream.push(x[1])
            stream.restore(kept)
    after(stream)
    loop.restore(stream.snapshot())
    stale.restore(stream.snapshot())
    for step in x[1:]:
        y = stream.push(step)
        torch.testing.assert_close(y, loop.push(step), rtol=0, atol=1e-12)
        assert (y - stale.push(step)).abs().max() > 1e-3
    assert stream.explain().ran == "compiled"


@pytest.mark.parametrize("change", SEEN)
def test_a_change_is_seen_at_the_next_push(change):
    check_change(SEEN[change])


def reset_and_restore(stream):
    kept = stream.snapshot()
    stream.reset()
    stream.restore(kept)


@pytest.mark.parametrize("after", [Stream.refresh, reset_and_restore])
def test_what_pytorch_does_not_count_is_seen_after_a_refresh_or_a_reset(after):
    check_change(lambda cell: cell.back.weight.data.mul_(2), after)

    def by_numpy(cell):
        cell.inward.bias.detach().numpy()[:] += 1

    check_change(by_numpy, after)


def test_a_stream_that_misses_changes_is_noticed(monkeypatch):
    monkeypatch.setattr(step_module.Origin, "changed", lambda self: False)
    for name in ("in place", "replaced", "number", "list"):
        killed(check_change, SEEN[name])


def test_the_context_is_the_streams_own_and_drawn_again_by_a_refresh():
    cell, given = Tempered().double().eval(), {"add": torch.zeros(2, 4).double()}
    stream, x = Stream(cell, 2, given, "compiled"), inputs(1, 2)[0]
    kept, first = stream.snapshot(), stream.push(x)
    given["add"].add_(1)
    given["add"] = torch.ones(2, 4).double()
    stream.restore(kept)
    assert torch.equal(stream.push(x), first)

    class Projecting(Tempered):
        def draw_context(self, batch_size, context=None):
            return {"add": context["add"] * self.gain}

    cell = Projecting().double().eval()
    given = {"add": torch.ones(2, 4).double()}
    stream, loop = Stream(cell, 2, given, "compiled"), Stream(cell, 2, given, "loop")
    assert torch.equal(stream.push(x), loop.push(x))
    with torch.no_grad():
        cell.gain.fill_(3)
    for each in (stream, loop):
        each.refresh()
    y = stream.push(x)
    torch.testing.assert_close(y, loop.push(x), rtol=0, atol=1e-12)
    assert (y - stream.state).sub(3).abs().max() < 1e-12
