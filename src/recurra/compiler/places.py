"""Where what a native call works on lies, as it is written down before there is any of it.

Legend: D any feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from recurra.compiler.block import Block


@dataclass(frozen=True)
class Place:
    """Where something lies: in which tensor or memory of the call, how many bytes from its beginning, and how many it
    is from one step to the next."""

    kind: str
    index: int
    skip: int = 0
    step: int = 0


NOWHERE = Place("zeros", 0)


@dataclass(frozen=True)
class Value:
    """A tensor whose numbers are at a place; strides count numbers. ``time`` is the axis on which the rows of all steps
    lie, None if it is of no step."""

    place: Place
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    time: int | None = None

    @property
    def contiguous(self) -> bool:
        return self.strides == strides_of(self.shape)


@dataclass(frozen=True)
class Total:
    """The sum over all steps of what is asked for nowhere else."""

    value: Value


def given_values(
    block: Block | None,
    given: Sequence[Tensor | tuple[int, ...] | None],
    numbers: Sequence[int | None],
    stepped: Sequence[bool | None],
    T: int,
    itemsize: int,
) -> list[Value]:
    """What is given to a segment, of which a part may lie in one tensor. ``numbers`` has the number of each of those
    among all that is kept, ``stepped`` says of which the first axis has rows of T steps. A shape stands for zeros,
    which lie nowhere."""
    values = []
    for k, (tensor, number) in enumerate(zip(given, numbers, strict=True)):
        if block is not None and number in block.parts:
            begin, shape = block.parts[number]
            place = Place("given", numbers.index(block.first), begin * itemsize)
        elif isinstance(tensor, tuple):
            place, shape = NOWHERE, tuple(tensor)
        else:
            assert tensor is not None
            place, shape = Place("given", k), tuple(tensor.shape)
        if stepped[k] and place is not NOWHERE:
            place = replace(place, step=prod(shape) // T * itemsize)
        values.append(Value(place, shape, strides_of(shape), 0 if stepped[k] else None))
    return values


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[k + 1 :]) for k in range(len(shape)))


def moved(value: Value, skip: int) -> Value:
    return replace(value, place=replace(value.place, skip=value.place.skip + skip))


def cut(value: Value, steps: int, T: int) -> Value:
    """So many steps of a value of T steps."""
    if value.time is None:
        return value
    shape = tuple(size * steps // T if axis == value.time else size for axis, size in enumerate(value.shape))
    return replace(value, shape=shape)
