"""Matrices in the state of a row, and attention: what the loops take over, and wrong sweeps told apart.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from catalogue import Entry
from invented_cells import foreign
from loop_programs import random_operands
from native import agree, program_of
from recurra import Recurrent, cells
from recurra.cell import Cell
from recurra.compiler import fuse, tidy
from recurra.compiler.assemble import product_over_time, product_with_same, spread
from recurra.compiler.build import Builder
from recurra.compiler.ir import Op
from recurra.compiler.llvm import body as body_module
from recurra.compiler.llvm import layout as layout_module
from recurra.compiler.llvm.kernel import Kernel
from recurra.compiler.llvm.stretches import Stretches
from recurra.compiler.passes import optimise
from recurra.compiler.plan import Plan
from recurra.compiler.regions import View, group
from test_compiler_segment import scripts_of, segments_of


class Attentive(Cell):
    """Sees what it attends to (Luong et al. 2015, section 3.3, input feeding), of a memory (B, S, H) as context."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size, self.H = input_size, hidden_size, hidden_size
        self.x = nn.Linear(input_size, hidden_size)
        self.u, self.v = nn.Linear(hidden_size, hidden_size), nn.Linear(2 * hidden_size, hidden_size)

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.H)

    def attend(self, h, context):
        share = torch.softmax(torch.bmm(context, h[:, :, None])[:, :, 0], 1)
        found = torch.bmm(share[:, None], context)[:, 0]
        return torch.tanh(self.v(torch.cat([h, found], 1)))

    def step(self, h, x, context=None):
        h = self.attend(torch.tanh(self.x(x) + self.u(h)), context)
        return h, h


class Looking(Attentive):
    """The same without input feeding: nothing of what it attends to goes into the next step."""

    def step(self, h, x, context=None):
        h = torch.tanh(self.x(x) + self.u(h))
        return h, self.attend(h, context)


def compiled(cell: Cell, context=None, T: int = 6, B: int = 3) -> tuple[Recurrent, Plan]:
    """A cell that has been run forward and backward, and its plan."""
    rnn = Recurrent(cell, backend="compiled")
    dtype = next(cell.parameters()).dtype
    y, _ = rnn(torch.randn(T, B, cell.input_size, dtype=dtype, requires_grad=True), context=context)
    y.sum().backward()
    return rnn, rnn._path._last


def written(plan: Plan) -> list[tuple[str, int]]:
    """Of every value that a pass writes for each row and step, how many numbers it has."""
    rows = plan.analysis.rows
    found = []
    for each in (*plan.ahead.stages, *plan.back.stages):
        nodes = each.outputs if each.native is None else each.native.gives
        for node in nodes:
            if node.meta["val"].numel() and rows.get(node) is not None:
                found.append((node.name, math.prod(node.meta["val"].shape) // node.meta["val"].shape[rows[node].axis]))
    return found


@pytest.mark.parametrize(
    "cell",
    [foreign("DeltaRule", 3, 16), foreign("HeadedDelta", 3, 16), Entry("", cells.MLSTM, None).build(3, 16)],
    ids=type,
)
def test_of_matrices_only_the_state_is_written(cell):
    _, plan = compiled(cell)
    large = [name for name, size in written(plan) if size >= 16 * 16]
    names = {node.name for node in (*plan.step.old, *plan.step.new)}
    gradients = {plan.step.gradient[node].name for node in plan.step.old}
    assert large
    assert set(large) <= names | gradients


def test_a_loop_that_takes_nothing_over_is_told_apart(monkeypatch):
    monkeypatch.setattr(fuse, "_taken", lambda *_: ([], []))
    with pytest.raises(AssertionError):
        test_of_matrices_only_the_state_is_written(foreign("DeltaRule", 3, 16))


def test_loops_of_matrices_are_part_of_one_call():
    rnn, _ = compiled(foreign("DeltaRule", 3, 16))
    assert scripts_of(rnn) == [True] * len(segments_of(rnn))
    rnn, _ = compiled(Attentive(3, 16), torch.randn(3, 9, 16, requires_grad=True))
    assert scripts_of(rnn) == [True] * len(segments_of(rnn)) == [True, True]


def test_the_gradient_of_a_memory_is_one_product():
    _, plan = compiled(Attentive(3, 16), torch.randn(3, 9, 16, requires_grad=True))
    graph = plan.back.whole.function.__self__.graph
    calls = [node.target for node in graph.nodes]
    assert calls.count(product_over_time) == 2
    assert torch.bmm not in calls


def test_the_gradients_of_weights_of_heads_are_one_product():
    _, plan = compiled(foreign("SharedHeads", 3, 16))
    calls = [node.target for node in plan.back.whole.function.__self__.graph.nodes]
    assert product_over_time in calls
    assert torch.bmm not in calls


@pytest.mark.parametrize(
    ("T", "B", "N", "K", "M"), [(5, 3, 4, 1, 6), (1, 2, 3, 2, 1), (4, 1, 1, 3, 2), (3, 0, 2, 1, 2)]
)
def test_a_product_over_time_is_the_sum_of_products(T, B, N, K, M):
    a, b = torch.randn(T, B, N, K, dtype=torch.float64), torch.randn(T, B, K, M, dtype=torch.float64)
    found = product_over_time(a.flatten(0, 1), b.flatten(0, 1), T)
    torch.testing.assert_close(found, (a @ b).sum(0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("T", "B", "N", "K", "M"), [(5, 3, 4, 1, 6), (1, 2, 3, 2, 1), (0, 2, 1, 3, 2), (3, 0, 2, 1, 2)]
)
def test_a_product_with_the_same_matrix_at_all_steps_is_one(T, B, N, K, M):
    a, b = torch.randn(T, B, N, K, dtype=torch.float64), torch.randn(B, K, M, dtype=torch.float64)
    expected = (a @ b).reshape(T * B, N, M)
    found = product_with_same(a.reshape(T * B, N, K), b, T, False)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    found = product_with_same(b.mT, a.mT.reshape(T * B, K, N), T, True)
    torch.testing.assert_close(found, expected.mT, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", ["hoisted", "compiled"])
def test_attention_outside_the_loop_copies_no_memory(backend):
    cell = Looking(3, 16).double()
    context = torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 3, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for way in (backend, "loop"):
        rnn = Recurrent(cell, backend=way)
        y, _ = rnn(x, context=context, lengths=torch.tensor([6, 0, 4]))
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, context, *cell.parameters()])])
        if way == backend:
            plan = rnn._path._last
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    parts = [part.whole.function.__self__.graph.nodes for part in (plan.ahead, plan.back)]
    calls = [node.target for part in parts for node in part]
    assert torch.bmm not in calls
    assert spread not in calls
    assert calls.count(product_with_same) == 4


