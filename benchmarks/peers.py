"""Ways to take the same training step from the same weights: recurra's, and those of its peers.

A training step is a forward pass over x and the gradients of sum(r * y), for random r, to x and to every weight.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import recurra.nn
from clock import repeated
from grid import STANDARD, Point
from lines import Gone, Process
from own_cells import make_cells, make_weights
from recurra import Recurrent, cells
from recurra.cell import Cell

# y, x and every weight, as "0.bias" for that of the first layer: the output and the gradients.
Results = dict[str, Tensor]

# Of the environment that make peers makes, or of another one with the same packages.
PEERS_PYTHON = Path(
    os.environ.get("PEERS_PYTHON", Path(__file__).resolve().parents[1] / ".venv" / "peers" / "bin" / "python")
)


class Unavailable(Exception):
    """There is no such way here; the message says why."""


class Peer(Protocol):
    """One way to take the training step."""

    def first(self) -> Results:
        """The step once, with whatever has to be compiled, and what it computes."""
        ...

    def run(self, count: int) -> list[float]:
        """The seconds of each of ``count`` more steps."""
        ...


@dataclass
class Task:
    """A point with its numbers, in float64 but exact in float32: every peer starts from these."""

    point: Point
    weights: list[dict[str, Tensor]]
    x: Tensor
    r: Tensor

    @staticmethod
    def of(point: Point, seed: int = 0) -> Task:
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(point.T, point.B, point.I, generator=draw).double()
        r = torch.randn(point.T, point.B, point.H, generator=draw).double()
        return Task(point, make_weights(point.cell, point.I, point.H, point.layers, seed), x, r)


class Here:
    """A training step in this process: ``forward`` x (T, B, I) -> y (T, B, O), and what is differentiated to."""

    def __init__(
        self, task: Task, forward: Callable[[Tensor], Tensor], leaves: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        self.forward = forward
        self.x = task.x.clone().to(dtype).requires_grad_()
        self.r = task.r.to(dtype)
        self.leaves = {"x": self.x, **leaves}
        self.run = repeated(self.step)

    def step(self) -> tuple[Tensor, ...]:
        y = self.forward(self.x)
        return y, *torch.autograd.grad(y, list(self.leaves.values()), grad_outputs=self.r)

    def first(self) -> Results:
        y, *gradients = self.step()
        return {"y": y.detach(), **dict(zip(self.leaves, gradients, strict=True))}


class Library(Here):
    """A training step of a module with torch.nn's names: its two biases are told apart for GRU's n alone."""

    def __init__(self, task: Task, module: nn.Module, dtype: torch.dtype) -> None:
        self.kind, self.size = task.point.cell, task.point.H
        state = {}
        for k, layer in enumerate(task.weights):
            state[f"weight_ih_l{k}"], state[f"weight_hh_l{k}"] = layer["weight_ih"], layer["weight_hh"]
            state[f"bias_ih_l{k}"], second = layer["bias"], torch.zeros_like(layer["bias"])
            if self.kind == "GRU":
                second[2 * self.size :] = layer["bias_hn"]
            state[f"bias_hh_l{k}"] = second
        module.load_state_dict(state)
        module.to(dtype)
        super().__init__(task, lambda x: module(x)[0], dict(module.named_parameters()), dtype)

    def first(self) -> Results:
        found = super().first()
        results = {"y": found["y"], "x": found["x"]}
        for name, gradient in found.items():
            kept, _, layer = name.rpartition("_l")
            if kept == "bias_hh":
                if self.kind == "GRU":
                    results[f"{layer}.bias_hn"] = gradient[2 * self.size :]
            elif kept:
                results[f"{layer}.{'bias' if kept == 'bias_ih' else kept}"] = gradient
        return results


def named(layers: list[Cell]) -> dict[str, Tensor]:
    return {f"{k}.{name}": weight for k, cell in enumerate(layers) for name, weight in cell.named_parameters()}


def over_time(task: Task, dtype: torch.dtype = torch.float32, **options: Any) -> Here:
    """recurra's Recurrent, the layers in a Stack."""
    layers = make_cells(task.point.cell, task.weights, dtype)
    rnn = Recurrent(layers[0] if len(layers) == 1 else cells.Stack(*layers), **options)
    return Here(task, lambda x: rnn(x)[0], named(layers), dtype)


