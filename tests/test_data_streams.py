"""Contiguous streams against a reading of the same law one token at a time.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recurra.data.streams import Streams, cover
from recurra.errors import ConfigError, DataError, ShapeError

_SIZES = {"length": st.integers(2, 200), "batch_size": st.integers(1, 20), "window": st.integers(1, 30)}


def _problems(streams, tokens, batch_size, window):
    """What is wrong with streams over ``tokens``, each of which is its own place in the text."""
    steps = (len(tokens) - 1) // batch_size
    read = {b: [] for b in range(batch_size)}
    for k in range(len(streams)):
        inputs, targets = streams.window(k)
        if inputs.shape != targets.shape or not 1 <= inputs.shape[0] <= window:
            return "shape"
        if k < len(streams) - 1 and inputs.shape[0] != window:
            return "a short window before the last"
        for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
            for b in range(batch_size):
                read[b].append((x[b], y[b]))
    for b, pairs in read.items():
        if pairs != [(b * steps + t, b * steps + t + 1) for t in range(steps)]:
            return f"row {b} reads {pairs}"
    return None


@given(**_SIZES)
def test_every_row_reads_on_and_predicts_the_next_token(length, batch_size, window):
    tokens = np.arange(length, dtype=np.uint8)
    if length <= batch_size:
        with pytest.raises(DataError, match=f"{batch_size + 1} are needed"):
            Streams(tokens, batch_size, window)
        return
    assert _problems(Streams(tokens, batch_size, window), tokens, batch_size, window) is None


@given(**_SIZES)
def test_every_token_but_the_first_and_a_remainder_is_a_target_once(length, batch_size, window):
    batch_size = min(batch_size, length - 1)
    streams = Streams(np.arange(length), batch_size, window)
    counts = Counter(t for k in range(len(streams)) for t in streams.window(k)[1].flatten().tolist())
    assert counts == Counter(range(1, length - (length - 1) % batch_size))


@given(**_SIZES)
def test_cover_has_every_token_but_the_first_as_a_target_once(length, batch_size, window):
    parts = cover(np.arange(length), batch_size, window)
    counts = Counter()
    for streams in parts:
        for k in range(len(streams)):
            inputs, targets = streams.window(k)
            assert torch.equal(targets, inputs + 1)
            counts.update(targets.flatten().tolist())
    assert counts == Counter(range(1, length))
    assert len(parts) <= 2
    if len(parts) == 2:
        last = parts[0].window(len(parts[0]) - 1)
        assert parts[1].window(0)[0][0, 0] == last[1][-1, -1]


@pytest.mark.parametrize("window", [1, 7, 62, 63, 64])
def test_one_stream_leaves_nothing_out(window):
    streams = Streams(np.arange(64, dtype=np.uint16), 1, window)
    targets = torch.cat([streams.window(k)[1] for k in range(len(streams))])
    assert targets[:, 0].tolist() == list(range(1, 64))


class _Unshifted(Streams):
    def window(self, k, rows=None):
        inputs, _ = super().window(k, rows)
        return inputs, inputs


class _Overlapping(Streams):
    def window(self, k, rows=None):
        inputs, targets = super().window(k, rows)
        inputs[:, 1:] -= 1
        targets[:, 1:] -= 1
        return inputs, targets


class _LastDropped(Streams):
    def __len__(self):
        return super().__len__() - 1


class _Shuffled(Streams):
    def window(self, k, rows=None):
        return super().window(len(self) - 1 - k if len(self) == 7 else k, rows)


@pytest.mark.parametrize("mutant", [_Unshifted, _Overlapping, _LastDropped, _Shuffled])
def test_the_oracle_kills_wrong_streams(mutant):
    tokens = np.arange(3 * 21 + 1)
    assert _problems(Streams(tokens, 3, 3), tokens, 3, 3) is None
    assert _problems(mutant(tokens, 3, 3), tokens, 3, 3) is not None


@given(batch_size=st.integers(1, 9), start=st.integers(-9, 9), stop=st.integers(-9, 9), k=st.integers(0, 4))
def test_rows_are_the_share_of_one_process(batch_size, start, stop, k):
    streams = Streams(np.arange(100), batch_size, -(-(99 // batch_size) // 5))
    rows = slice(start, stop)
    k = min(k, len(streams) - 1)
    for whole, share in zip(streams.window(k), streams.window(k, rows), strict=True):
        assert torch.equal(share, whole[:, list(range(batch_size))[rows]])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_a_memory_mapped_source_gives_own_int64_tensors(tmp_path, dtype):
    np.arange(50, dtype=dtype).tofile(tmp_path / "tokens")
    tokens = np.memmap(tmp_path / "tokens", dtype, "r")
    for batch_size in (1, 4):
        for tensor in Streams(tokens, batch_size, 5).window(1):
            assert tensor.dtype == torch.int64
            assert tensor.is_contiguous()
            tensor.zero_()
    assert tokens.tolist() == list(range(50))


def test_a_window_follows_from_its_number_alone():
    streams = Streams(np.arange(100), 3, 7)
    once = [streams.window(k) for k in range(len(streams))]
    for k in (4, 0, 2, 4, 3):
        assert all(torch.equal(a, b) for a, b in zip(streams.window(k), once[k], strict=True))


@pytest.mark.parametrize("k", [-1, 5, 10**9])
def test_a_window_that_is_not_there_is_refused(k):
    with pytest.raises(DataError, match=f"no window {k}: expected 0 to 4"):
        Streams(np.arange(26), 1, 5).window(k)


@pytest.mark.parametrize(("batch_size", "window"), [(0, 5), (-1, 5), (5, 0), (2.0, 5), (5, None)])
def test_sizes_below_one_and_no_sizes_are_refused(batch_size, window):
    for make in (Streams, cover):
        with pytest.raises(ConfigError, match="at least 1, got"):
            make(np.arange(9), batch_size, window) if window else make(np.arange(9), 5, window)


@pytest.mark.parametrize("tokens", [np.zeros((3, 3), np.uint8), np.zeros(9), np.zeros(9, bool)])
def test_what_is_no_row_of_integers_is_refused(tokens):
    with pytest.raises(ShapeError, match=r"expected tokens \(N,\)"):
        Streams(tokens, 1, 1)


@pytest.mark.parametrize(
    ("length", "says"), [(0, "longer text$"), (1, "longer text$"), (8, "batch size of 7 or less$")]
)
def test_too_few_tokens_are_refused_with_what_would_do(length, says):
    with pytest.raises(DataError, match=f"{length} tokens are too few for 8 streams.*9 are needed.*{says}"):
        Streams(np.arange(length), 8, 5)
