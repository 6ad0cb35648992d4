"""What a traced step depends on, tensors aside."""

from __future__ import annotations

from collections.abc import Hashable
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
    shape: tuple[Any, ...] = tuple(tensor.shape)
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
