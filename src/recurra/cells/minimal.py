"""Minimal gated units: the gates see only the input, so the recurrence is linear in its state.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurra.cell import Cell
from recurra.cells.initial import initialise


class MinGRU(Cell):
    """The minimal GRU (Feng et al. 2024, section 3.1)::

        z, g = W_ih x_t + b
        h_t = (1 - sigmoid(z)) * h_{t-1} + sigmoid(z) * g
        y_t = h_t

    The state is h (B, H).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.weight_ih = nn.Parameter(torch.empty(2 * hidden_size, input_size))
        self.bias = nn.Parameter(torch.empty(2 * hidden_size))
        initialise(self, hidden_size)

    def initial_state(self, batch_size: int) -> Tensor:
        return self.zeros(batch_size, self.output_size)

    def step(self, state: Tensor, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        z, g = F.linear(x, self.weight_ih, self.bias).chunk(2, dim=1)
        z = torch.sigmoid(z)
        h = (1 - z) * state + z * g
        return h, h


class MinLSTM(Cell):
    """The minimal LSTM, its two gates scaled to sum to one (Feng et al. 2024, section 3.2)::

        f, i, g = W_ih x_t + b
        f', i' = sigmoid(f), sigmoid(i)
        h_t = (f' * h_{t-1} + i' * g) / (f' + i')
        y_t = h_t

    The state is h (B, H). The forget gate's bias begins at 1.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size))
        self.bias = nn.Parameter(torch.empty(3 * hidden_size))
        initialise(self, hidden_size)
        with torch.no_grad():
            self.bias[:hidden_size] = 1.0

    def initial_state(self, batch_size: int) -> Tensor:
        return self.zeros(batch_size, self.output_size)

    def step(self, state: Tensor, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        f, i, g = F.linear(x, self.weight_ih, self.bias).chunk(3, dim=1)
        # f' / (f' + i') in the logarithm: nothing divides by a sum that may be zero.
        keep = torch.sigmoid(F.logsigmoid(f) - F.logsigmoid(i))
        h = keep * state + (1 - keep) * g
        return h, h
