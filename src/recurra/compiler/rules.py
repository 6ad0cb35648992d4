"""What PyTorch's operations on whole rows are in the loop IR: products, pieces of a row, reductions.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from recurra.compiler.build import Value
from recurra.compiler.features import Groups, known, refusal
from recurra.compiler.ir import Op
from recurra.compiler.operations import where

if TYPE_CHECKING:
    from recurra.compiler.lower import Lowering

_aten = torch.ops.aten
# A choice among more features than these is not made one by one.
_CHOICES = 256


def _mm(to: Lowering, node: fx.Node, a: fx.Node, m: fx.Node) -> Value:
    return to.product(node, a, m)


def _addmm(
    to: Lowering, node: fx.Node, c: fx.Node, a: fx.Node, m: fx.Node, *, beta: float = 1, alpha: float = 1
) -> Value:
    return to.of_float(to.spread(c, to.shape(node))) * float(beta) + to.product(node, a, m) * float(alpha)


def _copy(to: Lowering, node: fx.Node, into: fx.Node, x: fx.Node, blocking: bool = False) -> Value:
    return to.spread(x, to.shape(into))


def _empty(to: Lowering, node: fx.Node, *like: Any, **kinds: Any) -> Value:
    # Whatever it held is written over.
    return to.b.constant(0.0)


# Indices that are known


def _index(to: Lowering, node: fx.Node, x: fx.Node, indices: Any) -> Value | tuple[Value, ...]:
    _expect_known(node, [indices] if isinstance(indices, fx.Node) else indices)
    return to.moved(node)


def _index_select(to: Lowering, node: fx.Node, x: fx.Node, axis: int, indices: fx.Node) -> Value | tuple[Value, ...]:
    return _index(to, node, x, indices)


def _index_put(
    to: Lowering, node: fx.Node, x: fx.Node, indices: Any, values: fx.Node, accumulate: bool = False
) -> Value | tuple[Value, ...]:
    _expect_known(node, indices)
    if not accumulate:
        return to.moved(node)
    places = to.numbers(x)[tuple(slice(None) if each is None else known(each) for each in indices)]
    given = to.spread(values, places.shape)
    return to.accumulate(to.number(x), to.b.broadcast(to.of_float(given), places.numel()), places.flatten().tolist())


def _expect_known(node: fx.Node, indices: Sequence[Any]) -> None:
    if any(each is not None and known(each) is None for each in indices):
        raise refusal(node, "the indices are known only when it runs: write them into the step as a list, or slices")


# Indices that are calculated


def _chosen(to: Lowering, node: fx.Node, x: fx.Node, axis: int) -> tuple[Groups, list[Value]]:
    """Of each entry of an axis, where it lies: the groups, and for each entry its number spread over all groups."""
    groups = to.groups(node, x, axis)
    if groups.size > _CHOICES:
        raise refusal(node, f"it chooses among {groups.size} features, at most {_CHOICES} can be chosen from")
    return groups, [to.b.broadcast(to.b.constant(float(k)), groups.count) for k in range(groups.size)]


def _scatter(to: Lowering, node: fx.Node, x: fx.Node, axis: int, index: fx.Node, given: Any) -> Value:
    return _written(to, node, x, axis, index, given, lambda old, new: new)


def _scatter_add(to: Lowering, node: fx.Node, x: fx.Node, axis: int, index: fx.Node, given: Any) -> Value:
    return _written(to, node, x, axis, index, given, lambda old, new: old + new)


def _written(
    to: Lowering, node: fx.Node, x: fx.Node, axis: int, index: fx.Node, given: Any,
    how: Callable[[Value, Value], Value],
) -> Value:  # fmt: skip
    groups, entries = _chosen(to, node, x, axis)
    if to.width(index) != groups.count:
        raise refusal(node, "it writes more than one entry in each place")
    value = to.number(given) if isinstance(given, fx.Node) else to.b.broadcast(to.b.constant(given), groups.count)
    base, at = to.regroup(to.number(x), groups), to.number(index)
    parts = []
    for k, entry in enumerate(entries):
        old = to.part(base, k * groups.count, groups.count)
        parts.append(where(to.b, to.b.apply(Op.EQ, at, entry), how(old, value), old))
    return to.ungroup(to.join(parts), groups)


def _gather(to: Lowering, node: fx.Node, x: fx.Node, axis: int, index: fx.Node, *, sparse_grad: bool = False) -> Value:
    groups, entries = _chosen(to, node, x, axis)
    if to.width(index) != groups.count:
        raise refusal(node, "it takes more than one entry of each place")
    base, at = to.regroup(to.number(x), groups), to.number(index)
    found = to.part(base, 0, groups.count)
    for k, entry in enumerate(entries[1:], start=1):
        part = to.part(base, k * groups.count, groups.count)
        found = where(to.b, to.b.apply(Op.EQ, at, entry), part, found)
    return found


def _largest(to: Lowering, node: fx.Node, x: fx.Node, axis: int, keep: bool = False) -> tuple[Value, ...]:
    """The largest of an axis, and the first index of it; NaN is larger than all."""
    return _extreme(to, node, to.number(x), to.groups(node, x, axis))


def _smallest(to: Lowering, node: fx.Node, x: fx.Node, axis: int, keep: bool = False) -> tuple[Value, ...]:
    value, index = _extreme(to, node, -to.number(x), to.groups(node, x, axis))
    return -value, index


def _argmax(to: Lowering, node: fx.Node, x: fx.Node, axis: int | None = None, keep: bool = False) -> Value:
    return _extreme(to, node, to.number(x), to.groups(node, x, axis))[1]


def _argmin(to: Lowering, node: fx.Node, x: fx.Node, axis: int | None = None, keep: bool = False) -> Value:
    return _extreme(to, node, -to.number(x), to.groups(node, x, axis))[1]


def _extreme(to: Lowering, node: fx.Node, value: Value, groups: Groups) -> tuple[Value, ...]:
    b = to.b
    value = to.regroup(value, groups)
    entries = [b.broadcast(b.constant(float(k)), groups.count) for k in range(groups.size)]

    def meet(low: list[Value], high: list[Value]) -> list[Value]:
        (x, i), (y, j) = low, high
        nan_x, nan_y = b.apply(Op.NE, x, x), b.apply(Op.NE, y, y)
        tie = b.apply(Op.OR, b.apply(Op.EQ, x, y), b.apply(Op.AND, nan_x, nan_y))
        more = b.apply(Op.OR, b.apply(Op.GT, y, x), b.apply(Op.AND, nan_y, b.apply(Op.NOT, nan_x)))
        takes = b.apply(Op.OR, more, b.apply(Op.AND, tie, b.apply(Op.LT, j, i)))
        return [where(b, takes, y, x), where(b, takes, j, i)]

    largest, index = to.fold([value, to.join(entries)], groups.size, meet)
    return largest, index


# Reductions


def _sum(to: Lowering, node: fx.Node, x: fx.Node, axes: Any = None, keep: bool = False, *, dtype: Any = None) -> Value:
    return to.reduce(to.number(x), to.groups(node, x, axes), Op.ADD)


def _prod(to: Lowering, node: fx.Node, x: fx.Node, axis: Any = None, keep: bool = False, *, dtype: Any = None) -> Value:
    return to.reduce(to.number(x), to.groups(node, x, axis), Op.MUL)


def _mean(to: Lowering, node: fx.Node, x: fx.Node, axes: Any = None, keep: bool = False, *, dtype: Any = None) -> Value:
    return to.mean(to.number(x), to.groups(node, x, axes))


def _amax(to: Lowering, node: fx.Node, x: fx.Node, axes: Any = (), keep: bool = False) -> Value:
    groups = to.groups(node, x, list(axes) if isinstance(axes, (list, tuple)) else axes)
    return to.reduce(to.number(x), groups, Op.MAXIMUM)


def _amin(to: Lowering, node: fx.Node, x: fx.Node, axes: Any = (), keep: bool = False) -> Value:
    groups = to.groups(node, x, list(axes) if isinstance(axes, (list, tuple)) else axes)
    return -to.reduce(-to.number(x), groups, Op.MAXIMUM)


def _any(to: Lowering, node: fx.Node, x: fx.Node, axes: Any = None, keep: bool = False) -> Value:
    true = where(to.b, to.value(x), 1.0, 0.0)
    return to.b.apply(Op.NE, to.reduce(true, to.groups(node, x, axes), Op.ADD), 0.0)


def _all(to: Lowering, node: fx.Node, x: fx.Node, axes: Any = None, keep: bool = False) -> Value:
    false = where(to.b, to.value(x), 0.0, 1.0)
    return to.b.apply(Op.EQ, to.reduce(false, to.groups(node, x, axes), Op.ADD), 0.0)


def _var(
    to: Lowering, node: fx.Node, x: fx.Node, axes: Any = None, *, correction: float = 1, keepdim: bool = False
) -> Value:
    value, groups = to.number(x), to.groups(node, x, axes)
    if correction >= groups.size:
        raise refusal(node, "the variance of so few numbers")
    apart = value - to.back(to.mean(value, groups), groups)
    return to.reduce(apart * apart, groups, Op.ADD) * (1.0 / (groups.size - correction))


def _var_mean(
    to: Lowering, node: fx.Node, x: fx.Node, axes: Any = None, *, correction: float = 1, keepdim: bool = False
) -> tuple[Value, ...]:
    return _var(to, node, x, axes, correction=correction), _mean(to, node, x, axes)


def _softmax(to: Lowering, node: fx.Node, x: fx.Node, axis: int, half: bool) -> Value:
    value, groups = to.number(x), to.groups(node, x, axis)
    raised = to.b.apply(Op.EXP, value - to.back(to.reduce(value, groups, Op.MAXIMUM), groups))
    return raised / to.back(to.reduce(raised, groups, Op.ADD), groups)


def _log_softmax(to: Lowering, node: fx.Node, x: fx.Node, axis: int, half: bool) -> Value:
    value, groups = to.number(x), to.groups(node, x, axis)
    apart = value - to.back(to.reduce(value, groups, Op.MAXIMUM), groups)
    total = to.reduce(to.b.apply(Op.EXP, apart), groups, Op.ADD)
    return apart - to.back(to.b.apply(Op.LOG, total), groups)


def _layer_norm(
    to: Lowering, node: fx.Node, x: fx.Node, shape: list[int], weight: Any, bias: Any, eps: float
) -> tuple[Value, ...]:
    value, groups = to.number(x), to.groups(node, x, list(range(-len(shape), 0)))
    mean = to.mean(value, groups)
    apart = value - to.back(mean, groups)
    scale = 1.0 / to.b.apply(Op.SQRT, to.mean(apart * apart, groups) + float(eps))
    result = apart * to.back(scale, groups)
    if weight is not None:
        result = result * to.of_float(to.spread(weight, to.shape(x)))
    if bias is not None:
        result = result + to.of_float(to.spread(bias, to.shape(x)))
    return result, mean, scale


def _group_norm(
    to: Lowering, node: fx.Node, x: fx.Node, weight: Any, bias: Any, B: Any, channels: int, rest: int, count: int,
    eps: float,
) -> tuple[Value, ...]:  # fmt: skip
    value, size = to.number(x), channels * rest // count
    order = torch.arange(count * size).view(count, size)
    groups = Groups(count, size, order.T.flatten().tolist(), (order // size).flatten().tolist(), 1)
    mean = to.mean(value, groups)
    apart = value - to.back(mean, groups)
    scale = 1.0 / to.b.apply(Op.SQRT, to.mean(apart * apart, groups) + float(eps))
    result, by_channel = apart * to.back(scale, groups), [1 + k // rest for k in range(channels * rest)]
    if weight is not None:
        result = result * to.pick([to.number(weight)], by_channel)
    if bias is not None:
        result = result + to.pick([to.number(bias)], by_channel)
    return result, mean, scale


def _cumsum(to: Lowering, node: fx.Node, x: fx.Node, axis: int, *, dtype: Any = None) -> Value:
    return to.scan(to.number(x), to.groups(node, x, axis), Op.ADD)


def _cumprod(to: Lowering, node: fx.Node, x: fx.Node, axis: int, *, dtype: Any = None) -> Value:
    return to.scan(to.number(x), to.groups(node, x, axis), Op.MUL)


def _pad(to: Lowering, node: fx.Node, x: fx.Node, sizes: list[int], value: float = 0.0) -> Value:
    numbers = torch.constant_pad_nd(to.numbers(x, 1), sizes, 0)
    if not numbers.numel():
        raise refusal(node, "nothing is left of its features")
    return to.pick([to.number(x)], numbers.flatten().tolist(), float(value))


# These only move features about.
MOVES = {
    _aten.split, _aten.split_with_sizes, _aten.slice, _aten.select, _aten.expand, _aten.permute, _aten.transpose,
    _aten.t,
}  # fmt: skip
# So do these, but some of them not in whole pieces; or they fill with zeros.
MOVING = {
    _aten.flip, _aten.roll, _aten.repeat, _aten.unfold, _aten.diagonal, _aten.tril, _aten.triu, _aten.cat, _aten.stack,
    _aten.unbind, _aten.movedim, _aten.slice_scatter, _aten.select_scatter, _aten.diagonal_scatter,
    _aten.slice_backward, _aten.select_backward, _aten.diagonal_backward, _aten.as_strided, _aten.as_strided_scatter,
}  # fmt: skip
# Each takes the lowering, the node, and the operation's own arguments.
RULES: dict[Any, Callable[..., Value | tuple[Value, ...]]] = {
    _aten.mm: _mm,
    _aten.bmm: _mm,
    _aten.addmm: _addmm,
    _aten.copy: _copy,
    _aten.new_empty_strided: _empty,
    _aten.index: _index,
    _aten._unsafe_index: _index,
    _aten.index_select: _index_select,
    _aten.index_put: _index_put,
    _aten._unsafe_index_put: _index_put,
    _aten.scatter: _scatter,
    _aten.scatter_add: _scatter_add,
    _aten.gather: _gather,
    _aten.max: _largest,
    _aten.min: _smallest,
    _aten.argmax: _argmax,
    _aten.argmin: _argmin,
    _aten.sum: _sum,
    _aten.prod: _prod,
    _aten.mean: _mean,
    _aten.amax: _amax,
    _aten.amin: _amin,
    _aten.any: _any,
    _aten.all: _all,
    _aten.var: _var,
    _aten.var_mean: _var_mean,
    _aten._softmax: _softmax,
    _aten._log_softmax: _log_softmax,
    _aten.native_layer_norm: _layer_norm,
    _aten.native_group_norm: _group_norm,
    _aten.cumsum: _cumsum,
    _aten.cumprod: _cumprod,
    _aten.constant_pad_nd: _pad,
}
_SORTS = "it sorts features, which the loop IR has no words for; a maximum, softmax or cumsum can be compiled"
# What to do instead of what there is no rule for.
ADVICE: dict[Any, str] = {
    _aten.sort: _SORTS,
    _aten.topk: _SORTS,
    _aten.kthvalue: _SORTS,
    _aten.median: _SORTS,
    _aten.nonzero: "how many features it gives depends on their values",
}
