"""One point: every way to take the step is built, compared with the truth, and only then timed.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clock import in_turn
from grid import Point
from lines import Gone
from peers import Makers, Peer, Results, Task, Unavailable, makers, oracle
from recurra.errors import BackendError

TOLERANCE = 1e-4


def difference(one: Tensor, truth: Tensor) -> float:
    """The largest difference, over the largest number there should be; infinite for another shape and for NaN."""
    if one.shape != truth.shape:
        return float("inf")
    gap = (one.double() - truth).abs().max().item()
    return gap / max(truth.abs().max().item(), 1e-30) if gap == gap else float("inf")


def disagreement(found: Results, truth: Results) -> tuple[str, float]:
    """What is furthest from the truth, and how far."""
    if found.keys() != truth.keys():
        return f"results {sorted(found)} instead of {sorted(truth)}", float("inf")
    gaps = {name: difference(found[name], truth[name]) for name in truth}
    worst = max(gaps, key=gaps.__getitem__)
    return worst, gaps[worst]


def measure(task: Task, ways: Makers, seconds: float, rounds: int) -> dict[str, Any]:
    """Times in ms (medians, and the first call with its compilation) of the ways that agree; why there is none of
    the others: ``refused`` says that it cannot be run, ``wrong`` that its numbers are others."""
    truth = oracle(task)
    ready: dict[str, Peer] = {}
    firsts: dict[str, float] = {}
    gaps: dict[str, float] = {}
    refused: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name, make in ways.items():
        began = time.perf_counter()
        try:
            peer = make()
            found = peer.first()
        except (BackendError, Unavailable, Gone) as problem:
            refused[name] = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            continue
        firsts[name] = time.perf_counter() - began
        worst, gap = disagreement(found, truth)
        if gap <= TOLERANCE:
            ready[name], gaps[name] = peer, gap
        else:
            wrong[name] = f"{worst} differs by {gap:.1e} of its largest number, more than {TOLERANCE:.0e}"
    times = in_turn({name: peer.run for name, peer in ready.items()}, seconds, rounds)
    return {
        **asdict(task.point),
        "threads": torch.get_num_threads(),
        "flops": task.point.flops,
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "calls": {name: len(values) for name, values in times.items()},
        "first_milliseconds": {name: 1e3 * firsts[name] for name in ready},
        "largest_difference": gaps,
        "refused": refused,
        "wrong": wrong,
    }


def measure_point(point: Point, backend: str, seconds: float, rounds: int, folder: Path) -> dict[str, Any]:
    """``measure`` of all that there is."""
    task = Task.of(point)
    return measure(task, makers(task, backend, folder), seconds, rounds)
