"""Cells that are not in the house: all of them are lowered, and give the loop's own numbers, also as native code.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from invented_cells import FOREIGN, foreign
from loop_programs import random_operands
from lowered_loops import check
from native import agree, cast
from recurra.cell import leaves
from recurra.compiler.build import Builder
from recurra.compiler.interpret import interpret
from recurra.compiler.ir import Op, Program, parse
from recurra.compiler.llvm.code import Floats
from recurra.compiler.llvm.kernel import Kernel
from recurra.compiler.llvm.target import Target
from recurra.compiler.passes import optimise
from recurra.unroll import Recurrent


def moving(W: int) -> Program:
    """Features that are no neighbours of a carry, of a calculated value, of a mask, and as what is multiplied."""
    b = Builder()
    h, x, block = b.carry(W), b.input(2 * W), b.matrix(2 * W + 5, W)
    back = [W - 1 - k for k in range(W)]
    odd = b.gather(x, [2 * k + 1 for k in range(W)])
    z = b.matmul(b.gather(h, back), block, top=2) + b.matmul(b.tanh(x), block, top=5)
    mask = b.gather(b.apply(Op.LT, z, odd), [(3 * k + 1) % W for k in range(W)])
    z = b.apply(Op.WHERE, mask, z, b.gather(b.sin(z), back)) + b.sum(b.gather(z, [0, W - 1, 0]))
    return b.finish([b.gather(z, [W // 2] * 2 + back), mask_of(b, mask)], [b.tanh(z)])


def mask_of(b: Builder, mask):
    return b.apply(Op.WHERE, mask, 1.0, 0.5)


@pytest.mark.parametrize("W", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_features_that_are_no_neighbours_in_native_code(W, dtype):
    program = moving(W)
    operands = random_operands(program, 4, 5, lengths=True, resets=True)
    agree(Kernel(program, dtype), operands)
    agree(Kernel(optimise(program), dtype), operands)


def test_features_that_are_no_neighbours_on_a_plain_machine():
    program = moving(19)
    agree(Kernel(program, np.float64, Target("x86-64", "", 16, 16)), random_operands(program, 2, 3))


def test_a_table_of_other_features_is_told_apart(monkeypatch):
    right = Floats.table
    monkeypatch.setattr(Floats, "table", lambda floats, numbers: right(floats, [*numbers[1:], numbers[0]]))
    with pytest.raises(AssertionError):
        test_features_that_are_no_neighbours_in_native_code(7, np.float64)


def test_another_block_of_a_matrix_is_told_apart():
    program = moving(7)
    nodes = tuple(replace(node, top=max(0, node.top - 1)) for node in program.nodes)
    kernel = Kernel(replace(program, nodes=nodes), np.float64)
    kernel.program = program
    with pytest.raises(AssertionError):
        agree(kernel, random_operands(program, 2, 3))


def context(name: str, H: int, dtype=torch.float64):
    return torch.rand(4, H, dtype=dtype) if name == "Timed" else None


@pytest.mark.parametrize("name", FOREIGN)
def test_the_loops_of_a_foreign_cell_give_the_same_numbers_when_they_are_lowered(monkeypatch, name):
    cell = foreign(name, least=7)
    watch = check(monkeypatch, cell, T=3, context=context(name, cell.H))
    for lowered in watch.programs:
        assert str(parse(str(lowered.program))) == str(lowered.program)


@pytest.mark.parametrize("name", ["ONLSTM", "SharedHeads", "Attended", "Fourier"])
def test_loops_of_foreign_cells_run_as_native_code(monkeypatch, name):
    watch = check(monkeypatch, foreign(name, least=5), T=3)
    for lowered, operands in zip(watch.programs, watch.operands, strict=True):
        expected = interpret(lowered.program, operands)
        for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-5)):
            found = Kernel(lowered.program, dtype)(cast(operands, dtype))
            for ours, theirs in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["SCRN", "PhasedLSTM", "HeadedSLSTM", "Maxout", "Outer", "Activations", "Embedded"])
def test_foreign_cells_compiled_with_lengths_and_resets(name):
    cell = foreign(name)
    x = torch.randn(5, 4, cell.input_size, dtype=torch.float64, requires_grad=True)
    lengths, resets = torch.tensor([5, 3, 0, 4]), torch.rand(5, 4) < 0.3
    found = []
    for backend in ("compiled", "loop"):
        y, state = Recurrent(cell, backend=backend)(x, lengths=lengths, resets=resets)
        ends = [y, *leaves(state)]
        total = sum((torch.linspace(0, 1, end.numel(), dtype=end.dtype) * end.flatten()).sum() for end in ends)
        gradients = torch.autograd.grad(total, [x, *cell.parameters()], materialize_grads=True)
        found.append([*ends, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["MultiplicativeLSTM", "LMU", "ONLSTM", "BlockDiagonal", "Moved", "Counted", "Clockwork"]
)
def test_foreign_cells_in_float32(monkeypatch, name):
    watch = check(monkeypatch, foreign(name).float(), T=3)
    assert all(lowered.carries[0].meta["val"].dtype is torch.float32 for lowered in watch.programs)
