"""When explain() can be asked, and how its table and its picture look.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from explained import H, I, Sharing, Sorted, rows_of
from recurra import Bidirectional, Cell, Recurrent, cells, watch
from recurra.errors import BackendError

# --- before the first call ---


def test_explaining_first_draws_no_number_and_changes_no_later_run():
    cell = cells.Stack(cells.WeightDrop(cells.LSTM(3, 4), 0.5), cells.Zoneout(cells.GRU(4, 4), 0.5))
    rnn, x = Recurrent(cell), torch.randn(5, 2, 3)
    torch.manual_seed(1)
    expected = rnn(x)[0]
    other = Recurrent(cell)
    torch.manual_seed(1)
    assert not other.explain().called
    assert other(x)[0].equal(expected)
    assert other.explain().called


def test_what_says_too_little_is_explained_after_its_first_call():
    class NoSize(Cell):
        def initial_state(self, batch_size):
            return torch.zeros(batch_size, 2)

        def step(self, state, x, context=None):
            return state + x, state

    class Conditioned(NoSize):
        input_size = 2

        def draw_context(self, batch_size, context=None):
            return context + 1

    class Plain(Conditioned):
        def draw_context(self, batch_size, context=None):
            return context

        def step(self, state, x, context=None):
            return state + x * context, state

    for cell, context in ((NoSize(), None), (Conditioned(), torch.ones(2)), (Plain(), torch.ones(3, 2))):
        rnn = Recurrent(cell)
        found = rnn.explain()
        assert (found.asked, found.ran, found.called, found.table) == ("auto", "auto", False, [])
        assert "the step is traced at its first call" in found.why
        with pytest.raises(BackendError, match="there is no traced step to draw"):
            found.picture("nowhere.svg")
        rnn(torch.randn(4, 3, 2), context=context)
        assert rnn.explain().ran == "compiled"
        assert rnn.explain().table


def test_the_loop_has_no_table():
    found = Recurrent(cells.LSTM(3, 4), backend="loop").explain()
    assert found.table == []
    assert str(found) == "backend='loop' runs 'loop': the reference loop was asked for"
    assert Bidirectional(cells.LSTM(3, 4), cells.GRU(3, 4)).explain().table[1].reads == ("weight_ih", "bias")


def test_a_watched_call_is_explained_with_its_taps():
    rnn = Recurrent(cells.GRU(3, 4))
    x = torch.randn(2, 2, 3)
    rnn(x)
    before = rnn.explain().table
    with watch(rnn):
        rnn(x)
    assert rnn.explain().table != before
    rnn(x)
    assert rnn.explain().table == before


# --- how it looks ---


class Wide(Sharing):
    """Figures of many digits."""

    input_size = output_size = 4000

    def __init__(self):
        super().__init__()
        self.weight, self.leak = nn.Parameter(torch.zeros(4000, 4000)), nn.Parameter(torch.zeros(4000))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, 4000)


MANY = [
    Wide,
    lambda: cells.MLSTM(6, 4),
    lambda: cells.Stack(cells.LayerNormLSTM(3, 4), cells.SLSTM(4, 4), cells.Readout(cells.MinLSTM(4, 5), 2)),
    lambda: cells.RecurrentHighway(3, 4),
    Sorted,
    Sharing,
]


@pytest.mark.parametrize("make", MANY)
def test_the_table_fits_a_terminal_and_its_columns_add_up(make):
    found = Recurrent(make()).explain()
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    flops = sum(row.flops for row in found.table)
    total = next(line.split() for line in text.splitlines() if line.startswith("total"))
    assert total[1] == f"{flops:,}"
    shares = [float(share) for share in re.findall(r"^  \S.* ([\d.]+) %", text, re.MULTILINE)]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))
    # Right-aligned: the figures of a column end in one place.
    ends = {
        re.match(r"  \S.*?[\d,]+(?= +[\d.]+ %)", line).end()
        for line in text.splitlines()
        if " %" in line and line.startswith("  s")
    }
    assert len(ends) <= 1


def test_rows_are_values():
    row = rows_of(cells.LSTM(I, H))[0]
    assert rows_of(cells.LSTM(I, H))[0] == row
    with pytest.raises(FrozenInstanceError):
        row.flops = 0
    with pytest.raises(FrozenInstanceError):
        row.operations[0].flops = 0
    assert len({*rows_of(cells.LSTM(I, H))}) == len(rows_of(cells.LSTM(I, H)))


@pytest.mark.parametrize("make", MANY)
def test_the_picture_is_an_svg_with_every_stage_and_its_share(make, tmp_path):
    rnn = Recurrent(make())
    path = tmp_path / "stages.svg"
    rnn.explain().picture(path)
    again = tmp_path / "again.svg"
    rnn.explain().picture(str(again))
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    marks = [element.get("id", "") for element in root.iter()]
    drawn = [mark for mark in marks if mark.startswith(("forward ", "backward "))]
    expected = [
        " ".join([row.direction, row.kind, *row.carries])
        for row in rnn.explain().table
        if row.kind == "loop" or any(not each.moves for each in row.operations)
    ]
    assert drawn == expected
    shares = [float(mark.split()[-1]) for mark in marks if mark.startswith("share ")]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))
