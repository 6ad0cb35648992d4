"""Hoisted loops that are wrong on purpose. The comparison with the reference loop must notice every one of them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agreement import assert_agree, draw, killed, record
from catalogue import BY_NAME
from paths import by_hoisted, by_recurrent
from recurra import cells
from recurra.compiler import door, hoisted


def a_mask_one_step_late(monkeypatch):
    right = door.fill_padding

    def wrong(x, lengths):
        x, active = right(x, lengths)
        return x, torch.cat([torch.ones_like(active[:1]), active[:-1]])

    monkeypatch.setattr(door, "fill_padding", wrong)


def without_masks_backward(name: str):
    def change(monkeypatch):
        right = hoisted._loop_backward

        def wrong(call, *rest):
            right(replace(call, **{name: None}), *rest)

        monkeypatch.setattr(hoisted, "_loop_backward", wrong)

    return change


def backward_in_the_order_of_time(monkeypatch):
    right = hoisted._loop_backward
    monkeypatch.setattr(
        hoisted, "_loop_backward", lambda call, *rest: right(replace(call, reverse=not call.reverse), *rest)
    )


def no_gradient_for_the_fresh_state(monkeypatch):
    right = hoisted._loop_backward

    def wrong(call, compiled, values, carried, begun):
        right(call, compiled, values, carried, begun)
        begun[:] = [None] * len(begun)

    monkeypatch.setattr(hoisted, "_loop_backward", wrong)


def steps_and_rows_confused(monkeypatch):
    right = hoisted.Values.steps

    def wrong(self, node):
        parts = right(self, node)
        return torch.stack(list(parts)).transpose(0, 1).reshape(len(parts), *parts[0].shape).unbind(0)

    monkeypatch.setattr(hoisted.Values, "steps", wrong)


def sums_over_time_left_out(monkeypatch):
    right = hoisted.Values.total
    monkeypatch.setattr(
        hoisted.Values,
        "total",
        lambda self, node: self.steps(node)[-1] if self._values[node][0] == "rows" else right(self, node),
    )


def context_spread_the_wrong_way(monkeypatch):
    right = hoisted.Values.batched

    def wrong(self, node):
        form, value = self._values[node]
        if form == "once" and self.rows[node] is not None:
            return value.repeat_interleave(self.run.T, self.rows[node].axis)
        return right(self, node)

    monkeypatch.setattr(hoisted.Values, "batched", wrong)


@pytest.mark.parametrize(
    ("mutate", "name"),
    [
        (a_mask_one_step_late, "LSTM"),
        (without_masks_backward("active"), "LSTM"),
        (without_masks_backward("resets"), "LSTM"),
        (backward_in_the_order_of_time, "GRU"),
        (no_gradient_for_the_fresh_state, "LearnedInitialState"),
        (steps_and_rows_confused, "LSTM"),
        (sums_over_time_left_out, "LSTM"),
        (context_spread_the_wrong_way, "masked"),
    ],
)
def test_a_hoisted_loop_that_is_wrong_is_told_apart(mutate, name, monkeypatch):
    class Masked(cells.MinGRU):
        """Its context is a mask with a row for each row of the batch."""

        def step(self, state, x, context=None):
            return super().step(state, x * context[:, 0, :3])

    case = draw(BY_NAME["LSTM" if name == "masked" else name], 6, 4, 3, 4, "lengths", "resets")
    if name == "masked":
        case = draw(replace(BY_NAME["MinGRU"], make=Masked, memory=True), 6, 4, 3, 4, "lengths", "resets")
    # The last row is active at every step; here it begins afresh in the middle.
    case.resets[3, -1] = True
    assert_agree(record(by_hoisted, case), record(by_recurrent, case), 1e-12)
    mutate(monkeypatch)
    killed(lambda: assert_agree(record(by_hoisted, case), record(by_recurrent, case), 1e-12))