def library(task: Task, room: Any = nn, dtype: torch.dtype = torch.float32) -> Here:
    """torch.nn's layers, or those of recurra.nn."""
    name = {"vanilla": "RNN"}.get(task.point.cell, task.point.cell)
    module = getattr(room, name)(task.point.I, task.point.H, num_layers=task.point.layers)
    return Library(task, module, dtype)


Step = Callable[..., Any]


def in_python(layers: list[Cell], steps: Sequence[Step]) -> Callable[[Tensor], Tensor]:
    """The steps in a Python loop, a layer after the other."""

    def forward(x: Tensor) -> Tensor:
        for cell, step in zip(layers, steps, strict=True):
            state, ys = cell.initial_state(x.shape[1]), []
            for row in x.unbind(0):
                state, y = step(state, row)
                ys.append(y)
            x = torch.stack(ys)
        return x

    return forward


def eager(task: Task, dtype: torch.dtype = torch.float32) -> Here:
    """The step as it is written, in a Python loop."""
    layers = make_cells(task.point.cell, task.weights, dtype)
    return Here(task, in_python(layers, layers), named(layers), dtype)


class Compiled(Here):
    """The step by torch.compile, in a Python loop."""

    def __init__(self, task: Task) -> None:
        torch._dynamo.reset()
        layers = make_cells(task.point.cell, task.weights, torch.float32)
        steps = [torch.compile(cell, fullgraph=True, dynamic=False) for cell in layers]
        super().__init__(task, in_python(layers, steps), named(layers), torch.float32)

    def first(self) -> Results:
        try:
            return super().first()
        except torch._dynamo.exc.TorchDynamoException as problem:
            raise Unavailable(f"torch.compile: {type(problem).__name__}") from problem


class Scan:
    """A training step of JAX's scan, in a process and a virtual environment of its own (``make peers``)."""

    _process: Process | None = None

    def __init__(self, task: Task, folder: Path) -> None:
        if not PEERS_PYTHON.exists():
            raise Unavailable("JAX is not there: make peers")
        self.task, self.folder = task, folder

    def _ask(self, **request: Any) -> dict[str, Any]:
        if Scan._process is None:
            script = Path(__file__).with_name("serve_jax.py")
            # XLA asks this variable for the size of its pool of threads.
            environment = {"NPROC": str(torch.get_num_threads()), "JAX_PLATFORMS": "cpu"}
            Scan._process = Process([str(PEERS_PYTHON), str(script)], environment)
        try:
            return Scan._process.ask(request)
        except Gone:
            Scan._process = None
            raise

    def first(self) -> Results:
        weights = {f"{k}.{name}": weight for k, layer in enumerate(self.task.weights) for name, weight in layer.items()}
        arrays = {"x": self.task.x, "r": self.task.r, **weights}
        given, made = self.folder / "given.npz", self.folder / "made.npz"
        np.savez(given, **{name: value.float().numpy() for name, value in arrays.items()})
        self._ask(kind=self.task.point.cell, layers=self.task.point.layers, given=str(given), made=str(made))
        with np.load(made, allow_pickle=False) as found:
            return {name: torch.from_numpy(found[name]) for name in found.files}

    def run(self, count: int) -> list[float]:
        return self._ask(count=count)["seconds"]


def oracle(task: Task) -> Results:
    """The truth, in float64: torch.nn's for the cells it has, else the loop in eager steps."""
    made = library(task, dtype=torch.float64) if task.point.cell in STANDARD else eager(task, torch.float64)
    return made.first()


Makers = dict[str, Callable[[], Peer]]


def makers(task: Task, backend: str, folder: Path) -> Makers:
    """How to build each way to take the step, recurra first."""
    found: Makers = {"recurra": lambda: over_time(task, backend=backend)}
    if task.point.cell in STANDARD:
        found["torch.nn"] = lambda: library(task)
        if task.point.every_peer:
            found["recurra.nn"] = lambda: library(task, recurra.nn)
    found["eager"] = lambda: eager(task)
    if task.point.every_peer:
        found["torch.compile"] = lambda: Compiled(task)
    found["JAX scan"] = lambda: Scan(task, folder)
    return found
