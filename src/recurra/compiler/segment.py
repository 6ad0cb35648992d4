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
from recurra.compiler.pieces import write
from recurra.compiler.places import given_values
from recurra.compiler.pool import POOL
from recurra.compiler.script import Script
from recurra.compiler.writer import Unfit, Writer

# As many sizes are remembered.
_KEPT = 64


class _Room:
    """Memory that one call at a time works in, and the words of the script that it was last used for."""

    def __init__(self, script: Script, B: int, apart: int, dtype: Any) -> None:
        self.B, self.members, self.scratch = B, script.members, script.scratch
        self.words = aligned_empty(2 * len(script.words), np.dtype(np.int64))
        self.memory = [aligned_empty(size, dtype) for size in (apart * script.members, script.scratch)]
        self.spaces = [loop.workspace(B, script.members) for loop in script.loops]
        self.addresses = [array.ctypes.data for array in (self.words, *self.memory)]
        self.addresses += [address for space in self.spaces for address in space.addresses]
        self.script: Script | None = None

    def fits(self, script: Script, B: int) -> bool:
        enough = self.B >= B and self.members >= script.members and self.scratch >= script.scratch
        return enough and len(self.words) >= len(script.words)

    def take(self, script: Script) -> None:
        """Writes what all calls of a script have in common."""
        self.script, self.common = script, script.words.copy().data
        for at, which, skip in script.fixed:
            self.common[at] = self.addresses[which] + skip
        self.own = self.words[: len(script.words)].data


class Segment:
    """Some of the operations of a pass. ``graph`` has them as they are called one by one, ``sums`` is what sums over
    the steps in it. ``given`` and ``kept`` have for every input and every result its number among all that a forward
    pass keeps, where it may lie in one tensor with others. ``stepped`` says which inputs have rows of all steps on
    their first axis, None if that is not known. ``alone`` says that all results of the pass are some of its own, each
    once.
    """

    def __init__(
        self,
        graph: fx.Graph,
        sums: Callable[..., Tensor],
        dtype: torch.dtype,
        given: Sequence[int | None],
        kept: Sequence[int | None],
        stepped: Sequence[bool | None],
        alone: bool,
    ) -> None:
        self.graph, self.sums, self.dtype = graph, sums, dtype
        self.given, self.kept, self.stepped, self.alone = given, kept, stepped, alone
        self.one_by_one = fx.GraphModule(nn.Module(), graph).forward
        self._scripts: dict[tuple[Any, ...], Script | None] = {}
        self._idle: list[_Room] = []

    def run(self, call: Any, *given: Any) -> Sequence[Tensor | None]:
        """The results. Where ``call.together``, the one tensor of all that is kept stands for the first of it, None for
        the rest, and ``call.block`` says what lies where. A shape stands for zeros."""
        if call.lengths is not None or call.resets is not None:
            return self._one_by_one(call, given)
        addresses, alive, zeros = [], [], 0
        for k, tensor in enumerate(given):
            if not isinstance(tensor, Tensor):
                zeros += 0 if tensor is None else 1 << k
                addresses.append(0)
                continue
            if not tensor.is_contiguous() or tensor.is_neg():
                tensor = tensor.resolve_neg().contiguous()
                # As long as it is there, its memory is.
                alive.append(tensor)
            addresses.append(tensor.data_ptr())
        key = (call.T, call.B, call.reverse, torch.get_num_threads(), call.together, call.block, zeros)
        try:
            script = self._scripts[key]
        except KeyError:
            script = self._scripts[key] = self._script(call, given)
            while len(self._scripts) > _KEPT:
                self._scripts.pop(next(iter(self._scripts)))
        if script is None:
            given = given if call.block is None else call.block.apart(given, self.given)
            return self._one_by_one(call, given)
        values = [
            POOL.empty(shape, self.dtype) if large else torch.empty(shape, dtype=self.dtype)
            for shape, large in script.shapes
        ]
        if script.spare:
            values.append(POOL.empty((script.spare,), self.dtype, brief=True))
        addresses += [value.data_ptr() for value in values]
        room = self._room(script, call.B)
        words = room.own
        words[:] = room.common
        for at, which, skip in script.slots:
            words[at] = addresses[which] + skip
        calls().run(room.addresses[0])
        self._idle.append(room)
        if script.block is not None:
            call.block = script.block
        call.alone = self.alone
        return [None if index is None else values[index] for index in script.results]

    def _one_by_one(self, call: Any, given: Sequence[Any]) -> Sequence[Tensor | None]:
        given = [torch.zeros(each, dtype=self.dtype) if isinstance(each, tuple) else each for each in given]
        return self.one_by_one(call, *given)  # type: ignore[no-any-return]

    def _script(self, call: Any, given: Sequence[Any]) -> Script | None:
        if call.T * call.B == 0 or any(isinstance(t, Tensor) and t.dtype is not self.dtype for t in given):
            return None
        kept = self.kept if call.together else [None] * len(self.kept)
        values = given_values(call.block, given, self.given, self.stepped, call.T, self.dtype.itemsize)
        try:
            return write(Writer(self.graph, self.sums, self.dtype, call, values, None not in self.stepped), kept)
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
        if room.script is not script:
            room.take(script)
        return room
