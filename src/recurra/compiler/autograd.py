"""The door to PyTorch's autograd: a run over time as one operation with a backward pass of its own.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recurra.compiler import memory
from recurra.compiler.hoisted import Call
from recurra.compiler.pool import POOL


def run(call: Call, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """y (T, B, O) and the leaves of the final state, of ``tensors``, which are x (T, B, I), the weights and the
    context of the plan, the leaves of the state and the leaves of the fresh state."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        results: tuple[Tensor, ...] = _apply(call, *tensors)
        return results
    with torch.no_grad():
        y, finals, _ = memory.forward(call, tensors)
        return (y, *finals) if call.alone else tuple(own([y, *finals], tensors))


class OverTime(torch.autograd.Function):
    """The operation, by the name that PyTorch shows where it names one."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        # A gradient that is zero is None: where nobody needs them, zeros are not made.
        ctx.set_materialize_grads(False)
        y, finals, saved = memory.forward(call, tensors)
        ctx.call, ctx.count = call, len(tensors)
        ctx.save_for_backward(*tensors, *saved)
        results = [y, *finals] if call.alone else own([y, *finals], [*tensors, *saved])
        if not all(call.plan.differentiable):
            flat = zip(results, call.plan.differentiable, strict=True)
            ctx.mark_non_differentiable(*(result for result, differentiable in flat if not differentiable))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # Asked for once: with checkpointing they are calculated anew at each asking.
        kept = ctx.saved_tensors
        tensors, saved = kept[: ctx.count], kept[ctx.count :]
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *again(ctx.call, tensors, wanted, gradients)
        return None, *memory.backward(ctx.call, tensors, saved, gradients, wanted)


# PyTorch's own method has no types.
_apply: Callable[..., tuple[Tensor, ...]] = OverTime.apply


def again(
    call: Call, tensors: Sequence[Tensor], wanted: Sequence[bool], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients through the reference loop, so that they can be differentiated in their turn."""
    # An alias for each, as one tensor may have been given in two places.
    tensors = [t.view_as(t) if w else t for t, w in zip(tensors, wanted, strict=True)]
    results = call.again(tensors)
    pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if r.requires_grad and g is not None]
    ends = [tensor for tensor, w in zip(tensors, wanted, strict=True) if w]
    found = iter(
        torch.autograd.grad([r for r, _ in pairs], ends, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return [next(found) if w else None for w in wanted]


def own(results: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Results that share their memory with nothing else, as their owner may write on them, or keep them for long."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in others}
    own = []
    for result in results:
        storage = result.untyped_storage()
        shared = storage.data_ptr() in taken or storage.nbytes() != result.numel() * result.element_size()
        taken.add(storage.data_ptr())
        own.append(_copy(result) if shared else _no_view(result) if result._is_view() else result)
    return own


def _no_view(tensor: Tensor) -> Tensor:
    """The same numbers by a tensor that is not called a view: on one from a function PyTorch lets nobody write."""
    same: Tensor = torch.ops.aten._unsafe_view.default(tensor, tensor.shape)
    return same


def _copy(tensor: Tensor) -> Tensor:
    if tensor.is_cpu and tensor.dtype in (torch.float32, torch.float64):
        return POOL.empty(tensor.shape, tensor.dtype).copy_(tensor)
    return tensor.clone()
