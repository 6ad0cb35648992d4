"""The recurrent highway network.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurra.cell import Cell
from recurra.cells.initial import initialise


class RecurrentHighway(Cell):
    """A step as deep as you like, each layer free to carry its input on (Zilly et al. 2017, eqs. 7 to 9, c = 1 - t)::

        s_0 = h_{t-1}
        g, z = W_hh^l s_{l-1} + b^l   (+ W_ih x_t in the first layer)
        s_l = sigmoid(z) * tanh(g) + (1 - sigmoid(z)) * s_{l-1}
        h_t = s_depth
        y_t = h_t

    The state is h (B, H). The gate's bias begins at -2: carry first, transform by and by.
    """

    def __init__(self, input_size: int, hidden_size: int, depth: int = 3) -> None:
        super().__init__()
        self.input_size, self.output_size, self.depth = input_size, hidden_size, depth
        self.weight_ih = nn.Parameter(torch.empty(2 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(depth, 2 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(depth, 2 * hidden_size))
        initialise(self, hidden_size)
        with torch.no_grad():
            self.bias[:, :hidden_size] = 0.0
            self.bias[:, hidden_size:] = -2.0

    def initial_state(self, batch_size: int) -> Tensor:
        return self.zeros(batch_size, self.output_size)

    def step(self, state: Tensor, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        s = state
        for layer in range(self.depth):
            z = F.linear(s, self.weight_hh[layer], self.bias[layer])
            if layer == 0:
                z = z + F.linear(x, self.weight_ih)
            g, t = z.chunk(2, dim=1)
            t = torch.sigmoid(t)
            s = t * torch.tanh(g) + (1 - t) * s
        return s, s
