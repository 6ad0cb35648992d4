"""Cells with taps, what they must show by hand, and what is seen.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from recurra import Cell, Recurrent, tap, watch

PATHS = [("loop", "store"), ("hoisted", "store"), ("compiled", "store"), ("compiled", "recompute"), ("hoisted", "sqrt")]
every_path = pytest.mark.parametrize(("backend", "memory"), PATHS, ids=[" ".join(path) for path in PATHS])
T, B, I, H = 7, 3, 5, 4


class Pair(NamedTuple):
    h: Tensor
    level: Tensor


class Tapped(Cell):
    """Two leaves, and taps of several shapes: before, in and after the loop, of the input and of a truth value."""

    taps = True

    def __init__(self, input_size: int = I, hidden_size: int = H) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.inner = torch.nn.Linear(input_size + hidden_size, hidden_size)
        self.gain = torch.nn.Parameter(torch.linspace(0.5, 1.5, hidden_size))

    def initial_state(self, batch_size):
        return Pair(self.zeros(batch_size, self.output_size), self.zeros(batch_size) + 0.5)

    def step(self, state, x, context=None):
        see = tap if self.taps else (lambda name, value: value)
        before = see("drive", x.square().sum(1))
        h = see("h", torch.tanh(self.inner(torch.cat([x, state.h], dim=1))))
        level = see("level", 0.9 * state.level + 0.1 * h.mean(1) * before)
        see("outer", h[:, :, None] * level[:, None, None] + x[:, None, :2])
        see("positive", h > 0)
        see("gain", torch.sigmoid(self.gain).expand(len(x), -1))
        return Pair(h, level), see("y", h * self.gain)


class Untapped(Tapped):
    taps = False


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def doubled(cell: Cell, seed: int = 1) -> Cell:
    cell = cell.double().eval()
    with torch.no_grad():
        for k, parameter in enumerate(cell.parameters()):
            parameter.copy_(0.6 * numbers(*parameter.shape, seed=seed + k))
    return cell


def by_hand(cell: Cell, x: Tensor, lengths=None, resets=None, reverse=False) -> dict[str, Tensor]:
    """The values of the taps of ``Tapped``, by its equations, row by row, with no tap and no loop of the house."""
    steps, rows = x.shape[:2]
    names: dict[str, Tensor] = {}

    def put(name: str, t: int, b: int, value: Tensor) -> None:
        names.setdefault(name, torch.zeros(steps, rows, *value.shape, dtype=value.dtype))[t, b] = value

    for b in range(rows):
        h, level = torch.zeros(H, dtype=x.dtype), torch.tensor(0.5, dtype=x.dtype)
        valid = range(steps if lengths is None else lengths[b])
        for t in reversed(valid) if reverse else valid:
            if resets is not None and resets[t, b]:
                h, level = torch.zeros_like(h), torch.full_like(level, 0.5)
            drive = (x[t, b] ** 2).sum()
            h = torch.tanh(cell.inner.weight @ torch.cat([x[t, b], h]) + cell.inner.bias)
            level = 0.9 * level + 0.1 * h.mean() * drive
            for name, value in {
                "drive": drive,
                "h": h,
                "level": level,
                "outer": h[:, None] * level + x[t, b, :2],
                "positive": h > 0,
                "gain": torch.sigmoid(cell.gain),
                "y": h * cell.gain,
            }.items():
                put(name, t, b, value.detach())
    return names


MARKS = torch.zeros(T, B, dtype=torch.bool)
MARKS[3, 0] = MARKS[4, 2] = MARKS[0, 1] = True
CASES = {
    "plain": {},
    "lengths": {"lengths": [7, 0, 4]},
    "resets": {"resets": MARKS},
    "both": {"lengths": [5, 1, 7], "resets": MARKS},
}


def seen_by(rnn: Recurrent, x: Tensor, **options) -> dict[str, Tensor]:
    with watch(rnn) as seen:
        rnn(x, **options)
    return {name: seen[name] for name in seen}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