# Choices that are always the same


class Chosen(Cell):
    """Takes the only entry of an axis, and where a mask of its own says so the other value."""

    input_size = output_size = 4

    def __init__(self):
        super().__init__()
        self.u = nn.Linear(4, 4)
        self.mask = torch.tensor([True, True, True, True])

    def initial_state(self, batch_size):
        return self.zeros(batch_size, 4)

    def step(self, h, x, context=None):
        h = torch.tanh(self.u(h)[:, :, None][:, :, 0] + x)
        return torch.where(self.mask, h, -h), h


def test_a_choice_is_made_once_unless_somebody_may_change_it():
    rnn, plan = compiled(Chosen())
    masks = [node for node in plan.step.graph.nodes if node.target is torch.ops.aten.where.self]
    assert masks
    assert not any(map(tidy._is_fixed, [node.args[0] for node in masks]))
    x = torch.randn(5, 2, 4)
    before = rnn(x)[0]
    rnn.cell.mask[1] = False
    torch.testing.assert_close(rnn(x)[0], Recurrent(rnn.cell, backend="loop")(x)[0])
    assert not torch.equal(rnn(x)[0], before)


# Sweeps


def test_a_region_of_matrices_is_swept_along_its_last_axis():
    plan = group(program_of("matrix_memory", 16))
    matrices = [region for region in plan.regions if region.width == 160]
    assert matrices
    assert {region.stretch for region in matrices} == {16}
    assert "region of width 160 in stretches of 16" in str(plan)
    assert not any(plan.view(k).features for k, _ in enumerate(plan.program.nodes))


def test_what_is_seen_in_another_way_is_gathered():
    whole = View(3, True, many=2, inner=3)
    assert whole.one_by_one(12).features == (0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5)
    assert whole.fits(3)
    assert whole.fits(1)
    assert not whole.fits(2)
    assert View(3, True, many=4).fits(2)


def test_a_broadcast_of_a_gather_or_of_a_broadcast_is_followed():
    program = program_of("matrix_memory", 9)
    agree(Kernel(optimise(nested()), np.float64), random_operands(nested(), 4, 3))
    assert any(node.op is Op.BROADCAST and node.inner == 9 for node in program.nodes)


def nested():
    b = Builder()
    h, x = b.carry(40), b.input(4)
    back = b.broadcast(b.gather(x, [3, 1, 2, 0]), 20, 2)
    again = b.broadcast(b.broadcast(x, 20), 40, 10)
    h = b.tanh(h * b.broadcast(back, 40) + again - b.broadcast(b.sum(h * again, 10, 10), 40, 10)[:40])
    return b.finish([b.slice(again, 5, 20), b.max(h, 8)], [h])


def wrong_middle(right, self, number, many, inner):
    return right(self, number, many + 1, inner)


def wrong_first(right, self, chunk):
    return self.code.plus(right(self, chunk), 1)


def no_neutral(right, self, place):
    return self.floats.splat(1.0)


def wrong_stretch(right, self, view, pointer, number):
    return right(self, view, pointer, self.code.number(0))


def first_step(right, self, place, partials, target):
    self.sweep = replace(self.sweep, chunks=1)
    right(self, place, partials, target)


WRONG = {
    "the wrong block": (Stretches, "_without_middle", wrong_middle),
    "a stretch that nobody takes": (Stretches, "_first", wrong_first),
    "sums that do not begin with zero": (body_module.Body, "neutral", no_neutral),
    "the first stretch for all": (Stretches, "_of_stretch", wrong_stretch),
    "sums of the first step alone": (Stretches, "finish", first_step),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_sweep_is_told_apart(name, monkeypatch):
    owner, method, wrong = WRONG[name]
    right = getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda self, *rest: wrong(right, self, *rest))
    kernel = Kernel(program_of("matrix_memory", 9), np.float64)
    with pytest.raises(AssertionError):
        agree(kernel, random_operands(kernel.program, 4, 3))


@pytest.mark.parametrize("steps", [1, 3, 100])
@pytest.mark.parametrize("H", [1, 8, 17])
def test_any_number_of_steps_gives_the_same(steps, H, monkeypatch):
    monkeypatch.setattr(layout_module, "_STEPS", steps)
    kernel = Kernel(program_of("matrix_memory", H), np.float64)
    for threads in (1, 2, 3):
        agree(kernel, random_operands(kernel.program, 4, 2, lengths=True, resets=True), threads=threads)
