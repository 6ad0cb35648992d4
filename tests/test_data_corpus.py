"""Corpora on disk against an oracle that holds the whole text in memory; and every way in which one can fail."""

from __future__ import annotations

import contextlib
import errno
import json
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

from recurra.data import blocks, corpus, record, words
from recurra.data.corpus import SPLITS, Corpus, build_corpus, encode_file
from recurra.data.vocabulary import Bytes, Characters, Words, vocabulary_from_json
from recurra.errors import ConfigError, DataError

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
@given(texts=st.lists(_HARD, min_size=1, max_size=3), chunk=st.integers(1, 9), validation=_SHARE, test=_SHARE)
def test_a_corpus_is_the_text_that_fits_in_memory(unit, texts, chunk, validation, test):
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
def test_the_vocabulary_of_words_comes_from_the_training_part_alone(unit):
    with _folder("seen words here\n" * 60 + "zyxwvut zyxwvut\n" * 6) as (names, folder):
        vocabulary = build_corpus(names, folder, unit=unit, vocabulary_size=300, test=0.1).vocabulary
        seen = [vocabulary.decode([n]) for n in range(len(vocabulary))]
        assert any("seen" in piece for piece in seen)
        assert not any("zy" in piece for piece in seen)


def test_the_vocabulary_of_characters_comes_from_the_whole_text():
    with _folder("abc" * 60 + "z" * 5) as (names, folder):
        assert build_corpus(names, folder).vocabulary == Characters("abcz")


def test_a_run_without_white_space_is_taken_apart_and_loses_nothing(monkeypatch):
    monkeypatch.setattr(blocks, "LONGEST_RUN", 50)
    _small_blocks(monkeypatch, 20)
    text = "é中a" * 300
    with _folder(text) as (names, folder):
        built = build_corpus(names, folder, unit="subword", vocabulary_size=260)
        assert "".join(built.vocabulary.decode(part) for part in _parts(built)) == text


def test_subwords_of_a_long_text_are_learned_from_all_over_it(monkeypatch):
    monkeypatch.setattr(corpus, "LEARNED", 2000)
    monkeypatch.setattr(corpus, "LEARNED_FOR_EACH", 1)
    _small_blocks(monkeypatch, 100)
    text = "beginning " * 2000 + "ending " * 2000
    with _folder(text) as (names, folder):
        vocabulary = build_corpus(names, folder, unit="subword", vocabulary_size=300).vocabulary
        assert len(vocabulary.encode("beginning ending")) == 2


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


