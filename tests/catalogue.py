"""Every cell and wrapper of the house, and some that a user might write, each beside its oracle.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import plain
from recurra import cells
from recurra.cell import Cell


@dataclass(frozen=True)
class Entry:
    """A cell by name, how to make it for (I, H), and its oracle; ``memory`` where it attends to a context."""

    name: str
    make: Callable[[int, int], Cell]
    oracle: plain.Plain
    memory: bool = False

    def build(self, input_size: int, hidden_size: int, seed: int = 1) -> Cell:
        """The cell in evaluation mode and float64, with random parameters that float32 holds exactly."""
        cell = self.make(input_size, hidden_size).double().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in cell.named_parameters():
                spread = 0.4 if parameter.dim() < 2 else 0.8 * parameter.shape[-1] ** -0.5
                value = spread * torch.randn(parameter.shape, generator=generator)
                value += name.rpartition(".")[2].startswith("scale")
                parameter.copy_(value)
        return cell

    def __str__(self) -> str:
        return self.name


class LeakyState(NamedTuple):
    potential: Tensor
    trace: Tensor


class Leaky(Cell):
    """A leaky integrator that also keeps a slow trace of itself: two leaves of different sizes."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size, self.hidden_size = input_size, hidden_size + 3, hidden_size
        self.inward = nn.Linear(input_size, hidden_size)
        self.back = nn.Parameter(torch.zeros(hidden_size, 3))
        self.out = nn.Parameter(torch.zeros(3, hidden_size))
        self.leak = nn.Parameter(torch.zeros(hidden_size))

    def initial_state(self, batch_size):
        return LeakyState(self.zeros(batch_size, self.hidden_size), self.zeros(batch_size, 3) + 0.5)

    def step(self, state, x, context=None):
        keep = torch.sigmoid(self.leak)
        drive = torch.relu(self.inward(x) + state.trace @ self.back.T)
        potential = keep * state.potential + (1 - keep) * drive
        trace = 0.9 * state.trace + 0.1 * potential @ self.out.T
        return LeakyState(potential, trace), torch.cat([potential, trace], dim=1)


def leaky_step(p, state, x, _):
    potential, trace = state
    keep = plain.sigmoid(p["leak"])
    drive = plain.relu(p["inward.weight"] @ x + p["inward.bias"] + p["back"] @ trace)
    potential = keep * potential + drive - keep * drive
    trace = 0.9 * trace + 0.1 * (p["out"] @ potential)
    return (potential, trace), torch.cat([potential, trace])


class Rotor(Cell):
    """Two leaves that turn into one another."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.inward = nn.Parameter(torch.zeros(hidden_size, input_size))
        self.angle = nn.Parameter(torch.zeros(hidden_size))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.output_size), self.zeros(batch_size, self.output_size) + 1

    def step(self, state, x, context=None):
        a, b = state
        turned = torch.cos(self.angle) * a - torch.sin(self.angle) * b
        a, b = torch.tanh(turned + x @ self.inward.T), torch.sin(self.angle) * a + torch.cos(self.angle) * b
        return (a, b), a * b


def rotor_step(p, state, x, _):
    a, b = state
    sine, cosine = torch.sin(p["angle"]), torch.cos(p["angle"])
    new = (plain.tanh(p["inward"] @ x + cosine * a - sine * b), sine * a + cosine * b)
    return new, new[0] * new[1]


class Attending(Cell):
    """Dot attention over an encoder memory (B, S, H), its context (Luong et al. 2015, section 3.1, "dot")."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.inward = nn.Linear(input_size, hidden_size)
        self.recurrent = nn.Parameter(torch.zeros(hidden_size, hidden_size))
        self.found = nn.Parameter(torch.zeros(hidden_size, hidden_size))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.output_size)

    def step(self, state, x, context=None):
        weights = torch.softmax((context @ state[:, :, None])[:, :, 0], dim=1)
        found = (weights[:, :, None] * context).sum(1)
        h = torch.tanh(self.inward(x) + state @ self.recurrent.T + found @ self.found.T)
        return h, h


def attending_step(p, h, x, memory):
    weights = [torch.exp((memory[s] * h).sum()) for s in range(len(memory))]
    found = sum(weight * memory[s] for s, weight in enumerate(weights)) / sum(weights)
    h = plain.tanh(p["inward.weight"] @ x + p["inward.bias"] + p["recurrent"] @ h + p["found"] @ found)
    return h, h


class Direction(Cell):
    """Divides by the length of its input, which zeros in place of padding would not survive."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.inward = nn.Parameter(torch.zeros(hidden_size, input_size))
        self.keep = nn.Parameter(torch.zeros(hidden_size))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.output_size)

    def step(self, state, x, context=None):
        h = torch.tanh(self.keep * state + (x / x.norm(dim=1, keepdim=True)) @ self.inward.T)
        return h, h


def direction_step(p, h, x, _):
    h = plain.tanh(p["keep"] * h + p["inward"] @ x / torch.sqrt((x * x).sum()))
    return h, h


class Counting(Cell):
    """The running mean of its projected inputs: a leaf of whole numbers, (B,), beside one of real ones."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.inward = nn.Parameter(torch.zeros(hidden_size, input_size))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.output_size), self.zeros(batch_size).long()

    def step(self, state, x, context=None):
        mean, count = state
        mean = mean + (x @ self.inward.T - mean) / (count + 1)[:, None]
        return (mean, count + 1), mean


