"""Threads that share a call, by rows or by features: the bits of one thread, whoever comes, late or not at all.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import ir

from loop_programs import PROGRAMS, random_operands
from native import agree, cast, kernel_of
from random_programs import programs
from recurra.compiler.llvm import kernel as kernel_module
from recurra.compiler.llvm import team as team_module
from recurra.compiler.llvm.code import Floats
from recurra.compiler.llvm.divide import bound_function
from recurra.compiler.llvm.kernel import Kernel, addresses
from recurra.compiler.llvm.target import Engine, host
from recurra.compiler.llvm.team import openmp
from recurra.compiler.operands import Operands
from recurra.compiler.passes import optimise

ROWS = "rows"
FEATURES = "features"


@pytest.fixture
def by(monkeypatch):
    """Makes every call divide its work by rows or by features."""

    def choose(how: str) -> None:
        def divide(kernel, T, B, threads):
            parts = max(1, min(B, threads))
            return (parts, parts) if how == ROWS else (0, threads)

        monkeypatch.setattr(Kernel, "divide", divide)

    return choose


def same(found, expected) -> None:
    for one, other in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        np.testing.assert_array_equal(one, other)


def without_openmp(monkeypatch) -> None:
    monkeypatch.setattr(team_module, "openmp", lambda: None)


@pytest.mark.parametrize("library", ["openmp", "pool"])
@pytest.mark.parametrize("how", [ROWS, FEATURES])
@pytest.mark.parametrize("threads", [2, 3, 20])
def test_a_team_gives_the_same_bits_as_one_thread(threads, how, library, by, monkeypatch):
    if library == "pool":
        without_openmp(monkeypatch)
    elif openmp() is None:
        pytest.skip("this PyTorch has no GNU OpenMP")
    kernel = kernel_of("layer_norm_lstm", 100, np.float32)
    for B in (0, 1, 5):
        operands = cast(random_operands(kernel.program, 5, B, lengths=True, resets=True), np.float32)
        by(ROWS)
        expected = kernel(operands)
        by(how)
        same(kernel(operands, threads), expected)


@pytest.mark.parametrize("H", [7, 100])
@pytest.mark.parametrize("name", PROGRAMS)
def test_features_divided_agree_with_the_interpreter(name, H, by):
    by(FEATURES)
    kernel = kernel_of(name, H, np.float64)
    for B, variant in ((1, {}), (3, {"lengths": True, "resets": True, "reverse": True})):
        agree(kernel, random_operands(kernel.program, 4, B, **variant), threads=3)


@given(programs())
@settings(max_examples=15, deadline=None)
def test_random_programs_divided_give_the_same_bits(program):
    kernel = Kernel(optimise(program), np.float64)
    operands = random_operands(program, 3, 2, lengths=True, resets=True)
    expected = kernel(operands)
    kernel.divide = lambda T, B, threads: (0, threads)
    same(kernel(operands, 2), expected)


def test_a_call_can_be_run_again_by_the_team(by):
    by(FEATURES)
    kernel = kernel_of("lstm", 100, np.float32)
    operands = cast(random_operands(kernel.program, 4, 1), np.float32)
    first, middle = kernel(operands)
    second, end = kernel(Operands(4, 1, operands.inputs, matrices=operands.matrices, state=middle))
    outputs, state = kernel.outputs(4, 1), [leaf.copy() for leaf in operands.state]
    call = kernel.bind(4, 1, **addresses(operands, outputs, state), threads=2)
    call.share()
    same((outputs, state), (first, middle))
    call.share()
    same((outputs, state), (second, end))


def test_a_team_whose_threads_never_come_is_not_waited_for(by, monkeypatch):
    """Only the thread that asks takes part, as where OpenMP has no more to give."""
    by(FEATURES)
    kernel = kernel_of("layer_norm_lstm", 100, np.float32)
    operands = cast(random_operands(kernel.program, 5, 1), np.float32)
    expected = kernel(operands)
    native = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    monkeypatch.setattr(team_module.Team, "run", lambda team, function, argument, threads: native(function)(argument))
    same(kernel(operands, 4), expected)


def test_a_pool_with_fewer_threads_than_are_asked_for_is_enough(by, monkeypatch):
    by(FEATURES)
    without_openmp(monkeypatch)
    pool = ThreadPoolExecutor(2)
    monkeypatch.setattr(team_module, "_pool", lambda threads: pool)
    kernel = kernel_of("lstm", 100, np.float32)
    operands = cast(random_operands(kernel.program, 20, 1), np.float32)
    expected = kernel(operands)
    found = [None] * 4

    def ask(place: int) -> None:
        found[place] = [kernel(operands, 3) for _ in range(10)]

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in itertools.chain(*found):
        same(each, expected)


SMALL = """
import ctypes, sys, numpy as np
from native import kernel_of, cast
from loop_programs import random_operands
from recurra.compiler.llvm.code import Floats
from recurra.compiler.llvm.divide import bound_function
from recurra.compiler.llvm.kernel import Kernel
from recurra.compiler.llvm.target import Engine, host
from recurra.compiler.llvm.team import openmp
kernel = kernel_of('layer_norm_lstm', 100, np.float32)
operands = cast(random_operands(kernel.program, 50, 1), np.float32)
expected = kernel(operands)
Kernel.divide = lambda kernel, T, B, threads: (0, threads)
def check(*_):
    outputs, state = kernel(operands, 4)
    for one, other in zip([*outputs, *state], [*expected[0], *expected[1]]):
        np.testing.assert_array_equal(one, other)
    sys.stdout.write('same\\n')
