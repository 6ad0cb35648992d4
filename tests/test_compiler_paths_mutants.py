"""Faster paths that are wrong on purpose. The comparison with the reference loop must notice every one of them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import plain
from agreement import assert_agree, draw, killed, record
from catalogue import BY_NAME, Entry
from faster import path_of
from paths import by_recurrent
from recurra import cells
from recurra.cell import Cell
from recurra.compiler import assemble, autograd, door, eager, fuse, hoisted, memory, native
from recurra.compiler.eager import EagerLoop
from recurra.compiler.ir import Op
from recurra.compiler.lower import Lowering
from recurra.compiler.native import NativeLoop
from recurra.compiler.plan import Plan
from recurra.compiler.rows import Rows
from recurra.compiler.segment import Segment

_aten = torch.ops.aten


class Masked(cells.MinGRU):
    """Its context is a mask with a row for each row of the batch."""

    def step(self, state, x, context=None):
        return super().step(state, x * context[:, 0, :3])


class Sinking(Cell):
    """Takes the halves of a difference of two things that no state is in, and shows one of two that it is in."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.one, self.two = nn.Linear(input_size, hidden_size), nn.Linear(input_size, hidden_size)
        self.back = nn.Linear(hidden_size, hidden_size)

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.output_size)

    def step(self, state, x, context=None):
        left, right = (self.one(x) - torch.sigmoid(self.two(x))).chunk(2, 1)
        h = torch.tanh(torch.cat([right, left], 1) + self.back(state))
        return h, h - torch.sigmoid(2 * h)


