"""Loops, truncation and wrappers that are wrong on purpose. The proof must notice every one of them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from agreement import (
    check_gradients,
    check_neighbour,
    check_oracle,
    check_padding,
    check_same,
    check_seam,
    check_training,
    check_truncated,
    draw,
    draw_in_training,
    killed,
)
from catalogue import BY_NAME
from paths import (
    by_pieces,
    dropout_by_hand,
    in_chunks,
    weights_dropped_by_hand,
    zoneout_by_hand,
)
from recurra import cells, unroll
from recurra.cell import detach, map_state, where_rows

EVERYTHING = ("state", "lengths", "resets")


# --- loops ---

right = unroll.loop


def with_options(**changes: Callable[..., Any]) -> Callable[..., Any]:
    """The right loop on wrong arguments: each change sees all arguments by name."""

    def wrong(cell, x, state, context=None, **options):
        given = {"x": x, "state": state, "lengths": None, "resets": None} | options
        given |= {name: change(given) for name, change in changes.items() if given[name] is not None}
        return right(cell, given.pop("x"), given.pop("state"), context, **given)

    return wrong


def one_reset_left_out(given):
    """One that matters: not before the first step, and not in the padding."""
    resets, lengths = given["resets"].clone(), given["lengths"]
    ends = [len(resets)] * resets.shape[1] if lengths is None else lengths
    t, b = next((t, b) for t, b in resets.nonzero().tolist() if 0 < t < ends[b])
    resets[t, b] = False
    return resets


def one_step_late(given):
    late = torch.roll(given["resets"], 1, 0)
    late[0] = False
    return late


def reverse_over_padding(cell, x, state, context=None, *, reverse=False, resets=None, **options):
    if reverse:
        x, resets = x.flip(0), None if resets is None else resets.flip(0)
    y, state = right(cell, x, state, context, resets=resets, **options)
    return y.flip(0) if reverse else y, state


def state_after_the_padding(cell, x, state, context=None, *, lengths=None, **options):
    y, _ = right(cell, x, state, context, lengths=lengths, **options)
    return y, right(cell, x, state, context, **options)[1]


def outputs_in_the_padding(cell, x, state, context=None, *, lengths=None, **options):
    _, final = right(cell, x, state, context, lengths=lengths, **options)
    return right(cell, x, state, context, **options)[0], final


def detached_at_each_step(cell, x, state, context=None, *, resets=None, lengths=None, reverse=False, **rest):
    ys = []
    for t in range(len(x)):
        now = None if resets is None else resets[t : t + 1]
        left = None if lengths is None else (lengths - t).clamp(0, 1)
        y, state = right(cell, x[t : t + 1], detach(state), context, resets=now, lengths=left, **rest)
        ys.append(y)
    return torch.cat(ys), state


def rows_that_touch(cell, x, state, context=None, **options):
    return right(cell, x + 0 * x.mean(dim=1, keepdim=True), state, context, **options)


def careless(choose, fill):
    """The loop, but with its own way to fill the padding and to choose between a row's old and new values."""

    def wrong(cell, x, state, context=None, *, lengths=None, resets=None, fresh=None, reverse=False):
        T = len(x)
        active = torch.arange(T)[:, None] < lengths
        x = fill(active[:, :, None], x)
        ys = {}
        for t in reversed(range(T)) if reverse else range(T):
            if resets is not None:
                state = where_rows(resets[t] & active[t], fresh, state)
            new, y = cell(state, x[t], context)
            state = map_state(partial(choose, active[t]), new, state)
            ys[t] = choose(active[t], y, torch.zeros_like(y))
        return torch.stack([ys[t] for t in range(T)]), state

    return wrong


def by_where(active, new, old):
    return torch.where(active.view(-1, *[1] * (new.dim() - 1)), new, old)


def by_product(active, new, old):
    share = active.view(-1, *[1] * (new.dim() - 1)).to(new.dtype)
    return share * new + (1 - share) * old


def zero_filled(active, x):
    return torch.where(active, x, torch.zeros_like(x))


def unfilled(active, x):
    return x


def case_of(*options: str, name: str = "LSTM"):
    return draw(BY_NAME[name], 6, 4, 3, 4, *options)


def by_rows_and_pieces(case):
    check_same(by_pieces, case)


def in_three_chunks(case):
    check_same(in_chunks(2, 3), case)


