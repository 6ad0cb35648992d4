"""A cell over time: the plain loop that is the truth, and the modules around it.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recurra.cell import Cell, State, describe, detach, leaves, map_state, where_rows
from recurra.errors import BackendError, ShapeError, suggest
from recurra.explanation import Explanation
from recurra.taps import observed

BACKENDS = ("auto", "loop", "hoisted", "compiled")
MEMORY = ("store", "recompute", "sqrt")


class FasterPath(Protocol):
    """What runs a cell over time in place of the loop. ``given`` is the context before the cell drew from it."""

    def __call__(
        self,
        cell: Cell,
        x: Tensor,
        state: State,
        context: Any,
        *,
        given: Any,
        fresh: State,
        lengths: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, State]: ...

    def report(self, cell: Cell) -> Any:
        """What an Explanation says, under the same names, of a path that ran ``cell``, or will."""
        ...


def loop(
    cell: Cell,
    x: Tensor,
    state: State,
    context: Any = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    fresh: State | None = None,
    reverse: bool = False,
) -> tuple[Tensor, State]:
    """The reference loop: one step after another. Every other path is proven equal to it.

    x (T, B, I), lengths (B,) int64, resets (T, B) bool; ``fresh`` is the state a reset row starts from and
    ``context`` is drawn already. The arguments are not checked here, ``Recurrent`` does that; what the
    first step returns is.
    Returns y (T, B, O), zero beyond each row's length, and each row's state after its own last step.
    """
    T = x.shape[0]
    active = None
    if lengths is not None:
        steps = torch.arange(T, device=x.device)[:, None]
        active = steps < lengths
        # Whatever lies in the padding, NaN too, must reach neither a number nor a gradient. A row that has
        # ended takes its last input again, for nothing: zeros would give NaN gradients in a cell that divides.
        last = torch.minimum(steps, (lengths - 1).clamp(min=0))
        filler = x.detach().gather(0, last[:, :, None].expand_as(x))
        filler = torch.where((lengths > 0)[:, None], filler, torch.ones_like(filler))
        x = torch.where(active[:, :, None], x, filler)
        resets = None if resets is None else resets & active
    ys: list[Tensor] = [x] * T
    # PyTorch's compiler cannot count changes.
    checked = torch.compiler.is_compiling()
    for t in reversed(range(T)) if reverse else range(T):
        if resets is not None:
            state = where_rows(resets[t], fresh, state)
        before = None if checked else _versions(state)
        result = cell(state, x[t], context)
        if before is not None:
            _check_step(cell, state, before, result)
            checked = True
        new, y = result
        new = map_state(_as_carried, new, state)
        if active is not None:
            new = where_rows(active[t], new, state)
            y = where_rows(active[t], y, torch.zeros_like(y))
        state, ys[t] = new, y
    return torch.stack(ys), state


def _versions(state: State) -> list[int | None]:
    # Tensors of inference mode do not count their changes.
    return [None if leaf.is_inference() else leaf._version for leaf in leaves(state)]


def _check_step(cell: Cell, state: State, versions: list[int | None], result: Any) -> None:
    """What the first step returned, looked at once, so that a mistake is named and not carried on."""
    name = type(cell).__name__
    if not isinstance(result, tuple) or len(result) != 2:
        what = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
        raise ShapeError(f"the step of {name} must return the pair (new state, y), got {what}")
    new, y = result
    if versions != _versions(state):
        raise ShapeError(
            f"the step of {name} changed its state in place, and with it what earlier steps returned: "
            "compute a new tensor (h = h + x, not h += x)"
        )
    leaves(new)
    rows = leaves(state)[0].shape[0] if leaves(state) else None
    size = getattr(cell, "output_size", None)
    if not isinstance(y, Tensor) or y.dim() < 2 or y.shape[0] != (y.shape[0] if rows is None else rows):
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ShapeError(f"the step of {name} must return y (B, O), here ({rows}, {size or 'O'}), got {got}")
    if size is not None and y.shape[-1] != size:
        raise ShapeError(f"{name} has output_size={size}, but its step returned y {tuple(y.shape)}")


def _as_carried(new: Tensor, old: Tensor) -> Tensor:
    """What a step returned, held to the shape and, under autocast, to the precision of what came in."""
    if new.shape != old.shape:
        raise ShapeError(
            f"a step must keep the shape of its state: {tuple(old.shape)} went in, {tuple(new.shape)} came out"
        )
    if new.is_floating_point() and not old.is_floating_point():
        raise ShapeError(
            f"a step returned {new.dtype} for a state that began as {old.dtype}: begin with a state of {new.dtype}"
        )
    return new.to(old.dtype)


class Recurrent(nn.Module):
    """A cell over time.

    ``backend``: ``"loop"`` is the reference, one step after another. The others trace the step and run only what
    depends on the step before step by step, the rest for all steps at once: ``"compiled"`` as native code, or it says
    why not; ``"hoisted"`` as eager steps; ``"auto"`` as native code where that can be, else as eager steps, else
    as the reference loop. What draws random numbers in a step then draws others from the same seed, hooks on the
    cell's modules see a step only when it is traced (``"auto"`` takes the reference loop where there are any), and
    second derivatives go through the reference loop. ``explain()`` says what ran, and why.

    ``memory``: what is kept for the backward pass. ``"store"`` keeps all that it takes, ``"recompute"`` only the
    carried state of all steps, ``"sqrt"`` the carried state of about sqrt(T) steps.

    ``reverse=True`` steps from each row's last valid step to its first; y stays in the order of x.

    Raises BackendError for a path that cannot run this cell.
    """

    def __init__(self, cell: Cell, reverse: bool = False, backend: str = "auto", memory: str = "store") -> None:
        super().__init__()
        if not isinstance(cell, Cell):
            raise ShapeError(
                f"Recurrent takes a recurra.Cell, got {type(cell).__name__}: subclass Cell and write its step"
            )
        self.cell = cell
        self.reverse = reverse
        self.backend, self.memory = backend, memory
        self._path = choose_backend(backend, memory)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
        context: Any = None,
    ) -> tuple[Tensor, State]:
        """x (T, B, I) -> y (T, B, O) and the final state, each row's at its own last step.

        state: as ``cell.initial_state(B)``, which is also the default.
        lengths (B,): valid steps of each row, 0 to T, in any order, on any device. y is zero beyond them.
        resets (T, B) bool: that row starts afresh from ``initial_state`` before that step is taken.
        context: handed to ``cell.draw_context``, and what that returns to every step.

        Raises ShapeError for a shape, dtype or structure that does not fit.
        """
        # Attributes that are modules take their time to be found.
        cell = self.cell
        T, B = self._check_x(x)
        fresh = cell.initial_state(B)
        for leaf in leaves(fresh):
            if leaf.dim() == 0 or leaf.shape[0] != B:
                name = type(cell).__name__
                raise ShapeError(f"{name}.initial_state({B}) must give tensors with B={B} rows, got {describe(fresh)}")
        state = fresh if state is None else _check_state(state, fresh)
        lengths = None if lengths is None else _check_lengths(lengths, T, B, x.device)
        resets = None if resets is None else _check_resets(resets, T, B, x.device)
        drawn = cell.draw_context(B, context)
        options: dict[str, Any] = {"lengths": lengths, "resets": resets, "fresh": fresh, "reverse": self.reverse}

        def run() -> tuple[Tensor, State]:
            if T == 0:
                return x.new_zeros(0, B, output_size(cell)), state
            if self._path is not None:
                return self._path(cell, x, state, drawn, given=context, **options)
            return loop(cell, x, state, drawn, **options)

        if torch.compiler.is_compiling():
            return run()
        return observed(self, cell, run, lengths, self.reverse)

    def explain(self) -> Explanation:
        """Which path runs this cell, and why; what it costs. Before the first call the step is traced for this."""
        if self._path is None:
            return Explanation(self.backend, "loop", "the reference loop was asked for")
        return Explanation(self.backend, **self._path.report(self.cell)._asdict())

    def extra_repr(self) -> str:
        memory = "" if self.memory == "store" else f", memory={self.memory!r}"
        return f"reverse={self.reverse}, backend={self.backend!r}{memory}"

    def _check_x(self, x: Tensor) -> tuple[int, int]:
        if x.dim() != 3:
            raise ShapeError(f"expected x (T, B, I), time first, got {x.dim()} axes: {tuple(x.shape)}")
        cell = self.cell
        T, B, size = x.shape
        expected = getattr(cell, "input_size", None)
        if expected is not None and size != expected:
            raise ShapeError(
                f"expected x (T, B, {expected}), as {type(cell).__name__} has input_size={expected}, "
                f"got {tuple(x.shape)}"
            )
        return T, B


class Bidirectional(nn.Module):
    """Two cells over time, one in each direction, their outputs side by side.

    Schuster & Paliwal 1997. Each row is read backwards from its own last valid step.
    ``resets`` mark where a new piece begins; the backward cell starts afresh where such a piece ends.
    The state is the pair (forward state, backward state).
    """

    def __init__(self, forward_cell: Cell, backward_cell: Cell, backend: str = "auto", memory: str = "store") -> None:
        super().__init__()
        if forward_cell is backward_cell:
            raise ShapeError("the two directions need a cell each, got the same object twice: make a second one")
        self.ahead = Recurrent(forward_cell, backend=backend, memory=memory)
        self.back = Recurrent(backward_cell, reverse=True, backend=backend, memory=memory)

    def forward(
        self,
        x: Tensor,
        state: tuple[State, State] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
        context: Any = None,
    ) -> tuple[Tensor, tuple[State, State]]:
        """x (T, B, I) -> y (T, B, O forward + O backward) and both final states. Arguments as Recurrent's."""
        T, B = self.ahead._check_x(x)
        lengths = None if lengths is None else _check_lengths(lengths, T, B, x.device)
        resets = None if resets is None else _check_resets(resets, T, B, x.device)
        if state is not None and not (isinstance(state, tuple) and len(state) == 2):
            raise ShapeError(f"expected a pair (forward state, backward state), got {describe(state)}")
        state_ahead, state_back = (None, None) if state is None else state
        ends = resets
        if resets is not None:
            if lengths is not None:
                resets = resets & (torch.arange(T, device=x.device)[:, None] < lengths)
            ends = torch.cat([resets[1:], torch.zeros_like(resets[:1])])
        y_ahead, new_ahead = self.ahead(x, state_ahead, lengths=lengths, resets=resets, context=context)
        y_back, new_back = self.back(x, state_back, lengths=lengths, resets=ends, context=context)
        return torch.cat([y_ahead, y_back], dim=2), (new_ahead, new_back)

    def explain(self) -> Explanation:
        """Which path runs the forward cell, and why. For the other: ``back.explain()``."""
        return self.ahead.explain()


