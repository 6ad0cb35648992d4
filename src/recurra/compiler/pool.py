"""Memory for large values, kept for the next call: memory that is new to a process costs a visit to the system for
every page of it.

Legend: D any feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from weakref import ref

import numpy as np
import torch
from torch import Tensor

# Measured, see docs/lab-notes.md. Bytes below which the system's own allocator has memory at hand.
LEAST = 1 << 18
# How much larger than a value its memory may be, and for how many further values memory waits for its next one.
SPARE, AGE = 1.25, 96
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class Block:
    """A piece of memory. ``since``: how many values the pool had given when it came back."""

    def __init__(self, size: int) -> None:
        memory = np.empty(size + 64, np.uint8)
        begin = -memory.ctypes.data % 64
        self.memory, self.size = memory[begin : begin + size], size
        self.since = 0


class Pool:
    """Gives memory to tensors, and takes it back when nobody holds them any more."""

    def __init__(self) -> None:
        # By size, the last one that came back last.
        self._free: dict[int, list[Block]] = {}
        self._given = 0
        # Weak references live as long as what they refer to, or their callbacks are not called.
        self._lent: dict[int, ref[np.ndarray]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As ``torch.empty``, for float32 and float64 on the CPU."""
        size = prod(shape) * dtype.itemsize
        if size < LEAST:
            return torch.empty(shape, dtype=dtype)
        self._given += 1
        block = self._pop(size) or self._near(size) or Block(size)
        lent = block.memory[:size].view(_NUMPY[dtype]).reshape(shape)
        key = id(lent)

        def back(_: object) -> None:
            self._lent.pop(key, None)
            block.since = self._given
            self._free.setdefault(block.size, []).append(block)

        self._lent[key] = ref(lent, back)
        return torch.from_numpy(lent)

    def clear(self) -> None:
        """Gives what nobody uses back to the system."""
        self._free.clear()

    @property
    def idle(self) -> int:
        """Bytes that wait for their next value."""
        return sum(block.size for blocks in [*self._free.values()] for block in [*blocks])

    def _pop(self, size: int) -> Block | None:
        # Another thread, or a value that goes, may change the lists meanwhile.
        try:
            return self._free[size].pop()
        except (KeyError, IndexError):
            return None

    def _near(self, size: int) -> Block | None:
        """A block that is a little too large. What has waited for too long goes back to the system."""
        for each, blocks in [*self._free.items()]:
            blocks[:] = [block for block in blocks if self._given - block.since <= AGE]
            if not blocks:
                self._free.pop(each, None)
        fitting = [each for each in [*self._free] if size <= each <= SPARE * size]
        return self._pop(min(fitting)) if fitting else None


POOL = Pool()
