"""Random cells from a small grammar of steps: the hoisted loop gives what the reference loop gives.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import plain
from agreement import assert_agree, draw, killed, record
from catalogue import Entry
from paths import by_hoisted, by_recurrent
from recurra.cell import Cell

UNARY = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "sin": torch.sin,
    "exp": lambda a: torch.exp(a.clamp(-2.0, 1.0)),
    "softmax": lambda a: torch.softmax(a, 1),
    "norm": lambda a: F.layer_norm(a, a.shape[1:]),
    "mean": lambda a: a - a.mean(1, keepdim=True),
    "flip": lambda a: a.flip(1),
    "cumsum": lambda a: 0.3 * a.cumsum(1),
    "halves": lambda a: torch.cat(a.chunk(2, dim=1)[::-1], dim=1),
    "outer": lambda a: (a[:, :, None] * torch.tanh(a)[:, None, :]).mean(2),
    "views": lambda a: a.reshape(-1, 2).tanh().reshape(a.shape),
}
BINARY = {
    "add": torch.add,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(a > b, a, 0.5 * b),
    "gate": lambda a, b: torch.sigmoid(a) * b + (1 - torch.sigmoid(a)) * a,
    "ratio": lambda a, b: a / (1 + b.abs()),
    "bmm": lambda a, b: torch.bmm(a[:, :, None] * b[:, None, :], b[:, :, None])[:, :, 0] * 0.2,
}
WIDTH = 4

pick = st.integers(0, 99)
operation = st.one_of(
    st.tuples(st.just("unary"), st.sampled_from(sorted(UNARY)), pick),
    st.tuples(st.just("binary"), st.sampled_from(sorted(BINARY)), pick, pick),
    st.tuples(st.just("linear"), pick),
    st.tuples(st.just("linear"), pick),
    st.tuples(st.just("scale"), pick),
    st.tuples(st.just("context"), pick),
)


class Random(Cell):
    """Values are made one from another, all (B, 4); some of them are the new state, one is shown."""

    def __init__(self, program, new, shown):
        super().__init__()
        self.input_size = self.output_size = WIDTH
        self.program, self.new, self.shown = program, new, shown
        self.unused = nn.Parameter(torch.zeros(1))
        self.weights = nn.ParameterList(
            nn.Parameter(torch.zeros(WIDTH, WIDTH) if kind == "linear" else torch.zeros(WIDTH))
            for kind, *_ in program
            if kind in ("linear", "scale")
        )

    def initial_state(self, batch_size):
        return tuple(self.zeros(batch_size, WIDTH) for _ in self.new)

    def step(self, state, x, context=None):
        values, weights = [x, *state], iter(self.weights)
        for kind, *rest in self.program:
            name, places = (rest[0], rest[1:]) if kind in ("unary", "binary") else ("", rest)
            # Rather what was made last than what was there before.
            taken = [values[-1 - place % len(values)] for place in places]
            if kind == "unary":
                value = UNARY[name](*taken)
            elif kind == "binary":
                value = BINARY[name](*taken)
            elif kind == "linear":
                value = F.linear(taken[0], next(weights))
            elif kind == "scale":
                value = taken[0] * torch.tanh(next(weights))
            else:
                value = taken[0] * context[:, 0] + context[:, 1]
            values.append(value)
        new = tuple(torch.tanh(values[-1 - place % len(values)]) for place in self.new)
        return new, values[-1 - self.shown % len(values)]


@settings(max_examples=40)
@given(
    program=st.lists(operation, min_size=2, max_size=12),
    new=st.lists(pick, min_size=1, max_size=3),
    shown=pick,
    options=st.sampled_from(["state lengths resets", "lengths resets reverse", "state", "resets reverse"]),
    seed=st.integers(0, 5),
)
def test_a_random_cell_gives_the_same_by_either_path(program, new, shown, options, seed):
    entry = Entry("random", lambda _, __: Random(program, new, shown), plain.lstm, memory=True)
    case = draw(entry, 5, 3, WIDTH, WIDTH, *options.split(), seed=seed)
    assert_agree(record(by_hoisted, case), record(by_recurrent, case), 1e-9)


@pytest.mark.parametrize("kind", ["linear", "scale", "context"])
def test_the_comparison_can_tell(kind, monkeypatch):
    program = [("linear", 0), ("binary", "add", 0, 2), (kind, 0)]
    entry = Entry("random", lambda _, __: Random(program, [0], 0), plain.lstm, memory=True)
    case = draw(entry, 5, 3, WIDTH, WIDTH, "state")
    expected = record(by_recurrent, case)
    assert expected["gradient of x"].any()
    assert_agree(record(by_hoisted, case), expected, 1e-9)
    case.cell.new = [1]
    killed(lambda: assert_agree(record(by_hoisted, case), expected, 1e-9))
