"""Cells around cells that regularise: masks drawn once per sequence, states kept, weights dropped.

They act in training mode only; in evaluation mode each is the expectation of what it does in training.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from recurra.cell import Cell, State, leaves, map_state
from recurra.cells.wrappers import Around
from recurra.errors import ConfigError, ShapeError, suggest


class VariationalDropout(Around):
    """Dropout with one mask for all steps of a sequence, on the input, the output or both (Gal & Ghahramani 2016).

    ``input`` and ``output`` are the shares of features set to zero, in [0, 1); the rest is scaled up by
    1 / (1 - share). Each row of the batch has masks of its own. For the recurrent connection see ``Zoneout`` and
    ``WeightDrop``, which any cell survives.
    """

    def __init__(self, cell: Cell, input: float = 0.0, output: float = 0.0) -> None:
        super().__init__(cell)
        self.input, self.output = _share("input", input), _share("output", output)
        for share, size in (("input", "input_size"), ("output", "output_size")):
            if getattr(self, share) and not hasattr(cell, size):
                raise ShapeError(f"{type(cell).__name__} does not say its {size}, which a mask needs: set self.{size}")

    def draw_context(self, batch_size: int, context: Any = None) -> Any:
        on_input = on_output = None
        if self.training and self.input:
            on_input = F.dropout(1 + self.zeros(batch_size, self.input_size), self.input)
        if self.training and self.output:
            on_output = F.dropout(1 + self.zeros(batch_size, self.output_size), self.output)
        return on_input, on_output, self.cell.draw_context(batch_size, context)

    def step(self, state: State, x: Tensor, context: Any = None) -> tuple[State, Tensor]:
        on_input, on_output, inner = context if context is not None else (None, None, None)
        state, y = self.cell(state, x if on_input is None else x * on_input, inner)
        return state, y if on_output is None else y * on_output

    def extra_repr(self) -> str:
        return f"input={self.input}, output={self.output}"


class Zoneout(Around):
    """Some of the state keeps its old value, chosen anew at each step (Krueger et al. 2017)::

        training:    h_t = mask * h_{t-1} + (1 - mask) * h~_t      mask ~ Bernoulli(share)
        evaluation:  h_t = share * h_{t-1} + (1 - share) * h~_t

    ``share`` in [0, 1): one for every leaf of the state, or a tuple with one for each, in their order
    (LSTM: h, c). A cell whose output is a leaf of its state shows that leaf as zoneout left it.
    """

    def __init__(self, cell: Cell, share: float | tuple[float, ...]) -> None:
        super().__init__(cell)
        count = len(leaves(cell.initial_state(1)))
        shares = tuple(share) if isinstance(share, tuple) else (share,) * count
        if len(shares) != count:
            raise ShapeError(f"expected one share, or one for each of the {count} leaves of the state, got {shares}")
        self.shares = tuple(_share("share", each) for each in shares)

    def step(self, state: State, x: Tensor, context: Any = None) -> tuple[State, Tensor]:
        new, y = self.cell(state, x, context)
        shares = iter(self.shares)
        shown = y

        def keep(fresh: Tensor, old: Tensor) -> Tensor:
            nonlocal shown
            share = next(shares)
            if not share:
                return fresh
            if self.training:
                kept = torch.where(torch.rand_like(old) < share, old, fresh)
            else:
                kept = share * old + (1 - share) * fresh
            if fresh is y:
                shown = kept
            return kept

        return map_state(keep, new, state), shown

    def extra_repr(self) -> str:
        return f"shares={self.shares}"


class WeightDrop(Around):
    """Dropout on weights, one mask for all rows and steps of a sequence (Merity et al. 2018, DropConnect).

    ``share`` in [0, 1) of the entries of each parameter named in ``names`` is set to zero, the rest scaled up by
    1 / (1 - share). The default is the recurrent matrix; ``names`` are those of ``cell.named_parameters()``.

    Raises ConfigError for a parameter that the cell does not have.
    """

    def __init__(self, cell: Cell, share: float, names: tuple[str, ...] = ("weight_hh",)) -> None:
        super().__init__(cell)
        self.share, self.names = _share("share", share), names
        known = dict(cell.named_parameters())
        for name in names:
            if name not in known:
                raise ConfigError(f"{type(cell).__name__} has no parameter {name!r}: {suggest(name, known)}")

    def draw_context(self, batch_size: int, context: Any = None) -> Any:
        dropped = None
        if self.training and self.share:
            weights = dict(self.cell.named_parameters())
            dropped = {name: F.dropout(weights[name], self.share) for name in self.names}
        return dropped, self.cell.draw_context(batch_size, context)

    def step(self, state: State, x: Tensor, context: Any = None) -> tuple[State, Tensor]:
        dropped, inner = context if context is not None else (None, None)
        if dropped is None:
            return self.cell(state, x, inner)
        new, y = functional_call(self.cell, dropped, (state, x, inner))
        return new, y

    def extra_repr(self) -> str:
        return f"share={self.share}, names={self.names}"


def _share(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ConfigError(f"expected {name} from 0 to below 1, got {value}")
    return float(value)
