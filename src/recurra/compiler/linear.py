"""Whether the loop of a carry is a linear recurrence, which a scan can run.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

_aten = torch.ops.aten
_Depends = Callable[[Any], bool]


def _first_only(depends: _Depends, first: Any, *rest: Any) -> bool:
    return not any(map(depends, rest))


def _not_both(depends: _Depends, a: Any, b: Any) -> bool:
    return not (depends(a) and depends(b))


# Whether a result is still linear in the carry, of operations on whole rows that work feature by feature.
_RULES: dict[Any, Callable[..., bool]] = {
    _aten.add: lambda depends, *operands: True,
    _aten.sub: lambda depends, *operands: True,
    _aten.rsub: lambda depends, *operands: True,
    _aten.neg: lambda depends, x: True,
    _aten.mul: _not_both,
    _aten.div: _first_only,
    _aten.where: lambda depends, condition, a, b: not depends(condition),
    _aten.lerp: lambda depends, a, b, weight: not depends(weight),
    _aten.addcmul: lambda depends, x, a, b: _not_both(depends, a, b),
    _aten.addcdiv: lambda depends, x, a, b: not depends(b),
    _aten.tanh_backward: _first_only,
    _aten.sigmoid_backward: _first_only,
    _aten.threshold_backward: _first_only,
} | dict.fromkeys(
    (
        *(_aten.view, _aten._unsafe_view, _aten.reshape, _aten.unsqueeze, _aten.squeeze),
        *(_aten.clone, _aten.alias, _aten.detach, _aten._to_copy),
    ),
    lambda depends, x, *shape: True,
)


def is_linear_recurrence(old: fx.Node, new: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    """Whether ``new = a * old + b``, feature by feature, with a and b that do not depend on ``old``.

    ``nodes`` are those between the two, in order.
    """
    depends = {old}

    def on_old(operand: Any) -> bool:
        return isinstance(operand, fx.Node) and operand in depends

    for node in nodes:
        if depends.isdisjoint(node.all_input_nodes):
            continue
        rule = _RULES.get(node.target.overloadpacket) if isinstance(node.target, OpOverload) else None
        if rule is None or not rule(on_old, *node.args):
            return False
        depends.add(node)
    return new is not old and new in depends
