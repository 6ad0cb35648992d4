"""Random cells from a small grammar of steps: the faster paths give what the reference loop gives.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import plain
from agreement import assert_agree, draw, killed, record
from catalogue import Entry
from faster import MODES, by, path_of
from paths import by_recurrent
from random_cells import BINARY, UNARY, WIDTH, Random, operation, pick
from recurra.unroll import Recurrent

OPTIONS = ["state lengths resets", "lengths resets reverse", "state", "resets reverse", "lengths"]


def case_of(cell, T: int, B: int, options: str, seed: int = 5):
    entry = Entry("random", lambda _, __: cell, plain.lstm, memory=True)
    return draw(entry, T, B, WIDTH, WIDTH, *options.split(), seed=seed)


def check(cell, backend: str, memory: str, options: str, seed: int) -> None:
    """The numbers of the loop, but where the loop itself has none: a square root of nothing has no gradient."""
    case = case_of(cell, 5, 3, options, seed)
    expected = record(by_recurrent, case)
    if all(torch.isfinite(value).all() for value in expected.values()):
        rnn = Recurrent(case.cell, backend=backend, memory=memory)
        assert_agree(record(by(rnn), case), expected, 1e-9)
        assert rnn.explain().ran == backend


programs = {
    "program": st.lists(operation, min_size=2, max_size=12),
    "new": st.lists(pick, min_size=1, max_size=3),
    "shown": pick,
    "running": st.lists(pick, max_size=1),
    "fed": st.booleans(),
    "options": st.sampled_from(OPTIONS),
    "seed": st.integers(0, 5),
}


@settings(max_examples=40)
@given(**programs)
def test_a_random_cell_gives_the_same_by_the_hoisted_loop(program, new, shown, running, fed, options, seed):
    check(Random(program, new, shown, running, fed), "hoisted", "store", options, seed)


@settings(max_examples=15)
@given(**programs, memory=st.sampled_from(MODES))
def test_a_random_cell_gives_the_same_by_native_code(program, new, shown, running, fed, options, seed, memory):
    check(Random(program, new, shown, running, fed), "compiled", memory, options, seed)


@pytest.mark.parametrize("names", [sorted(UNARY)[:11], sorted(UNARY)[11:], sorted(BINARY)[:6], sorted(BINARY)[6:]])
@pytest.mark.parametrize("options", OPTIONS[:2])
def test_every_operation_of_the_grammar_once(names, options):
    """In a chain from the state, with a product before each."""
    program = []
    for name in names:
        program.append(("wider", 0))
        program.append(("unary", name, 0) if name in UNARY and names[0] in UNARY else ("binary", name, 0, 2))
        program.append(("scale", 0))
    check(Random(program, [0, 3], 1, [2], True), "compiled", "store", options, 3)


@pytest.mark.parametrize("backend", ["hoisted", "compiled"])
@pytest.mark.parametrize("kind", ["linear", "scale", "context", "wider", "twice"])
def test_the_comparison_can_tell(kind, backend):
    program = [("linear", 0), ("binary", "add", 0, 2), (kind, 0)]
    case = case_of(Random(program, [0], 0), 5, 3, "state")
    expected = record(by_recurrent, case)
    assert expected["gradient of x"].any()
    assert_agree(record(path_of(backend), case), expected, 1e-9)
    case.cell.new = [1]
    killed(lambda: assert_agree(record(path_of(backend), replace(case)), expected, 1e-9))
