"""Gated recurrent units. Gate order, as in PyTorch: r z n.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurra.cell import Cell
from recurra.cells.initial import initialise
from recurra.taps import tap


class GRU(Cell):
    """The gated recurrent unit that resets after the matrix product, as PyTorch's and cuDNN's do::

        r, z = sigmoid(W_i{r,z} x_t + W_h{r,z} h_{t-1} + b_{r,z})
        n = tanh(W_in x_t + b_n + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}
        y_t = h_t

    Cho et al. 2014, in the arrangement of its first version's released code. The state is h (B, H).
    Taps: ``reset_gate`` r, ``update_gate`` z, (B, H) each.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.bias_hn = nn.Parameter(torch.empty(hidden_size))
        initialise(self, hidden_size)

    def initial_state(self, batch_size: int) -> Tensor:
        return self.zeros(batch_size, self.output_size)

    def step(self, state: Tensor, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        from_x_r, from_x_z, from_x_n = F.linear(x, self.weight_ih, self.bias).chunk(3, dim=1)
        from_h_r, from_h_z, from_h_n = F.linear(state, self.weight_hh).chunk(3, dim=1)
        r = tap("reset_gate", torch.sigmoid(from_x_r + from_h_r))
        z = tap("update_gate", torch.sigmoid(from_x_z + from_h_z))
        n = torch.tanh(from_x_n + r * (from_h_n + self.bias_hn))
        h = (1 - z) * n + z * state
        return h, h


class GRUResetBefore(Cell):
    """The gated recurrent unit as published, reset before the matrix product (Cho et al. 2014, eqs. 5 to 8)::

        r, z = sigmoid(W_i{r,z} x_t + W_h{r,z} h_{t-1} + b_{r,z})
        n = tanh(W_in x_t + W_hn (r * h_{t-1}) + b_n)
        h_t = (1 - z) * n + z * h_{t-1}
        y_t = h_t

    This is the default of ONNX's GRU. The state is h (B, H).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(3 * hidden_size))
        initialise(self, hidden_size)

    def initial_state(self, batch_size: int) -> Tensor:
        return self.zeros(batch_size, self.output_size)

    def step(self, state: Tensor, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        H = self.output_size
        from_x_rz, from_x_n = F.linear(x, self.weight_ih, self.bias).split([2 * H, H], dim=1)
        rz = torch.sigmoid(from_x_rz + F.linear(state, self.weight_hh[: 2 * H]))
        r, z = rz.chunk(2, dim=1)
        n = torch.tanh(from_x_n + F.linear(r * state, self.weight_hh[2 * H :]))
        h = (1 - z) * n + z * state
        return h, h
