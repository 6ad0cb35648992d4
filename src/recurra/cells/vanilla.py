"""The vanilla recurrent network.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurra.cell import Cell
from recurra.cells.initial import initialise


class Vanilla(Cell):
    """The simple recurrent network (Elman 1990)::

        h_t = tanh(W_ih x_t + W_hh h_{t-1} + b)
        y_t = h_t

    ``activation`` is any function of a tensor: ``torch.tanh``, ``torch.relu``, one of your own.
    The state is h (B, H). Put a ``Readout`` around it for ``y_t = W_hy h_t``.
    """

    def __init__(self, input_size: int, hidden_size: int, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.activation = activation
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        initialise(self, hidden_size)

    def initial_state(self, batch_size: int) -> Tensor:
        return self.zeros(batch_size, self.output_size)

    def step(self, state: Tensor, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        h = self.activation(F.linear(x, self.weight_ih, self.bias) + F.linear(state, self.weight_hh))
        return h, h