def counting_step(p, state, x, _):
    mean, count = state
    mean = (count * mean + p["inward"] @ x) / (count + 1)
    return (mean, count + 1), mean


def heads(hidden_size: int) -> int:
    return next(count for count in (4, 2, 7, 1) if hidden_size % count == 0)


def vector(name: str) -> Callable:
    return lambda p: plain.zeros(p, p[name].shape[0])


CATALOGUE = [
    Entry("Vanilla", cells.Vanilla, plain.vanilla(plain.tanh)),
    Entry("Vanilla relu", lambda i, h: cells.Vanilla(i, h, torch.relu), plain.vanilla(plain.relu)),
    Entry("LSTM", cells.LSTM, plain.lstm),
    Entry("PeepholeLSTM", cells.PeepholeLSTM, plain.peephole_lstm),
    Entry("CoupledLSTM", cells.CoupledLSTM, plain.coupled_lstm),
    Entry("ProjectedLSTM", lambda i, h: cells.ProjectedLSTM(i, h, (h + 1) // 2), plain.projected_lstm),
    Entry("LayerNormLSTM", cells.LayerNormLSTM, plain.layer_norm_lstm),
    Entry("GRU", cells.GRU, plain.gru),
    Entry("GRUResetBefore", cells.GRUResetBefore, plain.gru_reset_before),
    Entry("RecurrentHighway", cells.RecurrentHighway, plain.highway),
    Entry("RecurrentHighway depth 1", lambda i, h: cells.RecurrentHighway(i, h, depth=1), plain.highway),
    Entry("MinGRU", cells.MinGRU, plain.min_gru),
    Entry("MinLSTM", cells.MinLSTM, plain.min_lstm),
    Entry("SLSTM", cells.SLSTM, plain.slstm),
    Entry("SLSTM heads", lambda i, h: cells.SLSTM(i, h, heads(h)), plain.slstm),
    Entry("MLSTM", cells.MLSTM, plain.mlstm),
    Entry("MLSTM heads", lambda i, h: cells.MLSTM(i, h, heads(h)), plain.mlstm),
    Entry(
        "Stack",
        lambda i, h: cells.Stack(cells.LSTM(i, h), cells.GRU(h, 2)),
        plain.stack(plain.lstm, plain.gru),
    ),
    Entry(
        "Residual",
        lambda i, h: cells.Residual(cells.Readout(cells.GRU(i, h), i)),
        plain.residual(plain.readout(plain.gru)),
    ),
    Entry(
        "Readout",
        lambda i, h: cells.Readout(cells.Vanilla(i, h), 3),
        plain.readout(plain.vanilla(plain.tanh)),
    ),
    Entry(
        "LearnedInitialState",
        lambda i, h: cells.LearnedInitialState(cells.PeepholeLSTM(i, h)),
        plain.learned_first_state(plain.peephole_lstm),
    ),
    Entry("LayerNorm", lambda i, h: cells.LayerNorm(cells.MinGRU(i, h)), plain.layer_norm(plain.min_gru)),
    Entry(
        "VariationalDropout",
        lambda i, h: cells.VariationalDropout(cells.LSTM(i, h), input=0.3, output=0.2),
        plain.around(plain.lstm),
    ),
    Entry(
        "Zoneout",
        lambda i, h: cells.Zoneout(cells.LSTM(i, h), (0.1, 0.4)),
        plain.expected_zoneout(plain.lstm, 0.1, 0.4),
    ),
    Entry("WeightDrop", lambda i, h: cells.WeightDrop(cells.GRU(i, h), 0.5), plain.around(plain.gru)),
    Entry(
        "deep",
        lambda i, h: cells.Stack(
            cells.LayerNorm(cells.Zoneout(cells.LSTM(i, h), (0.2, 0.1))),
            cells.Residual(cells.WeightDrop(cells.VariationalDropout(cells.GRU(h, h), 0.1), 0.5, ("cell.weight_hh",))),
        ),
        plain.stack(
            plain.layer_norm(plain.expected_zoneout(plain.lstm, 0.2, 0.1)),
            plain.residual(plain.around(plain.around(plain.gru))),
        ),
    ),
    Entry(
        "user: Leaky",
        Leaky,
        plain.Plain(lambda p: (plain.zeros(p, len(p["leak"])), plain.zeros(p, 3) + 0.5), leaky_step),
    ),
    Entry(
        "user: Rotor",
        Rotor,
        plain.Plain(lambda p: (0 * p["angle"].detach(), 0 * p["angle"].detach() + 1), rotor_step),
    ),
    Entry("user: Attending", Attending, plain.Plain(vector("found"), attending_step), memory=True),
    Entry("user: Direction", Direction, plain.Plain(vector("keep"), direction_step)),
    Entry(
        "user: Counting",
        Counting,
        plain.Plain(lambda p: (plain.zeros(p, len(p["inward"])), torch.zeros((), dtype=torch.int64)), counting_step),
    ),
]

BY_NAME = {entry.name: entry for entry in CATALOGUE}
