"""Two cells that no library has a kernel for, written as a user would, and where all cells of the benchmark come from.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurra import cells
from recurra.cell import Cell


class Gated(Cell):
    """Made up: two products one after the other in each step, with a product of the state between them::

    r, z = sigmoid(W_x{r,z} x_t + W_h{r,z} h_{t-1} + b_{r,z})
    n = tanh(W_xn x_t + W_hn (r * h_{t-1}) + b_n)
    h_t = h_{t-1} + z * (n - r * h_{t-1})
    y_t = h_t
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.weight_ih = nn.Parameter(torch.zeros(3 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.zeros(2 * hidden_size, hidden_size))
        self.weight_hn = nn.Parameter(torch.zeros(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(3 * hidden_size))

    def initial_state(self, batch_size: int) -> Tensor:
        return self.zeros(batch_size, self.output_size)

    def step(self, state: Tensor, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        H = self.output_size
        from_x_gates, from_x_n = F.linear(x, self.weight_ih, self.bias).split([2 * H, H], dim=1)
        r, z = torch.sigmoid(from_x_gates + F.linear(state, self.weight_hh)).chunk(2, dim=1)
        kept = r * state
        n = torch.tanh(from_x_n + F.linear(kept, self.weight_hn))
        h = state + z * (n - kept)
        return h, h


class Normed(Cell):
    """An LSTM with layer normalisation (Ba et al. 2016, supplement), on what comes from the state and on the cell::

    i, f, g, o = W_ih x_t + LN(W_hh h_{t-1}; scale_h) + b
    c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
    h_t = sigmoid(o) * tanh(LN(c_t; scale_c))
    y_t = h_t
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.weight_ih = nn.Parameter(torch.zeros(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.zeros(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))
        self.scale_h = nn.Parameter(torch.zeros(4 * hidden_size))
        self.scale_c = nn.Parameter(torch.zeros(hidden_size))

    def initial_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        return self.zeros(batch_size, self.output_size), self.zeros(batch_size, self.output_size)

    def step(
        self, state: tuple[Tensor, Tensor], x: Tensor, context: Any = None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        h, c = state
        from_h = F.layer_norm(F.linear(h, self.weight_hh), self.scale_h.shape, self.scale_h)
        i, f, g, o = (F.linear(x, self.weight_ih, self.bias) + from_h).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(F.layer_norm(c, self.scale_c.shape, self.scale_c))
        return (h, c), h


CLASSES = {"vanilla": cells.Vanilla, "GRU": cells.GRU, "LSTM": cells.LSTM, "own gated": Gated, "own normed": Normed}


def make_weights(kind: str, I: int, H: int, layers: int, seed: int) -> list[dict[str, Tensor]]:
    """The weights of each layer by name, uniform in 1/sqrt(H) as torch.nn's; float64 of float32.

    Scales are about 0.3: about 1 the normed recurrence is chaotic, and no two ways of rounding agree after 100 steps.
    """
    draw = torch.Generator().manual_seed(seed)
    made = []
    for layer in range(layers):
        shapes = {name: p.shape for name, p in CLASSES[kind](H if layer else I, H).named_parameters()}
        weights = {}
        for name, shape in shapes.items():
            uniform = (2 * torch.rand(shape, generator=draw) - 1) / math.sqrt(H)
            weights[name] = (uniform / 3 + 0.3 if name.startswith("scale") else uniform).double()
        made.append(weights)
    return made


def make_cells(kind: str, weights: list[dict[str, Tensor]], dtype: torch.dtype) -> list[Cell]:
    """A cell for each layer, with those weights."""
    made = []
    for layer in weights:
        H, I = layer["weight_hh"].shape[1], layer["weight_ih"].shape[1]
        cell = CLASSES[kind](I, H)
        cell.load_state_dict(layer)
        made.append(cell.to(dtype))
    return made