def truncated(
    rnn: Recurrent,
    x: Tensor,
    window: int,
    state: State | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
    context: Any = None,
) -> Iterator[tuple[slice, Tensor, State]]:
    """Truncated backpropagation through time, as a loop of your own (Williams & Peng 1990; Sutskever 2013).

    Cuts x (T, B, I) into windows of ``window`` steps and yields, for each, where it lies, its outputs and the
    state after it. The state is carried on into the next window, the gradient is not::

        for span, y, state in truncated(rnn, x, 35):
            loss(y, target[span]).backward()
            optimizer.step()
            optimizer.zero_grad()

    Raises ShapeError for a window below 1, and for a reversed recurrence, which cannot be carried on.
    """
    if window < 1:
        raise ShapeError(f"expected a window of at least 1 step, got {window}")
    if not isinstance(rnn, Recurrent) or rnn.reverse:
        raise ShapeError("only a forward Recurrent can carry its state from one window into the next")
    T, B = rnn._check_x(x)
    lengths = None if lengths is None else _check_lengths(lengths, T, B, x.device)
    resets = None if resets is None else _check_resets(resets, T, B, x.device)
    for start in range(0, T, window):
        span = slice(start, min(start + window, T))
        y, state = rnn(
            x[span],
            state,
            lengths=None if lengths is None else (lengths - start).clamp(0, span.stop - start),
            resets=None if resets is None else resets[span],
            context=context,
        )
        yield span, y, state
        state = detach(state)


