"""What PyTorch's operations on whole rows are in the loop IR: products, pieces of a row, reductions.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from recurra.compiler.build import Value
from recurra.compiler.ir import Op
from recurra.compiler.lines import at_line
from recurra.errors import BackendError

if TYPE_CHECKING:
    from recurra.compiler.lower import Lowering

_aten = torch.ops.aten


def refusal(node: fx.Node, why: str) -> BackendError:
    return BackendError(f"the time loop cannot be compiled at {at_line(node)}: {why}; use backend='hoisted'")


def _mm(to: Lowering, node: fx.Node, a: fx.Node, m: fx.Node) -> Value:
    return to.product(node, a, m)


def _addmm(
    to: Lowering, node: fx.Node, c: fx.Node, a: fx.Node, m: fx.Node, *, beta: float = 1, alpha: float = 1
) -> Value:
    return to.number(c) * float(beta) + to.product(node, a, m) * float(alpha)


def _split(to: Lowering, node: fx.Node, x: fx.Node, size: int | list[int], axis: int = 0) -> tuple[Value, ...]:
    whole = x.meta["val"].shape[axis]
    sizes = [min(size, whole - at) for at in range(0, whole, size)] if isinstance(size, int) else size
    return tuple(to.cut(x, node, axis, sum(sizes[:k]), part) for k, part in enumerate(sizes))


def _slice(
    to: Lowering, node: fx.Node, x: fx.Node, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> Value:
    if x.meta["val"].shape == node.meta["val"].shape:
        return to.value(x)
    return to.cut(x, node, axis, *_range(node, x.meta["val"].shape[axis], start, stop, step))


def _range(node: fx.Node, whole: int, start: Any, stop: Any, step: int) -> tuple[int, int]:
    if step != 1 or isinstance(start, fx.Node) or isinstance(stop, fx.Node):
        raise refusal(node, "it takes features that are no neighbours, or as many as there are rows")
    begin, end, _ = slice(start, stop).indices(whole)
    return begin, end - begin


def _select(to: Lowering, node: fx.Node, x: fx.Node, axis: int, at: int) -> Value:
    return to.cut(x, node, axis, at % x.meta["val"].shape[axis], 1)


def _slice_scatter(
    to: Lowering, node: fx.Node, x: fx.Node, part: fx.Node, axis: int = 0, start: Any = None, stop: Any = None,
    step: int = 1,
) -> Value:  # fmt: skip
    if x.meta["val"].shape == part.meta["val"].shape:
        return to.value(part)
    begin, _ = _range(node, x.meta["val"].shape[axis], start, stop, step)
    return to.paste(to.value(x), to.value(part), node, axis, begin)


def _select_scatter(to: Lowering, node: fx.Node, x: fx.Node, part: fx.Node, axis: int, at: int) -> Value:
    return to.paste(to.value(x), to.value(part), node, axis, at % x.meta["val"].shape[axis])


def _slice_backward(
    to: Lowering, node: fx.Node, part: fx.Node, _: Any, axis: int, start: Any, stop: Any, step: int
) -> Value:
    if part.meta["val"].shape == node.meta["val"].shape:
        return to.value(part)
    begin, _ = _range(node, node.meta["val"].shape[axis], start, stop, step)
    return to.paste(to.b.broadcast(to.b.constant(0.0), to.width(node)), to.number(part), node, axis, begin)


def _select_backward(to: Lowering, node: fx.Node, part: fx.Node, _: Any, axis: int, at: int) -> Value:
    zeros = to.b.broadcast(to.b.constant(0.0), to.width(node))
    return to.paste(zeros, to.number(part), node, axis, at % node.meta["val"].shape[axis])


def _cat(to: Lowering, node: fx.Node, parts: Sequence[fx.Node], axis: int = 0) -> Value:
    to.inner(node, node, axis)
    return to.b.concat([to.value(part) for part in parts])


def _sum(to: Lowering, node: fx.Node, x: fx.Node, axes: Any = None, keep: bool = False, *, dtype: Any = None) -> Value:
    return to.b.sum(to.number(x)) if to.over_features(node, x, axes) else to.number(x)


def _mean(to: Lowering, node: fx.Node, x: fx.Node, axes: Any = None, keep: bool = False, *, dtype: Any = None) -> Value:
    return to.b.mean(to.number(x)) if to.over_features(node, x, axes) else to.number(x)


def _amax(to: Lowering, node: fx.Node, x: fx.Node, axes: Any = (), keep: bool = False) -> Value:
    return to.b.max(to.number(x)) if to.over_features(node, x, list(axes)) else to.number(x)


def _amin(to: Lowering, node: fx.Node, x: fx.Node, axes: Any = (), keep: bool = False) -> Value:
    return -to.b.max(-to.number(x)) if to.over_features(node, x, list(axes)) else to.number(x)


def _var(
    to: Lowering, node: fx.Node, x: fx.Node, axes: Any = None, *, correction: float = 1, keepdim: bool = False
) -> Value:
    value = to.number(x)
    if not to.over_features(node, x, axes) or correction >= value.width:
        raise refusal(node, "the variance of so few numbers")
    apart = value - to.b.mean(value)
    return to.b.sum(apart * apart) * (1.0 / (value.width - correction))


def _softmax(to: Lowering, node: fx.Node, x: fx.Node, axis: int, half: bool) -> Value:
    value = to.number(x)
    if not to.over_features(node, x, axis):
        return value - value + 1.0
    raised = to.b.apply(Op.EXP, value - to.b.max(value))
    return raised / to.b.sum(raised)


def _log_softmax(to: Lowering, node: fx.Node, x: fx.Node, axis: int, half: bool) -> Value:
    value = to.number(x)
    if not to.over_features(node, x, axis):
        return value - value
    apart = value - to.b.max(value)
    return apart - to.b.apply(Op.LOG, to.b.sum(to.b.apply(Op.EXP, apart)))


def _layer_norm(
    to: Lowering, node: fx.Node, x: fx.Node, shape: list[int], weight: Any, bias: Any, eps: float
) -> tuple[Value, ...]:
    value = to.number(x)
    if prod(shape) != value.width:
        raise refusal(node, "it normalises over other axes than the features")
    mean = to.b.mean(value)
    apart = value - mean
    scale = 1.0 / to.b.apply(Op.SQRT, to.b.mean(apart * apart) + float(eps))
    result = apart * scale
    if weight is not None:
        result = result * to.number(weight)
    return (result if bias is None else result + to.number(bias)), mean, scale


# Each takes the lowering, the node, and the operation's own arguments.
RULES: dict[Any, Callable[..., Value | tuple[Value, ...]]] = {
    _aten.mm: _mm,
    _aten.bmm: _mm,
    _aten.addmm: _addmm,
    _aten.split: _split,
    _aten.split_with_sizes: _split,
    _aten.slice: _slice,
    _aten.select: _select,
    _aten.slice_scatter: _slice_scatter,
    _aten.select_scatter: _select_scatter,
    _aten.slice_backward: _slice_backward,
    _aten.select_backward: _select_backward,
    _aten.cat: _cat,
    _aten.sum: _sum,
    _aten.mean: _mean,
    _aten.amax: _amax,
    _aten.amin: _amin,
    _aten.var: _var,
    _aten._softmax: _softmax,
    _aten._log_softmax: _log_softmax,
    _aten.native_layer_norm: _layer_norm,
}