class Dividing(cells.Vanilla):
    """Shows a product of its state, divided by what is nothing where the state is."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.shown = nn.Linear(hidden_size, hidden_size, bias=False)

    def step(self, state, x, context=None):
        h, _ = super().step(state, x)
        shown = self.shown(h)
        return h, shown / (shown * shown).sum(1, keepdim=True)


ENTRIES = {
    **BY_NAME,
    "dividing": replace(BY_NAME["Vanilla"], make=Dividing),
    "masked": replace(BY_NAME["MinGRU"], make=Masked, memory=True),
    "sinking": Entry("sinking", Sinking, plain.lstm),
}


def changed(owner, name, wrong):
    """The function, given the right one and what it is called with."""
    right = getattr(owner, name)

    def change(*args, **named):
        return wrong(right, *args, **named)

    return lambda monkeypatch: monkeypatch.setattr(owner, name, change)


# --- the door and the hoisted loop ---


def a_mask_one_step_late(right, x, lengths):
    x, active = right(x, lengths)
    return x, torch.cat([torch.ones_like(active[:1]), active[:-1]])


def without(mask):
    return lambda right, self, call, *rest: right(self, replace(call, **{mask: None}), *rest)


def in_the_order_of_time(right, self, call, *rest):
    return right(self, replace(call, reverse=not call.reverse), *rest)


def no_gradient_of_the_fresh_state(right, self, call, operands, gradient):
    found = right(self, call, operands, gradient)
    return [*found[: len(gradient)], *[None] * len(gradient), *found[2 * len(gradient) :]]


def steps_and_rows_confused(right, value, rows, T):
    parts = right(value, rows, T)
    return torch.stack(list(parts)).transpose(0, 1).reshape(len(parts), *parts[0].shape).unbind(0)


def only_the_last_step(right, total):
    return lambda value, T, axis, apart: eager.steps(value, Rows(axis, apart, apart), T)[-1]


def spread_the_wrong_way(right, value, T, axis, apart):
    return value.repeat_interleave(T, axis)


# --- native loops ---


def the_carry_after_each_step(right, call, after, *rest):
    return after[-call.T * call.B :]


def the_carry_before_of_the_other_direction(right, call, *rest):
    return right(replace(call, reverse=not call.reverse), *rest)


def the_carry_before_without_resets(right, call, after, begin, fresh, both):
    return right(call, after, begin, None, both)


def the_carry_before_of_full_rows(right, call, *rest):
    return right(replace(call, lengths=None), *rest)


def resets_of_the_step_itself(right, self, kernel, call, values, state, fresh, resets, reverse, *rest):
    resets = resets if reverse == call.reverse else call.resets
    return right(self, kernel, call, values, state, fresh, resets, reverse, *rest)


def backward_from_the_first_step(right, self, kernel, call, values, state, fresh, resets, reverse, *rest):
    return right(self, kernel, call, values, state, fresh, resets, call.reverse, *rest)


def backward_through_the_padding(right, self, kernel, call, values, state, fresh, resets, reverse, *rest):
    call = call if reverse == call.reverse else replace(call, lengths=None)
    return right(self, kernel, call, values, state, fresh, resets, reverse, *rest)


def never_begun_rows_take_a_step(right, self, call, *rest):
    return right(self, replace(call, lengths=call.lengths.clamp(min=1)), *rest)


def no_first_reset(right, call):
    return torch.zeros_like(right(call))


# --- the plan ---


def without_the_gradient_of_the_first_state(right, self, *rest):
    right(self, *rest)
    self.first = []


def nothing_in_the_padding(monkeypatch):
    monkeypatch.setattr(Plan, "fills", False)


def a_weight_forgotten(right, self, *rest):
    right(self, *rest)
    self.places = self.places[:-1]


def saved_values_in_another_order(right, call, tensors, saved, *rest):
    saved = list(saved)
    alike = [k for k, value in enumerate(saved) if value.shape == saved[-1].shape]
    saved[alike[0]], saved[-1] = saved[-1], saved[alike[0]]
    return right(call, tensors, saved, *rest)


# --- memory ---


def always_the_first_part(right, self, value, span, T):
    return right(self, value, slice(0, span.stop - span.start), T)


def without_the_carried_gradient(right, call, tensors, *rest):
    found = right(call, tensors, *rest)
    count = len(call.plan.step.old)
    return [*found[: -2 * count], *(torch.zeros_like(f) for f in found[-2 * count : -count]), *found[-count:]]


def the_state_of_the_next_part(right, call, tensors):
    y, finals, kept = right(call, tensors)
    size = 1 + len(call.plan.step.old)
    return y, finals, [*kept[size:], *kept[:size]]


def parts_in_the_other_direction(right, plan, T, B, reverse):
    return right(plan, T, B, not reverse)


# --- what loops take over ---


def absorbed_with_operands_swapped(right, *rest):
    taken, ahead = right(*rest)
    for node in taken:
        if node.target is _aten.sub.Tensor:
            node.args = node.args[::-1]
    return taken, ahead


def sunk_with_operands_swapped(right, self, node):
    found = right(self, node)
    swapped = found is not None and node.target is _aten.sub.Tensor
    return self.b.apply(Op.NEG, found) if swapped else found


both = ("lengths", "resets")
HOISTED = {
    "a mask one step late": (changed(door, "fill_padding", a_mask_one_step_late), "LSTM"),
    "backward without lengths": (changed(EagerLoop, "backward", without("active")), "LSTM"),
    "backward without resets": (changed(EagerLoop, "backward", without("resets")), "LSTM"),
    "backward in the order of time": (changed(EagerLoop, "backward", in_the_order_of_time), "GRU"),
    "no gradient of the fresh state": (
        changed(EagerLoop, "backward", no_gradient_of_the_fresh_state),
        "LearnedInitialState",
    ),
    "steps and rows confused": (changed(eager, "steps", steps_and_rows_confused), "LSTM"),
    "sums over time left out": (changed(assemble, "summing", only_the_last_step), "LSTM"),
    "context spread the wrong way": (changed(assemble, "spread", spread_the_wrong_way), "masked"),
}
# A change, a cell, options of the case, the memory mode.
NATIVE = {
    "the carry after each step": (changed(native, "_before", the_carry_after_each_step), "LSTM", (), "store"),
    "the carry after each step, by resets": (
        changed(native, "_before", the_carry_after_each_step),
        "LSTM",
        ("resets",),
        "store",
    ),
    "the carry of the other direction": (
        changed(native, "_before", the_carry_before_of_the_other_direction),
        "GRU",
        ("resets",),
        "store",
    ),
    "the carry before a reset": (
        changed(native, "_before", the_carry_before_without_resets),
        "LSTM",
        ("resets",),
        "store",
    ),
    "the carry before the last step of a row": (
        changed(native, "_before", the_carry_before_of_full_rows),
        "LSTM",
        ("state", "lengths", "reverse"),
        "store",
    ),
    "resets not moved": (changed(NativeLoop, "_launch", resets_of_the_step_itself), "LSTM", both, "store"),
    "backward from the first step": (changed(NativeLoop, "_launch", backward_from_the_first_step), "GRU", (), "store"),
    "backward through the padding": (
        changed(NativeLoop, "_launch", backward_through_the_padding),
        "LSTM",
        ("state", "lengths"),
        "store",
    ),
    "rows that never began take a step": (
        changed(NativeLoop, "forward", never_begun_rows_take_a_step),
        "LSTM",
        ("state", "lengths"),
        "store",
    ),
    "no reset before the first step": (
        changed(hoisted.Call, "first_reset", no_first_reset),
        "LSTM",
        ("state", "resets"),
        "store",
    ),
    "no gradient of the fresh state": (
        changed(NativeLoop, "backward", no_gradient_of_the_fresh_state),
        "LearnedInitialState",
        both,
        "store",
    ),
    "no gradient of the first state": (
        changed(Plan, "__init__", without_the_gradient_of_the_first_state),
        "LSTM",
        ("state",),
        "store",
    ),
    "a weight without gradient": (changed(Plan, "__init__", a_weight_forgotten), "LSTM", (), "store"),
    "nothing in the padding": (nothing_in_the_padding, "dividing", ("lengths",), "store"),
    "values in another order": (changed(memory, "backward", saved_values_in_another_order), "LSTM", (), "store"),
    "a mask one step late": (changed(door, "fill_padding", a_mask_one_step_late), "LSTM", both, "store"),
    "sums over time left out": (changed(assemble, "summing", only_the_last_step), "LSTM", both, "store"),
    "always the first part": (changed(Rows, "steps", always_the_first_part), "LSTM", (), "recompute"),
    "parts without the carried gradient": (
        changed(hoisted, "backward", without_the_carried_gradient),
        "LSTM",
        both,
        "recompute",
    ),
    "parts without the carried gradient, run again": (
        changed(hoisted, "backward", without_the_carried_gradient),
        "LSTM",
        both,
        "sqrt",
    ),
    "parts from another's state": (changed(memory, "forward", the_state_of_the_next_part), "LSTM", (), "sqrt"),
    "parts in the other direction": (changed(memory, "parts_of", parts_in_the_other_direction), "LSTM", (), "sqrt"),
    "absorbed with operands swapped": (changed(fuse, "_taken", absorbed_with_operands_swapped), "sinking", (), "store"),
    "sunk with operands swapped": (changed(Lowering, "sink", sunk_with_operands_swapped), "sinking", (), "store"),
}


@pytest.mark.parametrize("name", HOISTED)
def test_a_hoisted_loop_that_is_wrong_is_told_apart(name, monkeypatch):
    change, cell = HOISTED[name]
    case = draw(ENTRIES[cell], 6, 4, 3, 4, *both)
    # The last row is active at every step; here it begins afresh in the middle.
    case.resets[3, -1] = True
    compare(change, case, path_of("hoisted"), monkeypatch)


@pytest.mark.parametrize("name", NATIVE)
def test_native_code_that_is_wrong_is_told_apart(name, monkeypatch):
    change, cell, options, mode = NATIVE[name]
    case = draw(ENTRIES[cell], 6, 4, 3, 4, *options)
    if case.resets is not None:
        case.resets[3, -1] = case.resets[0, -1] = True
    if mode == "recompute":
        monkeypatch.setattr(memory, "_ROWS", 8)
    # Scripts have mutants of their own.
    monkeypatch.setattr(Segment, "run", lambda self, *given: self.one_by_one(*given))
    compare(change, case, path_of("compiled", mode), monkeypatch)


def compare(change, case, path, monkeypatch) -> None:
    expected = record(by_recurrent, case)
    assert_agree(record(path, case), expected, 1e-12)
    change(monkeypatch)
    killed(lambda: assert_agree(record(path, case), expected, 1e-12))


def test_the_door_to_autograd_is_what_the_tests_go_through(monkeypatch):
    """No path answers by itself where the operation with a backward pass of its own is taken away."""
    monkeypatch.setattr(autograd, "_apply", lambda *rest: (_ for _ in ()).throw(AssertionError("asked")))
    case = draw(ENTRIES["LSTM"], 2, 2, 3, 4)
    for backend in ("hoisted", "compiled", "auto"):
        with pytest.raises(AssertionError, match="asked"):
            record(path_of(backend), case)
