"""Memory for large values, kept for the next call: memory that is new to a process costs a visit to the system for
every page of it.

Legend: D any feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import inf, prod
from weakref import ref

import numpy as np
import torch
from torch import Tensor

# Measured, see docs/lab-notes.md. Bytes below which the system's own allocator has memory at hand, and how much larger
# than a value its memory may be, and all memory than what was held.
LEAST, SPARE = 1 << 18, 1.25
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class Block:
    """A piece of memory. ``since``: how many values the pool had given when it came back."""

    def __init__(self, size: int) -> None:
        memory = np.empty(size + 64, np.uint8)
        begin = -memory.ctypes.data % 64
        self.memory, self.size = memory[begin : begin + size], size
        self.since = 0


class _Loan(ref[np.ndarray]):
    """Notices that nobody holds the numbers in a block any more."""

    __slots__ = ("block",)
    block: Block


class Pool:
    """Gives memory to tensors, and takes it back when nobody holds them any more.

    It never has much more than was held at one time since it was last cleared: before it asks for new memory, that
    which has waited longest goes back to the system. A program that keeps its last results until it has the next ones
    holds most of its memory at other times than those, and would else have new memory at each step.
    """

    def __init__(self) -> None:
        # By size, the last one that came back last.
        self._free: dict[int, list[Block]] = {}
        # Weak references live as long as what they refer to, or their callbacks are not called.
        self._lent: dict[int, _Loan] = {}
        self._given = self._most = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, brief: bool = False) -> Tensor:
        """As ``torch.empty``, for float32 and float64 on the CPU.

        What is held for a ``brief`` time only may have memory that is much larger: two passes whose values differ in
        size would else take turns in having each other's memory given up.
        """
        size = prod(shape) * dtype.itemsize
        if size < LEAST:
            return torch.empty(shape, dtype=dtype)
        self._given += 1
        block = self._pop(size) or self._near(size, inf if brief else SPARE * size) or self._new(size)
        lent = np.ndarray(shape, _NUMPY[dtype], block.memory)
        loan = _Loan(lent, self._back)
        loan.block = block
        self._lent[id(loan)] = loan
        return torch.from_numpy(lent)

    def clear(self) -> None:
        """Gives what nobody uses back to the system."""
        self._free.clear()
        self._most = 0

    @property
    def idle(self) -> int:
        """Bytes that wait for their next value."""
        return sum(block.size for blocks in [*self._free.values()] for block in [*blocks])

    def _back(self, loan: _Loan) -> None:
        self._lent.pop(id(loan), None)
        block = loan.block
        block.since = self._given
        self._free.setdefault(block.size, []).append(block)

    def _pop(self, size: int) -> Block | None:
        # Another thread, or a value that goes, may change the lists meanwhile.
        try:
            return self._free[size].pop()
        except (KeyError, IndexError):
            return None

    def _near(self, size: int, most: float) -> Block | None:
        """A block that is too large, but no larger than that."""
        fitting = [each for each, blocks in [*self._free.items()] if blocks and size <= each <= most]
        return self._pop(min(fitting)) if fitting else None

    def _new(self, size: int) -> Block:
        held = size + sum(loan.block.size for loan in [*self._lent.values()])
        self._most = max(self._most, held)
        waiting = sorted((block for blocks in [*self._free.values()] for block in [*blocks]), key=lambda b: b.since)
        over = held + sum(block.size for block in waiting) - SPARE * self._most
        for block in waiting:
            if over <= 0:
                break
            over -= block.size
            # Somebody else may have taken it meanwhile.
            with suppress(KeyError, ValueError):
                self._free[block.size].remove(block)
        return Block(size)


POOL = Pool()