short = with_options(lengths=lambda given: (given["lengths"] - 1).clamp(min=0))
long = with_options(lengths=lambda given: (given["lengths"] + 1).clamp(max=len(given["x"])))
no_lengths = with_options(lengths=lambda given: None)
no_resets = with_options(resets=lambda given: None)
no_reverse = with_options(reverse=lambda given: False)
no_first_state = with_options(state=lambda given: given["fresh"])
no_gradient_to_x = with_options(x=lambda given: given["x"].detach())
resets_to_the_state_given = with_options(fresh=lambda given: given["state"])
reset_skipped = with_options(resets=one_reset_left_out)
reset_late = with_options(resets=one_step_late)
chosen_by_product = careless(by_product, unfilled)
not_filled = careless(by_where, unfilled)
zeros_filled = careless(by_where, zero_filled)

LOOPS = [
    ("mask one step short", short, check_oracle, case_of(*EVERYTHING)),
    ("mask one step short", short, by_rows_and_pieces, case_of("lengths")),
    ("mask one step long", long, check_oracle, case_of("lengths")),
    ("lengths ignored", no_lengths, by_rows_and_pieces, case_of("lengths", "reverse")),
    ("lengths ignored", no_lengths, check_padding, case_of("lengths")),
    ("a reset skipped", reset_skipped, check_oracle, case_of("resets")),
    ("a reset skipped", reset_skipped, by_rows_and_pieces, case_of(*EVERYTHING)),
    ("resets ignored", no_resets, check_oracle, case_of("resets", "reverse")),
    ("resets one step late", reset_late, check_oracle, case_of("resets")),
    ("resets one step late", reset_late, in_three_chunks, case_of("resets")),
    ("resets to the state given", resets_to_the_state_given, check_oracle, case_of("state", "resets")),
    ("reverse over the padding", reverse_over_padding, check_oracle, case_of("lengths", "reverse")),
    ("reverse over the padding", reverse_over_padding, check_padding, case_of("lengths", "reverse")),
    ("reverse ignored", no_reverse, check_oracle, case_of("reverse")),
    ("final state after the padding", state_after_the_padding, check_oracle, case_of("lengths")),
    ("outputs in the padding", outputs_in_the_padding, check_oracle, case_of("lengths")),
    ("outputs in the padding", outputs_in_the_padding, check_padding, case_of("lengths")),
    ("initial state ignored", no_first_state, check_oracle, case_of("state")),
    ("initial state ignored", no_first_state, in_three_chunks, case_of()),
    ("no gradient through time", detached_at_each_step, check_oracle, case_of(*EVERYTHING)),
    ("no gradient through time", detached_at_each_step, check_gradients, case_of("state")),
    ("no gradient to x", no_gradient_to_x, check_oracle, case_of()),
    ("rows that touch", rows_that_touch, check_neighbour, case_of(*EVERYTHING)),
    ("padding chosen by product", chosen_by_product, check_padding, case_of("lengths")),
    ("padding not filled", not_filled, check_padding, case_of("lengths")),
    ("padding filled with zeros", zeros_filled, check_padding, case_of("lengths", name="user: Direction")),
]


@pytest.mark.parametrize(
    ("wrong", "check", "case"), [pytest.param(*row[1:], id=f"{row[0]}, {row[2].__name__}") for row in LOOPS]
)
def test_a_wrong_loop_is_noticed(wrong, check, case, monkeypatch):
    check(case)
    monkeypatch.setattr(unroll, "loop", wrong)
    killed(check, case)


def forgetful_chunks(case):
    """Chunks that each begin with the state that the first one began with."""
    rnn = unroll.Recurrent(case.cell, backend="loop")
    parts = [rnn(case.x[span], case.state) for span in (slice(0, 2), slice(2, None))]
    return torch.cat([y for y, _ in parts]), parts[-1][1]


def chunks_cut_off(case):
    """Chunks that carry their state without its gradient."""
    rnn = unroll.Recurrent(case.cell, backend="loop")
    y_1, state = rnn(case.x[:2], case.state)
    y_2, state = rnn(case.x[2:], detach(state))
    return torch.cat([y_1, y_2]), state


@pytest.mark.parametrize("wrong", [forgetful_chunks, chunks_cut_off])
def test_chunks_that_do_not_carry_everything_are_noticed(wrong):
    killed(check_same, wrong, case_of("state"))


# --- truncation ---


