"""M1: the peak of memory of one training step, and its time. Each is measured in a process of its own.

The peak is what the process grew by, as the system counts it, so that every library's own allocations are in it.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import gc
import inspect
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from grid import Point, Remembered
from measure import TOLERANCE, disagreement
from peers import Here, Task, Unavailable, library, oracle, over_time
from recurra import Recurrent
from recurra.errors import BackendError

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """Bytes: ``VmRSS`` now, ``VmHWM`` at most since the last reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def grown(peer: Here) -> int:
    """By how many bytes the process grows, at most, during a step. Without Linux's counters: since it began.

    Zero for a step that needs no more than there is: Linux adds up the pages of each processor now and then only, and
    what it says of a step of a few pages may be less than before it.
    """
    gc.collect()
    if not REFERENCES.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peer.step()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    REFERENCES.write_text("5")
    before = resident("VmRSS")
    peer.step()
    return max(resident("VmHWM") - before, 0)


def build(task: Task, path: str, backend: str) -> Here:
    if path == "torch.nn":
        return library(task)
    if path == "store":
        return over_time(task, backend=backend)
    if "memory" not in inspect.signature(Recurrent).parameters:
        raise Unavailable(f"Recurrent has no memory={path!r}")
    return over_time(task, backend=backend, memory=path)


def remember(asked: Remembered, backend: str) -> dict[str, Any]:
    """Bytes at the peak, y and the gradients among them, and milliseconds; or why there are none."""
    found: dict[str, Any] = asdict(asked)
    try:
        small = Task.of(Point("M1", asked.cell, 7, asked.B, asked.H, asked.H))
        check = build(small, asked.path, backend)
        worst, gap = disagreement(check.first(), oracle(small))
        if gap > TOLERANCE:
            return {**found, "wrong": f"{worst} differs by {gap:.1e} of its largest number"}
        del check
        task = Task.of(Point("M1", asked.cell, asked.T, asked.B, asked.H, asked.H))
        peer = build(task, asked.path, backend)
        if asked.T > 7:
            # Compiled before the peak is taken, on a short piece.
            torch.autograd.grad(peer.forward(peer.x[:7]).sum(), list(peer.leaves.values()))
        found["bytes"] = grown(peer)
        began = time.perf_counter()
        peer.step()
        return {**found, "milliseconds": 1e3 * (time.perf_counter() - began)}
    except (BackendError, Unavailable) as problem:
        return {**found, "refused": str(problem).splitlines()[0]}
