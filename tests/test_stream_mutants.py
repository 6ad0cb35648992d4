"""Streams that are wrong on purpose. The checks of test_stream must notice every one of them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import pytest

import paths
from agreement import check_streamed, draw, killed
from catalogue import BY_NAME
from paths import streamed
from recurra.cell import map_state
from recurra.stream import Stream
from test_stream import (
    check_errors_change_nothing,
    check_independent_copies,
    check_kept_and_restored,
    check_reset_rows,
    check_rows_apart,
)


class ResetsNothing(Stream):
    def reset(self, rows=None):
        pass


class ResetsAll(Stream):
    def reset(self, rows=None):
        super().reset()


class ResetsTheOthers(Stream):
    def _mask(self, rows, state):
        return ~super()._mask(rows, state)


class Forgets(Stream):
    def push(self, x):
        y = super().push(x)
        self.reset()
        return y


class RestoresNothing(Stream):
    def restore(self, state):
        super().restore(state)
        self._state = self._fresh()


class HandsOutItsState(Stream):
    def snapshot(self):
        return self._state


class TakesWhatIsGiven(Stream):
    def restore(self, state):
        self._state = state


class ShowsItsState(Stream):
    def push(self, x):
        super().push(x)
        return self._state


class StepsBeforeChecking(Stream):
    def push(self, x):
        self._state = map_state(lambda leaf: leaf * 0.5, self._state)
        return super().push(x)


class MixesRows(Stream):
    def push(self, x):
        return super().push(x + 0 * x.sum())


class KeepsNaN(Stream):
    """Resets by multiplying with zero."""

    def reset(self, rows=None):
        if rows is not None:
            mask = self._mask(rows, self._state)
            self._state = map_state(
                lambda leaf: leaf * (~mask).view(-1, *[1] * (leaf.dim() - 1)).to(leaf.dtype), self._state
            )


@pytest.mark.parametrize(
    ("check", "kind"),
    [
        (check_reset_rows, ResetsNothing),
        (check_reset_rows, ResetsAll),
        (check_reset_rows, ResetsTheOthers),
        (check_kept_and_restored, RestoresNothing),
        (check_independent_copies, HandsOutItsState),
        (check_independent_copies, TakesWhatIsGiven),
        (check_independent_copies, ShowsItsState),
        (check_errors_change_nothing, StepsBeforeChecking),
        (check_errors_change_nothing, TakesWhatIsGiven),
        (check_rows_apart, MixesRows),
        (check_rows_apart, KeepsNaN),
    ],
)
def test_a_wrong_stream_is_noticed(check, kind):
    killed(check, kind)


@pytest.mark.parametrize("kind", [Forgets, ResetsNothing, ResetsAll, ResetsTheOthers])
def test_a_wrong_stream_does_not_give_what_one_shot_gives(kind, monkeypatch):
    case = draw(BY_NAME["LSTM"], 5, 3, 3, 4, "state", "resets")
    check_streamed(streamed, case)
    monkeypatch.setattr(paths, "Stream", kind)
    killed(check_streamed, streamed, case)
