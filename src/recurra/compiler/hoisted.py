"""The hoisted loop: the carry's part of a step, step by step, and all the rest in large batched operations.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from recurra.compiler.plan import Plan
from recurra.compiler.schedule import BATCHED, LOOP, ONCE, SUMMED
from recurra.compiler.stages import ROWS, Compiled, Run, Values


@dataclass(frozen=True)
class Call:
    """One run of a plan: its sizes, which rows are active at which step, where rows begin afresh, the direction.

    The forward pass leaves the values of the plan's taps (T * B, ...) in ``taps``.
    """

    plan: Plan
    T: int
    B: int
    active: Tensor | None
    resets: Tensor | None
    reverse: bool
    again: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    lengths: Tensor | None = None
    taps: dict[str, Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> range:
        return range(self.T - 1, -1, -1) if self.reverse else range(self.T)

    def part(self, span: slice) -> Call:
        """The same run over some of its steps only."""

        def cut(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else mask[span]

        steps = span.stop - span.start
        lengths = None if self.lengths is None else (self.lengths - span.start).clamp(0, steps)
        return replace(self, T=steps, active=cut(self.active), resets=cut(self.resets), lengths=lengths, taps={})

    @cached_property
    def filled(self) -> tuple[Tensor, Tensor]:
        """The places (T * B) of steps that a row does not take, and for each that of the last one it does, or of the
        first step where it takes none."""
        assert self.lengths is not None
        lengths = self.lengths.clamp(min=1)
        places = (torch.arange(self.T)[:, None] >= lengths).flatten().nonzero()[:, 0]
        row = places % self.B
        return places, (lengths[row] - 1) * self.B + row

    def first_reset(self) -> Tensor:
        """(B,): whether a row starts afresh before the first of its steps."""
        assert self.resets is not None
        if not self.reverse or self.lengths is None:
            return self.resets[self.steps[0]]
        last = (self.lengths - 1).clamp(min=0)
        return self.resets.gather(0, last[None])[0]


def forward(call: Call, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y (T * B, O), the final leaves, and what the backward pass takes."""
    plan, step = call.plan, call.plan.step
    x, inputs, state, fresh = _sort(plan, tensors)
    values = _given(call, x, inputs)
    finals = list(state)
    with _no_autocast(x):
        for compiled, forget in zip(plan.ahead.stages, plan.ahead.forget, strict=True):
            if compiled.native is not None:
                compiled.native.forward(call, values, finals, fresh)
            elif compiled.stage.kind == LOOP:
                _loop_forward(call, compiled, values, finals, fresh)
            else:
                _stage(call, compiled, values)
            values.drop(forget)
        y = values.batched(step.y)
        call.taps.update({name: values.batched(node) for name, node in step.taps.items()})
        return y, finals, [values.get(node) for node in plan.saved]


