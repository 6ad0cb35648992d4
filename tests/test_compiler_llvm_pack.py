"""Native packing against numpy: every shape of step and tail, rows of a matrix far apart, and packing done wrong."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from loop_programs import PROGRAMS, random_operands
from native import cast, guarded, guards, kernel_of, program_of
from packing import packed
from recurra.compiler.build import Builder
from recurra.compiler.llvm import emit as emit_module
from recurra.compiler.llvm import pack as pack_module
from recurra.compiler.llvm.kernel import Kernel, Workspace, addresses
from recurra.compiler.llvm.target import Target


def check(kernel: Kernel, spare: int = 0, threads: int = 1) -> None:
    """The native panels are numpy's to the bit, and nothing beside them is written. ``spare`` numbers between rows."""
    operands = cast(random_operands(kernel.program, 1, 1), kernel.dtype.type)
    expected = packed(kernel, operands.matrices)
    wide = [np.full((rows, columns + spare), np.nan, kernel.dtype) for rows, columns in kernel.program.matrices]
    for each, matrix in zip(wide, operands.matrices, strict=True):
        each[:, : matrix.shape[1]] = matrix
    operands = replace(operands, matrices=wide)
    panels, whole = guarded(np.full(expected.size, np.nan, kernel.dtype))
    before = guards(whole)
    own = kernel.workspace(1, threads)
    workspace = Workspace(1, threads, panels, *own.arrays[1:], own.words)
    call = kernel.bind(
        1,
        1,
        **addresses(operands, kernel.outputs(1, 1), operands.state),
        strides=[matrix.shape[1] for matrix in wide],
        threads=threads,
        workspace=workspace,
    )
    assert guards(whole) == before, "memory beside the panels was written"
    np.testing.assert_array_equal(panels, expected)
    for matrix in wide:
        matrix *= 2
    call.pack()
    np.testing.assert_array_equal(panels, 2 * expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("H", [1, 7, 16, 33, 100])
@pytest.mark.parametrize("name", PROGRAMS)
def test_panels_are_those_of_numpy(name, H, dtype):
    check(kernel_of(name, H, dtype))


@pytest.mark.parametrize("name", ["lstm", "lstm_backward", "attentive"])
def test_rows_of_a_matrix_may_lie_apart(name):
    check(kernel_of(name, 33, np.float32), spare=5)


def test_a_part_of_a_matrix_is_packed():
    b = Builder()
    h, w, u = b.carry(20), b.matrix(47, 40), b.matrix(40, 47)
    one = b.matmul(h, w, width=20, start=3, top=5)
    other = b.matmul(h, u, width=20, start=3, top=5, transposed=True)
    mixed = b.matmul(b.tanh(one), u, width=20, start=3, top=5, transposed=True) + b.matmul(b.tanh(one), w, width=20)
    check(Kernel(b.finish([one + other, mixed], [b.tanh(one)]), np.float32))


@pytest.mark.parametrize("name", ["lstm", "lstm_backward"])
def test_threads_share_the_packing(name, monkeypatch):
    monkeypatch.setattr(Kernel, "divide", lambda kernel, T, B, threads: (threads, threads))
    check(kernel_of(name, 100, np.float32), threads=3)


def test_narrower_vectors_are_packed_too():
    check(Kernel(program_of("lstm", 33), np.float64, Target("x86-64", "", 16, 16)))


# Wrong on purpose. No mutant leaves the memory of its arrays.


def changed(monkeypatch, change) -> None:
    """Packing sees another layout than the rest."""
    right = pack_module.pack_function

    def wrong(floats, layout):
        mutant = copy.copy(layout)
        mutant.__dict__.pop("pieces", None)
        change(mutant)
        return right(floats, mutant)

    monkeypatch.setattr(emit_module, "pack_function", wrong)


def swap_products(layout):
    layout.sweeps = [
        replace(sweep, groups=tuple(replace(group, products=group.products[::-1]) for group in sweep.groups))
        for sweep in layout.sweeps
    ]


def forget_the_last_column(layout):
    layout.sweeps = [
        replace(sweep, region=replace(sweep.region, width=sweep.region.width - 1)) for sweep in layout.sweeps
    ]


def forget_the_last_row(layout):
    layout.sweeps = [
        replace(sweep, groups=tuple(replace(group, length=group.length - 1) for group in sweep.groups))
        for sweep in layout.sweeps
    ]


def forget_to_transpose(layout):
    square = [
        replace(node, transposed=not node.transposed)
        if node.op.value == "matmul" and len(set(layout.program.matrices[node.index])) == 1
        else node
        for node in layout.program.nodes
    ]
    layout.program = replace(layout.program, nodes=tuple(square))


@pytest.mark.parametrize("H", [7, 33])
@pytest.mark.parametrize("change", [swap_products, forget_the_last_column, forget_the_last_row, forget_to_transpose])
def test_a_panel_packed_wrong_is_told_apart(change, H, monkeypatch):
    changed(monkeypatch, change)
    with pytest.raises(AssertionError):
        check(Kernel(program_of("gru_before", H), np.float32))


def test_a_block_turned_wrong_is_told_apart(monkeypatch):
    right = pack_module.transpose
    monkeypatch.setattr(pack_module, "transpose", lambda code, lines: right(code, lines)[::-1])
    with pytest.raises(AssertionError):
        check(Kernel(program_of("lstm", 33), np.float32))


def test_a_piece_that_nobody_packs_is_told_apart(monkeypatch):
    right = Kernel(program_of("lstm", 33), np.float32)
    monkeypatch.setattr(type(right.layout), "units", right.layout.units - 1)
    with pytest.raises(AssertionError):
        check(right)
