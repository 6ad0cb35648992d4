"""What a traced step depends on, tensors aside."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_scalar

from recurra.cell import Cell

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
# What every module has, and how it is called: none of it changes what a step computes.
_COMMON = frozenset(nn.Module().__dict__)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fingerprint(cell: Cell) -> Hashable:
    """What a traced step depends on, tensors aside: the modules of a cell, their mode, hooks and plain attributes."""
    found: list[Hashable] = []
    for module in cell.modules():
        own = module.__dict__
        found.append((type(module), module.training))
        found.extend((name, _frozen(value)) for name, value in own.items() if name not in _COMMON)
        found.extend(tuple(map(_Same, own[hooks].values())) for hooks in _HOOKS if own[hooks])
    return tuple(found)


def hooked(cell: Cell) -> bool:
    """Whether somebody has hung a hook on a module of the cell."""
    return any(module.__dict__[hooks] for module in cell.modules() for hooks in _HOOKS)


def settings(cell: Cell) -> tuple[Any, ...]:
    """The mode and plain attributes of the modules of a cell: read under torch.compile, so that it guards them."""
    return tuple(
        (
            module.training,
            tuple((name, _plain(value)) for name, value in module.__dict__.items() if name not in _COMMON),
        )
        for module in cell.modules()
    )


def look(tensor: Tensor, batch_size: int | None = None) -> tuple[tuple[Any, ...], torch.dtype, torch.device]:
    """A tensor as part of a key; its first axis may be the batch."""
    shape: tuple[Any, ...] = tensor.shape
    if batch_size is not None and shape[:1] == (batch_size,):
        shape = ("B", *shape[1:])
    return shape, tensor.dtype, tensor.device


class _Same:
    """An object as part of a key: equal to itself alone."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_frozen, value))
    if isinstance(value, dict):
        return dict, tuple((_frozen(key), _frozen(part)) for key, part in value.items())
    return _Same(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_plain(part) for part in value)
    if isinstance(value, (int, float)):
        return guard_scalar(value)
    return value if isinstance(value, _PLAIN) else None


class Attributes:
    """Notices other attributes, modules, parameters, hooks or modes of a cell, and changed lists and dictionaries among
    its attributes."""

    def __init__(self, cell: Cell) -> None:
        self._live = [part for module in cell.modules() for part in _containers(module)]
        # Of modules of TorchScript it is not said what they are.
        self._known = all(isinstance(part, (dict, list)) for part in self._live)
        self._seen = [part.copy() for part in self._live] if self._known else []
        # The comparison of two tensors of one number is a truth value, and so says nothing of which they are.
        self._single = [
            (part, name, value)
            for part in self._live
            if isinstance(part, dict)
            for name, value in part.items()
            if isinstance(value, Tensor) and value.numel() == 1
        ]

    def changed(self) -> bool:
        try:
            return (
                not self._known
                or self._live != self._seen
                or any(part[name] is not value for part, name, value in self._single)
            )
        except Exception:
            # What cannot be compared, as tensors cannot, is not the same.
            return True


def _containers(module: nn.Module) -> Iterator[Any]:
    """The dictionaries and lists that say what a module is."""
    own = module.__dict__
    yield own
    yield from (own[held] for held in ("_modules", "_parameters", "_buffers"))
    yield from (own[hooks] for hooks in _HOOKS)
    for name, value in own.items():
        if name not in _COMMON:
            yield from _inside(value)


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, dict)):
        yield value
    if isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _inside(part)
