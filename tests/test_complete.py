"""Predictive text: what is read bit by bit equals a fresh reading; lines of a pipe."""

from __future__ import annotations

import io
import json
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recurra.cli.complete import Completer, run
from recurra.data.vocabulary import Characters
from recurra.decoding import (
    Lexicon,
    completions,
    model_step,
)
from recurra.errors import ConfigError, DataError
from small_languages import MADE, TEXT, UNITS, Tiny, child, completer_of, typed


def same_offers(one, other):
    assert one.text == other.text
    assert one.unknown == other.unknown
    found, expected = one.offers(4), other.offers(4)
    assert dict(found) == pytest.approx(dict(expected), abs=1e-9)


# The text and what is offered


@pytest.mark.parametrize("unit", UNITS)
def test_offers_are_those_of_the_whole_text_read_anew(unit):
    text = "the cat sat on  the\n\n hat, th"
    completer = typed(unit, text)
    vocabulary, model = MADE[unit]
    tail = {"character": "", "byte": "", "word": "th", "subword": " th"}[unit]
    ids = vocabulary.encode("\n" + text[: len(text) - len(tail)]).astype("int64")
    logits, state = model(torch.tensor(ids)[:, None])
    expected = completions(model_step(model), state, logits[-1], Lexicon(vocabulary), tail, 5)
    assert len(expected) == 5 or unit == "word"
    assert expected
    assert dict(completer.offers(5)) == pytest.approx(dict(expected), abs=1e-9)


strokes = st.lists(
    st.one_of(
        st.sampled_from(["the", " ", "  ", "\n", ", ", "cat", "é", "—", "x", "☃", "\n  \n", "can't", "zzz ", "."]),
        st.integers(1, 6),
    ),
    max_size=10,
)


@pytest.mark.parametrize("unit", UNITS)
@given(strokes=strokes)
def test_typing_and_taking_back_is_as_if_only_the_rest_was_typed(unit, strokes):
    completer, text = completer_of(unit, history=12), ""
    for stroke in strokes:
        if isinstance(stroke, int):
            completer.backspace(stroke)
            text = text[: max(0, len(text) - stroke)]
        else:
            completer.type(stroke)
            text += stroke
    assert completer.text == text
    same_offers(completer, typed(unit, text))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("history", [1, 7])
def test_a_long_text_at_once_is_the_same_text_key_by_key(unit, history):
    completer = completer_of(unit, history)
    completer.type(TEXT * 4 + "the c")
    same_offers(completer, typed(unit, TEXT * 4 + "the c"))
    completer.backspace(history + 40)
    same_offers(completer, typed(unit, (TEXT * 4 + "the c")[: -history - 40]))


def test_a_character_that_is_taken_back_wrongly_is_seen():
    completer = typed("character", "the catx")
    completer._characters.pop()
    with pytest.raises(AssertionError):
        same_offers(completer, typed("character", "the cat"))


def test_each_character_is_read_once_and_taking_back_reads_nothing():
    completer = completer_of("character")
    model = MADE["character"][1]
    before = model.read
    for character in TEXT:
        completer.type(character)
    assert model.read - before == len(TEXT)
    completer.backspace(len(TEXT))
    assert model.read - before == len(TEXT)


def test_what_is_kept_to_take_back_is_bounded():
    completer = completer_of("character", history=10)
    completer.type("the cat sat on the mat")
    assert len(completer._history) == 10
    completer.backspace(10)
    before = MADE["character"][1].read
    completer.backspace()
    # Past what is kept, the text is read again, and then as much is kept as before.
    assert MADE["character"][1].read - before == len("the cat sat")
    assert len(completer._history) == 10


def test_offers_are_looked_for_once_as_long_as_nothing_is_typed():
    completer = typed("character", "the c")
    first = completer.offers(3)
    before = MADE["character"][1].read
    assert completer.offers(3) is first
    assert MADE["character"][1].read == before
    completer.type("a")
    assert completer.offers(3) is not first
    completer.backspace()
    assert completer.offers(3) == first


