"""Every cell by every path that a sequence can take: all of them agree, gradients included.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agreement import (
    assert_agree,
    check_gradients,
    check_neighbour,
    check_padding,
    check_same,
    check_seam,
    check_streamed,
    check_truncated,
    draw,
    record,
)
from catalogue import BY_NAME, CATALOGUE
from paths import (
    Case,
    as_one_row_streams,
    by_pieces,
    by_plain,
    by_recurrent,
    in_chunks,
    streamed,
    truncated,
)
from recurra.unroll import Bidirectional

every_cell = pytest.mark.parametrize("entry", CATALOGUE, ids=str)
both_directions = pytest.mark.parametrize("direction", ["forward", "reverse"])


@both_directions
@every_cell
@settings(max_examples=5)
@given(cuts=st.lists(st.integers(0, 9), max_size=4))
def test_any_split_with_the_state_carried_equals_one_shot(entry, direction, cuts):
    case = draw(entry, 9, 3, 3, 4, "state", "lengths", "resets", direction)
    check_same(in_chunks(*cuts), case)


@given(cuts=st.lists(st.integers(0, 20), max_size=12), data=st.data())
def test_any_split_of_any_rows_equals_one_shot(cuts, data):
    T, B = 20, 3
    case = draw(BY_NAME["Zoneout"], T, B, 3, 2, "state", "resets")
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B), label="lengths"))
    check_same(in_chunks(*cuts), replace(case, lengths=lengths))


@every_cell
def test_one_step_at_a_time_equals_one_shot(entry):
    check_same(in_chunks(*range(7)), draw(entry, 7, 3, 2, 3))


@pytest.mark.parametrize("path", [streamed, as_one_row_streams])
@pytest.mark.parametrize("options", ["", "state resets"])
@every_cell
def test_streams_give_what_one_shot_gives(entry, options, path):
    check_streamed(path, draw(entry, 7, 3, 3, 4, *options.split()))


@both_directions
@every_cell
def test_each_row_and_each_piece_equals_itself_run_alone(entry, direction):
    check_same(by_pieces, draw(entry, 8, 5, 3, 4, "state", "lengths", "resets", direction))
    check_same(by_pieces, draw(entry, 8, 5, 3, 4, "lengths", direction, seed=6))


@both_directions
@every_cell
def test_nan_in_the_padding_changes_no_bit(entry, direction):
    check_padding(draw(entry, 6, 4, 3, 4, "state", "lengths", "resets", direction))
    check_padding(draw(entry, 6, 4, 3, 4, "lengths", direction))


@both_directions
@every_cell
def test_nan_in_a_row_changes_no_bit_of_another(entry, direction):
    check_neighbour(draw(entry, 6, 4, 3, 4, "state", "resets", direction))
    check_neighbour(draw(entry, 6, 4, 3, 4, "lengths", direction), spoilt_row=3)


@both_directions
@pytest.mark.parametrize("options", ["state", "lengths", "state lengths resets"])
@every_cell
def test_gradients_are_those_of_numerical_differentiation(entry, options, direction):
    check_gradients(draw(entry, 3, 3, 3, 4, *options.split(), direction))


@pytest.mark.parametrize("window", [1, 3, 5])
@every_cell
def test_truncation_is_the_whole_cut_by_hand(entry, window):
    case = draw(entry, 8, 4, 3, 4, "state", "lengths", "resets")
    check_truncated(case, window)


@pytest.mark.parametrize("window", [8, 50])
@every_cell
def test_a_window_as_long_as_the_sequence_is_the_whole(entry, window):
    check_same(truncated(window), draw(entry, 8, 4, 3, 4, "state", "lengths", "resets"))


@every_cell
def test_no_gradient_crosses_the_seam_of_a_truncation(entry):
    check_seam(draw(entry, 6, 3, 3, 4, "state"), 3)


@dataclass
class Pair:
    """Two cases on one x, for the two directions."""

    ahead: Case
    back: Case

    @property
    def x(self):
        return self.ahead.x

    @property
    def wanted(self):
        return self.ahead.wanted | {f"back {n}": v for n, v in self.back.wanted.items() if n != "x"}


def draw_pair(entry, *options: str) -> Pair:
    ahead, back = draw(entry, 6, 4, 3, 4, *options), draw(entry, 6, 4, 3, 4, *options, seed=8)
    return Pair(ahead, replace(back, x=ahead.x, lengths=ahead.lengths, resets=ahead.resets, context=ahead.context))


def by_bidirectional(pair: Pair):
    ahead, back = pair.ahead, pair.back
    rnn = Bidirectional(ahead.cell, back.cell)
    state = None if ahead.state is None else (ahead.state, back.state)
    return rnn(ahead.x, state, lengths=ahead.lengths, resets=ahead.resets, context=ahead.context)


def by_plain_in_both_directions(pair: Pair):
    ends = None
    if pair.ahead.resets is not None:
        # A piece ends where, one step on, the next one of the same row begins.
        ends = torch.zeros_like(pair.ahead.resets)
        for b in range(ends.shape[1]):
            n = len(ends) if pair.ahead.lengths is None else int(pair.ahead.lengths[b])
            for t in range(n - 1):
                ends[t, b] = pair.ahead.resets[t + 1, b]
    y_ahead, ahead = by_plain(pair.ahead)
    y_back, back = by_plain(replace(pair.back, reverse=True, resets=ends))
    return torch.cat([y_ahead, y_back], dim=2), (ahead, back)


@pytest.mark.parametrize("options", ["", "lengths", "state lengths resets"])
@every_cell
def test_bidirectional_reads_each_row_from_both_of_its_ends(entry, options):
    pair = draw_pair(entry, *options.split())
    assert_agree(record(by_bidirectional, pair), record(by_plain_in_both_directions, pair), 1e-12)


def test_a_reset_in_the_padding_leaves_the_given_backward_state_alone():
    pair = draw_pair(BY_NAME["GRU"], "state", "lengths")
    padding = torch.arange(6)[:, None] >= pair.ahead.lengths
    marked = Pair(replace(pair.ahead, resets=padding), pair.back)
    assert_agree(record(by_bidirectional, marked), record(by_bidirectional, pair), 0.0)


def test_reverse_reads_a_row_from_its_own_last_step():
    case = draw(BY_NAME["LSTM"], 6, 4, 3, 4, "state", "lengths", "reverse")
    flipped = case.x.detach().clone()
    for b, n in enumerate(case.lengths.tolist()):
        flipped[:n, b] = flipped[:n, b].flip(0)
    y, final = by_recurrent(replace(case, x=flipped, reverse=False))
    y_reverse, final_reverse = by_recurrent(case)
    for b, n in enumerate(case.lengths.tolist()):
        torch.testing.assert_close(y_reverse[:n, b], y[:n, b].flip(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(final_reverse, final, rtol=0, atol=1e-12)
