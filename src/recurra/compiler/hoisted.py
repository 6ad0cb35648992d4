"""A run of a plan: the carry's part of a step, step by step, and all the rest in large batched operations.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from recurra.compiler.block import Block
from recurra.compiler.plan import Plan


@dataclass
class Call:
    """One run of a plan: its sizes, which rows are active at which step, where rows begin afresh, the direction.

    The forward pass leaves the values of the plan's taps (T, B, ...) in ``taps``. Where ``together``, what it keeps
    for the backward pass may lie in one tensor, and ``block`` then says where in it. ``alone`` says whether the results
    share their memory with nothing else.
    """

    plan: Plan
    T: int
    B: int
    active: Tensor | None
    resets: Tensor | None
    reverse: bool
    again: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    lengths: Tensor | None = None
    together: bool = False
    taps: dict[str, Tensor] = field(default_factory=dict)
    block: Block | None = None
    alone: bool = False

    @property
    def steps(self) -> range:
        return range(self.T - 1, -1, -1) if self.reverse else range(self.T)

    def part(self, span: slice) -> Call:
        """The same run over some of its steps only."""

        def cut(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else mask[span]

        steps = span.stop - span.start
        lengths = None if self.lengths is None else (self.lengths - span.start).clamp(0, steps)
        return replace(
            self, T=steps, active=cut(self.active), resets=cut(self.resets), lengths=lengths, taps={}, block=None
        )

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
    """y (T, B, O), the final leaves, and what the backward pass takes."""
    plan, step, x = call.plan, call.plan.step, tensors[0]
    count = len(tensors) - 2 * len(step.old)
    given = [*tensors[:count], *step.constants.values(), *tensors[count:]]
    results = _run(plan.ahead.whole.function, x, call, *given)
    finals = 1 + len(step.taps)
    saved = finals + len(step.old)
    if step.taps:
        call.taps.update(zip(step.taps, results[1:finals], strict=True))
    return results[0], list(results[finals:saved]), [value for value in results[saved:] if value is not None]


def backward(
    call: Call,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of each of ``tensors``, None where none is wanted or it is zero; so may those of the results be."""
    plan, step, x = call.plan, call.plan.step, tensors[0]
    old = len(step.old)
    count = len(tensors) - 2 * old
    kept = saved if call.block is None else call.block.gather(saved, len(plan.saved))
    given: list[Any] = [*tensors[:count], *step.constants.values(), *kept]
    if step.y_gradient is not None:
        like = step.y_gradient.meta["val"]
        zeros = None if gradients[0] is not None else x.new_zeros(call.T, call.B, *like.shape[1:], dtype=like.dtype)
        given.append(gradients[0] if zeros is None else zeros)
    for number, k in enumerate(plan.differentiated):
        gradient, begin = gradients[1 + k], tensors[count + k]
        if gradient is not None:
            given.append(gradient)
        else:
            given.append(begin.shape if number in plan.back.whole.zeros else torch.zeros_like(begin))
    found = _run(plan.back.whole.function, x, call, *given)
    results: list[Tensor | None] = [None] * len(tensors)
    for place, gradient in zip(plan.places, found, strict=False):
        results[place] = gradient
    carried, ends = len(plan.wanted), len(plan.differentiated)
    for place, k in enumerate(plan.differentiated, carried):
        if k in plan.first:
            results[count + k], results[count + old + k] = found[place], found[place + ends]
    return [result if want else None for result, want in zip(results, wanted, strict=True)]


def _run(function: Callable[..., tuple[Any, ...]], x: Tensor, *given: Any) -> tuple[Any, ...]:
    """Calls the function of a pass. Casts are in the graph already."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return function(*given)
    with torch.autocast(kind, enabled=False):
        return function(*given)
