"""A text as contiguous streams, read side by side in windows: the batches of truncated backpropagation.

Legend: T time, B batch, I input, H hidden, O output, D any feature. N is the number of tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recurra.errors import ConfigError, DataError, ShapeError


class Streams:
    """N tokens as ``batch_size`` streams of equal length, in windows of ``window`` steps.

    Every stream has ``steps = (N - 1) // batch_size`` steps. At its step t, stream b reads token
    ``b * steps + t`` and is to predict the one after it. Row b of a window goes on where row b of the window
    before ended, so that the carried state stays true. Going through all windows once, each token but the
    first of the text, and but the last ``(N - 1) % batch_size``, is a target exactly once. With
    ``batch_size=1`` only the first is none; ``cover`` leaves none out with any batch size.

    ``len(streams)`` windows make an epoch; the last may have fewer steps than the others. ``tokens`` (N,) of
    any integer dtype may be memory-mapped: only what a window needs is read, and nothing is written.

    Raises ConfigError for a batch size or window below 1, ShapeError for tokens that are not (N,) integers,
    DataError where there is less than one step for each stream.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, window: int) -> None:
        for name, value in (("batch size", batch_size), ("window", window)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"expected a {name} of at least 1, got {value!r}")
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ShapeError(f"expected tokens (N,) of an integer dtype, got {tokens.shape} of {tokens.dtype}")
        if len(tokens) <= batch_size:
            raise DataError(_too_few(len(tokens), batch_size))
        self.batch_size = batch_size
        self.window_size = window
        self.steps = (len(tokens) - 1) // batch_size
        span = batch_size * self.steps
        self._inputs = tokens[:span].reshape(batch_size, self.steps)
        self._targets = tokens[1 : span + 1].reshape(batch_size, self.steps)

    def __len__(self) -> int:
        return -(-self.steps // self.window_size)

    def window(self, k: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Window k: inputs (T, B) int64 and targets (T, B) int64, the inputs' successors.

        It follows from k alone. ``rows`` picks some of the streams: the share of one process of many.
        Raises DataError where there is no window k.
        """
        if not 0 <= k < len(self):
            raise DataError(f"there is no window {k}: expected 0 to {len(self) - 1}")
        span = slice(k * self.window_size, (k + 1) * self.window_size)
        chosen = slice(None) if rows is None else rows
        return _time_first(self._inputs[chosen, span]), _time_first(self._targets[chosen, span])


def cover(tokens: np.ndarray, batch_size: int, window: int) -> list[Streams]:
    """Streams that together have every token but the first as a target exactly once, for evaluation.

    The first has ``batch_size`` streams, or fewer for a text of fewer steps. Where a remainder is left, the
    second has it as a single stream, which goes on where the last of the first ended.
    Raises as Streams does; a text needs two tokens.
    """
    first = Streams(tokens, min(batch_size, max(len(tokens) - 1, 1)), window)
    rest = tokens[first.batch_size * first.steps :]
    return [first, Streams(rest, 1, window)] if len(rest) > 1 else [first]


def _time_first(tokens: np.ndarray) -> Tensor:
    # A copy in any case: the source may be read-only, and a tensor must not lie on it.
    return torch.from_numpy(np.array(tokens.T, dtype=np.int64, order="C"))


def _too_few(count: int, batch_size: int) -> str:
    needed = f"{count} tokens are too few for {batch_size} streams side by side: {batch_size + 1} are needed"
    if count < 2:
        return f"{needed}; give a longer text"
    return f"{needed}; give a longer text, or a batch size of {count - 1} or less"
