"""A generator of native code that is wrong on purpose is told apart. No mutant leaves the memory of its arrays."""

from __future__ import annotations

import re

import numpy as np
import pytest

from loop_programs import random_operands
from native import agree, kernel_of, program_of
from recurra.compiler.build import Builder
from recurra.compiler.llvm import chain as chain_module
from recurra.compiler.llvm import code as code_module
from recurra.compiler.llvm import emit as emit_module
from recurra.compiler.llvm import kernel as kernel_module
from recurra.compiler.llvm.kernel import Kernel
from recurra.compiler.llvm.target import host


@pytest.mark.parametrize("tail", [1, -1])
def test_a_tail_of_the_wrong_length_is_told_apart(tail, monkeypatch):
    right = code_module.Floats.tail
    monkeypatch.setattr(code_module.Floats, "tail", lambda floats, count: right(floats, count + tail))
    killed(Kernel(program_of("layer_norm_lstm", 33), np.float64))


def test_a_reset_that_is_skipped_is_told_apart(monkeypatch):
    right = emit_module._Run._restore
    monkeypatch.setattr(
        emit_module._Run, "_restore", lambda run, name, row: None if name == "fresh" else right(run, name, row)
    )
    killed(Kernel(program_of("lstm", 7), np.float64))


@pytest.mark.parametrize(("right", "wrong"), [("icmp slt i64", "icmp sle i64"), ("icmp slt i64", "icmp sgt i64")])
def test_a_length_that_is_off_by_one_is_told_apart(right, wrong, monkeypatch):
    killed(mutant("lstm", 7, right, wrong, monkeypatch))


def test_rows_that_no_tile_takes_are_told_apart(monkeypatch):
    killed(mutant("lstm", 7, r"(%\"higher[.\d]*\" = )urem i64 [^\n]*", r"\1add i64 0, 0", monkeypatch))


def test_a_step_that_a_sum_forgets_is_told_apart(monkeypatch):
    right = chain_module._finish
    monkeypatch.setattr(chain_module, "_finish", lambda code, node, steps, *where: right(code, node, steps - 1, *where))
    killed(Kernel(program_of("layer_norm_lstm", 33), np.float64))


def test_a_number_of_another_reduction_is_told_apart(monkeypatch):
    right = chain_module.Link._number

    def wrong(link, view, pointer, known):
        number = known.numbers.get(view.place)
        others = [each for each in known.numbers.values() if each is not number]
        return link.code.spread(others[-1]) if number is not None and others else right(link, view, pointer, known)

    monkeypatch.setattr(chain_module.Link, "_number", wrong)
    killed(Kernel(program_of("layer_norm_lstm", 33), np.float64))


def test_a_vector_of_other_features_is_told_apart(monkeypatch):
    """What a region has calculated is handed to the next one, from the first feature on whichever was asked for."""
    right = chain_module.Row.vector
    monkeypatch.setattr(
        chain_module.Row, "vector", lambda row, place, start, lanes, least: right(row, place, 0, lanes, least)
    )
    killed(Kernel(program_of("layer_norm_lstm", 33), np.float64))


def test_a_tail_that_is_taken_for_a_whole_vector_is_told_apart(monkeypatch):
    right = chain_module.Row.vector
    monkeypatch.setattr(
        chain_module.Row, "vector", lambda row, place, start, lanes, least: right(row, place, start, lanes, 1)
    )
    b = Builder()
    x, y = b.input(3), b.input(5)
    # Regions of other widths: the second one reads what the first one has in its last vector, and more.
    wide = b.concat([b.tanh(x), y * 2.0])
    killed(Kernel(b.finish([wide * b.sum(wide)], []), np.float64))


def test_a_carry_that_is_not_brought_forward_is_told_apart(monkeypatch):
    monkeypatch.setattr(emit_module._Run, "_advance", lambda run, count: None)
    killed(Kernel(program_of("lstm", 7), np.float64))


def test_a_carry_that_is_overwritten_while_it_is_read_is_told_apart(monkeypatch):
    """With one home for odd and even steps, later tiles of a product read what the first ones made."""
    b = Builder()
    h, x = b.carry(33), b.input(33)
    h = b.tanh(x + b.matmul(h, b.matrix(33, 33)))
    genuine = Kernel(b.finish([h * 2.0], [h]), np.float64)
    agree(genuine, random_operands(genuine.program, 5, 3))
    changed, count = re.subn(r"(and i64 %[^,]*), 1\n", r"\1, 0\n", genuine.assembly)
    assert count
    monkeypatch.setattr(kernel_module, "emit", lambda *_: (changed, genuine.layout))
    killed(Kernel(genuine.program, np.float64))


FLOATS = [
    ("fadd", "fsub"),
    ("fsub", "fadd"),
    ("fmul <", "fadd <"),
    ("fdiv", "fmul"),
    ("fneg <8 x double> %", "fadd <8 x double> zeroinitializer, %"),
    ("fcmp olt", "fcmp ogt"),
]


@pytest.mark.parametrize("name", ["layer_norm_lstm", "exponential_gates"])
@pytest.mark.parametrize(("right", "wrong"), FLOATS)
def test_every_wrong_float_instruction_is_told_apart(name, right, wrong, monkeypatch):
    if host().vector_bytes != 64:
        pytest.skip("the instructions are those of 512-bit vectors")
    assembly = kernel_of(name, 7, np.float64).assembly
    places = [found.start() for found in re.finditer(re.escape(right), assembly)]
    # Some of each kind: a clamp that never binds here is covered by the tests of the functions.
    for place in places[:: max(1, len(places) // 3)]:
        if "recurra." in assembly[:place].rpartition("\ndefine")[2].partition("(")[0]:
            continue
        changed = assembly[:place] + wrong + assembly[place + len(right) :]
        monkeypatch.setattr(kernel_module, "emit", lambda *_, changed=changed: (changed, layout_of(name)))
        killed(Kernel(program_of(name, 7), np.float64))


def layout_of(name: str):
    return kernel_of(name, 7, np.float64).layout


def mutant(name: str, H: int, right: str, wrong: str, monkeypatch) -> Kernel:
    genuine = kernel_of(name, H, np.float64)
    changed, count = re.subn(right, wrong, genuine.assembly)
    assert count, f"there is no {right}"
    monkeypatch.setattr(kernel_module, "emit", lambda *_: (changed, genuine.layout))
    return Kernel(genuine.program, np.float64)


def killed(kernel: Kernel) -> None:
    with pytest.raises(AssertionError):
        agree(kernel, random_operands(kernel.program, 13, 11, lengths=True, resets=True))