def test_characters_out_of_the_vocabulary_are_kept_in_the_text_and_named_and_not_read():
    completer = typed("character", "the☃ c")
    assert completer.text == "the☃ c"
    assert completer.unknown == "☃"
    assert completer.offers(4) == typed("character", "the c").offers(4)
    completer.backspace(3)
    assert completer.unknown == ""
    completer.type("☃\n")
    assert completer.unknown == ""


def test_words_out_of_the_vocabulary_are_named_when_they_have_ended():
    completer = typed("word", "the zebra")
    assert completer.unknown == ""
    completer.type(" ")
    assert completer.unknown == "zebra"
    assert completer.offers(3) == typed("word", "the unicorn ").offers(3)


def test_a_word_model_goes_on_behind_the_punctuation_of_an_unfinished_word():
    completer = typed("word", "the cat,")
    assert all(offer.text.startswith(" ") for offer in completer.offers(5))
    read = typed("word", "the cat , ").offers(5)
    assert [offer.text.strip() for offer in completer.offers(5)] == [offer.text for offer in read]


def test_a_word_of_more_than_a_thousand_characters_has_no_offers():
    completer = completer_of("subword")
    completer.type("a" * 1001)
    assert completer.offers(3) == []
    completer.type(" ")
    assert len(completer.offers(3)) == 3


def test_a_text_begins_like_a_line_and_has_no_offers_where_that_is_unknown():
    completer = completer_of("character")
    vocabulary, model = MADE["character"]
    logits, state = model(torch.tensor(vocabulary.encode("\n").astype("int64"))[:, None])
    expected = completions(model_step(model), state, logits[-1], Lexicon(vocabulary), "", 3)
    assert completer.offers(3) == expected
    vocabulary = Characters("ab ")
    completer = Completer(Tiny(3), vocabulary)
    assert completer.offers() == []
    completer.type("a")
    assert completer.offers()


def test_a_model_in_training_is_put_in_evaluation_mode():
    model = Tiny(3).train()
    Completer(model, Characters("ab "))
    assert not model.training


def test_a_count_below_one_is_refused():
    with pytest.raises(ConfigError, match="at least 1 offer, got a count of 0"):
        completer_of("character").offers(0)
    with pytest.raises(ConfigError, match="at least 1 offer, got a count of -1"):
        run(completer_of("character"), io.StringIO(), io.StringIO(), io.StringIO(), count=-1)


# A pipe


def test_lines_of_a_pipe_are_completed_each_for_itself():
    process = child(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate("the c\n\nhé☃ t".encode(), timeout=60)
    assert process.returncode == 0
    assert err.decode() == "line 3: not in the vocabulary: ☃\n"
    blocks = [
        "".join(f"{offer.probability:.6f}\t{offer.text}\n" for offer in typed("character", line).offers(3))
        for line in ("the c", "", "hé☃ t")
    ]
    assert all(block.count("\n") == 3 for block in blocks)
    assert out.decode() == "\n".join(blocks)


def lines_of(stdin, **settings):
    out, err = io.StringIO(), io.StringIO()
    assert run(completer_of("character"), stdin, out, err, 2, **settings) == 0
    return out.getvalue().splitlines()


def test_lines_as_json():
    records = [json.loads(line) for line in lines_of(io.StringIO("the c\r\nsat on\n"), json=True)]
    assert [record["text"] for record in records] == ["the c", "sat on"]
    for record in records:
        assert record["offers"] == [offer._asdict() for offer in typed("character", record["text"]).offers(2)]


def test_no_lines_print_nothing():
    assert lines_of(io.StringIO("")) == []


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_input_that_is_not_utf8_is_refused_with_its_line(errors):
    stdin = io.TextIOWrapper(io.BytesIO(b"the c\ncaf\xe9\n"), encoding="utf-8", errors=errors)
    with pytest.raises(DataError, match="not UTF-8"):
        lines_of(stdin)