def windows(x, window):
    return [slice(start, min(start + window, len(x))) for start in range(0, len(x), window)]


def never_carried(rnn, x, window, state=None, **options):
    for span in windows(x, window):
        yield span, *rnn(x[span], state)


def cut_one_step_early(rnn, x, window, state=None, **options):
    for span in windows(x, window):
        y, state = rnn(x[span][:-1], state)
        last, state = rnn(x[span][-1:], detach(state))
        yield span, torch.cat([y, last]), state
        state = detach(state)


right_truncated = unroll.truncated


def cut_one_step_late(rnn, x, window, state=None, **options):
    return right_truncated(rnn, x, window + 1, state, **options)


@pytest.mark.parametrize("wrong", [never_carried, cut_one_step_early, cut_one_step_late])
def test_truncation_at_the_wrong_place_is_noticed(wrong, monkeypatch):
    case = case_of("state")
    check_truncated(case, 3)
    monkeypatch.setattr(unroll, "truncated", wrong)
    killed(check_truncated, case, 3)


def test_truncation_that_never_cuts_is_noticed(monkeypatch):
    case = case_of("state")
    check_seam(case, 3)
    monkeypatch.setattr(unroll, "detach", lambda state: state)
    killed(check_seam, case, 3)
    killed(check_truncated, case, 3)


# --- wrappers in training ---


class MaskEachStep(cells.VariationalDropout):
    def step(self, state, x, context=None):
        return super().step(state, x, self.draw_context(len(x)))


class UnscaledMask(cells.VariationalDropout):
    def draw_context(self, batch_size, context=None):
        on_x, on_y, inner = super().draw_context(batch_size, context)
        return (on_x > 0).double(), on_y, inner


class OutputNotMasked(cells.VariationalDropout):
    def step(self, state, x, context=None):
        return super().step(state, x, context and (context[0], None, context[2]))


class WrongWayZoneout(cells.Zoneout):
    """Keeps what it should renew."""

    def step(self, state, x, context=None):
        wrong = cells.Zoneout(self.cell, tuple(1 - share for share in self.shares))
        return wrong.train(self.training).step(state, x, context)


class ZoneoutUnseen(cells.Zoneout):
    """Shows its output as it was before zoneout."""

    def step(self, state, x, context=None):
        new, _ = super().step(state, x, context)
        return new, self.cell(state, x, context)[1]


class MaskOnce(cells.Zoneout):
    """Keeps the same entries at every step."""

    def step(self, state, x, context=None):
        torch.manual_seed(11)
        return super().step(state, x, context)


class UnscaledWeights(cells.WeightDrop):
    def draw_context(self, batch_size, context=None):
        dropped, inner = super().draw_context(batch_size, context)
        return {name: (1 - self.share) * value for name, value in dropped.items()}, inner


class WeightsEachStep(cells.WeightDrop):
    def step(self, state, x, context=None):
        return super().step(state, x, self.draw_context(len(x)))


@pytest.mark.parametrize(
    ("by_hand", "kind", "share"),
    [
        (dropout_by_hand, MaskEachStep, (0.4, 0.3)),
        (dropout_by_hand, UnscaledMask, (0.4, 0.3)),
        (dropout_by_hand, OutputNotMasked, (0.4, 0.3)),
        (zoneout_by_hand, MaskOnce, (0.4,)),
        (zoneout_by_hand, WrongWayZoneout, ((0.4, 0.3),)),
        (zoneout_by_hand, ZoneoutUnseen, (0.4,)),
        (weights_dropped_by_hand, UnscaledWeights, (0.4,)),
        (weights_dropped_by_hand, WeightsEachStep, (0.4,)),
    ],
)
def test_a_wrapper_that_draws_wrongly_is_noticed(by_hand, kind, share):
    case = draw_in_training(lambda i, h: kind.__base__(cells.LSTM(i, h), *share), "state")
    check_training(by_hand, case)
    wrong = kind(case.cell.cell, *share).train()
    killed(check_training, by_hand, replace(case, cell=wrong))


@pytest.mark.parametrize("kind", [WrongWayZoneout, ZoneoutUnseen])
def test_a_zoneout_that_is_wrong_in_evaluation_is_noticed(kind):
    case = case_of(name="Zoneout")
    wrong = kind(case.cell.cell, case.cell.shares).eval()
    killed(check_oracle, replace(case, cell=wrong))
