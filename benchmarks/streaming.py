"""S1: one step at a time, batch 1: recurra.Stream, torch.nn's cell and ONNX Runtime, a time for each single step.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clock import one_by_one
from grid import Streaming
from lines import Gone, Process
from measure import TOLERANCE, difference
from own_cells import make_cells, make_weights
from peers import PEERS_PYTHON
from recurra import Stream
from recurra.errors import BackendError

# Inputs are taken from so many rows, over and over; the first of them are the check.
ROWS = 64


class Cell:
    """torch.nn's LSTMCell or GRUCell, its state kept."""

    def __init__(self, kind: str, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        H = weights["weight_hh"].shape[1]
        self.cell = getattr(nn, f"{kind}Cell")(weights["weight_ih"].shape[1], H)
        second = torch.zeros_like(weights["bias"])
        if kind == "GRU":
            second[2 * H :] = weights["bias_hn"]
        state = {"weight_ih": weights["weight_ih"], "weight_hh": weights["weight_hh"]}
        self.cell.load_state_dict({**state, "bias_ih": weights["bias"], "bias_hh": second})
        self.cell.to(dtype)
        self.state: Any = None

    def push(self, x: Tensor) -> Tensor:
        self.state = self.cell(x, self.state)
        return self.state[0] if isinstance(self.state, tuple) else self.state


def outputs(push: Callable[[Any], Any], rows: list[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(push(row)) for row in rows])


def onnx_runtime(
    task: Streaming, weights: dict[str, Tensor], rows: Tensor, folder: Path
) -> tuple[Tensor, dict[str, float]]:
    """The outputs and the times of ONNX Runtime, in a process and a virtual environment of its own."""
    given, made = folder / "stream.npz", folder / "streamed.npz"
    np.savez(given, rows=rows.float().numpy(), **{name: value.float().numpy() for name, value in weights.items()})
    process = Process([str(PEERS_PYTHON), str(Path(__file__).with_name("serve_onnx.py"))], {})
    try:
        request = {"given": str(given), "made": str(made), "threads": torch.get_num_threads(), **asdict(task)}
        found = process.ask(request)
    finally:
        process.close()
    with np.load(made, allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["y"]), found


def stream(task: Streaming, backend: str, folder: Path) -> dict[str, Any]:
    """Nanoseconds a step of each way that agrees, and why there are none of the others."""
    [weights] = make_weights(task.cell, task.size, task.size, 1, seed=task.size)
    rows = torch.randn(ROWS, 1, task.size, generator=torch.Generator().manual_seed(task.size))
    single = list(rows)
    found: dict[str, Any] = {**asdict(task), "nanoseconds": {}, "refused": {}, "wrong": {}}
    with torch.no_grad():
        truth = outputs(Cell(task.cell, weights, torch.float64).push, list(rows.double()))

        def take(name: str, y: Tensor, measured: Callable[[], dict[str, float]]) -> None:
            gap = difference(y, truth)
            if gap <= TOLERANCE:
                found["nanoseconds"][name] = measured()
            else:
                found["wrong"][name] = f"the outputs differ by {gap:.1e}"

        def here(push: Callable[[Tensor], Tensor]) -> Callable[[], dict[str, float]]:
            return lambda: one_by_one(push, single, task.steps, task.seconds)

        try:
            [cell] = make_cells(task.cell, [weights], torch.float32)
            ours = Stream(cell.eval(), backend=backend)
            take("recurra", outputs(ours.push, single), here(ours.push))
        except BackendError as problem:
            found["refused"]["recurra"] = str(problem).splitlines()[0]
        theirs = Cell(task.cell, weights, torch.float32)
        take("torch.nn cell", outputs(theirs.push, single), here(theirs.push))
    if not PEERS_PYTHON.exists():
        found["refused"]["ONNX Runtime"] = "ONNX Runtime is not there: make peers"
        return found
    try:
        y, measured = onnx_runtime(task, weights, rows, folder)
        take("ONNX Runtime", y, lambda: measured)
    except Gone as problem:
        found["refused"]["ONNX Runtime"] = str(problem)
    return found