def choose_backend(asked: str, memory: str = "store") -> FasterPath | None:
    """The one door to the faster paths: the one that answers to ``asked``, None for the loop.

    Raises BackendError if there is none.
    """
    for given, known, what in ((asked, BACKENDS, "backend"), (memory, MEMORY, "memory mode")):
        if given not in known:
            raise BackendError(f"there is no {what} {given!r}: {suggest(given, known)}")
    if asked == "loop":
        if memory != "store":
            raise BackendError(f"memory={memory!r} is not for the reference loop: use backend='compiled' or 'auto'")
        return None
    from recurra.compiler import Traced

    return Traced(loop, asked, memory)


def output_size(cell: Cell) -> int:
    """``cell.output_size``, or a ShapeError that says who needs it."""
    size = getattr(cell, "output_size", None)
    if not isinstance(size, int):
        raise ShapeError(f"{type(cell).__name__} does not say its output_size: set self.output_size in its __init__")
    return size


def _check_state(state: State, fresh: State) -> State:
    given, expected = leaves(state), leaves(fresh)
    if [leaf.shape for leaf in given] != [leaf.shape for leaf in expected]:
        raise ShapeError(f"expected a state {describe(fresh)}, as initial_state gives it, got {describe(state)}")
    for leaf, like in zip(given, expected, strict=True):
        if leaf.dtype != like.dtype or leaf.device != like.device:
            raise ShapeError(
                f"expected a state of {like.dtype} on {like.device}, got {leaf.dtype} on {leaf.device}: "
                "move it with state.to(...)"
            )
    # A plain tuple stands in for a named one of the same sizes.
    return map_state(lambda _, leaf: leaf, fresh, state)


def _check_lengths(lengths: Tensor | Sequence[int], T: int, B: int, device: torch.device) -> Tensor:
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.shape != (B,):
        raise ShapeError(
            f"expected lengths ({B},), a whole number for each row, got {tuple(lengths.shape)} {lengths.dtype}"
        )
    if torch.compiler.is_compiling():
        # To read a number here would cut the graph in two.
        torch._assert_async(((lengths >= 0) & (lengths <= T)).all(), "expected lengths from 0 to T")
    elif B and (int(lengths.min()) < 0 or int(lengths.max()) > T):
        worst = int(lengths.min()) if int(lengths.min()) < 0 else int(lengths.max())
        raise ShapeError(f"expected lengths from 0 to T={T}, got {worst}")
    # Native code takes them by their address.
    return lengths.to(device=device, dtype=torch.int64).contiguous()


def _check_resets(resets: Tensor, T: int, B: int, device: torch.device) -> Tensor:
    if resets.dtype != torch.bool or resets.shape != (T, B):
        raise ShapeError(f"expected resets ({T}, {B}) of torch.bool, got {tuple(resets.shape)} of {resets.dtype}")
    return resets.to(device).contiguous()
