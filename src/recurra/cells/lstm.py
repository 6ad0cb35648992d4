"""Long short-term memory and its variants. Gate order, as in PyTorch: i f g o.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurra.cell import Cell
from recurra.cells.initial import initialise
from recurra.taps import tap


class LSTMState(NamedTuple):
    """h (B, O) is what the cell shows, c (B, H) what it remembers."""

    h: Tensor
    c: Tensor


class LSTM(Cell):
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate Gers et al. 2000)::

        i, f, g, o = W_ih x_t + W_hh h_{t-1} + b
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
        h_t = sigmoid(o) * tanh(c_t)
        y_t = h_t

    The forget gate's bias begins at 1. Taps: ``input_gate``, ``forget_gate``, ``output_gate``, after the sigmoid,
    and ``cell``, c_t; (B, H) each.
    """

    gates = 4

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size, self.hidden_size = input_size, hidden_size, hidden_size
        self.weight_ih = nn.Parameter(torch.empty(self.gates * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(self.gates * hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        initialise(self, self.hidden_size)
        with torch.no_grad():
            self.bias[self.hidden_size : 2 * self.hidden_size] = 1.0

    def initial_state(self, batch_size: int) -> LSTMState:
        return LSTMState(self.zeros(batch_size, self.output_size), self.zeros(batch_size, self.hidden_size))

    def step(self, state: LSTMState, x: Tensor, context: Any = None) -> tuple[LSTMState, Tensor]:
        z = F.linear(x, self.weight_ih, self.bias) + F.linear(state.h, self.weight_hh)
        i, f, g, o = z.chunk(4, dim=1)
        i = tap("input_gate", torch.sigmoid(i))
        f = tap("forget_gate", torch.sigmoid(f))
        o = tap("output_gate", torch.sigmoid(o))
        c = tap("cell", f * state.c + i * torch.tanh(g))
        h = o * torch.tanh(c)
        return LSTMState(h, c), h


class PeepholeLSTM(LSTM):
    """The LSTM whose gates also see the memory (Gers & Schmidhuber 2000)::

    i, f, g, o = W_ih x_t + W_hh h_{t-1} + b
    c_t = sigmoid(f + p_f * c_{t-1}) * c_{t-1} + sigmoid(i + p_i * c_{t-1}) * tanh(g)
    h_t = sigmoid(o + p_o * c_t) * tanh(c_t)
    y_t = h_t
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.weight_ci = nn.Parameter(torch.zeros(hidden_size))
        self.weight_cf = nn.Parameter(torch.zeros(hidden_size))
        self.weight_co = nn.Parameter(torch.zeros(hidden_size))

    def step(self, state: LSTMState, x: Tensor, context: Any = None) -> tuple[LSTMState, Tensor]:
        z = F.linear(x, self.weight_ih, self.bias) + F.linear(state.h, self.weight_hh)
        i, f, g, o = z.chunk(4, dim=1)
        i = torch.sigmoid(i + self.weight_ci * state.c)
        f = torch.sigmoid(f + self.weight_cf * state.c)
        c = f * state.c + i * torch.tanh(g)
        h = torch.sigmoid(o + self.weight_co * c) * torch.tanh(c)
        return LSTMState(h, c), h


class CoupledLSTM(LSTM):
    """The LSTM that writes only what it forgets, i = 1 - f (Greff et al. 2017, CIFG)::

        f, g, o = W_ih x_t + W_hh h_{t-1} + b
        c_t = sigmoid(f) * c_{t-1} + (1 - sigmoid(f)) * tanh(g)
        h_t = sigmoid(o) * tanh(c_t)
        y_t = h_t

    The forget gate's bias begins at 1.
    """

    gates = 3

    def reset_parameters(self) -> None:
        initialise(self, self.hidden_size)
        with torch.no_grad():
            self.bias[: self.hidden_size] = 1.0

    def step(self, state: LSTMState, x: Tensor, context: Any = None) -> tuple[LSTMState, Tensor]:
        z = F.linear(x, self.weight_ih, self.bias) + F.linear(state.h, self.weight_hh)
        f, g, o = z.chunk(3, dim=1)
        f = torch.sigmoid(f)
        c = f * state.c + (1 - f) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return LSTMState(h, c), h


class ProjectedLSTM(Cell):
    """The LSTM that shows less than it remembers (Sak et al. 2014)::

        i, f, g, o = W_ih x_t + W_hh h_{t-1} + b
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
        h_t = W_hr (sigmoid(o) * tanh(c_t))
        y_t = h_t

    h is (B, proj_size), c is (B, H). The forget gate's bias begins at 1.
    """

    def __init__(self, input_size: int, hidden_size: int, proj_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size, self.hidden_size = input_size, proj_size, hidden_size
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, proj_size))
        self.weight_hr = nn.Parameter(torch.empty(proj_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))
        initialise(self, hidden_size)
        with torch.no_grad():
            self.bias[hidden_size : 2 * hidden_size] = 1.0

    def initial_state(self, batch_size: int) -> LSTMState:
        return LSTMState(self.zeros(batch_size, self.output_size), self.zeros(batch_size, self.hidden_size))

    def step(self, state: LSTMState, x: Tensor, context: Any = None) -> tuple[LSTMState, Tensor]:
        z = F.linear(x, self.weight_ih, self.bias) + F.linear(state.h, self.weight_hh)
        i, f, g, o = z.chunk(4, dim=1)
        c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)
        h = F.linear(torch.sigmoid(o) * torch.tanh(c), self.weight_hr)
        return LSTMState(h, c), h


class LayerNormLSTM(LSTM):
    """The LSTM with layer normalisation inside its gates (Ba et al. 2016, section 3.1 and equations 20 to 22)::

        i, f, g, o = s_x * norm(W_ih x_t) + s_h * norm(W_hh h_{t-1}) + b
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
        h_t = sigmoid(o) * tanh(s_c * norm(c_t) + b_c)
        y_t = h_t

    ``norm`` subtracts the mean over the features and divides by sqrt(variance + 1e-5).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.scale_x = nn.Parameter(torch.ones(4 * hidden_size))
        self.scale_h = nn.Parameter(torch.ones(4 * hidden_size))
        self.scale_c = nn.Parameter(torch.ones(hidden_size))
        self.bias_c = nn.Parameter(torch.zeros(hidden_size))

    def step(self, state: LSTMState, x: Tensor, context: Any = None) -> tuple[LSTMState, Tensor]:
        wide, narrow = self.scale_x.shape, self.scale_c.shape
        z = F.layer_norm(F.linear(x, self.weight_ih), wide, self.scale_x, self.bias)
        z = z + F.layer_norm(F.linear(state.h, self.weight_hh), wide, self.scale_h)
        i, f, g, o = z.chunk(4, dim=1)
        c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(F.layer_norm(c, narrow, self.scale_c, self.bias_c))
        return LSTMState(h, c), h
