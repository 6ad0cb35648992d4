"""Cells around cells: how layers are stacked, joined, read out and begun.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurra.cell import Cell, State, from_flat, to_flat
from recurra.errors import ShapeError


class Stack(Cell):
    """Cells on top of one another: each takes the output of the one below, in the same time step.

    The state is the tuple of their states. Each draws its own context from the one given.
    Raises ShapeError where one cell's output does not fit the next one's input.
    """

    def __init__(self, *cells: Cell) -> None:
        super().__init__()
        if not cells:
            raise ShapeError("a Stack needs at least one cell")
        for below, above in pairwise(cells):
            gives, takes = getattr(below, "output_size", None), getattr(above, "input_size", None)
            if gives is not None and takes is not None and gives != takes:
                raise ShapeError(
                    f"in a Stack, {type(below).__name__} gives {gives} features "
                    f"and {type(above).__name__} on top of it takes {takes}"
                )
        self.cells = cast("Sequence[Cell]", nn.ModuleList(cells))
        if hasattr(cells[0], "input_size"):
            self.input_size = cells[0].input_size
        if hasattr(cells[-1], "output_size"):
            self.output_size = cells[-1].output_size

    def initial_state(self, batch_size: int) -> tuple[State, ...]:
        return tuple(cell.initial_state(batch_size) for cell in self.cells)

    def draw_context(self, batch_size: int, context: Any = None) -> tuple[Any, ...]:
        return tuple(cell.draw_context(batch_size, context) for cell in self.cells)

    def step(self, state: tuple[State, ...], x: Tensor, context: Any = None) -> tuple[tuple[State, ...], Tensor]:
        contexts = context if context is not None else (None,) * len(self.cells)
        new = []
        for cell, below, drawn in zip(self.cells, state, contexts, strict=True):
            after, x = cell(below, x, drawn)
            new.append(after)
        return tuple(new), x


class Around(Cell):
    """The common part of cells around one cell: its sizes, initial state and context are the inner cell's."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        if not isinstance(cell, Cell):
            raise ShapeError(f"{type(self).__name__} goes around a recurra.Cell, got {type(cell).__name__}")
        self.cell = cell
        for size in ("input_size", "output_size"):
            if hasattr(cell, size):
                setattr(self, size, getattr(cell, size))

    def initial_state(self, batch_size: int) -> State:
        return self.cell.initial_state(batch_size)

    def draw_context(self, batch_size: int, context: Any = None) -> Any:
        return self.cell.draw_context(batch_size, context)

    def step(self, state: State, x: Tensor, context: Any = None) -> tuple[State, Tensor]:
        return self.cell(state, x, context)


class Residual(Around):
    """``y_t = x_t + y_t of the inner cell`` (He et al. 2016; for recurrent stacks Wu et al. 2016, section 3.1).

    Raises ShapeError where the inner cell's input and output differ in size.
    """

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        takes, gives = getattr(cell, "input_size", None), getattr(cell, "output_size", None)
        if takes != gives:
            raise ShapeError(
                f"Residual adds x to y, but {type(cell).__name__} takes {takes} and gives {gives} features"
            )

    def step(self, state: State, x: Tensor, context: Any = None) -> tuple[State, Tensor]:
        state, y = self.cell(state, x, context)
        return state, x + y


class Readout(Around):
    """``y_t = W_hy y_t + b`` on the inner cell's output: from (B, its output) to (B, output_size)."""

    def __init__(self, cell: Cell, output_size: int, bias: bool = True) -> None:
        super().__init__(cell)
        if not hasattr(cell, "output_size"):
            raise ShapeError(f"{type(cell).__name__} does not say its output_size: set it in its __init__")
        self.linear = nn.Linear(cell.output_size, output_size, bias=bias)
        self.output_size = output_size

    def step(self, state: State, x: Tensor, context: Any = None) -> tuple[State, Tensor]:
        state, y = self.cell(state, x, context)
        return state, self.linear(y)


class LearnedInitialState(Around):
    """A cell whose first state is learned (Forcada & Carrasco 1995).

    One row, begun at the inner cell's own initial state and shared by the whole batch.
    """

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        with torch.no_grad():
            self.first = nn.Parameter(to_flat(cell.initial_state(1))[0].clone())

    def initial_state(self, batch_size: int) -> State:
        like = self.cell.initial_state(batch_size)
        return from_flat(self.first.expand(batch_size, -1), like)


class LayerNorm(Around):
    """The inner cell on a normalised input (Ba et al. 2016; before the layer, as in Xiong et al. 2020)::

        x'_t = s * (x_t - mean) / sqrt(variance + 1e-5) + b        over the features of one row
        h_t, y_t = cell(h_{t-1}, x'_t)

    ``Residual(LayerNorm(cell))`` is the block of deep stacks. Normalisation inside the gates is a cell of its
    own, ``LayerNormLSTM``.
    """

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        if not hasattr(cell, "input_size"):
            raise ShapeError(f"{type(cell).__name__} does not say its input_size: set it in its __init__")
        self.scale = nn.Parameter(torch.ones(cell.input_size))
        self.bias = nn.Parameter(torch.zeros(cell.input_size))

    def step(self, state: State, x: Tensor, context: Any = None) -> tuple[State, Tensor]:
        x = F.layer_norm(x, self.scale.shape, self.scale, self.bias)
        return self.cell(state, x, context)
