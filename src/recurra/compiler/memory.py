"""What is kept from the forward for the backward pass: every value it takes, only the carried state, or less.

``"store"`` keeps every value that the backward pass takes. ``"recompute"`` keeps the carried state of all steps, from
which all else is calculated again, without a loop, some steps at a time. ``"sqrt"`` keeps the carried state of about
sqrt(T) steps and runs the loop again in between (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost";
Gruslys et al. 2016, "Memory-Efficient Backpropagation Through Time").

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, sqrt

import torch
from torch import Tensor

from recurra.compiler import hoisted
from recurra.compiler.hoisted import Call
from recurra.compiler.plan import Plan
from recurra.compiler.pool import POOL
from recurra.errors import BackendError

# As many rows keep a matrix product busy.
_ROWS = 512


def forward(call: Call, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y (T, B, O), the final leaves, and what the backward pass takes."""
    if call.plan.memory != "sqrt" or not call.plan.saved:
        return hoisted.forward(call, tensors)
    draws = bool(call.plan.analysis.draws)
    if draws and tensors[0].device.type != "cpu":
        raise BackendError("memory='sqrt' draws the same random numbers twice, on the CPU only: use another mode")
    count = 2 * len(call.plan.step.old)
    x, inputs, state, fresh = tensors[0], tensors[1:-count], list(tensors[-count : -count // 2]), tensors[-count // 2 :]
    y, kept = None, []
    for span in parts_of(call.plan, call.T, call.B, call.reverse):
        kept += [torch.get_rng_state() if draws else torch.empty(0), *state]
        part = call.part(span)
        outputs, state, _ = hoisted.forward(part, [x[span], *inputs, *state, *fresh])
        y = _filled(call, y, span, outputs)
        for name, value in part.taps.items():
            call.taps[name] = _filled(call, call.taps.get(name), span, value)
    assert y is not None
    return y, state, kept


def _filled(call: Call, whole: Tensor | None, span: slice, part: Tensor) -> Tensor:
    """The values of all steps (T, B, ...), with those of some steps put in their place."""
    if whole is None:
        whole = part.new_empty(call.T, *part.shape[1:])
    whole[span] = part
    return whole


def backward(
    call: Call,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of each of ``tensors``, None where none is wanted or it is zero; so may those of the results be."""
    plan = call.plan
    if plan.memory == "store":
        return hoisted.backward(call, tensors, saved, gradients, wanted)
    # The parts need less than the whole had.
    POOL.clear()
    count = 2 * len(plan.step.old)
    spans = parts_of(call.plan, call.T, call.B, call.reverse)
    if plan.memory == "recompute":
        if call.block is not None:
            saved = call.block.all(saved, len(plan.saved))

        def recall(number: int, part: Call, given: list[Tensor]) -> list[Tensor]:
            span = spans[number]
            places = [(plan.analysis.rows[node], value) for node, value in zip(plan.saved, saved, strict=True)]
            return [rows.steps(value, span, call.T) for rows, value in places if rows is not None]

    else:
        size = 1 + len(plan.step.old)

        def recall(number: int, part: Call, given: list[Tensor]) -> list[Tensor]:
            random, *state = saved[number * size : (number + 1) * size]
            with torch.random.fork_rng(devices=[]):
                if random.numel():
                    torch.set_rng_state(random)
                return hoisted.forward(part, [*given[:-count], *state, *given[-count // 2 :]])[2]

    return _in_parts(call, spans, recall, tensors, gradients, wanted)


def _in_parts(
    call: Call,
    spans: list[slice],
    recall: Callable[[int, Call, list[Tensor]], list[Tensor]],
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The backward pass, one part of the steps after the other, against their order. ``recall`` gives what the
    forward pass of a part would have kept."""
    count = len(call.plan.step.old)
    x, rest = tensors[0], list(tensors[1:])
    begin = 1 + len(rest) - 2 * count
    carried = list(gradients[1:])
    total: list[Tensor | None] = [None] * len(tensors)
    total[0] = torch.empty_like(x) if wanted[0] else None
    needed = [wanted[0], *wanted[1:begin], *[True] * count, *wanted[begin + count :]]
    for number in reversed(range(len(spans))):
        span, part = spans[number], call.part(spans[number])
        given = [x[span], *rest]
        incoming = [None if gradients[0] is None else gradients[0][span], *carried]
        found = hoisted.backward(part, given, recall(number, part, given), incoming, needed)
        if total[0] is not None:
            total[0][span] = 0 if found[0] is None else found[0]
        carried = [new if new is not None else old for new, old in zip(found[begin:], carried, strict=False)]
        for k in (*range(1, begin), *range(begin + count, len(tensors))):
            if found[k] is not None:
                total[k] = found[k] if total[k] is None else total[k] + found[k]
    total[begin : begin + count] = carried
    return [value if want else None for value, want in zip(total, wanted, strict=True)]


def parts_of(plan: Plan, T: int, B: int, reverse: bool) -> list[slice]:
    """The parts of the steps, in the order in which they are taken."""
    steps = ceil(sqrt(T))
    if plan.memory == "recompute":
        steps = max(steps, ceil(_ROWS / max(1, B)))
    parts = [slice(start, min(start + steps, T)) for start in range(0, T, steps)]
    return parts[::-1] if reverse else parts
