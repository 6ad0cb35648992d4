"""A program, compiled for this machine, and how it is called.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recurra.compiler.ir import Program
from recurra.compiler.llvm.emit import SHARED, emit
from recurra.compiler.llvm.layout import pack, panel_size
from recurra.compiler.llvm.target import Engine, Target, host
from recurra.compiler.llvm.team import Team
from recurra.compiler.operands import Array, Operands
from recurra.compiler.regions import group
from recurra.errors import ShapeError

_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 5)


class Kernel:
    """A program as native code for ``dtype``, float32 or float64. T, B and the weights are given at each call.

    A call does not hold Python's lock, and rows never meet: threads can take ranges of rows of the same arrays.
    """

    def __init__(self, program: Program, dtype: Any, target: Target | None = None) -> None:
        self.program, self.dtype = program, np.dtype(dtype)
        self.target = host() if target is None else target
        self.assembly, self.layout = emit(group(program), self.dtype, self.target)
        self._engine = Engine(self.assembly, self.target)
        self.native_run = _RUN(self._engine.address("run"))
        self.native_share = self._engine.address("share")

    def pack(self, matrices: Sequence[Array]) -> list[Array]:
        """The matrices in the order in which the kernel reads them; good for every call until they change."""
        panels = []
        for sweep in self.layout.sweeps:
            for each in sweep.groups:
                panel = aligned_empty(panel_size(sweep, each, self.layout.lanes), self.dtype)
                pack(self.program, sweep, each, self.layout.lanes, matrices, panel)
                panels.append(panel)
        return panels

    def scratch(self, B: int) -> Array:
        """Working memory for B rows. Its contents do not matter."""
        return aligned_empty(self.layout.scratch * B, self.dtype)

    def outputs(self, T: int, B: int) -> list[Array]:
        """Arrays for the outputs (T, B, D). Their contents do not matter."""
        widths = [self.program.nodes[place].width for place in self.program.outputs]
        return [aligned_empty(T * B * width, self.dtype).reshape(T, B, width) for width in widths]

    def __call__(self, operands: Operands) -> tuple[list[Array], list[Array]]:
        """The outputs (T, B, D) each, and each carry (B, D) after the last step, as ``interpret`` gives them.

        Raises ShapeError for arrays that are not as the program declares them.
        """
        operands.check(self.program, self.dtype)
        outputs = self.outputs(operands.T, operands.B)
        state = [leaf.copy() for leaf in operands.state]
        self.bind(operands, self.pack(operands.matrices), outputs, state, self.scratch(operands.B)).run()
        return outputs, state

    def bind(
        self,
        operands: Operands,
        panels: Sequence[Array],
        outputs: Sequence[Array],
        state: Sequence[Array],
        scratch: Array,
    ) -> Call:
        """A call on these very arrays: it writes ``outputs``, and ``state`` in place. Checks nothing.

        ``operands.state`` and ``operands.matrices`` are not read. Two calls need scratch memory each.
        """
        none: list[Array] = []
        arrays: dict[str, Sequence[Array]] = {
            "input": operands.inputs,
            "row": operands.rows,
            "vector": operands.vectors,
            "state": state,
            "fresh": operands.fresh or none,
            "output": outputs,
            "panel": panels,
            "lengths": [np.full(operands.B, operands.T, np.int64) if operands.lengths is None else operands.lengths],
            "resets": none if operands.resets is None else [operands.resets],
            "active": [np.empty(operands.B, np.int64)],
            "scratch": [scratch],
        }
        table = (ctypes.c_void_p * len(self.layout.entries))()
        for (name, index), entry in self.layout.entries.items():
            table[entry] = arrays[name][index].ctypes.data if index < len(arrays[name]) else None
        return Call(self, table, arrays, operands.T, operands.B, operands.reverse)


@dataclass(frozen=True, eq=False)
class Call:
    """A kernel and the arrays it works on. It can be run again after their contents have changed."""

    kernel: Kernel
    table: ctypes.Array[ctypes.c_void_p]
    arrays: Mapping[str, Sequence[Array]]
    T: int
    B: int
    reverse: bool

    def run(self, begin: int = 0, end: int | None = None) -> None:
        """Takes the rows begin to end through time. Raises ShapeError for rows that are not there."""
        end = self.B if end is None else end
        if not 0 <= begin <= end <= self.B:
            raise ShapeError(f"expected a range of rows within 0 to {self.B}, got {begin} to {end}")
        self.kernel.native_run(self.table, self.T, self.B, begin, end, self.reverse)

    def share(self, team: Team) -> None:
        """Takes all rows through time, shared among the threads of a team so that each has as many steps."""
        bounds = split(self.arrays["lengths"][0], max(1, min(team.threads, self.B)))
        parts = len(bounds) - 1
        words = (ctypes.c_int64 * len(SHARED))(
            ctypes.addressof(self.table), bounds.ctypes.data, self.T, self.B, self.reverse, parts, 0
        )
        team.run(self.kernel.native_share, ctypes.addressof(words), parts)


def split(lengths: Array, parts: int) -> Array:
    """The bounds (parts + 1,) of neighbouring rows whose lengths (B,) add up to nearly the same."""
    # A row costs a little even where it has no step.
    before = np.concatenate([[0], np.cumsum(2 * lengths + 1)])
    wanted = before[-1] * np.arange(1, parts) // parts
    inner = np.searchsorted(before + np.append(np.diff(before) // 2, 0), wanted)
    return np.concatenate([[0], inner, [lengths.size]]).astype(np.int64)


def aligned_empty(size: int, dtype: np.dtype[Any]) -> Array:
    """An array (size,) that begins at a multiple of 64 bytes."""
    spare = 64 // dtype.itemsize
    whole = np.empty(size + spare, dtype)
    skip = (-whole.ctypes.data % 64) // dtype.itemsize
    return whole[skip : skip + size]
