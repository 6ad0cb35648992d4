"""Named values inside a step, to be read out for every step of a run.

    f = tap("forget_gate", torch.sigmoid(f))          in a step: f, and nothing else

    with watch(rnn) as seen:                          where somebody wants to see it
        y, state = rnn(x)
    seen["forget_gate"]                               (T, B, D)

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from recurra.errors import ShapeError, TapError, suggest

Result = TypeVar("Result")

# The attributes by which the house's wrappers hold their cells say nothing about which cell is meant.
_UNSAID = ("cell", "cells")


class _Here(threading.local):
    """What is watched in this thread, and the run that is being recorded."""

    watches: tuple[Seen, ...] = ()
    record: Record | None = None


_here = _Here()


def tap(name: str, value: Tensor) -> Tensor:
    """``value`` itself. Inside a step, ``watch`` shows it under this name.

    value: (B, ...), of any dtype. Nobody watching, a tap is one call of an empty function where a step is run, and
    nothing at all where it is traced. A name that comes again in the same step is shown as ``name#2``, ``name#3``.

    Raises ShapeError for a value without a row for each of the batch, where somebody watches.
    """
    record = _here.record
    if record is not None:
        record.note(name, value)
    return value


@contextmanager
def watch(module: nn.Module) -> Iterator[Seen]:
    """While this is entered, the taps of every ``Recurrent`` in ``module``, itself included, are seen, in this thread.

    Each call of a Recurrent replaces what was seen of its call before. Values are as they were when they were tapped,
    zero in the padding, cut off from the graph, and nobody else's. The first call traces the step anew, with the taps.
    """
    if not isinstance(module, nn.Module):
        raise ShapeError(f"watch takes a Recurrent, or a module that has some, got {type(module).__name__}")
    seen = Seen(module)
    _here.watches = (*_here.watches, seen)
    try:
        yield seen
    finally:
        _here.watches = tuple(each for each in _here.watches if each is not seen)


class Seen:
    """The values of taps over time, by name: ``seen["forget_gate"]`` is (T, B, ...).

    A name begins with where its cell is: ``0.forget_gate`` and ``1.forget_gate`` in a Stack of two LSTMs,
    ``ahead.0.forget_gate`` in a Bidirectional, ``low.forget_gate`` in a cell with ``self.low``. ``cell`` and ``cells``,
    by which the house's wrappers hold others, are left out. The end of a name will do where only one ends so.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._paths = {part: _short(path) for path, part in module.named_modules()}
        self._values: dict[nn.Module, dict[str, Tensor]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of the taps."""
        return tuple(name for values in self._values.values() for name in values)

    def __getitem__(self, name: str) -> Tensor:
        """Raises TapError for a name that is not there, or may mean several."""
        found = self._find(name)
        if len(found) > 1:
            raise TapError(f"{name!r} may be any of {', '.join(found)}: name one of them")
        if not found:
            what = type(self._module).__name__
            if not self._values:
                raise TapError(f"{name!r} was not seen: no Recurrent in {what} has been called while it was watched")
            known = suggest(name, self.names) if self.names else "none was reached"
            raise TapError(f"{what} has no tap {name!r}: {known}")
        return next(values[found[0]] for values in self._values.values() if found[0] in values)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and len(self._find(name)) == 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Seen({', '.join(f'{name} {tuple(self[name].shape)}' for name in self.names)})"

    def _find(self, name: str) -> list[str]:
        names = self.names
        return [name] if name in names else [each for each in names if each.endswith(f".{name}")]

    def _show(self, rnn: nn.Module, values: dict[str, Tensor]) -> None:
        path = self._paths[rnn]
        self._values[rnn] = {".".join([*path, name]): value for name, value in values.items()}


class Record:
    """The taps of one run of a cell over time. While it is entered, taps in this thread go to it.

    ``steps`` are the values noted in each step, in the order in which the steps were taken.
    """

    def __init__(self, cell: nn.Module) -> None:
        self.cell = cell
        self.steps: list[dict[str, Tensor]] = []
        self.values: dict[str, Tensor] | None = None
        self._paths = {module: _short(path) for path, module in cell.named_modules()}
        self._inside: list[tuple[str, ...]] = []
        self._rows = 0

    def __enter__(self) -> Record:
        self._before, _here.record = _here.record, self
        return self

    def __exit__(self, *error: object) -> None:
        _here.record = self._before

    @contextmanager
    def inside(self, cell: nn.Module, x: Tensor) -> Iterator[None]:
        """While this is entered, taps are those of ``cell``, in a step that takes x (B, I)."""
        if not self._inside:
            self.steps.append({})
            self._rows = x.shape[0]
        self._inside.append(self._paths.get(cell, ()))
        try:
            yield
        finally:
            self._inside.pop()

    def note(self, name: str, value: Tensor) -> None:
        if not self._inside:
            return
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != self._rows:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(
                f"the tap {name!r} in {type(self.cell).__name__} needs a value (B, ...), a row for each of the batch, "
                f"here ({self._rows}, ...), got {got}"
            )
        step = self.steps[-1]
        whole = unique = ".".join([*self._inside[-1], name])
        number = 1
        while unique in step:
            number += 1
            unique = f"{whole}#{number}"
        # The step may go on to write on it.
        step[unique] = value.detach().clone()

    def over_time(self, lengths: Tensor | None, reverse: bool) -> dict[str, Tensor]:
        """Every value (T, B, ...), zero beyond each row's length (B,)."""
        values = self._joined(reverse) if self.values is None else self.values
        if lengths is None:
            return values
        found = {}
        for name, value in values.items():
            valid = torch.arange(value.shape[0], device=lengths.device)[:, None] < lengths
            valid = valid.view(*valid.shape, *[1] * (value.dim() - 2))
            found[name] = torch.where(valid, value, torch.zeros_like(value))
        return found

    def _joined(self, reverse: bool) -> dict[str, Tensor]:
        steps = self.steps[::-1] if reverse else self.steps
        names = dict.fromkeys(name for step in self.steps for name in step)
        for name in names:
            shapes = {step[name].shape if name in step else None for step in steps}
            if len(shapes) > 1:
                what = "is not reached in every step" if None in shapes else "changes its shape from step to step"
                raise ShapeError(
                    f"the tap {name!r} in {type(self.cell).__name__} {what}, and so has no value (T, B, ...)"
                )
        return {name: torch.stack([step[name] for step in steps]) for name in names}


def recording() -> Record | None:
    """Where the taps of this thread go, if anywhere."""
    return _here.record


def observed(
    rnn: nn.Module, cell: nn.Module, run: Callable[[], Result], lengths: Tensor | None, reverse: bool
) -> Result:
    """``run()``, which takes ``cell`` over time for ``rnn``. Who watches ``rnn`` sees the taps."""
    watches = [seen for seen in _here.watches if rnn in seen._paths]
    if _here.record is not None:
        # A Recurrent in the step of a cell: its steps are not those that are watched.
        outer, _here.record = _here.record, None
        try:
            return run()
        finally:
            _here.record = outer
    if not watches:
        return run()
    for seen in watches:
        seen._values.pop(rnn, None)
    with Record(cell) as record:
        result = run()
    values = record.over_time(lengths, reverse)
    for seen in watches:
        seen._show(rnn, values)
    return result


def _short(path: str) -> tuple[str, ...]:
    """The parts of a module's path that say which cell it is."""
    return tuple(part for part in path.split(".") if part and part not in _UNSAID)