def backward(
    call: Call,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of each of ``tensors``, None where none is wanted or it is zero."""
    plan, step = call.plan, call.plan.step
    x, inputs, _, _ = _sort(plan, tensors)
    values = _given(call, x, inputs)
    for node, tensor in zip(plan.saved, saved, strict=True):
        values.put(node, ROWS if node in plan.analysis.varying else ONCE, tensor)
    if step.y_gradient is not None:
        values.put(step.y_gradient, ROWS, gradients[0])
    carried = [gradients[1 + k] for k in plan.differentiated]
    begun: list[Tensor | None] = [None] * len(carried)
    with _no_autocast(x):
        for compiled, forget in zip(plan.back.stages, plan.back.forget, strict=True):
            if compiled.native is not None:
                compiled.native.backward(call, values, carried, begun)
            elif compiled.stage.kind == LOOP:
                _loop_backward(call, compiled, values, carried, begun)
            else:
                _stage(call, compiled, values)
            values.drop(forget)
        found: dict[fx.Node, Tensor] = {}
        for node, gradient in plan.wanted.items():
            found[node] = values.batched(gradient) if node is step.x else values.total(gradient)
    first: list[Tensor | None] = [None] * (2 * len(step.old))
    for place, k in enumerate(plan.differentiated):
        if k in plan.first:
            first[k], first[len(step.old) + k] = carried[place], begun[place]
    gradient_x = found.get(step.x)
    results = [
        None if gradient_x is None else gradient_x.view(x.shape),
        *(found.get(node) for node in plan.analysis.inputs[: len(inputs)]),
        *first,
    ]
    return [result if want else None for result, want in zip(results, wanted, strict=True)]


def _sort(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """x, weights and context, state, fresh state."""
    count = len(plan.step.old)
    ends = len(tensors) - 2 * count
    return tensors[0], tensors[1:ends], tensors[ends : ends + count], tensors[ends + count :]


def _given(call: Call, x: Tensor, inputs: Sequence[Tensor]) -> Values:
    plan = call.plan
    functions = None if plan.backend is None else plan.backend.functions
    values = Values(Run(call.T, call.B), plan.analysis.rows, functions)
    values.put(plan.step.x, ROWS, x.reshape(call.T * call.B, x.shape[2]))
    for node, tensor in zip(plan.analysis.inputs, [*inputs, *plan.step.constants.values()], strict=True):
        values.put(node, ONCE, tensor)
    return values


def _stage(call: Call, compiled: Compiled, values: Values) -> None:
    take = {ONCE: values.get, BATCHED: values.batched, SUMMED: values.total}[compiled.stage.kind]
    size = call.T * call.B if compiled.stage.kind == BATCHED else call.B
    results = compiled.function(size, *(take(node) for node in compiled.inputs))
    for node, result in zip(compiled.outputs, results, strict=True):
        values.put(node, compiled.forms[node], result)


def _loop_forward(
    call: Call, compiled: Compiled, values: Values, finals: list[Tensor], fresh: Sequence[Tensor]
) -> None:
    """Runs the time loop of a component. ``finals`` holds its first state, then its last."""
    numbers = compiled.stage.carries
    count = len(numbers)
    state, begin = [finals[k] for k in numbers], [fresh[k] for k in numbers]
    active, resets = _masks(call.active, state), _masks(call.resets, state)
    slices, rest = _operands(call, compiled, values)
    kept = _columns(call, compiled)
    for t in call.steps:
        if resets is not None:
            state = [torch.where(m[t], f, s) for m, f, s in zip(resets, begin, state, strict=True)]
        results = compiled.function(call.B, *state, *slices[t], *rest)
        for at, column in kept.values():
            column[t] = results[at]
        if active is None:
            state = results[:count]
        else:
            state = [torch.where(m[t], n, s) for m, n, s in zip(active, results, state, strict=False)]
    for k, leaf in zip(numbers, state, strict=True):
        finals[k] = leaf
    values.join(list(kept), [column for _, column in kept.values()])


def _loop_backward(
    call: Call, compiled: Compiled, values: Values, carried: list[Tensor], begun: list[Tensor | None]
) -> None:
    """Runs the backward loop of a component, against the order of its steps.

    ``carried`` holds the gradient of the last state, then that of the first; ``begun`` gets that of the fresh one.
    """
    numbers = compiled.stage.carries
    count = len(numbers)
    gradient = [carried[k] for k in numbers]
    active, resets = _masks(call.active, gradient), _masks(call.resets, gradient)
    zeros = [torch.zeros_like(leaf) for leaf in gradient]
    afresh = list(zeros)
    slices, rest = _operands(call, compiled, values)
    kept = _columns(call, compiled)
    for t in reversed(call.steps):
        # A row that was not active handed its state on untouched.
        new = gradient
        if active is not None:
            new = [torch.where(m[t], g, z) for m, g, z in zip(active, gradient, zeros, strict=True)]
        results = compiled.function(call.B, *new, *slices[t], *rest)
        for at, column in kept.values():
            column[t] = results[at]
        if active is None:
            gradient = results[:count]
        else:
            gradient = [torch.where(m[t], o, g) for m, o, g in zip(active, results, gradient, strict=False)]
        if resets is not None:
            # A row that began afresh took nothing from the step before.
            afresh = [a + torch.where(m[t], g, z) for a, m, g, z in zip(afresh, resets, gradient, zeros, strict=True)]
            gradient = [torch.where(m[t], z, g) for m, g, z in zip(resets, gradient, zeros, strict=True)]
    for k, leaf, start in zip(numbers, gradient, afresh, strict=True):
        carried[k], begun[k] = leaf, None if resets is None else start
    values.join(list(kept), [column for _, column in kept.values()])


def _operands(call: Call, compiled: Compiled, values: Values) -> tuple[Sequence[Sequence[Tensor]], list[Tensor]]:
    """What a loop takes from outside: the slices of each step, and what is the same at all of them."""
    count = len(compiled.stage.carries)
    columns = [values.steps(node) for node in compiled.slices] + [values.place(node) for node in compiled.placed]
    slices = list(zip(*columns, strict=True)) if columns else [()] * call.T
    return slices, [values.get(node) for node in compiled.inputs[count + len(compiled.slices) :]]


def _columns(call: Call, compiled: Compiled) -> dict[fx.Node, tuple[int, list[Any]]]:
    """For each value that a loop must hand over from every step: where it is among the results, and room for all."""
    return {
        node: (at, [None] * call.T)
        for at, node in enumerate(compiled.outputs)
        if at >= len(compiled.stage.carries) and node not in compiled.placed
    }


def _masks(mask: Tensor | None, state: Sequence[Tensor]) -> list[Sequence[Tensor]] | None:
    """For each leaf, the mask (T, B) of each step in the leaf's number of axes."""
    if mask is None:
        return None
    return [mask.view(*mask.shape, *[1] * (leaf.dim() - 1)).unbind(0) for leaf in state]


@contextmanager
def _no_autocast(x: Tensor) -> Iterator[None]:
    """Casts are in the graph already."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        yield
    else:
        with torch.autocast(kind, enabled=False):
            yield
