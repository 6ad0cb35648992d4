"""A cell live: one input at a time, its state kept between them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recurra.cell import Cell, State, leaves, map_state, where_rows
from recurra.errors import BackendError, ShapeError
from recurra.unroll import Recurrent, _check_state, loop


class Stream:
    """A cell, or the cell of a forward ``Recurrent``, run one input at a time::

        stream = Stream(cell.eval(), batch_size=2)
        y = stream.push(x)          # x (2, I) -> y (2, O)
        kept = stream.snapshot()    # a state is a value: save it, go on, come back
        stream.restore(kept)
        stream.reset([1])           # row 1 starts afresh, row 0 goes on

    The rows are separate streams side by side; none sees another. A sequence pushed step by step gives what
    ``Recurrent`` gives on all of it. Nothing here is differentiated; a snapshot may enter a graph elsewhere.
    Whatever raises leaves the state as it was.
    ``context`` goes to ``cell.draw_context`` once, here; after a change of the weights make a new Stream.

    Raises BackendError for a reversed recurrence, and for a cell in training mode, whose masks belong to one
    sequence and would stay the same for ever; ShapeError for what is no cell, and for a negative batch size.
    """

    def __init__(self, cell: Cell | Recurrent, batch_size: int = 1, context: Any = None) -> None:
        if isinstance(cell, Recurrent):
            if cell.reverse:
                raise BackendError(
                    "a reversed Recurrent begins at the last input, which is still to come: use reverse=False"
                )
            cell = cell.cell
        if not isinstance(cell, Cell):
            raise ShapeError(f"Stream takes a recurra.Cell or a Recurrent, got {type(cell).__name__}")
        if batch_size < 0:
            raise ShapeError(f"expected a batch_size of at least 0, got {batch_size}")
        self.cell = cell
        self.batch_size = batch_size
        self._check_mode()
        with torch.no_grad():
            self._context = cell.draw_context(batch_size, context)
        self._state = self._fresh()

    @property
    def state(self) -> State:
        """The state after the last push. It is read, not written: ``restore`` sets it."""
        return self._state

    def push(self, x: Tensor) -> Tensor:
        """One step of every row. x (B, I) -> y (B, O); with a batch size of 1 also x (I,) -> y (O,).

        Raises ShapeError for an x that does not fit, BackendError for a cell that is in training mode again.
        """
        self._check_mode()
        single = x.dim() == 1 and self.batch_size == 1
        rows = x[None] if single else x
        size = getattr(self.cell, "input_size", None)
        if rows.dim() != 2 or rows.shape[0] != self.batch_size or size not in (None, rows.shape[1]):
            wanted = f"({self.batch_size}, {size or 'I'})"
            raise ShapeError(f"expected x {wanted}, a row for each stream, got {tuple(x.shape)}")
        with torch.no_grad():
            y, self._state = loop(self.cell, rows[None], self._state, self._context)
        return y[0, 0] if single else y[0]

    def reset(self, rows: Tensor | Sequence[int] | Sequence[bool] | None = None) -> None:
        """Start afresh: all rows, or those that ``rows`` names, a (B,) bool mask or row numbers from 0.

        Raises ShapeError for a mask of another shape and for a row that there is not.
        """
        fresh = self._fresh()
        self._state = fresh if rows is None else where_rows(self._mask(rows, fresh), fresh, self._state)

    def snapshot(self) -> State:
        """A copy of the state, which nothing that happens to the stream later can change."""
        return map_state(lambda leaf: leaf.detach().clone(), self._state)

    def restore(self, state: State) -> None:
        """Go on from ``state``, of which a copy is taken.

        Raises ShapeError for a state of another structure, shape, dtype or device.
        """
        self._state = map_state(lambda leaf: leaf.detach().clone(), _check_state(state, self._state))

    def _fresh(self) -> State:
        with torch.no_grad():
            # Cloned, for a learned first state is a view of its parameter.
            return map_state(torch.clone, self.cell.initial_state(self.batch_size))

    def _mask(self, rows: Tensor | Sequence[int] | Sequence[bool], state: State) -> Tensor:
        B = self.batch_size
        device = next((leaf.device for leaf in leaves(state)), None)
        named = torch.as_tensor(rows, device=device)
        if named.dim() != 1 or (named.dtype == torch.bool and len(named) != B):
            raise ShapeError(f"expected a bool mask ({B},) or row numbers, got {tuple(named.shape)}")
        if named.dtype == torch.bool:
            return named
        for row in named.tolist():
            if row not in range(B):
                raise ShapeError(f"there is no row {row} among {B} streams, which are numbered from 0")
        return torch.zeros(B, dtype=torch.bool, device=device).index_fill(0, named.to(torch.int64), True)

    def _check_mode(self) -> None:
        for module in self.cell.modules():
            if module.training:
                raise BackendError(
                    f"{type(module).__name__} is in training mode, where masks are drawn at random: "
                    "call .eval() on the cell before streaming"
                )
