"""What a step that is to be lowered is taken apart into while it is traced: operations that there are rules for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recurra.compiler.operations import POINTWISE
from recurra.compiler.rules import RULES

Table = dict[Any, Callable[..., Any]]

_aten = torch.ops.aten
# What the core table leaves whole, and no rule is needed for once it is taken apart.
_MORE = [_aten.elu, _aten.leaky_relu, _aten.hardtanh, _aten.linalg_vector_norm]


def decompositions() -> Table:
    """The table with which to trace a step that is to be lowered: all but what there is a rule for is taken apart."""
    core = torch._decomp.core_aten_decompositions()
    table: Table = {**core, **torch._decomp.get_decompositions(_MORE), **needed()}
    # Taken apart, the gradient of an embedding is no sum over the rows any more.
    rules = POINTWISE.keys() | RULES.keys() | {_aten.embedding_dense_backward}
    return {t: how for t, how in table.items() if not {t, getattr(t, "overloadpacket", t)} & rules}


def needed() -> Table:
    """What has to be taken apart for any path: as it is, its gradients take more than a sum over the rows."""
    return {_aten._trilinear.default: _trilinear}


def _trilinear(
    one: Tensor,
    two: Tensor,
    three: Tensor,
    expand_one: Sequence[int],
    expand_two: Sequence[int],
    expand_three: Sequence[int],
    summed: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """The products of three tensors, each with new axes where ``expand`` says, summed over some axes: what
    ``torch.nn.Bilinear`` and its gradients are made of."""
    axes = range(one.dim() + len(expand_one))
    terms: list[Any] = []
    for tensor, expand in ((one, expand_one), (two, expand_two), (three, expand_three)):
        terms += [tensor, [axis for axis in axes if axis not in expand]]
    return torch.einsum(*terms, [axis for axis in axes if axis not in summed])
