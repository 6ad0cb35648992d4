"""What an operation of a traced step costs, in FLOPs, at either size of the trace.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from recurra.compiler.lines import name_of
from recurra.compiler.trace import SIZES

_aten = torch.ops.aten
# They say anew how numbers lie in memory, and touch none.
_FREE = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "alias", "detach",
    "split", "split_with_sizes", "unbind", "slice", "select", "as_strided", "diagonal", "unfold", "lift_fresh_copy",
}  # fmt: skip
# They move numbers, or write some that are known.
_MOVES = _FREE | {
    "clone", "_to_copy", "copy", "cat", "stack", "index", "_unsafe_index", "index_select", "gather", "embedding",
    "flip", "roll", "repeat", "slice_backward", "select_backward", "slice_scatter", "select_scatter",
    "constant_pad_nd", "full", "empty", "arange", "eye", "scalar_tensor", "index_put", "scatter", "masked_fill",
    "tril", "triu",
}  # fmt: skip
# A product, and a sum on top of it.
_BIASED = {_aten.addmm, _aten.baddbmm}


def flops(node: fx.Node, size: str) -> int:
    """The FLOPs of a node at the batch of ``node.meta[size]``: "val" or "other"."""
    target = node.target
    if not isinstance(target, OpOverload) or name_of(node) in _MOVES:
        return 0
    packet = target.overloadpacket
    operands = [operand for operand in node.all_input_nodes if isinstance(operand.meta.get(size), Tensor)]
    if packet in (_aten.mv, _aten.dot):
        return 2 * numbers(operands[0], size)
    if packet in flop_registry:

        def value(operand: fx.Node) -> Any:
            if size in operand.meta:
                return operand.meta[size]
            # The size of the batch, or a multiple of it.
            factor: Any = operand.args[1] if operand.args else 1
            return factor * SIZES[size == "other"]

        arguments: Any = fx.node.map_arg(node.args, value)
        named: Any = fx.node.map_arg(node.kwargs, value)
        products = int(flop_registry[packet](*arguments, **named, out_val=node.meta[size]))
        return products + (numbers(node, size) if packet in _BIASED else 0)
    given = numbers(node, size)
    return max(given, numbers(operands[0], size)) if operands and torch.Tag.pointwise not in target.tags else given


def is_free(node: fx.Node) -> bool:
    """Whether a node touches no number."""
    return not isinstance(node.target, OpOverload) or name_of(node) in _FREE


def numbers(node: fx.Node, size: str) -> int:
    """How many numbers a node gives."""
    value = node.meta.get(size)
    parts = value if isinstance(value, (tuple, list)) else [value]
    return sum(part.numel() for part in parts if isinstance(part, Tensor))
