"""Packing by numpy: the oracle of the native one.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import numpy as np

from recurra.compiler.llvm.kernel import Kernel


def packed(kernel: Kernel, matrices: list[np.ndarray]) -> np.ndarray:
    """All panels, flat."""
    lanes, nodes = kernel.layout.lanes, kernel.program.nodes
    panels = []
    for sweep in kernel.layout.sweeps:
        for group in sweep.groups:
            columns = []
            for place in group.products:
                node = nodes[place]
                matrix = matrices[node.index].T if node.transposed else matrices[node.index]
                matrix = matrix[node.top : node.top + group.length, node.start : node.start + node.width]
                whole = np.zeros((group.length, sweep.vectors * lanes), kernel.dtype)
                whole[:, : node.width] = matrix
                columns.append(whole.reshape(group.length, sweep.vectors, lanes))
            every = np.stack(columns, axis=1)
            for first in range(0, sweep.vectors, sweep.stride):
                panels.append(every[:, :, first : first + sweep.stride].ravel())
    return np.concatenate(panels) if panels else np.empty(0, kernel.dtype)