# --- what is refused before anything is written ---


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"unit": "chars"}, "there is no unit 'chars'"),
        ({"unit": None}, "there is no unit None"),
        ({"vocabulary_size": 50}, "leave it out"),
        ({"unit": "byte", "vocabulary_size": 256}, "leave it out"),
        ({"unit": "word", "vocabulary_size": 1}, "from 2 to 65536 for words, got 1"),
        ({"unit": "subword", "vocabulary_size": 255}, "from 256 to 65536 for subwords, got 255"),
        ({"unit": "subword", "vocabulary_size": 10**9}, "got 1000000000"),
        ({"unit": "word", "vocabulary_size": 1e3}, "got 1000.0"),
        ({"validation": -0.1}, "validation=-0.1"),
        ({"test": 1}, "test=1"),
        ({"validation": 0.5, "test": 0.5}, "together below 1"),
        ({"test": float("nan")}, "test=nan"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        build_corpus("nowhere", tmp_path / "corpus", **settings)
    assert os.listdir(tmp_path) == []


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


def test_a_wrong_name_leaves_no_folder_behind(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        build_corpus(tmp_path / "nothing", tmp_path / "corpus")
    assert os.listdir(tmp_path) == []


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


# --- damage ---


def _damage(path, data):
    path.write_bytes(data)
    with pytest.raises(DataError, match=path.name):
        Corpus.open(path.parent)


@pytest.mark.parametrize("name", ["corpus.json", "train.bin", "validation.bin", "test.bin"])
def test_every_kind_of_damage_is_noticed_and_named(built, name):
    path = built.folder / name
    whole = path.read_bytes()
    for place in {*range(0, len(whole), 1 + len(whole) // 150), len(whole) - 1}:
        for bit in (0, 5, 7):
            _damage(path, whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
    for length in {*range(0, len(whole), 1 + len(whole) // 50), len(whole) - 1}:
        _damage(path, whole[:length])
    _damage(path, whole + b"\0")
    _damage(path, whole + b"\n")
    path.unlink()
    with pytest.raises(DataError, match=name):
        Corpus.open(built.folder)
    path.mkdir()
    with pytest.raises(DataError, match=name):
        Corpus.open(built.folder)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(DataError, match=f"{name} is damaged: it is no regular file"):
        Corpus.open(built.folder)
    path.unlink()
    path.write_bytes(whole)
    assert Corpus.open(built.folder) == built


def test_a_folder_without_a_corpus_is_called_so(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="there is no corpus in"):
            Corpus.open(folder)


def test_a_part_that_goes_away_later_is_refused(built):
    with open(built.folder / "train.bin", "r+b") as file:
        file.truncate(5)
    with pytest.raises(DataError, match=r"train\.bin is damaged"):
        built.split("train")
    (built.folder / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train\.bin is damaged"):
        built.split("train")


def _changed(**changes):
    """A change of the record that keeps its digest right: what only a program could have written."""

    def change(content):
        for key, value in changes.items():
            *folders, last = key.split("__")
            place = content
            for folder in folders:
                place = place[folder]
            place[last] = value

    return change


_CHANGES = {
    "negative": _changed(splits__train__tokens=-1),
    "huge": _changed(splits__train__tokens=10**30),
    "huge and plausible": _changed(splits__test__tokens=2**62),
    "bool": _changed(splits__train__tokens=True),
    "float": _changed(splits__train__tokens=1.0),
    "text": _changed(splits__train__bytes="5"),
    "null": _changed(splits__validation__characters=None),
    "other digest": _changed(splits__train__digest="00" * 32),
    "digest a number": _changed(splits__train__digest=5),
    "splits a list": _changed(splits=[]),
    "split a number": _changed(splits__test=5),
    "no splits": lambda content: content.pop("splits"),
    "dtype": _changed(dtype="float64"),
    "dtype a list": _changed(dtype=["uint8"]),
    "no dtype": lambda content: content.pop("dtype"),
    "sources": _changed(sources=5),
    "source": _changed(sources=[5]),
    "vocabulary": _changed(vocabulary=None),
    "vocabulary unit": _changed(vocabulary__unit="bytes"),
    "vocabulary too small": _changed(vocabulary={"unit": "character", "characters": "ab"}),
}


@pytest.mark.parametrize("name", _CHANGES)
def test_a_record_that_says_something_wrong_is_refused(built, name):
    path = built.folder / "corpus.json"
    content, _ = record.unseal(path)
    _CHANGES[name](content)
    path.write_bytes(record.seal(content))
    with pytest.raises(DataError):
        Corpus.open(built.folder)


def _sealed(body):
    return record._OPENING + record._digest(body) + record._MIDDLE + body + record._CLOSING


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"NaN", b"[" * 100_000, b"1" * 10_000, b"\xff", b'{"a":' * 50_000, b"[],[]," * 200_000],
    ids=range(10),
)
def test_a_record_that_is_no_record_is_refused(built, body):
    path = built.folder / "corpus.json"
    path.write_bytes(_sealed(body))
    with pytest.raises(DataError, match=r"corpus.json is damaged"):
        Corpus.open(built.folder)


def test_a_record_is_json_with_the_digest_first(built):
    value = json.loads((built.folder / "corpus.json").read_text())
    assert list(value) == ["blake2b", "content"]
    assert value["blake2b"] == built.digest
    assert vocabulary_from_json(value["content"]["vocabulary"]) == built.vocabulary


def test_a_record_that_grew_too_large_is_refused_unread(built, monkeypatch):
    monkeypatch.setattr(record, "LARGEST", 100)
    with pytest.raises(DataError, match="more than the 100"):
        Corpus.open(built.folder)
    with pytest.raises(DataError, match="more than 100"):
        record.seal({"words": ["x"] * 100})


# --- folders that cannot be written ---


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "the limit on the size of a file is reached"),
        (errno.EROFS, "cannot write into .*: Read-only"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_is_named_and_leaves_no_half_corpus(tmp_path, built, monkeypatch, call, number, says):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(DataError, match=says) as caught:
        build_corpus(tmp_path / "text.txt", built.folder, unit="byte")
    assert str(built.folder) in str(caught.value)
    assert not [name for name in os.listdir(built.folder) if name.startswith(".")]
    if call == "fsync":
        assert Corpus.open(built.folder) == built
    else:
        with pytest.raises(DataError, match="there is no corpus"):
            Corpus.open(built.folder)


def test_ctrl_c_leaves_the_old_corpus_and_no_temporary_file(tmp_path, built, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(tmp_path / "text.txt", built.folder, unit="byte")
    assert Corpus.open(built.folder) == built
    assert len(os.listdir(built.folder)) == 4


def test_a_file_where_the_folder_should_be_is_refused(tmp_path, built):
    for folder in (tmp_path / "text.txt", tmp_path / "text.txt" / "corpus"):
        with pytest.raises(DataError, match=r"cannot write into .*text.txt"):
            build_corpus(tmp_path / "text.txt", folder)
        with pytest.raises(DataError, match=r"cannot write into .*text.txt"):
            encode_file(built.vocabulary, tmp_path / "text.txt", folder)


@pytest.mark.parametrize("source", ["text.txt", "-"])
@pytest.mark.parametrize("action", ["build_corpus(source, '.')", "encode_file(Bytes(), source, '.')"])
def test_a_real_limit_on_file_sizes_is_a_full_disk(tmp_path, source, action):
    (tmp_path / "text.txt").write_text("some text\n" * 20_000)
    program = (
        "from recurra.data.corpus import *; from recurra.data.vocabulary import Bytes; import resource, sys\n"
        "from recurra.errors import DataError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"source = {source!r}\n"
        f"try: {action}\n"
        "except DataError as problem: print(problem)\n"
    )
    with open(tmp_path / "text.txt", "rb") as text:
        done = subprocess.run([sys.executable, "-c", program], stdin=text, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the limit on the size of a file is reached while writing into .:")
    assert os.listdir(tmp_path) == ["text.txt"]
