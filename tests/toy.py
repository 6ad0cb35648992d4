"""A small task with everything that makes resuming hard: carried state, dropout, zoneout, accumulation."""

from __future__ import annotations

import torch
from torch import nn

from recurra.cells import LSTM, Stack, VariationalDropout, Zoneout
from recurra.training.config import TrainingConfig
from recurra.training.distributed import World
from recurra.training.loop import Trainer
from recurra.training.progress import Silent
from recurra.training.run import Run
from recurra.unroll import Recurrent


class ToyModel(nn.Module):
    def __init__(self, regularised: bool = True) -> None:
        super().__init__()
        cells = [LSTM(3, 5), LSTM(5, 4)]
        if regularised:
            cells = [VariationalDropout(Zoneout(cell, 0.2), output=0.3) for cell in cells]
        self.rnn = Recurrent(Stack(*cells))
        self.readout = nn.Linear(4, 1)

    def forward(self, x, state):
        y, state = self.rnn(x, state)
        return self.readout(y), state


class ToyTask:
    """Predict the running mean of a random walk; window k of row b is drawn from (k, b) alone."""

    unit = "numbers"
    windows = 5

    def __init__(self, config, regularised=True):
        torch.manual_seed(config.seed)
        self.model = ToyModel(regularised)
        self.config = config
        self.poison = {}
        self.evaluations = 0

    def initial_carry(self):
        with torch.no_grad():
            return self.model.rnn.cell.initial_state(self.config.batch_size)

    def window(self, window, rows):
        generator = torch.Generator().manual_seed(1000 + window)
        x = torch.randn(self.config.window, self.config.batch_size, 3, generator=generator)
        return x[:, rows], x.sum(2, keepdim=True).cumsum(0)[:, rows]

    def loss(self, model, window, carry, rows):
        x, target = self.window(window, rows)
        if window in self.poison:
            x = self.poison[window](x)
        y, carry = model(x, carry)
        return nn.functional.mse_loss(y, target), target.numel(), carry

    def evaluate(self, model):
        self.evaluations += 1
        model.eval()
        with torch.no_grad():
            x, target = self.window(99, slice(None))
            y, _ = model(x, None)
            return float(nn.functional.mse_loss(y, target))

    def figures(self, loss):
        return {"squared error": loss}

    def identity(self):
        return {"toy": 1}


def config(**changes) -> TrainingConfig:
    plain = {"batch_size": 4, "window": 6, "epochs": 4, "warmup": 2, "seed": 3, "learning_rate": 1e-2, "threads": 1}
    return TrainingConfig(**{**plain, **changes})


def new_trainer(folder, settings, task=None, progress=None, world=None):
    task = task or ToyTask(settings)
    run = Run.create(folder, "toy")
    run.path.joinpath("run.json").write_text('{"format": "recurra-run", "version": 1, "task": "toy"}')
    return Trainer(task, run, settings, world or World(), progress or Silent())


class Notes(Silent):
    """Keeps what was said."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)
