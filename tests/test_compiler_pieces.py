"""A pass in pieces of time gives what it gives on all steps at once, and takes one piece's memory for what nobody sees.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agreement import assert_agree, draw, record
from catalogue import BY_NAME, CATALOGUE, Entry
from faster import fill_memory_with_nan
from paths import by_recurrent
from recurra import cells
from recurra.compiler import pieces, script, writer
from recurra.compiler.llvm import kernel
from recurra.compiler.llvm.sequence import COPY, DRAWN, calls
from recurra.compiler.places import Place, Value
from recurra.compiler.pool import LEAST
from recurra.compiler.script import Called, Script, Section, lay_out
from recurra.compiler.writer import Writer
from test_compiler_segment import Between, compiled, segments_of, threads, told_apart

# In pieces of 3 steps and of 7 with a first one of 5, and one row alone.
SIZES = [(9, 4), (1, 3), (40, 2), (30, 1), (2, 9)]
STACK = Entry("stack", lambda I, H: cells.Stack(cells.LSTM(I, H), cells.GRU(H, H)), None)
USUAL = [*(BY_NAME[name] for name in ("Vanilla", "LSTM", "GRU", "GRUResetBefore", "PeepholeLSTM", "Residual")), STACK]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    fill_memory_with_nan(monkeypatch)
    monkeypatch.setattr(pieces, "PIECE", 1)
    monkeypatch.setattr(pieces, "ROWS", 12)


def written(rnn) -> list[Script]:
    """Of every size of every segment, how it was written down."""
    return [each for part in segments_of(rnn) for each in part._scripts.values() if each is not None]


@pytest.mark.parametrize("entry", [e for e in CATALOGUE if e.name != "user: Counting"], ids=str)
def test_a_pass_in_pieces_gives_what_the_loop_gives(entry):
    first = draw(entry, 1, 1, 19, 24)
    _, path = compiled(first)
    for number, (T, B) in enumerate(SIZES):
        options = [*(["state"] if number % 2 else []), *(["reverse"] if number % 3 else [])]
        case = replace(draw(entry, T, B, 19, 24, *options), cell=first.cell)
        assert_agree(record(path, case), record(by_recurrent, case), 1e-11)


@pytest.mark.parametrize("entry", USUAL, ids=str)
@pytest.mark.parametrize("reverse", [(), ("reverse",)])
def test_the_usual_cells_go_in_pieces_each_way(entry, reverse):
    case = draw(entry, 40, 2, 19, 24, *reverse)
    rnn, path = compiled(case)
    assert_agree(record(path, case), record(by_recurrent, case), 1e-11)
    assert [each.steps for each in written(rnn)] == [7, 7]


@given(
    T=st.integers(2, 30), B=st.integers(1, 9), rows=st.integers(1, 60), reverse=st.booleans(), seed=st.integers(0, 9)
)
def test_wherever_time_is_cut(T, B, rows, reverse, seed):
    torch.manual_seed(seed)
    case = draw(BY_NAME["LSTM"], T, B, 19, 24, "state", *(["reverse"] if reverse else []))
    pieces.ROWS, before = rows, pieces.ROWS
    try:
        rnn, path = compiled(case)
        assert_agree(record(path, case), record(by_recurrent, case), 1e-11)
    finally:
        pieces.ROWS = before
    least = -(-rows // B)
    assert all(min(T, least) <= each.steps <= 2 * least for each in written(rnn))


def test_what_nobody_sees_takes_one_pieces_memory():
    rooms = []
    for T in (40, 400):
        case = draw(BY_NAME["GRU"], T, 2, 19, 24)
        rnn, path = compiled(case)
        record(path, case)
        rooms.append([max(each.scratch, each.spare) for each in written(rnn)])
    # Of 7 steps and of as many: only what is of no step is in it beside.
    assert rooms[0] == rooms[1]
    assert max(rooms[0]) * 8 < LEAST


def test_a_long_call_is_one_call_in_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "MOST", 100_000)
    case = draw(BY_NAME["LSTM"], 90, 4, 19, 24)
    rnn, path = compiled(case)
    assert_agree(record(path, case), record(by_recurrent, case), 1e-11)
    assert [each.steps for each in written(rnn)] == [3, 3]
    monkeypatch.setattr(pieces, "PIECE", 1 << 30)
    rnn, path = compiled(case)
    record(path, case)
    assert not written(rnn)


@pytest.mark.parametrize("hidden", [24, 50])
def test_two_threads_give_the_numbers_of_one_in_pieces(monkeypatch, hidden):
    for module in (kernel, writer.gemm):
        monkeypatch.setattr(module, "WAKE", 1)
    monkeypatch.setattr(writer.gemm, "LEAST_SUMS", 1)
    case = draw(BY_NAME["GRU"], 40, 5, 19, hidden)
    rnn, path = compiled(case)
    found = []
    for number in (1, 2):
        with threads(number):
            found.append(record(path, case))
    one, two = found
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {each.members for each in written(rnn)} == {1, 2}
    assert {each.steps for each in written(rnn)} == {4}
    assert_agree(one, record(by_recurrent, case), 1e-11)


def test_no_part_of_a_sum_is_a_last_vector_alone(monkeypatch):
    """It is moved back over its neighbour's, and would add to what that one has written."""
    monkeypatch.setattr(writer.gemm, "LEAST_SUMS", 1)
    parts = []
    right = Writer.call_products

    def noted(self, when, number, names, numbers, *rest):
        parts.append((numbers.get("parts"), numbers.get("D", 0)))
        right(self, when, number, names, numbers, *rest)

    monkeypatch.setattr(Writer, "call_products", noted)
    case = draw(BY_NAME["Vanilla"], 12, 4, 19, 24)
    with threads(8):
        record(compiled(case)[1], case)
    lanes = writer.gemm.products(torch.float64).lanes
    sums = [(count, -(-D // lanes)) for count, D in parts if count]
    assert sums
    assert all(count == 1 or vectors // count >= 2 for count, vectors in sums)


def test_what_is_not_known_to_be_of_every_step_is_not_cut():
    case = draw(Entry("between", Between, None), 40, 2, 19, 24)
    rnn, path = compiled(case)
    assert_agree(record(path, case), record(by_recurrent, case), 1e-11)
    for part in segments_of(rnn):
        part.stepped = [None for _ in part.stepped]
        part._scripts.clear()
    assert_agree(record(path, case), record(by_recurrent, case), 1e-11)
    assert {each.steps for each in written(rnn)} == {40}


@pytest.mark.parametrize("back", [False, True])
def test_sections_move_over_memory(back):
    """By hand: rows copied in pieces of 3 from one tensor by way of a place for one piece to another."""
    T, steps, D = 8, 3, 5
    size = D * 8

    def copy(source, target, count):
        words = [0, 0, count * size, 2, *[0] * (COPY - 4)]
        return Called(calls().copy, words, {0: source, 1: target}, [DRAWN])

    def piece(count):
        given, brief, seen = (Place(*place, 0, size) for place in (("given", 0), ("value", 0), ("value", 1)))
        return [copy(given, brief, count), copy(brief, seen, count)]

    first, second, onward = (T - 2, T - 5, -steps) if back else (0, 2, steps)
    sections = [Section(piece(2), 1, first), Section(piece(3), 2, second, onward), Section([])]
    result = Value(Place("value", 1, 0, size), (T, D), (D, 1), 0)
    made = lay_out(sections, [steps * D, T * D], {0}, [result], [None], 1, (), 8, steps)
    assert made.shapes == (((T, D), T * D * 8 >= LEAST),)
    source, target, room = np.random.default_rng(0).random((T, D)), np.zeros((T, D)), np.zeros(made.scratch)
    words = made.words.copy()
    rooms = {script.ROOM.index("words"): words.ctypes.data, script.ROOM.index("scratch"): room.ctypes.data}
    for at, which, skip in made.fixed:
        words[at] = rooms[which] + skip
    for at, which, skip in made.slots:
        words[at] = (source.ctypes.data, target.ctypes.data)[which] + skip
    calls().run(words.ctypes.data)
    assert np.array_equal(source, target)


# --- pieces that are wrong on purpose ---


def from_anew(right, writer, steps, again=False):
    found = right(writer, steps, again)
    if again:
        # What only the first piece does, each does.
        writer.list[:0] = writer.first
    return found


def moved_no_address(right, layout, section):
    """Counters begin anew as they should."""
    return [(word, mask, add) for word, mask, add in right(layout, section) if mask == 0]


def all_in_one_place(right, layout, sizes, brief, *rest):
    """The states of each step, too, which the next piece and the backward pass read."""
    right(layout, sizes, {*range(len(sizes))}, *rest)


def not_added(right, writer, when, number, names, numbers, *rest):
    return right(writer, when, number, names, {**numbers, "more": 0}, *rest)


def begun_with_zeros(right, writer, start, a, b):
    before, writer.again = writer.again, False
    try:
        return right(writer, start, a, b)
    finally:
        writer.again = before


def no_further(right, layout, sections, *rest):
    return right(layout, [replace(section, onward=0) for section in sections], *rest)


def never_after(right, writer, after, stepped):
    return right(writer, False, stepped)


WRONG = {
    "each piece from the first state": (Writer, "write", from_anew),
    "sums of the last piece alone": (Writer, "call_products", not_added),
    "products of the last piece alone": (Writer, "product", begun_with_zeros),
    "always the same piece": (script._Layout, "script", no_further),
    "addresses that do not move": (script._Layout, "moves", moved_no_address),
    "one piece's memory for all": (script._Layout, "__init__", all_in_one_place),
    "sums of sums before they are there": (Writer, "when", never_after),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pieces_are_told_apart(name, monkeypatch):
    told_apart(monkeypatch, draw(BY_NAME["LSTM"], 40, 2, 19, 24, "state"), *WRONG[name])
