"""Cells that are not in the house, by native code: the plain loop's numbers, whatever the sizes and options.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agreement import assert_agree, assert_identical, distances, draw, record, values
from catalogue import Entry
from faster import MODES, by, fill_memory_with_nan, path_of
from invented_cells import FOREIGN
from paths import Case, by_recurrent
from recurra.errors import BackendError
from recurra.unroll import Recurrent

# T, B, options of the runs of every cell, all of them on one Recurrent. Every option meets every other.
RUNS = [
    (5, 5, "state lengths resets"),
    (5, 5, "state lengths resets reverse"),
    (2, 1, "state resets reverse"),
    (1, 5, "state lengths"),
    (2, 0, "state lengths resets"),
]
# One of these for each cell in turn.
LONG = [(63, 1, "state lengths reverse"), (63, 5, "state resets"), (63, 2, "lengths resets")]
SIZES = (7, 1, 12)
# Their matrices of numbers for each row, or what they must write out, would take long to compile.
SMALL = {"LTC", "Counted", "Moved", "Attended", "SharedHeads", "Activations", "ONLSTM", "Maxout", "Fourier", "Rounded"}
# They jump where a number is a little different, or take long to compile once more.
JUMPS = {
    "LTC",
    "PhasedLSTM",
    "Fourier",
    "Rounded",
    "Maxout",
    "Counted",
    "Clockwork",
    "Embedded",
    "Powers",
    "BlockDiagonal",
}
NAMES = list(FOREIGN)
WIDE = ["UGRNN", "RAN", "LMU", "HeadedSLSTM", "DeltaRule", "Written"]


class FirstOfContext(FOREIGN["Timed"]):
    """Its context is the first of three, (B, 3, H)."""

    def step(self, state, x, context=None):
        return super().step(state, x, context[:, 0])


def case_of(name: str, T: int, B: int, H: int, options: str) -> Case:
    make = FirstOfContext if name == "Timed" else FOREIGN[name]
    H = make.multiple * max(-(-H // make.multiple), 2 if make.multiple > 1 else 1)
    return draw(Entry(name, make, None, memory=name == "Timed"), T, B, 3, H, *options.split())


def size_of(name: str) -> int:
    return 4 if name in SMALL else SIZES[NAMES.index(name) % 3]


@pytest.fixture(autouse=True)
def _nan(monkeypatch):
    fill_memory_with_nan(monkeypatch)


# The loop itself says so of a batch of no rows.
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_cell_gives_the_loops_numbers(name):
    H, number = size_of(name), NAMES.index(name)
    rnn = Recurrent(case_of(name, 1, 1, H, "").cell, backend="compiled")
    for T, B, options in [*RUNS, LONG[number % 3]]:
        case = replace(case_of(name, T, B, H, options), cell=rnn.cell)
        if name == "Fourier" and T == 63:
            # Its numbers grow apart by a factor at each step.
            continue
        expected = record(by_recurrent, case)
        assert all(torch.isfinite(value).all() for value in expected.values())
        assert_agree(record(by(rnn), case), expected, 1e-12)
        if T == 5:
            padding = torch.arange(T)[:, None] >= case.lengths
            spoilt = replace(case, x=case.x.detach().masked_fill(padding[:, :, None], torch.nan).requires_grad_())
            assert_identical(record(by(rnn), spoilt), record(by(rnn), case))
    assert rnn.explain().ran == "compiled"
    case = replace(case_of(name, 5, 5, H, "state lengths resets"), cell=rnn.cell)
    with torch.no_grad():
        assert_agree(values(by(rnn), case), values(by_recurrent, case), 1e-12)


@pytest.mark.parametrize("name", WIDE)
def test_a_foreign_cell_of_a_hundred_units(name):
    case = case_of(name, 9, 5, 100, "state lengths resets")
    assert_agree(record(path_of("compiled"), case), record(by_recurrent, case), 1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in JUMPS][::3])
def test_a_foreign_cell_in_float32(name):
    case = case_of(name, 4, 3, size_of(name), "state lengths reverse")
    far = distances(record(path_of("compiled"), case.to(torch.float32)), record(by_recurrent, case))
    assert all(off <= 1e-5 for off in far.values()), far


@pytest.mark.parametrize("memory", MODES[1:])
@pytest.mark.parametrize("name", ["MultiplicativeLSTM", "PhasedLSTM", "Feedback", "Powers", "Timed", "DeltaRule"])
def test_a_foreign_cell_with_less_memory(name, memory):
    rnn = Recurrent(case_of(name, 1, 1, 5, "").cell, backend="compiled", memory=memory)
    for T, B, options in [(11, 5, "state lengths resets"), (30, 3, "state lengths reverse resets"), (1, 2, "state")]:
        case = replace(case_of(name, T, B, 5, options), cell=rnn.cell)
        assert_agree(record(by(rnn), case), record(by_recurrent, case), 1e-12)


@pytest.mark.parametrize("name", ["CoRNN", "RAN", "SRU", "Delayed", "Outer", "Timed"])
def test_second_derivatives_of_a_foreign_cell(name):
    case = case_of(name, 4, 3, 4, "state lengths resets")
    found = []
    for path in (by_recurrent, path_of("compiled")):
        wanted = list(case.wanted.values())
        total = path(case)[0].square().sum()
        first = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
        second = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(second, wanted, allow_unused=True, materialize_grads=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_nothing_between_features_is_a_clear_refusal():
    """An empty slice has no place in a row."""
    case = draw(Entry("Moved", FOREIGN["Moved"], None), 2, 2, 3, 2)
    with pytest.raises(BackendError, match=r"invented_cells\.py:\d+: nothing is left of its features"):
        path_of("compiled")(case)
    assert_agree(record(path_of("auto"), case), record(by_recurrent, case), 1e-12)
