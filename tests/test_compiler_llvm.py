"""Native code against the interpreter: tiles and tails, lengths, resets, reverse, memory it must not touch.

The interpreter is proven against the equations in test_compiler_ir.py. Here it runs in float64.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from loop_programs import PROGRAMS, lstm_backward, random_operands
from native import agree, cast, kernel_of, program_of
from random_programs import programs
from recurra.compiler.build import Builder
from recurra.compiler.interpret import interpret
from recurra.compiler.ir import Op
from recurra.compiler.llvm.kernel import Kernel, addresses
from recurra.compiler.llvm.target import Target, host
from recurra.compiler.operands import Operands
from recurra.compiler.passes import optimise
from recurra.errors import ShapeError

SHAPES = [(1, 1), (2, 5), (13, 5), (2, 17), (2, 0), (0, 3)]
VARIANTS = [
    {},
    {"lengths": True},
    {"resets": True},
    {"reverse": True},
    {"lengths": True, "resets": True, "reverse": True},
]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("H", [1, 7, 33, 100])
@pytest.mark.parametrize("name", PROGRAMS)
def test_native_code_agrees_with_the_interpreter(name, H, dtype):
    kernel = kernel_of(name, H, dtype)
    for seed, (T, B) in enumerate(SHAPES):
        for variant in VARIANTS if (T, B) in ((13, 5), (2, 17)) else VARIANTS[-1:]:
            agree(kernel, random_operands(kernel.program, T, B, seed, **variant))


OTHER_TARGETS = {
    "avx2": Target("haswell", "+avx2,+fma", 32, 16),
    "sse": Target("x86-64", "", 16, 16),
    "avx512 in halves": Target("skylake-avx512", "+avx512f,+avx512vl,+avx512dq", 32, 32),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ["lstm", "attentive"])
@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_narrower_vectors_and_fewer_registers_agree_too(target, name, dtype):
    chosen = OTHER_TARGETS[target]
    if host().vector_bytes < 64 and chosen.cpu != "x86-64":
        pytest.skip("this machine has not the instructions")
    for H in (7, 33):
        kernel = Kernel(program_of(name, H), dtype, chosen)
        agree(kernel, random_operands(kernel.program, 3, 17, lengths=True, resets=True))


@pytest.mark.parametrize("beyond", [0, 1])
def test_nothing_is_read_beyond_the_end_of_an_array(beyond):
    """In a process of its own, which dies when it reads what is not there."""
    lines = [
        "import numpy as np, native",
        f"for name, H, dtype in [('attentive', 7, np.float64), ('peephole_lstm', 33, np.float32)]:"
        f" native.run_fenced(name, H, dtype, {beyond})",
        "print('alive')",
    ]
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=here, capture_output=True, text=True)
    assert (done.stdout == "alive\n" and done.returncode == 0) == (beyond == 0), done.stderr


def test_programs_that_no_pass_has_seen_agree():
    for name in ("attentive", "peephole_lstm"):
        kernel = Kernel(PROGRAMS[name](7), np.float64)
        agree(kernel, random_operands(kernel.program, 3, 5, lengths=True))


@given(programs())
@settings(max_examples=40, deadline=None)
def test_random_programs_agree(program):
    operands = random_operands(program, 3, 5, lengths=True, resets=True)
    agree(Kernel(optimise(program), np.float64), operands)


@given(programs())
@settings(max_examples=15, deadline=None)
def test_random_programs_agree_without_passes(program):
    agree(Kernel(program, np.float64), random_operands(program, 2, 9, reverse=True))


def test_the_backward_step_of_an_lstm_gives_autograds_gradients():
    H, T, B = 7, 5, 3
    module = torch.nn.LSTM(H, H, bias=False, dtype=torch.float64)
    x = torch.randn(T, B, H, dtype=torch.float64)
    before = (x @ module.weight_ih_l0.T).detach().requires_grad_()
    h = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    c = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    weight = module.weight_hh_l0
    kept, old, new, ys, h_t, c_t = [], [], [], [], h, c
    for t in range(T):
        i, f, g, o = (before[t] + h_t @ weight.T).chunk(4, dim=1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        old.append(c_t)
        c_t = f * c_t + i * g
        h_t = o * torch.tanh(c_t)
        kept.append(torch.cat([i, f, g, o], dim=1))
        new.append(c_t)
        ys.append(h_t)
    y = torch.stack(ys)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad((y * dy).sum(), [before, h, c])
    arrays = [torch.stack(each).detach().numpy() for each in (kept, old, new)]
    zero = np.zeros((B, H))
    operands = Operands(
        T, B, [*arrays, dy.numpy()], matrices=[weight.detach().numpy()], state=[zero, zero.copy()], reverse=True
    )
    outputs, state = Kernel(optimise(lstm_backward(H)), np.float64)(operands)
    for found, true in zip([*outputs, *state], expected, strict=True):
        np.testing.assert_allclose(found, true.numpy(), rtol=1e-12, atol=1e-12)


# Ranges of rows


@pytest.mark.parametrize("ranges", [[(0, 6), (6, 17)], [(9, 17), (3, 9), (0, 3)], [(k, k + 1) for k in range(17)]])
def test_ranges_of_rows_are_independent(ranges):
    kernel = kernel_of("layer_norm_lstm", 33, np.float64)
    agree(kernel, random_operands(kernel.program, 5, 17, lengths=True, resets=True), ranges)


def test_rows_outside_the_range_are_not_touched():
    kernel = kernel_of("projected", 7, np.float64)
    operands = random_operands(kernel.program, 3, 9)
    whole, ends = kernel(operands)
    outputs, state = kernel.outputs(3, 9), [leaf.copy() for leaf in operands.state]
    for array in outputs:
        array[...] = -7.0
    kernel.bind(3, 9, **addresses(operands, outputs, state)).run(2, 5)
    for found, expected in zip(outputs, whole, strict=True):
        np.testing.assert_array_equal(found[:, 2:5], expected[:, 2:5])
        assert (np.delete(found, np.s_[2:5], axis=1) == -7.0).all()
    for found, expected, old in zip(state, ends, operands.state, strict=True):
        np.testing.assert_array_equal(found[2:5], expected[2:5])
        np.testing.assert_array_equal(np.delete(found, np.s_[2:5], axis=0), np.delete(old, np.s_[2:5], axis=0))


def test_threads_can_share_the_rows():
    kernel = kernel_of("lstm", 33, np.float32)
    operands = cast(random_operands(kernel.program, 13, 17, lengths=True), np.float32)
    expected, ends = kernel(operands)
    outputs, state = kernel.outputs(13, 17), [leaf.copy() for leaf in operands.state]
    call = kernel.bind(13, 17, **addresses(operands, outputs, state))
    threads = [threading.Thread(target=call.run, args=each) for each in ((0, 8), (8, 17))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, true in zip([*outputs, *state], [*expected, *ends], strict=True):
        np.testing.assert_allclose(found, true, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_rows_numbers_are_the_same_to_the_bit_whatever_is_beside_it(dtype):
    kernel = kernel_of("attentive", 33, dtype)
    operands = cast(random_operands(kernel.program, 5, 17), dtype)
    whole, ends = kernel(operands)
    for begin, end in [(0, 1), (3, 5), (2, 13)]:
        rows = np.s_[begin:end]
        part = replace(
            operands,
            B=end - begin,
            inputs=[array[:, rows].copy() for array in operands.inputs],
            rows=[array[rows].copy() for array in operands.rows],
            state=[array[rows].copy() for array in operands.state],
        )
        outputs, state = kernel(part)
        for found, expected in zip(outputs, whole, strict=True):
            np.testing.assert_array_equal(found, expected[:, rows])
        for found, expected in zip(state, ends, strict=True):
            np.testing.assert_array_equal(found, expected[rows])


def test_a_range_beyond_the_rows_is_refused():
    kernel = kernel_of("lstm", 7, np.float64)
    operands = random_operands(kernel.program, 2, 3)
    outputs = kernel.outputs(2, 3)
    call = kernel.bind(2, 3, **addresses(operands, outputs, operands.state))
    with pytest.raises(ShapeError, match="range of rows within 0 to 3, got 2 to 4"):
        call.run(2, 4)


def test_operands_of_another_dtype_are_refused():
    kernel = kernel_of("lstm", 7, np.float64)
    with pytest.raises(ShapeError, match=r"input 0 to be .* of float64"):
        kernel(cast(random_operands(kernel.program, 2, 3), np.float32))


def test_a_program_without_inputs_or_outputs_runs():
    b = Builder()
    n = b.carry(3)
    program = b.finish([], [n + 1.0])
    outputs, state = Kernel(program, np.float64)(Operands(5, 2, state=[np.zeros((2, 3))]))
    assert outputs == []
    np.testing.assert_array_equal(state[0], np.full((2, 3), 5.0))


def test_carries_can_change_places():
    b = Builder()
    one, two = b.carry(5), b.carry(5)
    kernel = Kernel(b.finish([two], [two, one]), np.float64)
    agree(kernel, random_operands(kernel.program, 3, 4, lengths=True))


def test_not_a_number_and_infinity_stay_what_they_are():
    b = Builder()
    x, y = b.input(1), b.input(1)
    program = b.finish(
        [
            b.apply(Op.MAXIMUM, x, y),
            b.apply(Op.MINIMUM, x, y),
            b.sign(x) + 0.0,
            b.relu(x),
            b.clamp(x, -1.0, 1.0) * 1.0,
            b.apply(Op.WHERE, b.apply(Op.NE, x, y), 1.0, 2.0) * 1.0,
            b.apply(Op.WHERE, b.apply(Op.GE, x, y), 1.0, 2.0) * 1.0,
            b.max(b.concat([x, y, x])),
            b.max(b.concat([y, y, x])),
        ],
        [],
    )
    values = [np.nan, np.inf, -np.inf, 0.0, -2.5, 3.0]
    pairs = np.array([(one, other) for one in values for other in values])
    arrays = [np.ascontiguousarray(pairs[None, :, k : k + 1]) for k in (0, 1)]
    operands = Operands(1, len(pairs), inputs=arrays)
    for dtype in (np.float64, np.float32):
        found, _ = Kernel(optimise(program), dtype)(cast(operands, dtype))
        for one, true in zip(found, interpret(program, operands)[0], strict=True):
            np.testing.assert_array_equal(one, true)
