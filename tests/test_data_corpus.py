"""Corpora on disk against an oracle that holds the whole text in memory; and every way in which one can fail."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recurra.data import blocks, bpe, corpus, words
from recurra.data.corpus import SPLITS, Corpus, build_corpus, encode_file
from recurra.data.vocabulary import Bytes, Characters, Words
from recurra.errors import DataError

TEXT = "One two, three; four!\r\nFünf 六 seven  eight.\n\n" * 40


@contextlib.contextmanager
def _folder(*contents):
    """A new folder with the contents as text0, text1, ...: yields their names and a folder for the corpus."""
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for n, content in enumerate(contents):
            names.append(os.path.join(folder, f"text{n}"))
            Path(names[-1]).write_bytes(content.encode() if isinstance(content, str) else content)
        yield names, os.path.join(folder, "corpus")


def _parts(built):
    return [built.split(name).tolist() for name in SPLITS]


# --- the oracle: the same corpus, from the whole text in memory ---


def _whole(contents, unit):
    newline = b"\n" if unit == "byte" else "\n"
    whole = newline[:0]
    for content in contents:
        if unit != "byte":
            content = content.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        if content and whole and not whole.endswith(newline):
            whole += newline
        whole += content
    return whole


def _cut(whole, place, unit):
    """The first place from ``place`` on where the text may be cut, tried one after the other."""
    for at in range(place, len(whole)):
        if unit == "character" or at == 0:
            return at
        if unit == "byte":
            if whole[at] & 0b11000000 != 0b10000000:
                return at
        elif at > place + blocks.FARTHEST_SEAM:
            return place
        elif whole[at] in " \n\t" and not whole[at - 1].isspace():
            return at
    return len(whole) if unit == "byte" or len(whole) <= place + blocks.FARTHEST_SEAM else place


def _expected(contents, unit, validation, test):
    whole = _whole(contents, unit)
    held_out = round(len(whole) * test)
    first = _cut(whole, len(whole) - held_out - round(len(whole) * validation), unit)
    second = max(first, _cut(whole, len(whole) - held_out, unit))
    return whole[:first], whole[first:second], whole[second:]


def _small_blocks(monkeypatch, chunk):
    """Blocks of a few characters, so that everything that can be cut apart is."""
    make = blocks.Text.__init__

    def smaller(self, files, unit):
        make(self, files, unit)
        self.chunk = chunk

    monkeypatch.setattr(blocks.Text, "__init__", smaller)


_HARD = st.lists(
    st.sampled_from(["a", "word", "é", "€", "𝄞", " ", "  ", "\n", "\r\n", "\r", "\t", ",", "中", "\u2028"]), max_size=60
).map("".join)
_SHARE = st.sampled_from([0, 0.05, 0.1, 0.25])


@pytest.mark.parametrize("unit", ["character", "byte", "word", "subword"])
@given(
    texts=st.lists(_HARD, min_size=1, max_size=3),
    chunk=st.integers(1, 9),
    validation=_SHARE,
    test=_SHARE,
    farthest=st.sampled_from([3, 100]),
)
def test_a_corpus_is_the_text_that_fits_in_memory(unit, texts, chunk, validation, test, farthest):
    contents = [text.encode() for text in texts] if unit == "byte" else texts
    shares = {"validation": validation, "test": test}
    with _folder(*contents) as (names, folder), pytest.MonkeyPatch.context() as patch:
        _small_blocks(patch, chunk)
        patch.setattr(blocks, "FARTHEST_SEAM", farthest)
        expected = _expected(contents, unit, validation, test)
        try:
            built = build_corpus(names, folder, unit=unit, **shares)
        except DataError:
            parts = expected if unit != "word" else [words.split(part) for part in expected]
            needed = [part for part, share in zip(parts, (1, validation, test), strict=True) if share]
            # A subword may be many characters, so that only the shortest parts are surely too short.
            assert unit == "subword" or min(map(len, needed)) < 2
            return
        vocabulary = built.vocabulary
        if unit == "character":
            assert vocabulary.characters == "".join(sorted(set("".join(expected))))
        if unit == "word":
            assert vocabulary == Words.learn([expected[0]], 10_000)
        for name, part, content in zip(SPLITS, _parts(built), expected, strict=True):
            if unit == "byte":
                assert bytes(part) == content
                assert built.bytes[name] == len(content)
            else:
                assert part == vocabulary.encode(content).tolist()
                assert (built.characters[name], built.bytes[name]) == (len(content), len(content.encode()))
            assert built.tokens[name] == len(part)
        assert _parts(Corpus.open(folder)) == _parts(built)
        encoded = encode_file(vocabulary, names, folder)
        whole = expected[0][:0].join(expected)
        assert encoded.tokens.tolist() == (list(whole) if unit == "byte" else vocabulary.encode(whole).tolist())
        assert encoded.bytes == len(whole if unit == "byte" else whole.encode())
        assert encoded.characters == sum(built.characters.values())
        assert unit == "byte" or encoded.characters == len(whole)


@pytest.mark.parametrize("unit", ["character", "byte", "word", "subword"])
@pytest.mark.parametrize("validation", [0, 0.05, 0.3])
@pytest.mark.parametrize("farthest", range(7))
def test_every_cut_is_the_first_that_is_allowed(unit, validation, farthest, monkeypatch):
    _small_blocks(monkeypatch, 11)
    monkeypatch.setattr(blocks, "FARTHEST_SEAM", farthest)
    for length in range(400, 425):
        content = TEXT[:length].encode() if unit == "byte" else TEXT[:length]
        expected = _expected([content], unit, validation, 0.1)
        with _folder(content) as (names, _):
            parts = ["", "", ""] if unit != "byte" else [b"", b"", b""]
            size = sum(map(len, expected))
            cuts = (size - round(size * 0.1) - round(size * validation), size - round(size * 0.1))
            for part, block in blocks.Text([("text", Path(names[0]))], unit).parts(cuts):
                parts[part] += block.content
            assert tuple(parts) == expected


def test_bytes_that_are_no_text_are_cut_where_the_shares_end():
    with _folder(b"\x80" * 1000) as (names, folder):
        built = build_corpus(names, folder, unit="byte")
        assert built.tokens == built.bytes == {"train": 900, "validation": 50, "test": 50}


def test_the_oracle_kills_a_corpus_with_a_cut_too_early(monkeypatch):
    whole = _whole([TEXT], "word")
    right = _expected([TEXT], "word", 0.1, 0.1)
    monkeypatch.setattr(blocks, "_next_cut", lambda content, place, unit: place)
    with _folder(TEXT) as (names, folder):
        built = build_corpus(names, folder, unit="word", validation=0.1, test=0.1)
        assert sum(built.characters.values()) == len(whole)
        assert [built.characters[name] for name in SPLITS] != [len(part) for part in right]


def test_the_oracle_kills_words_cut_by_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_last_seam", len)
    _small_blocks(monkeypatch, 7)
    with _folder(TEXT) as (names, folder):
        built = build_corpus(names, folder, unit="word", validation=0.1, test=0.1)
        expected = _expected([TEXT], "word", 0.1, 0.1)
        assert _parts(built)[0] != built.vocabulary.encode(expected[0]).tolist()


@pytest.mark.parametrize("unit", ["word", "subword"])
@pytest.mark.parametrize("shares", [{"validation": 0.1, "test": 0}, {"validation": 0, "test": 0.1}])
def test_the_vocabulary_of_words_comes_from_the_training_part_alone(unit, shares):
    with _folder("seen words here\n" * 60 + "zyxwvut zyxwvut\n" * 6) as (names, folder):
        vocabulary = build_corpus(names, folder, unit=unit, vocabulary_size=300, **shares).vocabulary
        seen = [vocabulary.decode([n]) for n in range(len(vocabulary))]
        assert any("seen" in piece for piece in seen)
        assert not any("zy" in piece for piece in seen)


def test_the_vocabulary_of_characters_comes_from_the_whole_text():
    with _folder("abc" * 60 + "z" * 5) as (names, folder):
        assert build_corpus(names, folder).vocabulary == Characters("abcz")


def test_a_run_without_white_space_is_taken_apart_and_loses_nothing(monkeypatch):
    monkeypatch.setattr(blocks, "LONGEST_RUN", 50)
    _small_blocks(monkeypatch, 20)
    text = "é中a" * 3000
    with _folder(text) as (names, folder):
        built = build_corpus(names, folder, unit="subword", vocabulary_size=260)
        assert 8100 <= built.characters["train"] <= 8200
        assert 350 <= built.characters["test"] <= 450
        assert "".join(built.vocabulary.decode(part) for part in _parts(built)) == text
        assert max(map(len, blocks.Text([("text", Path(names[0]))], "subword"))) < 50 + 20


def test_subwords_of_a_long_text_are_learned_from_all_over_it(monkeypatch):
    monkeypatch.setattr(corpus, "LEARNED", 2000)
    monkeypatch.setattr(corpus, "LEARNED_FOR_EACH", 1)
    _small_blocks(monkeypatch, 100)
    learned = []
    learn = bpe.learn
    monkeypatch.setattr(bpe, "learn", lambda texts, size: learn((learned.append(t) or t for t in texts), size))
    text = "beginning " * 2000 + "ending " * 2000
    with _folder(text) as (names, folder):
        vocabulary = build_corpus(names, folder, unit="subword", vocabulary_size=300).vocabulary
        assert len(vocabulary.encode("beginning ending")) == 2
        assert 1000 < sum(map(len, learned)) <= 2200


@pytest.mark.data
def test_a_published_figure_needs_ninety_five_five(data_folder, tmp_path):
    source = data_folder / "text/shakespeare/input.txt"
    text = source.read_bytes().decode()
    built = build_corpus([str(source)], tmp_path)
    assert built.tokens == built.characters == built.bytes == {"train": 1003854, "validation": 55770, "test": 55770}
    assert len(built.vocabulary) == 65
    assert "".join(built.vocabulary.decode(built.split(name)) for name in SPLITS) == text
    assert built.sources == ("input.txt",)


# --- what a corpus is like ---


@pytest.fixture
def built(tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    return build_corpus(tmp_path / "text.txt", tmp_path / "corpus")


def test_a_part_is_read_only_memory(built):
    part = built.split("train")
    assert isinstance(part, np.memmap)
    assert part.dtype == built.vocabulary.dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        part[0] = 1


def test_a_wrong_part_is_refused(built):
    with pytest.raises(DataError, match="did you mean 'validation'"):
        built.split("valid")


def test_a_share_of_nothing_is_an_empty_part(tmp_path):
    with _folder(TEXT) as (names, folder):
        built = build_corpus(names, folder, validation=0, test=0)
        assert built.tokens == {"train": len(_whole([TEXT], "character")), "validation": 0, "test": 0}
        assert built.split("test").shape == (0,)
        assert Corpus.open(folder).split("validation").dtype == np.uint8


def test_sources_are_named_as_given_and_no_folder_of_the_machine_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for name in ("a.txt", "b.txt"):
        Path("texts", name).write_text(TEXT)
    Path("c.txt").write_text(TEXT)
    built = build_corpus(["texts", str(tmp_path / "c.txt")], "corpus")
    assert built.sources == ("texts/a.txt", "texts/b.txt", "c.txt")
    assert str(tmp_path) not in Path("corpus/corpus.json").read_text()


def test_the_same_text_has_the_same_digest_and_another_text_another(tmp_path):
    digests = []
    for n, text in enumerate([TEXT, TEXT, TEXT[:-1] + "x"]):
        with _folder(text) as (names, _):
            digests.append(build_corpus(names, tmp_path / str(n)).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_corpus_replaces_the_one_before_and_leaves_nothing_else(tmp_path, built):
    (tmp_path / "text.txt").write_text("another text\n" * 50)
    again = build_corpus(tmp_path / "text.txt", built.folder, unit="byte")
    assert again.vocabulary == Bytes()
    assert Corpus.open(built.folder) == again
    assert sorted(os.listdir(built.folder)) == ["corpus.json", "test.bin", "train.bin", "validation.bin"]


def test_another_text_is_encoded_in_a_file_without_a_name(built, tmp_path):
    (tmp_path / "other.txt").write_text("two, three\n")
    before = sorted(os.listdir(tmp_path))
    encoded = encode_file(built.vocabulary, [tmp_path / "other.txt"], tmp_path)
    assert built.vocabulary.decode(encoded.tokens) == "two, three\n"
    assert sorted(os.listdir(tmp_path)) == before
    assert not encoded.tokens.flags.writeable


def test_characters_that_another_text_adds_are_named_with_file_and_place(built, tmp_path):
    (tmp_path / "near.txt").write_text("two\n" * 100_000)
    (tmp_path / "far.txt").write_text("two\n" * 100_000 + "Ω")
    with pytest.raises(DataError, match=r"far.txt has characters .* at 400000 .*--unit byte"):
        encode_file(built.vocabulary, [tmp_path / "near.txt", tmp_path / "far.txt"], tmp_path)


def test_standard_input_is_a_text_like_any_other(tmp_path):
    program = (
        "from recurra.data.corpus import *; import sys\n"
        "corpus = build_corpus(['-'], 'corpus', unit='word')\n"
        "print(corpus.sources, sum(corpus.characters.values()))\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, input=TEXT.encode(), capture_output=True, check=True, cwd=tmp_path).stdout
    assert out.decode().strip() == f"('-',) {len(_whole([TEXT], 'word'))}"
    assert len(os.listdir(tmp_path / "corpus")) == 4
    again = (
        "from recurra.data.corpus import *; print(len(encode_file(Corpus.open('corpus').vocabulary, '-', '.').tokens))"
    )
    out = subprocess.run(
        [sys.executable, "-c", again], input=b"One two\n", capture_output=True, check=True, cwd=tmp_path
    ).stdout
    assert out == b"3\n"


# --- short, wrong and changing texts ---


@pytest.mark.parametrize("unit", ["character", "byte", "word", "subword"])
@pytest.mark.parametrize("content", ["", "a", "\n", "abc", " ", "a b"])
def test_a_text_too_short_is_refused_with_its_length(content, unit):
    with _folder(content) as (names, folder):
        with pytest.raises(DataError, match="empty" if content == "" else f"it has {len(content)} .* at least 2"):
            build_corpus(names, folder, unit=unit)
        assert os.listdir(folder) == []
        if content != "a b":
            with pytest.raises(DataError, match="at least 2 are needed"):
                encode_file(Words(["<unk>"]), names, folder)


@pytest.mark.parametrize("length", range(20, 60))
def test_what_a_short_text_is_told_to_be_is_enough(length):
    with _folder("x" * length) as (names, folder):
        try:
            build_corpus(names, folder)
        except DataError as problem:
            needed = int(re.search(r"about (\d+) characters", str(problem))[1])
            assert length < needed == 40
            return
    assert length >= 30


@given(
    contents=st.lists(st.binary(max_size=120), min_size=1, max_size=3),
    unit=st.sampled_from(["character", "byte", "word", "subword"]),
)
def test_any_bytes_make_a_corpus_or_a_data_error(contents, unit):
    with _folder(*contents) as (names, folder):
        try:
            built = build_corpus(names, folder, unit=unit)
        except DataError:
            assert os.listdir(folder) == []
            return
        assert sum(built.bytes.values()) == len(_whole(contents, "byte")) or unit != "byte"
        assert _parts(Corpus.open(folder)) == _parts(built)


def test_a_text_that_changes_meanwhile_is_refused_and_the_old_corpus_stays(tmp_path, built, monkeypatch):
    survey = corpus._survey

    def grow(text):
        size, characters = survey(text)
        with open(tmp_path / "text.txt", "a") as file:
            file.write("eight")
        return size, characters

    monkeypatch.setattr(corpus, "_survey", grow)
    with pytest.raises(DataError, match=r"text.txt; try again"):
        build_corpus(tmp_path / "text.txt", built.folder)
    assert Corpus.open(built.folder) == built
