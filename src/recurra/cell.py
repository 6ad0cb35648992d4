"""A cell: one step of a recurrence, and the few verbs its carried state needs.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from recurra.errors import ShapeError
from recurra.taps import recording

# A tensor whose first axis is the batch, or a tuple or named tuple of such states.
State: TypeAlias = Any


class Cell(nn.Module):
    """One step of a recurrence: ``h_t, y_t  from  h_{t-1}, x_t``.

    A cell of your own subclasses this and writes ``initial_state`` and ``step``, nothing else::

        class Leaky(Cell):
            def __init__(self, input_size, hidden_size):
                super().__init__()
                self.input_size, self.output_size = input_size, hidden_size
                self.inward = nn.Linear(input_size, hidden_size)

            def initial_state(self, batch_size):
                return self.zeros(batch_size, self.output_size)

            def step(self, state, x, context=None):
                h = 0.9 * state + 0.1 * torch.tanh(self.inward(x))
                return h, h

    ``step`` is a pure function of its arguments and the cell's parameters; it changes nothing in place.
    ``input_size`` and ``output_size`` are asked for only by what must know them: stacks, masks and heads.
    """

    input_size: int
    output_size: int
    __call__: Callable[..., tuple[State, Tensor]]

    def initial_state(self, batch_size: int) -> State:
        """The state before the first step: tensors with the batch as first axis, (B, D) or (B, ..., D)."""
        raise NotImplementedError(f"{type(self).__name__} has no initial_state(self, batch_size): write it")

    def step(self, state: State, x: Tensor, context: Any = None) -> tuple[State, Tensor]:
        """One step. x (B, I) -> (new state, of the same structure as the old; y (B, O)).

        ``context`` is what stays the same over the sequence (see ``draw_context``).
        """
        raise NotImplementedError(f"{type(self).__name__} has no step(self, state, x, context=None): write it")

    def draw_context(self, batch_size: int, context: Any = None) -> Any:
        """What every step of one sequence shares, drawn once before its first step.

        A plain cell hands on what the caller gave. A wrapper adds its own part: a mask, dropped weights.
        """
        return context

    def forward(self, state: State, x: Tensor, context: Any = None) -> tuple[State, Tensor]:
        # The loop calls the module, so PyTorch's hooks see every step of every nested cell.
        record = recording()
        if record is None:
            return self.step(state, x, context)
        with record.inside(self, x):
            return self.step(state, x, context)

    def zeros(self, batch_size: int, *sizes: int) -> Tensor:
        """Zeros (B, *sizes) in the dtype and on the device of the cell's first floating-point parameter."""
        # Its own parameters come first; by name they are found sooner.
        for own in self._parameters.values():
            if own is not None and own.is_floating_point():
                return own.new_zeros(batch_size, *sizes)
        for tensor in chain(self.parameters(), self.buffers()):
            if tensor.is_floating_point():
                return tensor.new_zeros(batch_size, *sizes)
        return torch.zeros(batch_size, *sizes)


def leaves(state: State) -> list[Tensor]:
    """The tensors of a state, in order."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, tuple):
        return [leaf for part in state for leaf in leaves(part)]
    raise ShapeError(
        f"a state is a tensor or a tuple of states, got {type(state).__name__}: return tensors from the step"
    )


def map_state(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """``function`` of each leaf of ``state`` and the leaves at its place in ``others``, in the same structure."""
    if isinstance(state, Tensor) and all(isinstance(other, Tensor) for other in others):
        return function(state, *others)
    for other in others:
        if not (isinstance(state, tuple) and isinstance(other, tuple) and len(state) == len(other)):
            raise ShapeError(
                f"two states differ in structure: {describe(state)} and {describe(other)}; "
                "a step returns a state of the structure that initial_state gave"
            )
    parts = [map_state(function, *pieces) for pieces in zip(state, *others, strict=True)]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def detach(state: State) -> State:
    """The same numbers, cut off from the graph that made them: the seam of truncated backpropagation."""
    return map_state(Tensor.detach, state)


def select_rows(state: State, rows: Tensor) -> State:
    """The rows of a batch named by ``rows`` (int64 indices or a (B,) bool mask), in every leaf."""
    return map_state(lambda leaf: leaf[rows], state)


def where_rows(mask: Tensor, state: State, other: State) -> State:
    """Row by row ``state`` where mask (B,) holds, else ``other``."""

    def choose(leaf: Tensor, alternative: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (leaf.dim() - 1)), leaf, alternative)

    return map_state(choose, state, other)


def to_flat(state: State) -> Tensor:
    """A state as one tensor (B, D): each leaf flattened behind the batch axis, side by side."""
    return torch.cat([leaf.reshape(leaf.shape[0], leaf.shape[1:].numel()) for leaf in leaves(state)], dim=1)


def from_flat(flat: Tensor, like: State) -> State:
    """The inverse of ``to_flat``: flat (B, D) cut into the structure, sizes and dtypes of ``like``."""
    sizes = [leaf.shape[1:].numel() for leaf in leaves(like)]
    if flat.dim() != 2 or flat.shape[1] != sum(sizes):
        raise ShapeError(f"expected a flat state (B, {sum(sizes)}), got {tuple(flat.shape)}")
    pieces = iter(flat.split(sizes, dim=1))
    return map_state(lambda leaf: next(pieces).reshape(len(flat), *leaf.shape[1:]).to(leaf.dtype), like)


def describe(state: State) -> str:
    """The structure and sizes of a state, for people: ``LSTMState(h=(5, 8), c=(5, 8))``."""
    if isinstance(state, Tensor):
        return str(tuple(state.shape))
    if not isinstance(state, tuple):
        return type(state).__name__
    names = getattr(state, "_fields", None)
    parts = [describe(part) for part in state]
    if names is None:
        return "(" + ", ".join(parts) + ("," if len(parts) == 1 else "") + ")"
    return f"{type(state).__name__}({', '.join(f'{n}={p}' for n, p in zip(names, parts, strict=True))})"
