"""What a forward pass keeps for the backward pass, in one tensor: each tensor costs its time, however small.

Legend: D any feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """Where what is kept lies in the one tensor: by its number among all that is kept, at which of the tensor's numbers
    it begins, and its shape.

    The tensor stands in the place of ``first``, None in that of the others. ``parts`` need not have all that is kept.
    """

    parts: dict[int, tuple[int, tuple[int, ...]]]

    @property
    def first(self) -> int:
        return min(self.parts)

    def gather(self, values: Sequence[Tensor], count: int) -> list[Tensor | None]:
        """Of the tensors of a pass that keeps so many values, each in its place."""
        rest = iter(values)
        first = self.first
        return [None if number in self.parts and number != first else next(rest) for number in range(count)]

    def all(self, values: Sequence[Tensor], count: int) -> list[Tensor]:
        """The same as a tensor each."""
        found = self.apart(self.gather(values, count), range(count))
        return [value for value in found if value is not None]

    def apart(self, values: Sequence[Tensor | None], numbers: Sequence[int | None]) -> list[Tensor | None]:
        """The same ``values``, which have these numbers, a tensor each."""
        found = [*values]
        whole = values[numbers.index(self.first)]
        assert whole is not None
        for place, number in enumerate(numbers):
            if number in self.parts:
                begin, shape = self.parts[number]
                found[place] = whole[begin : begin + prod(shape)].view(shape)
        return found
