"""A module of recurra.nn beside its namesake of torch.nn, and everything about the two that must be equal.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import recurra.nn

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "projected": ("LSTM", {"proj_size": 2}),
    "gru": ("GRU", {}),
}


def pair(kind: str, input_size: int, hidden_size: int, cls: type | None = None, **options: Any):
    """A module of recurra.nn and one of torch.nn with the same float64 weights."""
    name, more = KINDS[kind]
    arguments = {"dtype": torch.float64, **more, **options}
    theirs = getattr(torch.nn, name)(input_size, hidden_size, **arguments)
    ours = (cls or getattr(recurra.nn, name))(input_size, hidden_size, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def a_state(module: torch.nn.RNNBase, *batch: int) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(count, *batch, module.proj_size or module.hidden_size, dtype=torch.float64, requires_grad=True)
    c = torch.randn(count, *batch, module.hidden_size, dtype=torch.float64, requires_grad=True)
    return (h, c) if module.mode == "LSTM" else h


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [tensor for tensor in value if tensor is not None]
    return [tensor for part in value if part is not None for tensor in tensors(part)]


def everything(module: torch.nn.Module, x: Any, hx: Any = None) -> list[Tensor]:
    """Output, final state, and the gradients of a weighted sum of both by input, state and weights."""
    results = [tensor for tensor in tensors(module(x, hx)) if tensor.is_floating_point()]
    generator = torch.Generator().manual_seed(7)
    total = sum((r * torch.randn(r.shape, dtype=torch.float64, generator=generator).to(r)).sum() for r in results)
    source = x.data if isinstance(x, PackedSequence) else x
    sources = [source, *([] if hx is None else tensors(hx)), *module.parameters()]
    return [*results, *torch.autograd.grad(total, [s for s in sources if s.requires_grad])]


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> bool:
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    return all(torch.allclose(a.double(), b, tolerance, tolerance) for a, b in zip(ours, theirs, strict=True))


def numbers(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64, requires_grad=True)


def packed(lengths: list[int], enforce_sorted: bool) -> PackedSequence:
    """Rows (T, 3) of these lengths, whose data asks for its gradient."""
    x = torch.randn(max(lengths), len(lengths), 3, dtype=torch.float64)
    sequence = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)
    sequence.data.requires_grad_()
    return sequence
