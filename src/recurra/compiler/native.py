"""A loop of a schedule as native code: what it takes from PyTorch's tensors, and what it gives back.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from recurra.compiler.ir import Node, Op, Program
from recurra.compiler.llvm.kernel import Kernel, kernel_for
from recurra.compiler.lower import Lowered
from recurra.compiler.pool import POOL
from recurra.compiler.rows import Rows, by_row, from_rows
from recurra.compiler.stages import Compiled

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Kept:
    """An output of the program that is the value of ``node``. ``carry`` is given where it is that carry's old value,
    which is the new one of the step before and need not be written twice."""

    node: fx.Node
    output: int
    carry: int | None = None


class NativeLoop:
    """One loop, compiled. ``lowered`` has the program and the nodes of its operands."""

    def __init__(self, compiled: Compiled, lowered: Lowered, rows: Mapping[fx.Node, Rows | None]) -> None:
        self.compiled, self.lowered, self.rows = compiled, lowered, rows
        self.dtype: torch.dtype = lowered.carries[0].meta["val"].dtype
        self.program, self.kept = _kept(lowered)
        self._kernels: dict[tuple[bool, frozenset[int]], Kernel] = {}
        self.needs = (*lowered.inputs, *lowered.rows, *lowered.vectors, *lowered.matrices)
        self.gives = tuple(kept.node for kept in self.kept)
        # An output that is an old carry as well has one step more, for the first state.
        self.both = {kept.output for kept in self.kept if kept.carry is not None}
        self._flat = {node for node in (*self.needs, *self.gives) if self._is_flat(node)}
        self._bent = [(k, node) for k, node in enumerate(self.needs) if node not in self._flat]
        # Whether all is as the program has it.
        self.is_plain = not self._bent and self._flat.issuperset(self.gives)
        self.widths = _widths(self.program)

    @property
    def kernels(self) -> list[Kernel]:
        """The native code that there is by now."""
        return [*self._kernels.values()]

    def kernel(self, every_state: bool = False, summed: frozenset[int] = frozenset()) -> Kernel:
        """The native code; with ``every_state`` it keeps the new carries of all steps, after the other outputs.

        ``summed`` are outputs that it keeps the sums over all steps of, as carries behind the others.
        """
        key = every_state, summed
        if key not in self._kernels:
            program = _summed(self.program, summed)
            program = _with_states(program) if every_state else program
            self._kernels[key] = kernel_for(program, str(self.dtype).removeprefix("torch."))
        return self._kernels[key]

    def forward(
        self, call: Any, operands: Sequence[Tensor], state: Sequence[Tensor], fresh: Sequence[Tensor]
    ) -> list[Tensor]:
        begin = [_carry(leaf) for leaf in state]
        afresh = [_carry(leaf) for leaf in fresh] if call.resets is not None else None
        last = [leaf.clone() for leaf in begin]
        plain = call.resets is None and not (call.reverse and call.lengths is not None)
        both = self.both if plain else set()
        fill = call.lengths is not None and call.plan.fills
        taken = replace(call, lengths=call.lengths.clamp(min=1)) if fill else call
        outputs = self._launch(self.kernel(), taken, operands, last, afresh, call.resets, call.reverse, both)
        if fill:
            idle = (call.lengths == 0)[:, None]
            last = [torch.where(idle, first, leaf) for first, leaf in zip(begin, last, strict=True)]
            for k, value in enumerate(outputs):
                steps = value[call.B :] if k in both and not call.reverse else value
                places, sources = call.filled
                steps.index_copy_(0, places, steps.index_select(0, sources))
        results = [_like(leaf, first) for leaf, first in zip(last, state, strict=True)]
        size = call.T * call.B
        for kept in self.kept:
            value = outputs[kept.output]
            if kept.carry is not None:
                first = begin[kept.carry]
                again = None if afresh is None else afresh[kept.carry]
                value = _before(call, value, first, again, kept.output in both)
            elif kept.output in both:
                value = value[:size] if call.reverse else value[call.B :]
            results.append(self._bend(kept.node, value))
        return results

    def backward(self, call: Any, operands: Sequence[Tensor], gradient: Sequence[Tensor]) -> list[Tensor | None]:
        first = [_carry(leaf).clone() for leaf in gradient]
        resets = call.resets
        afresh: list[Tensor | None] = [None] * len(first)
        if resets is None:
            outputs = self._launch(self.kernel(), call, operands, first, None, None, not call.reverse)
        else:
            # A row that began afresh took nothing from the step before: going back, its gradient ends before that
            # step. What it would have been is the gradient of the fresh state.
            zeros = [torch.zeros_like(leaf) for leaf in first]
            later = torch.zeros_like(resets)
            ahead, behind = (later[1:], resets[:-1]) if call.reverse else (later[:-1], resets[1:])
            ahead.copy_(behind)
            outputs = self._launch(self.kernel(True), call, operands, first, zeros, later, not call.reverse)
            outputs, states = outputs[: -len(first)], outputs[-len(first) :]
            marks = resets[:, :, None]
            afresh = [
                torch.where(marks, each.view(*resets.shape, each.shape[1]), 0).sum(0).view(leaf.shape)
                for each, leaf in zip(states, gradient, strict=True)
            ]
            begins = call.first_reset()[:, None]
            first = [torch.where(begins, 0, leaf) for leaf in first]
        ends = [_like(leaf, last) for leaf, last in zip(first, gradient, strict=True)]
        return [*ends, *afresh, *(self._bend(kept.node, outputs[kept.output]) for kept in self.kept)]

    def _launch(
        self,
        kernel: Kernel,
        call: Any,
        operands: Sequence[Tensor],
        state: list[Tensor],
        fresh: list[Tensor] | None,
        resets: Tensor | None,
        reverse: bool,
        both: Collection[int] = (),
    ) -> list[Tensor]:
        """Runs the kernel on the operands. Writes ``state``; gives the outputs (T * B, D), those in ``both`` with
        room for one step more where the first one begins."""
        B, size = call.B, call.T * call.B
        outputs, places = [], []
        for k, width in enumerate(self.widths if kernel.program is self.program else _widths(kernel.program)):
            memory = POOL.empty((size + B if k in both else size, width), self.dtype)
            skip = B * width * self.dtype.itemsize if k in both and not reverse else 0
            outputs.append(memory)
            places.append(memory.data_ptr() + skip)
        if B:
            taken = [*operands]
            for k, node in self._bent:
                rows = self.rows[node]
                taken[k] = (taken[k] if rows is None else by_row(taken[k], rows)).to(self.dtype)
            # As long as these are there, their memory is.
            taken = [value if value.is_contiguous() else value.contiguous() for value in taken]
            kernel.launch(
                call.T,
                B,
                operands=[value.data_ptr() for value in taken],
                state=[leaf.data_ptr() for leaf in state],
                fresh=None if fresh is None else [leaf.data_ptr() for leaf in fresh],
                outputs=places,
                lengths=0 if call.lengths is None else call.lengths.data_ptr(),
                resets=0 if resets is None else resets.data_ptr(),
                reverse=reverse,
                threads=torch.get_num_threads(),
            )
        return outputs

    # Tensors of the program, and tensors of the graph

    def _is_flat(self, node: fx.Node) -> bool:
        """Whether the numbers of a node lie as the program has them, (B, D), or have no rows."""
        rows, like = self.rows[node], node.meta["val"]
        if like.dtype is not self.dtype:
            return False
        return rows is None or (rows.axis == 0 and rows.apart == 1)

    def shape(self, node: fx.Node, count: int) -> tuple[int, ...]:
        """The shape of a value of so many rows whose numbers lie as the program has them."""
        rows = self.rows[node]
        assert rows is not None
        return (count * rows.factor, *node.meta["val"].shape[1:])

    def _bend(self, node: fx.Node, value: Tensor) -> Tensor:
        rows, like = self.rows[node], node.meta["val"]
        if node in self._flat:
            return value.view(self.shape(node, value.shape[0]))
        assert rows is not None
        return from_rows(value, rows, like).to(like.dtype)


def _carry(leaf: Tensor) -> Tensor:
    return (leaf if leaf.dim() == 2 else leaf.reshape(leaf.shape[0], prod(leaf.shape[1:]))).contiguous()


def _like(leaf: Tensor, other: Tensor) -> Tensor:
    return leaf if leaf.dim() == other.dim() else leaf.view(other.shape)


def _widths(program: Program) -> list[int]:
    return [program.nodes[place].width for place in program.outputs]


def _before(call: Any, after: Tensor, begin: Tensor, fresh: Tensor | None, both: bool) -> Tensor:
    """A carry before each step (T * B, D), of its values after each step; with ``both`` these have room for it."""
    T, B, reverse = call.T, call.B, call.reverse
    if both:
        after[T * B :].copy_(begin) if reverse else after[:B].copy_(begin)
        return after[B:] if reverse else after[: T * B]
    old = torch.cat([after[B:], begin] if reverse else [begin, after[: T * B - B]]).view(T, B, begin.shape[1])
    if reverse and call.lengths is not None:
        steps = torch.arange(T)[:, None, None]
        old = torch.where(steps >= call.lengths[:, None] - 1, begin, old)
    old = old if fresh is None else torch.where(call.resets[:, :, None], fresh, old)
    return old.view(T * B, begin.shape[1])


def _kept(lowered: Lowered) -> tuple[Program, tuple[_Kept, ...]]:
    """The program without the outputs that are another one's copy, or that one's value a step before."""
    program = lowered.program
    nodes, outputs = program.nodes, program.outputs

    def same(place: int) -> int:
        node = nodes[place]
        whole = node.op is Op.SLICE and node.width == nodes[node.args[0]].width
        return node.args[0] if whole and node.args[0] in outputs else place

    kept: list[tuple[fx.Node, int, int | None]] = []
    for node, place in zip(lowered.outputs, map(same, outputs), strict=True):
        value = nodes[place]
        after = program.new[value.index] if value.op is Op.CARRY else None
        if after is not None and same(after) in outputs and nodes[after].op is not Op.CARRY:
            kept.append((node, same(after), value.index))
        else:
            kept.append((node, place, None))
    needed = list(dict.fromkeys(place for _, place, _ in kept))
    program = replace(program, outputs=tuple(needed))
    return program, tuple(_Kept(node, needed.index(place), carry) for node, place, carry in kept)


def _summed(program: Program, outputs: frozenset[int]) -> Program:
    """The program that adds these outputs up instead of keeping each step's."""
    nodes, carries, new = [*program.nodes], [*program.carries], [*program.new]
    for place in (program.outputs[k] for k in sorted(outputs)):
        width = nodes[place].width
        nodes += [Node(Op.CARRY, (), width, index=len(carries)), Node(Op.ADD, (len(nodes), place), width)]
        carries.append(width)
        new.append(len(nodes) - 1)
    rest = tuple(place for k, place in enumerate(program.outputs) if k not in outputs)
    return replace(program, nodes=tuple(nodes), carries=tuple(carries), outputs=rest, new=tuple(new))


def _with_states(program: Program) -> Program:
    """The program that keeps the new value of every carry as well."""
    nodes, outputs = list(program.nodes), list(program.outputs)
    for place in program.new:
        if place in outputs:
            nodes.append(Node(Op.SLICE, (place,), nodes[place].width))
            place = len(nodes) - 1
        outputs.append(place)
    return replace(program, nodes=tuple(nodes), outputs=tuple(outputs))
