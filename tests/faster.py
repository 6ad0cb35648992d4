"""The faster paths of a Recurrent, as tests take them, and memory that nobody wrote.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import numpy as np
import torch

from paths import Case, Path
from recurra.compiler import segment
from recurra.compiler.llvm import kernel
from recurra.unroll import Recurrent

BACKENDS = ("hoisted", "compiled")
MODES = ("store", "recompute", "sqrt")


def path_of(backend: str, memory: str = "store") -> Path:
    """A Recurrent of its own for each run."""
    return lambda case: by(Recurrent(case.cell, backend=backend, memory=memory))(case)


def by(rnn: Recurrent) -> Path:
    """One Recurrent for all runs, so that its plans serve them all. The cell of the case must be its own."""

    def path(case: Case):
        assert case.cell is rnn.cell
        rnn.reverse = case.reverse
        return rnn(case.x, case.state, lengths=case.lengths, resets=case.resets, context=case.context)

    return path


def fill_memory_with_nan(monkeypatch) -> None:
    """Memory is full of NaN until somebody writes it: PyTorch's own, and that in which native code works."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    launch, aligned, run = kernel.Kernel.launch, kernel.aligned_empty, segment.Segment.run

    def spoilt(make):
        def wrong(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() and "out" not in kwargs else made

        return wrong

    def launched(self, *args, **kwargs):
        for workspace in self._idle:
            for array in workspace.arrays:
                array.view(np.uint8)[...] = 0xFF
        launch(self, *args, **kwargs)

    def run_on(self, *args):
        for room in self._idle:
            for array in (*room.memory, *(array for space in room.spaces for array in space.arrays)):
                array.view(np.uint8)[...] = 0xFF
        return run(self, *args)

    def all_ones(size, dtype):
        array = aligned(size, dtype)
        array.view(np.uint8)[...] = 0xFF
        return array

    monkeypatch.setattr(torch, "empty", spoilt(empty))
    monkeypatch.setattr(torch, "empty_like", spoilt(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", spoilt(new_empty))
    monkeypatch.setattr(kernel, "aligned_empty", all_ones)
    monkeypatch.setattr(segment, "aligned_empty", all_ones)
    monkeypatch.setattr(segment.Segment, "run", run_on)
    monkeypatch.setattr(kernel.Kernel, "launch", launched)
