"""A small grammar of steps, and the random cells that it gives.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from recurra.cell import Cell


def heads(a, function):
    """The function of two halves of each row, (B, 2, D / 2)."""
    return function(a.view(a.shape[0], 2, -1)).reshape(a.shape)


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
    "heads": lambda a: heads(a, lambda h: torch.softmax(h, 2) * h.sum(1, keepdim=True)),
    "turned": lambda a: a.view(a.shape[0], 2, -1).transpose(1, 2).reshape(a.shape),
    "largest": lambda a: a - a.amax(1, keepdim=True) + heads(a, lambda h: h.amax(2, keepdim=True).expand_as(h)),
    "size": lambda a: a / (1.0 + a.norm(dim=1, keepdim=True)),
    "every second": lambda a: torch.cat([a[:, ::2], a[:, 1::2].neg()], 1),
    "rolled": lambda a: torch.roll(a, 1, 1) + F.pad(a[:, 1:], (0, 1)),
    "log": lambda a: torch.log1p(a.square()) + F.logsigmoid(a),
    "where": lambda a: torch.where(a.abs() > 0.3, a, 0.2 * a),
}
BINARY = {
    "add": torch.add,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(a > b, a, 0.5 * b),
    "gate": lambda a, b: torch.sigmoid(a) * b + (1 - torch.sigmoid(a)) * a,
    "ratio": lambda a, b: a / (1 + b.abs()),
    "bmm": lambda a, b: torch.bmm(a[:, :, None] * b[:, None, :], b[:, :, None])[:, :, 0] * 0.2,
    "dot": lambda a, b: torch.tanh((a * b).sum(1, keepdim=True)) * a,
    "mask": lambda a, b: a * (b > 0) + b * ((a < 0) & (b < 0.5)),
    "mixed": lambda a, b: torch.cat([a[:, :2], b[:, 2:]], 1),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "attend": lambda a, b: (torch.softmax(torch.stack([a, b], 1) @ a[:, :, None], 1) * torch.stack([a, b], 1)).sum(1),
}
# Widths of values: every one can be brought to every other.
WIDTHS = (4, 6)
WIDTH = WIDTHS[0]

pick = st.integers(0, 99)
operation = st.one_of(
    st.tuples(st.just("unary"), st.sampled_from(sorted(UNARY)), pick),
    st.tuples(st.just("unary"), st.sampled_from(sorted(UNARY)), pick),
    st.tuples(st.just("binary"), st.sampled_from(sorted(BINARY)), pick, pick),
    st.tuples(st.just("binary"), st.sampled_from(sorted(BINARY)), pick, pick),
    st.tuples(st.just("linear"), pick),
    st.tuples(st.just("linear"), pick),
    st.tuples(st.just("twice"), pick),
    st.tuples(st.just("wider"), pick),
    st.tuples(st.just("scale"), pick),
    st.tuples(st.just("context"), pick),
)


def fitted(a, width):
    """A value of another width: cut, or with its first features behind it again."""
    return a[:, :width] if width <= a.shape[1] else torch.cat([a, a[:, : width - a.shape[1]]], 1)


class Random(Cell):
    """Values are made one from another, (B, 4) or (B, 6); some of them are the new state, one is shown.

    ``running`` leaves are a running maximum of the value, ``new`` ones its tanh; ``fed`` ones see what is shown.
    """

    def __init__(self, program, new, shown, running=(), fed=False):
        super().__init__()
        self.input_size = self.output_size = WIDTH
        self.program, self.new, self.shown, self.running, self.fed = program, new, shown, running, fed
        self.unused = nn.Parameter(torch.zeros(1))
        weights, widths = [], [WIDTH, *self._sizes()]
        for kind, *rest in program:
            width = widths[-1 - rest[-1 if kind != "binary" else 1] % len(widths)]
            if kind in ("linear", "twice", "wider"):
                out = WIDTHS[width == WIDTHS[0]] if kind == "wider" else width
                weights.append(torch.zeros(out, width))
                width = out
            elif kind == "scale":
                weights.append(torch.zeros(width))
            widths.append(width)
        self.weights = nn.ParameterList(nn.Parameter(weight) for weight in weights)

    def _sizes(self):
        """The sizes of the leaves of the state, by turns the one and the other."""
        count = len(self.new) + len(self.running)
        return [WIDTHS[k % 2] for k in range(count)] + [WIDTH] * self.fed

    def initial_state(self, batch_size):
        return tuple(self.zeros(batch_size, size) for size in self._sizes())

    def step(self, state, x, context=None):
        values, weights = [x, *state], iter(self.weights)
        for kind, *rest in self.program:
            name, places = (rest[0], rest[1:]) if kind in ("unary", "binary") else ("", rest)
            # Rather what was made last than what was there before.
            taken = [values[-1 - place % len(values)] for place in places]
            if kind == "unary":
                value = UNARY[name](*taken)
            elif kind == "binary":
                value = BINARY[name](taken[0], fitted(taken[1], taken[0].shape[1]))
            elif kind in ("linear", "wider"):
                value = F.linear(taken[0], next(weights))
            elif kind == "twice":
                weight = next(weights)
                value = taken[0] @ weight @ weight.t()
            elif kind == "scale":
                value = taken[0] * torch.tanh(next(weights))
            else:
                width = taken[0].shape[1]
                value = taken[0] * fitted(context[:, 0], width) + fitted(context[:, 1], width)
            values.append(value)
        sizes = self._sizes()
        made = [values[-1 - place % len(values)] for place in (*self.new, *self.running)]
        made = [fitted(value, size) for value, size in zip(made, sizes, strict=False)]
        new = [torch.tanh(value) for value in made[: len(self.new)]]
        new += [
            torch.maximum(0.9 * old, value) for old, value in zip(state[len(new) :], made[len(new) :], strict=False)
        ]
        shown = fitted(values[-1 - self.shown % len(values)], WIDTH)
        return tuple(new) + ((torch.tanh(shown),) if self.fed else ()), shown
