"""The time loop of a stage, step by step in PyTorch's own operations.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from recurra.compiler.rows import Rows
from recurra.compiler.stages import Compiled


class EagerLoop:
    """One loop. ``needs`` are the values that it takes from outside, ``gives`` those that it hands over."""

    def __init__(self, compiled: Compiled, rows: Mapping[fx.Node, Rows | None]) -> None:
        self.compiled, self.rows = compiled, rows
        self.count = len(compiled.stage.carries)
        self.needs, self.gives = compiled.inputs[self.count :], compiled.outputs[self.count :]

    def forward(self, call: Any, operands: Sequence[Tensor], state: Sequence[Tensor], fresh: Sequence[Tensor]) -> Any:
        """The last state, then the values of all steps."""
        active, resets = _masks(call.active, state), _masks(call.resets, state)
        slices, rest, places = self._operands(call, operands)
        columns = self._columns(call)
        for t in call.steps:
            if resets is not None:
                state = [torch.where(m[t], f, s) for m, f, s in zip(resets, fresh, state, strict=True)]
            results = self.compiled.function(call.B, *state, *slices[t], *rest)
            for at, column in columns.values():
                column[t] = results[at]
            if active is None:
                state = results[: self.count]
            else:
                state = [torch.where(m[t], n, s) for m, n, s in zip(active, results, state, strict=False)]
        return *state, *self._given(columns, places)

    def backward(self, call: Any, operands: Sequence[Tensor], gradient: Sequence[Tensor]) -> Any:
        """Against the order of the steps: the gradient of the first state, of the fresh one, the values of all
        steps."""
        active, resets = _masks(call.active, gradient), _masks(call.resets, gradient)
        zeros = [torch.zeros_like(leaf) for leaf in gradient]
        afresh = list(zeros)
        slices, rest, places = self._operands(call, operands)
        columns = self._columns(call)
        for t in reversed(call.steps):
            # A row that was not active handed its state on untouched.
            new = gradient
            if active is not None:
                new = [torch.where(m[t], g, z) for m, g, z in zip(active, gradient, zeros, strict=True)]
            results = self.compiled.function(call.B, *new, *slices[t], *rest)
            for at, column in columns.values():
                column[t] = results[at]
            if active is None:
                gradient = results[: self.count]
            else:
                gradient = [torch.where(m[t], o, g) for m, o, g in zip(active, results, gradient, strict=False)]
            if resets is not None:
                # A row that began afresh took nothing from the step before.
                afresh = [
                    a + torch.where(m[t], g, z) for a, m, g, z in zip(afresh, resets, gradient, zeros, strict=True)
                ]
                gradient = [torch.where(m[t], z, g) for m, g, z in zip(resets, gradient, zeros, strict=True)]
        begun = [None] * self.count if resets is None else afresh
        return *gradient, *begun, *self._given(columns, places)

    def _operands(
        self, call: Any, operands: Sequence[Tensor]
    ) -> tuple[Sequence[Sequence[Tensor]], Sequence[Tensor], dict[fx.Node, Tensor]]:
        """The slices of each step, what is the same at all of them, and memory for what is written in its place."""
        compiled, count = self.compiled, len(self.compiled.slices)
        columns = [
            steps(value, self._rows(node), call.T) for node, value in zip(compiled.slices, operands, strict=False)
        ]
        places = {}
        for node in compiled.placed:
            like = node.meta["val"]
            size = call.B * self._rows(node).factor
            memory = torch.empty((call.T * size, *like.shape[1:]), dtype=like.dtype, device=like.device)
            places[node] = memory
            by_step: Tensor = memory.unflatten(0, (call.T, size))
            columns.append(by_step.unbind(0))
        slices = list(zip(*columns, strict=True)) if columns else [()] * call.T
        return slices, operands[count:], places

    def _columns(self, call: Any) -> dict[fx.Node, tuple[int, list[Any]]]:
        """For each value that is not written in its place: where it is among the results, and room for all steps."""
        return {
            node: (self.count + at, [None] * call.T)
            for at, node in enumerate(self.gives)
            if node not in self.compiled.placed
        }

    def _given(
        self, columns: Mapping[fx.Node, tuple[int, list[Any]]], places: Mapping[fx.Node, Tensor]
    ) -> list[Tensor]:
        return [places[n] if n in places else joined(columns[n][1], self._rows(n)) for n in self.gives]

    def _rows(self, node: fx.Node) -> Rows:
        rows = self.rows[node]
        assert rows is not None
        return rows


def steps(value: Tensor, rows: Rows, T: int) -> Sequence[Tensor]:
    """The value of each step, of that of all steps."""
    parts = rows.by_step(value, T)
    if rows.apart == 1:
        return parts.squeeze(rows.axis).unbind(rows.axis)
    return [step.flatten(rows.axis, rows.axis + 1) for step in parts.unbind(rows.axis + 1)]


def joined(column: Sequence[Tensor], rows: Rows) -> Tensor:
    """The value of all steps, of that of each."""
    if rows.apart == 1:
        return torch.cat(list(column), rows.axis)
    parts = [value.unflatten(rows.axis, (rows.apart, value.shape[rows.axis] // rows.apart)) for value in column]
    return torch.cat(parts, rows.axis + 1).flatten(rows.axis, rows.axis + 1)


def _masks(mask: Tensor | None, state: Sequence[Tensor]) -> list[Sequence[Tensor]] | None:
    """For each leaf, the mask (T, B) of each step in the leaf's number of axes."""
    if mask is None:
        return None
    return [mask.view(*mask.shape, *[1] * (leaf.dim() - 1)).unbind(0) for leaf in state]
