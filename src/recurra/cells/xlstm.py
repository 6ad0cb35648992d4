"""sLSTM and mLSTM, the two cells of xLSTM: exponential gates, kept in range by a running maximum.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurra.cell import Cell
from recurra.cells.initial import initialise
from recurra.errors import ShapeError


class SLSTMState(NamedTuple):
    """Output h, memory c, normaliser n, and the running maximum m of the gates' logarithms; each (B, H)."""

    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


class SLSTM(Cell):
    """The scalar-memory LSTM with exponential gates (Beck et al. 2024, section 2.2, eqs. 8 to 17)::

        i, f, g, o = W_ih x_t + W_hh h_{t-1} + b          W_hh block-diagonal, a block for each head
        m_t = max(log_sigmoid(f) + m_{t-1}, i)
        i' = exp(i - m_t),   f' = exp(log_sigmoid(f) + m_{t-1} - m_t)
        c_t = f' * c_{t-1} + i' * tanh(g)
        n_t = f' * n_{t-1} + i'
        h_t = sigmoid(o) * c_t / n_t
        y_t = h_t

    m begins at -1e4, the others at zero. The forget gate's bias begins at 1.
    Raises ShapeError where the hidden size does not divide among the heads.
    """

    def __init__(self, input_size: int, hidden_size: int, heads: int = 1) -> None:
        super().__init__()
        head_size = _head_size(hidden_size, heads)
        self.input_size, self.output_size, self.heads = input_size, hidden_size, heads
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(heads, 4 * head_size, head_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))
        initialise(self, hidden_size, heads)
        with torch.no_grad():
            self.bias[hidden_size : 2 * hidden_size] = 1.0

    def initial_state(self, batch_size: int) -> SLSTMState:
        zeros = self.zeros(batch_size, self.output_size)
        # No past yet: the first input sets the scale, however small its gate.
        return SLSTMState(zeros, zeros, zeros, zeros - 1e4)

    def step(self, state: SLSTMState, x: Tensor, context: Any = None) -> tuple[SLSTMState, Tensor]:
        B, H = state.h.shape
        by_head = state.h.view(B, self.heads, H // self.heads)
        recurrent = torch.einsum("bkd,kgd->bkg", by_head, self.weight_hh)
        # (B, heads, 4 * head) -> (B, 4, H): the gates apart, the heads side by side.
        recurrent = recurrent.view(B, self.heads, 4, H // self.heads).transpose(1, 2).reshape(B, 4 * H)
        i, f, g, o = (F.linear(x, self.weight_ih, self.bias) + recurrent).chunk(4, dim=1)
        f = F.logsigmoid(f) + state.m
        m = torch.maximum(f, i)
        write, keep = torch.exp(i - m), torch.exp(f - m)
        c = keep * state.c + write * torch.tanh(g)
        n = keep * state.n + write
        h = torch.sigmoid(o) * c / n
        return SLSTMState(h, c, n, m), h


class MLSTMState(NamedTuple):
    """Memory C (B, heads, D, D), normaliser n (B, heads, D), running maximum m (B, heads)."""

    C: Tensor
    n: Tensor
    m: Tensor


class MLSTM(Cell):
    """The matrix-memory LSTM, keys and values in an outer product (Beck et al. 2024, section 2.3, eqs. 19 to 27)::

        q, k, v, o = W_ih x_t + b;   k = k / sqrt(D)
        i, f = W_gates x_t + b_gates                        one of each for each head
        m_t = max(log_sigmoid(f) + m_{t-1}, i)
        i' = exp(i - m_t),   f' = exp(log_sigmoid(f) + m_{t-1} - m_t)
        C_t = f' * C_{t-1} + i' * v k^T
        n_t = f' * n_{t-1} + i' * k
        h_t = sigmoid(o) * (C_t q / max(|n_t . q|, exp(-m_t)))
        y_t = h_t

    There is no recurrent matrix, so the recurrence is linear in (C, n). The forget gate's bias begins at 1.
    Raises ShapeError where the hidden size does not divide among the heads.
    """

    def __init__(self, input_size: int, hidden_size: int, heads: int = 1) -> None:
        super().__init__()
        self.head_size = _head_size(hidden_size, heads)
        self.input_size, self.output_size, self.heads = input_size, hidden_size, heads
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))
        self.weight_gates = nn.Parameter(torch.empty(2 * heads, input_size))
        self.bias_gates = nn.Parameter(torch.empty(2 * heads))
        initialise(self, hidden_size)
        with torch.no_grad():
            self.bias_gates[heads:] = 1.0

    def initial_state(self, batch_size: int) -> MLSTMState:
        K, D = self.heads, self.head_size
        return MLSTMState(self.zeros(batch_size, K, D, D), self.zeros(batch_size, K, D), self.zeros(batch_size, K))

    def step(self, state: MLSTMState, x: Tensor, context: Any = None) -> tuple[MLSTMState, Tensor]:
        B, K, D = state.n.shape
        q, k, v, o = F.linear(x, self.weight_ih, self.bias).view(B, 4, K, D).unbind(1)
        k = k * D**-0.5
        i, f = F.linear(x, self.weight_gates, self.bias_gates).chunk(2, dim=1)
        f = F.logsigmoid(f) + state.m
        m = torch.maximum(f, i)
        write, keep = torch.exp(i - m)[:, :, None], torch.exp(f - m)[:, :, None]
        C = keep[..., None] * state.C + (write * v)[..., :, None] * k[..., None, :]
        n = keep * state.n + write * k
        found = (C * q[..., None, :]).sum(-1)
        # Clamped, as exp would overflow where both gates stay shut, and its gradient be NaN.
        scale = torch.maximum((n * q).sum(-1).abs(), torch.exp(-m.clamp(min=-80.0)))
        h = (torch.sigmoid(o) * found / scale[..., None]).reshape(B, K * D)
        return MLSTMState(C, n, m), h


def _head_size(hidden_size: int, heads: int) -> int:
    if heads < 1 or hidden_size % heads:
        raise ShapeError(f"hidden_size={hidden_size} does not divide among {heads} heads: choose a divisor")
    return hidden_size // heads
