"""Text from tokens as they come, and stop strings, however both are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recurra.data.vocabulary import Bytes, Subwords, Words
from recurra.decoding import (
    decode_stream,
    until,
)
from recurra.errors import ConfigError


@given(st.lists(st.integers(0, 255), max_size=24))
def test_streamed_bytes_are_the_decoded_bytes(ids):
    assert "".join(decode_stream(Bytes(), ids)) == Bytes().decode(ids)


@given(st.text(max_size=12))
def test_streamed_bytes_never_break_a_character(text):
    pieces = list(decode_stream(Bytes(), text.encode()))
    assert [c for piece in pieces for c in piece] == list(text)
    assert len(pieces) == len(text)


def test_a_streamed_character_comes_with_its_last_byte():
    def ids():
        for byte in "aé€".encode():
            fed.append(byte)
            yield byte

    fed: list[int] = []
    assert [(piece, len(fed)) for piece in decode_stream(Bytes(), ids())] == [("a", 1), ("é", 3), ("€", 6)]


WORDS = Words(["<unk>", "the", "cat", ",", ".", "...", "(", ")", "\n", "don't", "猫"])


@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=12))
def test_streamed_words_are_joined_as_the_whole_text_is(ids):
    assert "".join(decode_stream(WORDS, ids)) == WORDS.decode(ids)


@given(st.lists(st.integers(0, 299), max_size=24))
def test_streamed_subwords_are_the_decoded_subwords(ids):
    ids = [token % len(subwords()) for token in ids]
    assert "".join(decode_stream(subwords(), ids)) == subwords().decode(ids)


def test_streamed_subwords_never_break_a_character():
    text = "the cat — 猫 — sat"
    pieces = list(decode_stream(subwords(), subwords().encode(text)))
    assert "".join(pieces) == text
    assert len(pieces) > 8


def subwords(_made=[]):  # noqa: B006
    pytest.importorskip("tokenizers")

    if not _made:
        _made.append(Subwords.learn(["the cat sat on the mat, the hat and the cart. " * 9], 300))
    return _made[0]


def cut(text, places):
    places = sorted({place % (len(text) + 1) for place in places})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@given(
    st.text("ab", max_size=20),
    st.text("ab", min_size=1, max_size=5),
    st.lists(st.integers(0, 20), max_size=9),
)
def test_a_stop_string_ends_the_text_wherever_it_was_cut(text, stop, places):
    assert "".join(until(cut(text, places), stop)) == text.split(stop)[0]


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=5))
def test_nothing_is_held_back_that_cannot_begin_the_stop_string(text, stop):
    text = text.split(stop)[0]
    fed: list[str] = []
    shown = ""
    for piece in until((fed.append(c) or c for c in text), stop):
        shown += piece
        so_far = "".join(fed)
        if so_far != text:
            held = so_far[len(shown) :]
            assert stop.startswith(held)
            assert not any(stop.startswith(so_far[n:]) for n in range(len(shown)) if n < len(so_far))
    assert shown == text


def test_nothing_is_read_behind_the_stop_string():
    source = iter(["one", " ST", "OP and", " more"])
    assert "".join(until(source, "STOP")) == "one "
    assert list(source) == [" more"]


def test_an_empty_stop_string_is_refused_at_once():
    with pytest.raises(ConfigError, match="at least one character"):
        until(iter(["a"]), "")
