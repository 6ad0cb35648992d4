"""What explain() gives, as tests ask for it.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import torch
from torch import nn

from recurra import Cell, Recurrent, cells

I, H = 6, 10


def rows_of(cell: Cell, backend: str = "compiled", *, gradients: bool = True, **options):
    with torch.set_grad_enabled(gradients):
        return Recurrent(cell, backend=backend, **options).explain().table


def by_direction(rows, direction: str, figure: str = "flops") -> int:
    return sum(getattr(row, figure) for row in rows if row.direction == direction)


class Sharing(Cell):
    """Calculates a weight from another one once, and a context with rows and one without."""

    input_size = output_size = 4

    def __init__(self):
        super().__init__()
        self.weight, self.leak = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, 4)

    def step(self, state, x, context=None):
        state = torch.sigmoid(self.leak) * state + x @ (self.weight * 2).T
        return state, state.softmax(1)


class Sorted(Cell):
    """Cannot be lowered: it sorts in the loop."""

    input_size = output_size = 3

    def __init__(self):
        super().__init__()
        self.inner = cells.Vanilla(3, 3)

    def initial_state(self, batch_size):
        return self.inner.initial_state(batch_size)

    def step(self, state, x, context=None):
        h, _ = self.inner(state, x)
        h = h.sort(1).values
        return h, h
