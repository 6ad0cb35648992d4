"""What a pass does in native code, as one native call: its loops, products and sums, with nothing of Python between.

For each size of a call it is written down once which function is called on what: numbers, but for where the tensors of
the call and its memory lie. What cannot be written down runs call by call, with the same results.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from recurra.compiler.llvm import gemm
from recurra.compiler.llvm.kernel import aligned_empty
from recurra.compiler.llvm.sequence import calls
from recurra.compiler.pool import POOL
from recurra.compiler.script import Script, Unfit, Writer

# As many sizes are remembered.
_KEPT = 64


class _Room:
    """Memory that one call at a time works in."""

    def __init__(self, script: Script, B: int, apart: int, dtype: Any) -> None:
        self.B, self.members = B, script.members
        self.words = aligned_empty(2 * len(script.words), np.dtype(np.int64))
        self.memory = aligned_empty(apart * script.members, dtype)
        self.spaces = [loop.kernel().workspace(B, script.members) for loop in script.loops]
        own = (self.words.ctypes.data, self.memory.ctypes.data)
        self.addresses = [*own, *(address for space in self.spaces for address in space.addresses)]

    def fits(self, script: Script, B: int) -> bool:
        return self.B >= B and self.members >= script.members and len(self.words) >= len(script.words)


class Segment:
    """Some of the operations of a pass. ``graph`` has them as they are called one by one, ``sums`` is what sums over
    the steps in it."""

    def __init__(self, graph: fx.Graph, sums: Callable[..., Tensor], dtype: torch.dtype) -> None:
        self.graph, self.sums, self.dtype = graph, sums, dtype
        self.one_by_one = fx.GraphModule(nn.Module(), graph).forward
        self._scripts: dict[tuple[Any, ...], Script | None] = {}
        self._idle: list[_Room] = []

    def run(self, call: Any, *given: Tensor) -> Sequence[Tensor | None]:
        if call.lengths is not None or call.resets is not None:
            return self.one_by_one(call, *given)  # type: ignore[no-any-return]
        key = (call.T, call.B, call.reverse, torch.get_num_threads())
        try:
            script = self._scripts[key]
        except KeyError:
            script = self._scripts[key] = self._script(call, given)
            while len(self._scripts) > _KEPT:
                self._scripts.pop(next(iter(self._scripts)))
        if script is None:
            return self.one_by_one(call, *given)  # type: ignore[no-any-return]
        dtype = self.dtype
        # As long as these are there, their memory is.
        given = tuple([t if t.is_contiguous() and not t.is_neg() else t.resolve_neg().contiguous() for t in given])
        values = [POOL.empty(shape, dtype) for shape in script.shapes]
        room = self._room(script, call.B)
        addresses = [*room.addresses, *[tensor.data_ptr() for tensor in given], *[value.data_ptr() for value in values]]
        words = room.words.data
        words[: len(script.words)] = script.words.data
        for at, which, skip in script.slots:
            words[at] = addresses[which] + skip
        calls().run(addresses[0])
        self._idle.append(room)
        return [
            None if part is None else values[part[0]] if part[1] < 0 else values[part[0]][part[1] : part[2]]
            for part in script.results
        ]

    def _script(self, call: Any, given: Sequence[Tensor]) -> Script | None:
        if call.T * call.B == 0 or any(tensor.dtype is not self.dtype for tensor in given):
            return None
        try:
            return Writer(self.graph, self.sums, self.dtype, call, given).run()
        except Unfit:
            return None

    def _room(self, script: Script, B: int) -> _Room:
        try:
            room = self._idle.pop()
        except IndexError:
            room = None
        if room is None or not room.fits(script, B):
            products = gemm.products(self.dtype)
            room = _Room(script, B, products.memory, products.numpy)
        return room