"""
NESTED = """
inside = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(check)
openmp().GOMP_parallel(ctypes.cast(inside, ctypes.c_void_p), None, 2, 0)
"""


@pytest.mark.parametrize(
    ("more", "environment", "times"),
    [("check()", {"OMP_THREAD_LIMIT": "1"}, 1), ("check()", {"OMP_NUM_THREADS": "1"}, 1), (NESTED, {}, 2)],
    ids=["thread limit", "one thread", "inside a team"],
)
def test_openmp_that_gives_fewer_threads_is_enough(more, environment, times):
    if openmp() is None:
        pytest.skip("this PyTorch has no GNU OpenMP")
    environment = {**os.environ, **environment}
    here = Path(__file__).parent
    command = [sys.executable, "-c", SMALL + more]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["same"] * times, done.stderr


# Who takes which rows


@cache
def _bound():
    module = ir.Module("bound")
    bound_function(Floats(module, np.dtype(np.float64), host())).linkage = "external"
    engine = Engine(str(module), host())
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, *[ctypes.c_int64] * 4)
    return kind(engine.address("bound")), engine


def split(lengths: list[int] | None, T: int, B: int, parts: int) -> list[int]:
    """The bounds (parts + 1,) of neighbouring rows that the threads take."""
    bound, _ = _bound()
    array = None if lengths is None else np.array(lengths, np.int64)
    pointer = None if array is None else array.ctypes.data
    return [bound(pointer, T, B, part, parts) for part in range(parts + 1)]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 8))
def test_rows_are_split_by_the_steps_they_take(lengths, parts):
    bounds = split(lengths, 50, len(lengths), parts)
    assert (bounds[0], bounds[-1]) == (0, len(lengths))
    assert (np.diff(bounds) >= 0).all()
    cost = [sum(2 * length + 1 for length in lengths[a:b]) for a, b in itertools.pairwise(bounds)]
    assert max(cost) <= sum(cost) / parts + 2 * max(lengths) + 2


def test_equal_rows_are_split_evenly():
    assert split([100] * 16, 100, 16, 2) == [0, 8, 16]
    assert split(None, 100, 16, 2) == [0, 8, 16]
    assert split(None, 3, 7, 3) == split([3] * 7, 3, 7, 3) == [0, 2, 5, 7]
    assert split([9, 1, 1, 1, 1, 1, 1, 1], 9, 8, 2) == [0, 1, 8]
    assert split(None, 5, 0, 2) == [0, 0, 0]


def test_few_rows_of_much_work_are_divided_by_features_and_others_by_rows():
    small, large = kernel_of("lstm", 7, np.float32), kernel_of("lstm", 300, np.float32)
    assert small.divide(5, 1, 4) == (1, 1)
    assert large.divide(100, 1, 1) == (1, 1)
    assert large.divide(100, 1, 4) == (0, 4)
    assert large.divide(100, 64, 4) == (4, 4)
    assert small.divide(10_000, 1, 4) == (1, 1)


# Wrong on purpose


def test_pieces_that_nobody_takes_are_told_apart(by, monkeypatch):
    by(FEATURES)
    genuine = kernel_of("lstm", 100, np.float64)
    before, define, after = genuine.assembly.partition('define internal void @"drive"')
    body, end, rest = after.partition("\n}")
    assert body.count("udiv") == 4
    changed = before + define + body.replace("udiv", "urem") + end + rest
    monkeypatch.setattr(kernel_module, "emit", lambda *_: (changed, genuine.layout))
    mutant = Kernel(genuine.program, np.float64)
    operands = random_operands(mutant.program, 4, 1)
    with pytest.raises(AssertionError):
        agree(mutant, operands, threads=2)
