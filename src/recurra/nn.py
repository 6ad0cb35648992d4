"""``RNN``, ``LSTM`` and ``GRU`` with the face of their ``torch.nn`` namesakes and recurra's cells inside.

Legend: T time, B batch, I input, H hidden, O output, D any feature.

    from recurra.nn import LSTM         # instead of torch.nn's

Constructor, parameters, ``state_dict``, initial values, shapes and defaults are inherited from ``torch.nn``.
The arithmetic is not: each layer and direction is one ``Recurrent`` around a cell. Three things differ:

- An ``hx`` of the wrong batch size is refused for a PackedSequence too; torch.nn may pick rows from it.
- Under autocast the state is carried in the dtype of the weights, and all results leave in autocast's.
- ``flatten_parameters`` does nothing, as there is no cuDNN buffer to fill.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from recurra import cells
from recurra.cell import Cell, State, describe, map_state
from recurra.errors import RecurraError, ShapeError
from recurra.explanation import Explanation
from recurra.unroll import Recurrent

__all__ = ["RNN", "LSTM", "GRU"]

# What autocast casts; it leaves float64 alone.
AUTOCAST = {torch.float32, torch.float16, torch.bfloat16}


class InputError(RecurraError, RuntimeError):
    """An input or state does not fit the module; a RuntimeError, as torch.nn raises it."""


class _OverTime(nn.RNNBase):
    """What the three have in common: layers, directions, padding and checks. A subclass names its cell."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._directions = 2 if self.bidirectional else 1
        # In lists, so that parameters() and state_dict() do not see them: the parameters are of this module.
        self._free = [[self._build(index)] for index in range(self.num_layers * self._directions)]

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Any, Any]:
        """input (T, B, I), or (B, T, I) with ``batch_first``, or (T, I), or packed -> output and final state.

        output: (T, B, directions * O), in the form of the input.
        hx: the state before the first step, zeros by default. h_0 (num_layers * directions, B, O), or without
        B for an unbatched input; for the LSTM the pair (h_0, c_0), where c_0 has H features. Its rows are in
        the caller's order, also for a PackedSequence. The final state has the same form.

        Raises ShapeError (a ValueError) for a wrong dtype or number of axes of the input, InputError
        (a RuntimeError) for everything else that does not fit.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        x = self._check_input(input, (2, 3))
        if x.dim() == 2:
            y, state = self._unroll(x[:, None], self._check_state(hx, ()))
            return y[:, 0], map_state(lambda leaf: leaf[:, 0], state)
        x = x.transpose(0, 1) if self.batch_first else x
        y, state = self._unroll(x, self._check_state(hx, (x.shape[1],)))
        return y.transpose(0, 1) if self.batch_first else y, state

    def explain(self) -> Explanation:
        """Which path runs the cells, and why."""
        with self._recurrent(0) as recurrent:
            return recurrent.explain()

    def flatten_parameters(self) -> None:
        """Nothing: existing programs call it."""

    def _cell(self, input_size: int) -> Cell:
        raise NotImplementedError

    def _cell_biases(self, bias_ih: Tensor, bias_hh: Tensor) -> dict[str, Tensor]:
        """The two biases (gates * H,) of torch.nn as the biases of the cell."""
        return {"bias": bias_ih + bias_hh}

    def _cell_parameters(self, weight_ih: Tensor, weight_hh: Tensor, *rest: Tensor) -> dict[str, Tensor]:
        """The parameters of one layer and direction, in torch.nn's order, by their names in a Recurrent."""
        bias_ih, bias_hh = rest[:2] if self.bias else [weight_ih.new_zeros(len(weight_ih))] * 2
        named = {"weight_ih": weight_ih, "weight_hh": weight_hh, **self._cell_biases(bias_ih, bias_hh)}
        if self.proj_size:
            named["weight_hr"] = rest[-1]
        return {f"cell.{name}": tensor for name, tensor in named.items()}

    def _build(self, index: int) -> Recurrent:
        """The Recurrent of one layer and direction, whose parameters are given to it at each call."""
        layer, backwards = divmod(index, self._directions)
        width = self.input_size if layer == 0 else (self.proj_size or self.hidden_size) * self._directions
        with torch.device("meta"):
            return Recurrent(self._cell(width), reverse=bool(backwards))

    @contextmanager
    def _recurrent(self, index: int) -> Iterator[Recurrent]:
        """A Recurrent lent to one caller at a time, as two threads cannot give parameters to the same one."""
        try:
            recurrent = self._free[index].pop()
        except IndexError:
            recurrent = self._build(index)
        try:
            yield recurrent
        finally:
            self._free[index].append(recurrent)

    def _unroll(self, x: Tensor, state: State | None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """All layers over x (T, B, I), from and to a state of leaves (num_layers * directions, B, D)."""
        finals: list[State] = []
        weights = self.all_weights
        for layer in range(self.num_layers):
            if layer > 0:
                x = F.dropout(x, self.dropout, self.training)
            ys = []
            for index in range(layer * self._directions, (layer + 1) * self._directions):
                start = None if state is None else map_state(lambda leaf, i=index: leaf[i], state)
                parameters = self._cell_parameters(*weights[index])
                with self._recurrent(index) as recurrent:
                    y, final = functional_call(recurrent, parameters, (x, start), {"lengths": lengths})
                ys.append(y)
                finals.append(final)
            x = torch.cat(ys, dim=2) if self.bidirectional else ys[0]
        state = map_state(lambda *rows: torch.stack(rows).to(self._result_dtype()), *finals)
        return x.to(self._result_dtype()), state if isinstance(state, Tensor) else tuple(state)

    def _forward_packed(self, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        data = self._check_input(packed.data, (2,))
        order, back = packed.sorted_indices, packed.unsorted_indices
        state = self._check_state(hx, (int(packed.batch_sizes[0]),))
        if state is not None and order is not None:
            state = map_state(lambda leaf: leaf.index_select(1, order), state)
        x, lengths = pad_packed_sequence(PackedSequence(data, packed.batch_sizes))
        y, state = self._unroll(x, state, lengths)
        if back is not None:
            state = map_state(lambda leaf: leaf.index_select(1, back), state)
        return PackedSequence(pack_padded_sequence(y, lengths).data, packed.batch_sizes, order, back), state

    def _check_input(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """The input, or the data of a packed one, in the dtype of the weights."""
        name, size, weight = type(self).__name__, self.input_size, self.all_weights[0][0]
        if not isinstance(x, Tensor):
            raise InputError(f"{name} expected a Tensor or a PackedSequence as input, got {type(x).__name__}")
        if x.dim() not in axes:
            if axes == (2,):
                raise InputError(f"{name} expected packed sequences (T, {size}) each, got data {tuple(x.shape)}")
            batched = "(B, T" if self.batch_first else "(T, B"
            raise ShapeError(
                f"{name} expected input {batched}, {size}), or (T, {size}) for one sequence, got {tuple(x.shape)}"
            )
        if not self._fits_dtype(x):
            raise ShapeError(
                f"{name} expected input of {weight.dtype}, as its weights are, got {x.dtype}: "
                f"convert the input with input.to({weight.dtype}), or the module to the dtype of your data"
            )
        if x.shape[-1] != size:
            raise InputError(
                f"{name} expected {size} features in the last axis of its input, as input_size={size}, "
                f"got {x.shape[-1]} in {tuple(x.shape)}"
            )
        if x.shape[1 if x.dim() == 3 and self.batch_first else 0] == 0:
            raise InputError(
                f"{name} expected at least 1 time step, got input {tuple(x.shape)}: leave empty sequences out"
            )
        if x.device != weight.device:
            raise InputError(
                f"{name} expected input on {weight.device}, where its weights are, got {x.device}: "
                f"move it with input.to({str(weight.device)!r})"
            )
        return x.to(weight.dtype)

    def _check_state(self, hx: State | None, batch: tuple[int, ...]) -> State | None:
        """hx with leaves (num_layers * directions, B, D), as the weights are; ``batch`` is (B,) or ()."""
        if hx is None:
            return None
        name, weight = type(self).__name__, self.all_weights[0][0]
        count = self.num_layers * self._directions
        sizes = {"h_0": (count, *batch, self.proj_size or self.hidden_size)}
        if self.mode == "LSTM":
            sizes["c_0"] = (count, *batch, self.hidden_size)
        if isinstance(hx, list):
            hx = tuple(hx)
        given = hx if self.mode == "LSTM" and isinstance(hx, tuple) else (hx,)
        if [getattr(leaf, "shape", None) for leaf in given] != list(sizes.values()):
            axes = "(num_layers * directions, B, features)" if batch else "(num_layers * directions, features)"
            raise InputError(
                f"{name} expected hx to be {' and '.join(f'{leaf} {size}' for leaf, size in sizes.items())}, "
                f"that is {axes}, got {describe(hx)}"
            )
        for leaf in given:
            if not self._fits_dtype(leaf) or leaf.device != weight.device:
                raise InputError(
                    f"{name} expected hx of {weight.dtype} on {weight.device}, as its weights are, "
                    f"got {leaf.dtype} on {leaf.device}: convert it with .to(...)"
                )
        state = [leaf.to(weight.dtype) if batch else leaf.to(weight.dtype)[:, None] for leaf in given]
        return tuple(state) if self.mode == "LSTM" else state[0]

    def _fits_dtype(self, tensor: Tensor) -> bool:
        weight = self.all_weights[0][0]
        return tensor.dtype == weight.dtype or (_autocasts(weight) and tensor.dtype in AUTOCAST)

    def _result_dtype(self) -> torch.dtype:
        weight = self.all_weights[0][0]
        return torch.get_autocast_dtype(weight.device.type) if _autocasts(weight) else weight.dtype


def _autocasts(weight: Tensor) -> bool:
    device = weight.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return enabled and weight.dtype in AUTOCAST


class RNN(_OverTime, nn.RNN):
    """The vanilla recurrent network, ``recurra.cells.Vanilla``, with the face of ``torch.nn.RNN``::

        RNN(input_size, hidden_size, num_layers=1, nonlinearity="tanh", bias=True, batch_first=False,
            dropout=0.0, bidirectional=False, device=None, dtype=None)

    ``nonlinearity`` is ``"tanh"`` or ``"relu"``. Arguments, shapes and errors: see ``forward``.
    """

    def _cell(self, input_size: int) -> Cell:
        activation = torch.tanh if self.nonlinearity == "tanh" else torch.relu
        return cells.Vanilla(input_size, self.hidden_size, activation)


class LSTM(_OverTime, nn.LSTM):
    """Long short-term memory, ``recurra.cells.LSTM``, with the face of ``torch.nn.LSTM``::

        LSTM(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
             bidirectional=False, proj_size=0, device=None, dtype=None)

    With ``proj_size`` it is ``recurra.cells.ProjectedLSTM``. Arguments, shapes and errors: see ``forward``.
    """

    def _cell(self, input_size: int) -> Cell:
        if self.proj_size:
            return cells.ProjectedLSTM(input_size, self.hidden_size, self.proj_size)
        return cells.LSTM(input_size, self.hidden_size)


class GRU(_OverTime, nn.GRU):
    """The gated recurrent unit that resets after the product, ``recurra.cells.GRU``, as ``torch.nn.GRU``::

        GRU(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
            bidirectional=False, device=None, dtype=None)

    Arguments, shapes and errors: see ``forward``.
    """

    def _cell(self, input_size: int) -> Cell:
        return cells.GRU(input_size, self.hidden_size)

    def _cell_biases(self, bias_ih: Tensor, bias_hh: Tensor) -> dict[str, Tensor]:
        H = self.hidden_size
        bias_hh_rz, bias_hn = bias_hh.split([2 * H, H])
        return {"bias": bias_ih + F.pad(bias_hh_rz, (0, H)), "bias_hn": bias_hn}
