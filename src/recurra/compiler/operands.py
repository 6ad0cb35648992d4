"""What a program runs on: its arrays, and where rows end and start afresh.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recurra.compiler.ir import Program
from recurra.errors import ShapeError

Array = NDArray[Any]


@dataclass(frozen=True)
class Operands:
    """The arrays of one run over T steps of B rows, all of one dtype, float32 or float64.

    inputs (T, B, D) each, rows (B, D), vectors (D,), matrices as the program declares them.
    state (B, D) each: the carries before the first step.
    lengths (B,) int64: a row takes only the steps below its length. None: all T.
    resets (T, B) bool: before that step the row's carries become those of ``fresh`` (B, D) each.
    reverse: the steps are taken from T - 1 down to 0.
    """

    T: int
    B: int
    inputs: Sequence[Array] = ()
    rows: Sequence[Array] = ()
    vectors: Sequence[Array] = ()
    matrices: Sequence[Array] = ()
    state: Sequence[Array] = ()
    fresh: Sequence[Array] | None = None
    lengths: Array | None = None
    resets: Array | None = None
    reverse: bool = False

    def check(self, program: Program, dtype: np.dtype[Any]) -> None:
        """Raises ShapeError for the first array that is not what the program declares."""
        T, B = self.T, self.B
        _check("input", self.inputs, [(T, B, width) for width in program.inputs], dtype)
        _check("row", self.rows, [(B, width) for width in program.rows], dtype)
        _check("vector", self.vectors, [(width,) for width in program.vectors], dtype)
        _check("matrix", self.matrices, list(program.matrices), dtype)
        _check("state", self.state, [(B, width) for width in program.carries], dtype)
        if self.lengths is not None:
            _check("lengths", [self.lengths], [(B,)], np.dtype(np.int64))
        if self.resets is not None:
            if self.fresh is None:
                raise ShapeError("resets need the fresh state that a row starts from: give fresh")
            _check("resets", [self.resets], [(T, B)], np.dtype(np.bool_))
            _check("fresh", self.fresh, [(B, width) for width in program.carries], dtype)


def _check(name: str, arrays: Sequence[Array], shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any]) -> None:
    if len(arrays) != len(shapes):
        raise ShapeError(f"expected {len(shapes)} arrays of kind {name}, got {len(arrays)}")
    for place, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            found = f"{array.shape} of {array.dtype}" + ("" if array.flags.c_contiguous else ", not contiguous")
            raise ShapeError(f"expected {name} {place} to be {shape} of {dtype}, contiguous, got {found}")
