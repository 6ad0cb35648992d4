"""The backend for this machine's processor.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, fx

from recurra.compiler.join import join
from recurra.compiler.llvm import gemm
from recurra.compiler.lower import lower
from recurra.compiler.native import NativeLoop
from recurra.compiler.rows import Rows
from recurra.compiler.stages import Compiled, Functions
from recurra.errors import BackendError

_aten = torch.ops.aten


class CPU:
    """Makes native code of loops, for this machine's processor; ``rows`` says where the batch lies in every value."""

    functions: Functions = MappingProxyType(
        {_aten.mm.default: gemm.mm, _aten.addmm.default: gemm.addmm, _aten.sum.dim_IntList: gemm.total}
    )

    def __init__(self, rows: Mapping[fx.Node, Rows | None]) -> None:
        self.rows = rows

    def join(
        self, graph: fx.Graph, sums: Callable[..., Tensor], given: Mapping[fx.Node, int], kept: Mapping[int, int]
    ) -> tuple[fx.Graph, frozenset[fx.Node]]:
        return join(graph, sums, given, kept)

    def __call__(self, compiled: Compiled, forms: Mapping[fx.Node, str], free: frozenset[fx.Node]) -> NativeLoop:
        """Raises BackendError, with the operation and the user's line, where the loop cannot be compiled."""
        device = compiled.inputs[0].meta["val"].device
        if device.type != "cpu":
            raise BackendError(f"native code is for the CPU, and the state is on {device}; use backend='hoisted'")
        return NativeLoop(compiled, lower(compiled, self.rows, forms, free), self.rows)
