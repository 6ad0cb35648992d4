"""One training step of a recurrent layer: recurra's paths beside torch.nn, in turn, in one process.

    python benchmarks/unroll.py [--repeat 7] [--save figures.json]

For each point the numbers are compared first, in float64: outputs, final state and every gradient of recurra.nn's
layer with torch.nn's, and of the hoisted loop with the reference loop. Where they disagree no speed is printed.
Times are medians, forward and backward, in milliseconds; the ratio is torch.nn's time over that of the faster of
recurra's two loops, so that above 1 is faster than torch.nn.

Legend: T time, B batch, I input, H hidden.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import recurra.nn
from recurra import Recurrent, cells

# (kind, T, B, I, H)
GRID = [
    (kind, T, B, I, H)
    for kind in ("RNN", "GRU", "LSTM")
    for T, B, I, H in [(128, 1, 64, 128), (64, 16, 64, 128), (64, 32, 256, 256), (32, 64, 32, 128), (64, 64, 64, 512)]
]
CELLS = {"RNN": cells.Vanilla, "GRU": cells.GRU, "LSTM": cells.LSTM}


def training_step(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad()
        y, _ = layer(x)
        y.square().mean().backward()

    return run


def results(layer: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, final state and every gradient."""
    y, state = layer(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    return [y, *(state if isinstance(state, tuple) else (state,)), *gradients]


def make(kind: str, T: int, B: int, I: int, H: int) -> dict[str, torch.nn.Module]:
    """The layers to time, after showing that they compute the same. Raises AssertionError where they do not."""
    torch.manual_seed(T + B + I + H)
    x = torch.randn(min(T, 16), min(B, 4), I, dtype=torch.float64, requires_grad=True)
    theirs = getattr(torch.nn, kind)(I, H, dtype=torch.float64)
    ours = getattr(recurra.nn, kind)(I, H, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    loop = Recurrent(CELLS[kind](I, H).double(), backend="loop")
    hoisted = Recurrent(loop.cell, backend="hoisted")
    for one, other in ((ours, theirs), (hoisted, loop)):
        for a, b in zip(results(one, x), results(other, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    layers = {"torch.nn": theirs, "recurra.nn": ours, "loop": loop, "hoisted": hoisted}
    return {name: layer.float() for name, layer in layers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    rows = []
    print(f"threads: {torch.get_num_threads()}; ms, medians of {arguments.repeat}; ratio above 1: faster than torch.nn")
    print(f"{'':26} {'torch.nn':>10} {'recurra.nn':>10} {'loop':>10} {'hoisted':>10} {'ratio':>7}")
    for kind, T, B, I, H in GRID:
        x = torch.randn(T, B, I)
        steps = {name: training_step(layer, x) for name, layer in make(kind, T, B, I, H).items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(arguments.repeat + 1):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                if turn:
                    times[name].append(1e3 * (time.perf_counter() - began))
        median = {name: statistics.median(values) for name, values in times.items()}
        ratio = median["torch.nn"] / min(median["loop"], median["hoisted"])
        point = f"{kind:<5} T{T} B{B} I{I} H{H}"
        print(f"{point:26} " + " ".join(f"{ms:10.2f}" for ms in median.values()) + f" {ratio:7.2f}")
        rows.append({"point": point, "milliseconds": median, "ratio": ratio})
    if arguments.save:
        arguments.save.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
