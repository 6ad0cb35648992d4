"""Small modules in float64, to be seen as a part of PyTorch.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import torch

from recurra import Recurrent, cells

T, B, I, H = 7, 5, 3, 4
TRACED = ["auto", "hoisted"]


def make(backend="auto", cell=cells.LSTM):
    torch.manual_seed(1)
    return Recurrent(cell(I, H), backend=backend).double()


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
