"""A program, compiled for this machine, and how it is called.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

from recurra.compiler.ir import Op, Program, parse
from recurra.compiler.llvm.divide import HEADER, LINE, TABLE, claims_at
from recurra.compiler.llvm.emit import emit
from recurra.compiler.llvm.target import Engine, Target, host
from recurra.compiler.llvm.team import Team
from recurra.compiler.operands import Array, Operands
from recurra.compiler.regions import group
from recurra.errors import ShapeError

_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 4)
_SHARE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# Measured, see docs/lab-notes.md. Multiplications and additions below which a call is not worth a second thread; and
# those of one step between two places where all threads meet, below which it is not worth dividing.
WAKE = 400_000
MEET = 100_000


class Kernel:
    """A program as native code for ``dtype``, float32 or float64. T, B and the weights are given at each call.

    A call does not hold Python's lock. Rows never meet, and a row's numbers are the same to the bit whatever is
    beside it and however many threads there are.
    """

    def __init__(self, program: Program, dtype: Any, target: Target | None = None) -> None:
        self.program, self.dtype = program, np.dtype(dtype)
        self.target = host() if target is None else target
        self.assembly, self.layout = emit(group(program), self.dtype, self.target)
        self._engine = Engine(self.assembly, self.target)
        self.compiled = self._engine.compiled
        self.address = self._engine.address("share")
        self.native_share = _SHARE(self.address)
        self.native_run = _RUN(self._engine.address("run"))
        self.words = struct.Struct(f"={len(HEADER)}q{8 * (TABLE - len(HEADER))}x{len(self.layout.entries)}q")
        self.claims = TABLE + claims_at(self.layout)
        self.strides = tuple(columns for _, columns in program.matrices)
        self._no_fresh = (0,) * len(program.carries)
        products = [node for node in program.nodes if node.op is Op.MATMUL]
        self._work = sum(2 * program.nodes[node.args[0]].width * node.width for node in products)
        self._idle: list[Workspace] = []

    def launch(
        self,
        T: int,
        B: int,
        *,
        operands: Sequence[int] = (),
        strides: Sequence[int] | None = None,
        state: Sequence[int] = (),
        fresh: Sequence[int] | None = None,
        outputs: Sequence[int] = (),
        lengths: int = 0,
        resets: int = 0,
        reverse: bool = False,
        threads: int = 1,
    ) -> None:
        """One whole call on the memory at these addresses: it writes the outputs, and ``state`` in place.

        ``operands`` are the inputs, rows, vectors and matrices, in this order; shapes and types are those of
        ``Operands``. strides: numbers from one row of each matrix to the next, as the program declares the matrices
        if not given. 0 for lengths or resets: there are none. Nothing is checked: a wrong address ends the process.
        """
        parts, members = self.divide(T, B, threads)
        try:
            workspace = self._idle.pop()
        except IndexError:
            workspace = self.workspace(B, members)
        if workspace.B < B or workspace.members < members:
            workspace = self.workspace(B, members)
        self.words.pack_into(
            workspace.buffer,
            0,
            *(T, B, reverse, self.layout.units, parts, members, give_way()),
            *operands,
            *(self.strides if strides is None else strides),
            *state,
            *(self._no_fresh if fresh is None else fresh),
            *outputs,
            lengths,
            resets,
            *workspace.addresses,
        )
        self.start(workspace, members)
        self._idle.append(workspace)

    def bind(
        self,
        T: int,
        B: int,
        *,
        operands: Sequence[int] = (),
        strides: Sequence[int] | None = None,
        state: Sequence[int] = (),
        fresh: Sequence[int] | None = None,
        outputs: Sequence[int] = (),
        lengths: int = 0,
        resets: int = 0,
        reverse: bool = False,
        threads: int = 1,
        workspace: Workspace | None = None,
    ) -> Call:
        """A call as of ``launch`` that can be run again and again. It packs the matrices now, and not again.

        Two calls that run at the same time need a workspace each, and get one if none is given.
        """
        workspace = self.workspace(B, threads) if workspace is None else workspace
        pointers = (
            *operands,
            *(self.strides if strides is None else strides),
            *(*state, *(self._no_fresh if fresh is None else fresh), *outputs, lengths, resets),
            *workspace.addresses,
        )
        call = Call(self, workspace, (T, B, reverse), pointers, self.divide(T, B, threads))
        call.pack()
        return call

    def __call__(self, operands: Operands, threads: int = 1) -> tuple[list[Array], list[Array]]:
        """The outputs (T, B, D) each, and each carry (B, D) after the last step, as ``interpret`` gives them.

        Raises ShapeError for arrays that are not as the program declares them.
        """
        operands.check(self.program, self.dtype)
        outputs = self.outputs(operands.T, operands.B)
        state = [leaf.copy() for leaf in operands.state]
        self.launch(operands.T, operands.B, **addresses(operands, outputs, state), threads=threads)
        return outputs, state

    def outputs(self, T: int, B: int) -> list[Array]:
        """Arrays for the outputs (T, B, D). Their contents do not matter."""
        widths = [self.program.nodes[place].width for place in self.program.outputs]
        return [aligned_empty(T * B * width, self.dtype).reshape(T, B, width) for width in widths]

    def workspace(self, B: int, members: int = 1) -> Workspace:
        """Memory for calls on up to B rows and up to ``members`` threads."""
        layout, whole = self.layout, np.dtype(np.int64)
        panels, scratch = (aligned_empty(size, self.dtype) for size in (layout.panels, layout.scratch * B))
        size = self.claims + members * LINE
        work, words = (aligned_empty(size, whole) for size in (members * layout.work * B, size))
        return Workspace(B, members, panels, scratch, work, words)

    def divide(self, T: int, B: int, threads: int) -> tuple[int, int]:
        """Into how many ranges of rows a call is divided, 0 if it is by features; and how many threads it takes."""
        if threads == 1 or T * B * self._work < WAKE:
            return 1, 1
        # With a row or two for each thread, every weight is read for too little: better each thread its own weights.
        meet = MEET if threads > B else 8 * MEET
        if 2 * threads >= B and B * self._work >= meet * len(self.layout.stages):
            return 0, threads
        parts = max(1, min(B, threads))
        return parts, parts

    def start(self, workspace: Workspace, threads: int) -> None:
        """Runs what the words of the workspace say."""
        if threads == 1:
            self.native_share(workspace.address)
        else:
            workspace.words[self.claims :] = 0
            Team(threads).run(self.address, workspace.address, threads)


class Workspace:
    """What a call on up to B rows and up to ``members`` threads works in. Contents do not matter."""

    def __init__(self, B: int, members: int, panels: Array, scratch: Array, work: Array, words: Array) -> None:
        self.B, self.members, self.words = B, members, words
        self.arrays = (panels, scratch, work)
        self.addresses = tuple(array.ctypes.data for array in self.arrays)
        self.address, self.buffer = words.ctypes.data, words.data


class Call:
    """A kernel and the memory that it works on. It can be run again after the contents have changed."""

    def __init__(
        self,
        kernel: Kernel,
        workspace: Workspace,
        size: tuple[int, int, bool],
        pointers: tuple[int, ...],
        division: tuple[int, int],
    ) -> None:
        self.kernel, self.workspace, self.size, self.pointers = kernel, workspace, size, pointers
        self.parts, self.members = division
        self._run, self._address = kernel.native_run, workspace.address

    def pack(self) -> None:
        """Packs the matrices, after they have changed."""
        # Without rows, packing is all there is to do.
        self._write((0, 0, False), self.kernel.layout.units)
        self.kernel.start(self.workspace, self.members)
        self._write(self.size, 0)

    def run(self, begin: int = 0, end: int | None = None) -> None:
        """Takes the rows begin to end through time, on this thread. Raises ShapeError for rows that are not there.

        Ranges that do not overlap can run at the same time, on threads of the caller's.
        """
        B = self.size[1]
        end = B if end is None else end
        if not 0 <= begin <= end <= B:
            raise ShapeError(f"expected a range of rows within 0 to {B}, got {begin} to {end}")
        self._run(self._address, begin, end, 0, 1)

    def share(self) -> None:
        """Takes all rows through time, on as many threads as it was bound for, where they are worth it."""
        self._write(self.size, 0)
        self.kernel.start(self.workspace, self.members)

    def _write(self, size: tuple[int, int, bool], units: int) -> None:
        header = (*size, units, self.parts, self.members, give_way())
        self.kernel.words.pack_into(self.workspace.buffer, 0, *header, *self.pointers)


def addresses(operands: Operands, outputs: Sequence[Array], state: Sequence[Array]) -> dict[str, Any]:
    """What ``launch`` and ``bind`` take, of arrays that stay alive and where they are."""

    def of(arrays: Sequence[Array]) -> list[int]:
        return [array.ctypes.data for array in arrays]

    return {
        "operands": of([*operands.inputs, *operands.rows, *operands.vectors, *operands.matrices]),
        "state": of(state),
        "fresh": None if operands.fresh is None else of(operands.fresh),
        "outputs": of(outputs),
        "lengths": 0 if operands.lengths is None else operands.lengths.ctypes.data,
        "resets": 0 if operands.resets is None else operands.resets.ctypes.data,
        "reverse": operands.reverse,
    }


@cache
def give_way() -> int:
    """The address of the function by which a thread lets others run; 0 where there is none."""
    if not hasattr(os, "sched_yield"):
        return 0
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


def aligned_empty(size: int, dtype: np.dtype[Any]) -> Array:
    """An array (size,) that begins at a multiple of 64 bytes."""
    spare = 64 // dtype.itemsize
    whole = np.empty(size + spare, dtype)
    skip = (-whole.ctypes.data % 64) // dtype.itemsize
    return whole[skip : skip + size]


def kernel_for(program: Program, dtype: Any) -> Kernel:
    """The kernel of a program on this machine. Equal programs share one; the last 256 are kept.

    Threads may ask at once: each gets a kernel that is good, and all later ones the same.
    """
    return _kernel_for(str(program), np.dtype(dtype).name, host())


@lru_cache(256)
def _kernel_for(text: str, dtype: str, target: Target) -> Kernel:
    # By their text: as numbers 0.0 and -0.0 are equal, and programs with them would be, too.
    return Kernel(parse(text), dtype, target)
