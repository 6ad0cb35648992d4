"""A cell live: one input at a time, its state kept between them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recurra.cell import Cell, State, leaves, map_state, where_rows
from recurra.errors import BackendError, RecurraError, ShapeError, suggest
from recurra.explanation import Explanation
from recurra.unroll import Recurrent, _check_state, loop

if TYPE_CHECKING:
    from recurra.compiler.step import BoundStep

BACKENDS = ("auto", "loop", "compiled")


class Stream:
    """A cell, or the cell of a forward ``Recurrent``, run one input at a time::

        stream = Stream(cell.eval(), batch_size=2)
        y = stream.push(x)          # x (2, I) -> y (2, O)
        kept = stream.snapshot()    # a state is a value: save it, go on, come back
        stream.restore(kept)
        stream.reset([1])           # row 1 starts afresh, row 0 goes on

    The rows are separate streams side by side; none sees another. A sequence pushed step by step gives what
    ``Recurrent`` gives on all of it. Nothing here is differentiated; a snapshot may enter a graph elsewhere.
    Whatever raises leaves the state as it was. Threads that push to one stream wait for each other.

    ``backend``: ``"compiled"`` runs the whole step as one native call, or says why not; ``"loop"`` is the reference;
    ``"auto"`` compiles where that can be, else takes the loop, and ``explain()`` says which, and why. A step is traced
    and compiled at its first push; hooks on its modules see it only then, and so ``"auto"`` takes the loop for them.

    ``context`` is copied, and goes to ``cell.draw_context`` once, here. Weights may change between two pushes: what an
    optimiser, ``load_state_dict`` or any other operation of PyTorch does to them counts from the next push on. What is
    written past PyTorch, as ``weight.data.add_(1)`` or numpy writes, may not be seen before ``refresh()`` or a
    ``reset()`` of all rows.

    Raises BackendError for a reversed recurrence, and for a cell in training mode, whose masks belong to one
    sequence and would stay the same for ever; ShapeError for what is no cell, and for a negative batch size.
    """

    def __init__(self, cell: Cell | Recurrent, batch_size: int = 1, context: Any = None, backend: str = "auto") -> None:
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
        if backend == "hoisted":
            raise BackendError("of a single step nothing can be hoisted: use backend='auto', 'compiled' or 'loop'")
        if backend not in BACKENDS:
            raise BackendError(f"there is no backend {backend!r}: {suggest(backend, BACKENDS)}")
        self.cell = cell
        self.batch_size = batch_size
        self.backend = backend
        self._check_mode()
        self._lock = threading.Lock()
        self._given = _own(context)
        # The step as native code, whose memory the state is then. Else what was refused, and why.
        self._step: BoundStep | None = None
        self._refused: tuple[Any, ...] = ()
        self._why = ""
        self._draw()
        self._state = self._fresh()

    @property
    def state(self) -> State:
        """A copy of the state after the last push. ``restore`` sets it."""
        return self.snapshot()

    def push(self, x: Tensor) -> Tensor:
        """One step of every row. x (B, I) -> y (B, O); with a batch size of 1 also x (I,) -> y (O,).

        y is the caller's own: later pushes do not change it.

        Raises ShapeError for an x that does not fit, BackendError for a cell that is in training mode again, and for
        a step that cannot be compiled where ``backend="compiled"``.
        """
        with self._lock:
            y = None if self._step is None else self._step.push(x)
            return self._push(x) if y is None else y

    def _push(self, x: Tensor) -> Tensor:
        """A push that nothing is known of yet."""
        self._check_mode()
        single = x.dim() == 1 and self.batch_size == 1
        rows = x[None] if single else x
        size = getattr(self.cell, "input_size", None)
        if rows.dim() != 2 or rows.shape[0] != self.batch_size or size not in (None, rows.shape[1]):
            wanted = f"({self.batch_size}, {size or 'I'})"
            raise ShapeError(f"expected x {wanted}, a row for each stream, got {tuple(x.shape)}")
        # A parameter is a plain tensor once it is cut off.
        step = self._bind(rows.detach())
        if step is not None and (pushed := step.push(x.detach())) is not None:
            return pushed
        with torch.no_grad():
            y, self._state = loop(self.cell, rows[None], self._state, self._context)
        return y[0, 0] if single else y[0]

    def _bind(self, rows: Tensor) -> BoundStep | None:
        """The native step for such rows; None where the loop takes it."""
        if self.backend == "loop":
            return None
        from recurra.compiler import step

        asked = (type(rows), rows.shape, rows.dtype, rows.device, torch.is_autocast_enabled("cpu"))
        if self._step is None and asked == self._refused:
            return None
        if self._step is None:
            with torch.inference_mode(False), torch.no_grad():
                self._state = map_state(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), self._state)
        try:
            self._step = step.bind(self.backend, self.cell, rows, self._state, self._given, self._context, self._step)
        except RecurraError as error:
            self._step, self._why = None, str(error)
            if self.backend == "compiled":
                raise
            # If the step is wrong, the loop says so.
            self._refused = asked
        return self._step

    def explain(self) -> Explanation:
        """Which path the last push took, and why."""
        if self.backend == "loop":
            return Explanation("loop", "loop", "the reference loop was asked for")
        if self._step is not None:
            return Explanation(self.backend, "compiled", "the whole step is one native call", str(self._step))
        if self._why:
            return Explanation(self.backend, "loop" if self.backend == "auto" else "nothing", self._why)
        return Explanation(self.backend, self.backend, "the step is traced at its first push")

    def refresh(self) -> None:
        """Draw the context again, and read all weights: after a change of either that is not seen by itself."""
        self._check_mode()
        with self._lock:
            self._draw()
            self._forget()

    def reset(self, rows: Tensor | Sequence[int] | Sequence[bool] | None = None) -> None:
        """Start afresh: all rows, or those that ``rows`` names, a (B,) bool mask or row numbers from 0.

        Raises ShapeError for a mask of another shape and for a row that there is not.
        """
        fresh = self._fresh()
        mask = None if rows is None else self._mask(rows, fresh)
        with self._lock:
            self._set(fresh if mask is None else where_rows(mask, fresh, self._state))
            if mask is None:
                self._forget()

    def snapshot(self) -> State:
        """A copy of the state, which nothing that happens to the stream later can change."""
        with self._lock:
            return map_state(lambda leaf: leaf.detach().clone(), self._state)

    def restore(self, state: State) -> None:
        """Go on from ``state``, of which a copy is taken.

        Raises ShapeError for a state of another structure, shape, dtype or device.
        """
        state = _check_state(state, self._state)
        with self._lock:
            self._set(map_state(lambda leaf: leaf.detach().clone(), state))

    def __getstate__(self) -> dict[str, Any]:
        """What a copy begins with: a state of its own, and nothing bound."""
        return {**self.__dict__, "_state": self.snapshot(), "_lock": None, "_step": None}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update(kept, _lock=threading.Lock())

    def _set(self, state: State) -> None:
        """Go on from a state that is the stream's own."""
        old, new = leaves(self._state), leaves(state)
        alike = [(leaf.shape, leaf.dtype) for leaf in old] == [(leaf.shape, leaf.dtype) for leaf in new]
        if self._step is None or not alike:
            self._state, self._step = state, None
            return
        with torch.no_grad():
            for leaf, value in zip(old, new, strict=True):
                leaf.copy_(value)

    def _forget(self) -> None:
        """Let the next push read everything again."""
        self._refused = ()
        if self._step is not None:
            self._step.outdated = True

    def _draw(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._context = self.cell.draw_context(self.batch_size, self._given)

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


def _own(context: Any) -> Any:
    """A copy of a context: its tensors, tuples, lists and dictionaries. Anything else is as it was."""
    if isinstance(context, Tensor):
        with torch.inference_mode(False):
            return context.detach().clone()
    if type(context) is dict:
        return {name: _own(part) for name, part in context.items()}
    if type(context) in (list, tuple):
        return type(context)(_own(part) for part in context)
    if isinstance(context, tuple) and hasattr(context, "_fields"):
        return type(context)(*map(_own, context))
    return context
