"""A process that measures what it is asked to, with the number of threads that its environment says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import limit
import measure
import memory
import streaming
from grid import Point, Remembered, Streaming
from lines import serve


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """One job: its kind, and what it needs."""
    job, folder, backend = request["job"], Path(request["folder"]), request["backend"]
    if job == "point":
        point = Point(**request["point"])
        return measure.measure_point(point, backend, request["seconds"], request["rounds"], folder)
    if job == "stream":
        return streaming.stream(Streaming(**request["stream"]), backend, folder)
    if job == "memory":
        return memory.remember(Remembered(**request["memory"]), backend)
    return {"flops": limit.fma_limit(torch.get_num_threads()), "copied": limit.copy_bandwidth()}


def main() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    serve(answer)


if __name__ == "__main__":
    main()
