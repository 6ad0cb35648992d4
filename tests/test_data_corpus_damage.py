"""Settings that do not fit, damaged corpora, folders that cannot be written: an error of recurra, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from recurra.data import corpus, record
from recurra.data.corpus import Corpus, build_corpus, encode_file
from recurra.data.output import create_temporary
from recurra.data.vocabulary import vocabulary_from_json
from recurra.errors import ConfigError, DataError

TEXT = "One two, three; four!\r\nFünf 六 seven  eight.\n\n" * 40


@pytest.fixture
def built(tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    return build_corpus(tmp_path / "text.txt", tmp_path / "corpus")


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


def test_a_wrong_name_leaves_no_folder_behind(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        build_corpus(tmp_path / "nothing", tmp_path / "corpus")
    assert os.listdir(tmp_path) == []


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
    with pytest.raises(DataError, match=f"{name} cannot be read: it is no regular file; build the corpus again"):
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


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"NaN",
        b"[" * 100_000,
        b"1" * 10_000,
        b"\xff",
        b'{"a":' * 50_000,
    ],
    ids=range(9),
)
def test_a_record_that_is_no_record_is_refused(built, body):
    path = built.folder / "corpus.json"
    path.write_bytes(record._wrap(body))
    with pytest.raises(DataError, match=r"corpus.json is damaged"):
        Corpus.open(built.folder)


def test_a_record_of_a_million_empty_lists_is_refused_before_it_is_parsed(built):
    path = built.folder / "corpus.json"
    path.write_bytes(record._wrap(b'{"a": [' + b"[]," * 600_000 + b"[]]}"))
    with pytest.raises(DataError, match=r"corpus\.json is damaged: .* more than the \d+ values"):
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


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path, built):
    program = (
        "from recurra.data.output import *; import os, signal, sys; from pathlib import Path\n"
        "for name in ('train.bin', 'corpus.json', 'pipe'): create_temporary(Path('.'), name)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=built.folder)
    assert killed.returncode == -9
    assert len(os.listdir(built.folder)) == 7
    busy, file = create_temporary(built.folder, "test.bin")
    with file, open(tmp_path / "text.txt", "rb") as text:
        program = "from recurra.data.corpus import *; build_corpus('-', '.')"
        subprocess.run([sys.executable, "-c", program], stdin=text, check=True, cwd=built.folder)
        left = [name for name in os.listdir(built.folder) if name.startswith(".")]
        assert left == [busy.name]
    assert Corpus.open(built.folder).tokens == built.tokens


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
        "from recurra.errors import ConfigError, DataError\n"
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
