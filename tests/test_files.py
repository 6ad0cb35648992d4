"""Files: replaced whole or not at all, and read with suspicion."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurra import files
from recurra.errors import CheckpointError, DataError
from recurra.files import (
    inside,
    make_folder,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    replacing,
    sync_folder,
    temporaries,
    write_atomically,
)


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def _write_half(path: Path, failure: type[BaseException]) -> None:
    with replacing(path) as handle:
        handle.write(b"x" * 100_000)
        raise failure


def test_the_new_version_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "run.json"
    write_atomically(path, "old")
    write_atomically(path, "grüße")
    assert path.read_bytes() == "grüße".encode()
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert _names(tmp_path) == ["run.json"]


def test_the_old_version_is_there_until_the_block_ends(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    with replacing(path) as handle:
        handle.write(b"new")
        handle.flush()
        assert path.read_text() == "old"
        assert list(temporaries(tmp_path).values()) == ["run.json"]
    assert path.read_text() == "new"


def test_a_file_that_was_not_there_does_not_appear_when_writing_it_fails(tmp_path):
    with pytest.raises(ZeroDivisionError):
        _write_half(tmp_path / "new", ZeroDivisionError)
    assert _names(tmp_path) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, MemoryError, ValueError, CheckpointError])
def test_any_error_keeps_the_old_file_removes_the_new_one_and_passes_through(tmp_path, failure):
    path = tmp_path / "best.json"
    path.write_text("old")
    with pytest.raises(failure):
        _write_half(path, failure)
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["best.json"]


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "the limit on the size of a file is reached"),
        (errno.EIO, "cannot be written"),
        (errno.EROFS, "cannot be written"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_is_named_and_costs_nothing(tmp_path, monkeypatch, call, number, says):
    path = tmp_path / "last.json"
    path.write_text("old")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(CheckpointError) as caught:
        write_atomically(path, b"12345")
    message = str(caught.value)
    assert says in message
    assert str(path) in message
    assert "nothing was lost" in message
    assert ("needs 5 bytes" in message) == (number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["last.json"]


def test_a_missing_folder_a_file_as_folder_and_a_folder_as_file_are_refused(tmp_path):
    (tmp_path / "plain").write_text("kept")
    (tmp_path / "sub" / "full").mkdir(parents=True)
    for path in (
        tmp_path / "missing" / "a",
        tmp_path / "plain" / "a",
        tmp_path / "sub",
        tmp_path / ("n" * 250),
    ):
        with pytest.raises(CheckpointError, match="cannot be written"):
            write_atomically(path, "x")
    assert _names(tmp_path) == ["plain", "sub"]
    assert (tmp_path / "plain").read_text() == "kept"


def test_a_file_system_that_cannot_sync_folders_is_accepted_and_a_broken_one_is_not(tmp_path, monkeypatch):
    real = os.fsync
    number = errno.EINVAL

    def fsync(descriptor):
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "a", "x")
    number = errno.EIO
    with pytest.raises(CheckpointError, match="cannot be forced to the disk"):
        write_atomically(tmp_path / "a", "y")
    assert _names(tmp_path) == ["a"]


def test_what_a_killed_process_left_is_found_and_nothing_else_is(tmp_path):
    left = tmp_path / ".last.json.0123456789abcdef.tmp"
    for name in (
        left.name,
        "last.json",
        ".hidden",
        "x.tmp",
        ".last.json.0123.tmp",
        "last.json.0123456789abcdef.tmp",
    ):
        (tmp_path / name).touch()
    assert temporaries(tmp_path) == {left: "last.json"}


def test_folders_are_made_with_those_above_them_and_forced_to_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    make_folder(tmp_path / "a" / "b")
    assert set(synced) == {tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino}
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "c"):
        with pytest.raises(CheckpointError, match="cannot be made"):
            make_folder(path)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "/etc/passwd", "../a", "..\\a", "a\\b", "a\0b", "\ud800", "a/", "/"],
)
def test_names_that_are_no_bare_file_names_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="is no file name inside"):
        inside(tmp_path, name)


def test_links_may_stay_in_the_folder_and_not_leave_it(tmp_path):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    (away / "secret").write_text("x")
    (home / "file").write_text("x")
    (home / "out").symlink_to(away / "secret")
    (home / "up").symlink_to("..")
    (home / "dangling").symlink_to(away / "none")
    (home / "chain").symlink_to("out")
    (home / "alias").symlink_to("file")
    (home / "loop").symlink_to("loop")
    for name in ("out", "up", "dangling", "chain"):
        with pytest.raises(CheckpointError, match="leads out of"):
            inside(home, name)
    for name in ("file", "alias", "not-yet", "..x", " "):
        assert inside(home, name) == home / name
    (tmp_path / "link").symlink_to(home)
    assert inside(tmp_path / "link", "file").read_text() == "x"
    with pytest.raises(CheckpointError):
        open_regular(inside(home, "loop"))


@settings(deadline=None)
@given(st.text(max_size=20))
def test_no_name_leads_out_of_the_folder(name):
    folder = Path(__file__).parent
    try:
        path = inside(folder, name)
    except CheckpointError:
        return
    assert path.resolve().parent == folder.resolve()


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "none"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_bytes(path, 1000)


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (lambda folder, error: open_regular(folder / "none", error), "none cannot be read: No such file"),
        (lambda folder, error: open_regular(folder, error), "no regular file"),
        (lambda folder, error: read_bytes(folder, 5, error), "no regular file"),
        (lambda folder, error: read_bytes(folder / "six", 5, error), "has 6 bytes, more than the 5"),
        (lambda folder, error: sync_folder(folder / "none", error), "forced to the disk: No such file"),
        (lambda folder, error: parse_json(b"[", "x", error=error), "x is not valid JSON"),
        (lambda folder, error: parse_json(b"[]", "x", error=error), "must hold a JSON object"),
        (lambda folder, error: parse_json(b'{"a": []}', "x", 1, error), "more than the 1 values"),
        (lambda folder, error: parse_json(b'{"a":' * 65 + b"1" + b"}" * 65, "x", error=error), "nested deeper"),
        (lambda folder, error: parse_json(b"[" * 100_000, "x", error=error), "nested deeper"),
    ],
)
def test_what_is_refused_is_told_by_the_error_of_the_caller(tmp_path, refused, says):
    (tmp_path / "six").write_bytes(b"sixsix")
    with pytest.raises(DataError, match=f"{says}.*; read on$"):
        refused(tmp_path, lambda why: DataError(f"{why}; read on"))


def test_a_file_above_the_limit_is_not_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    assert read_bytes(path, 100) == b"x" * 100
    with pytest.raises(CheckpointError, match="has 100 bytes, more than the 99"):
        read_bytes(path, 99)
    with open(path, "wb") as handle:
        handle.truncate(2**40)
    with pytest.raises(CheckpointError, match="more than"):
        read_json(path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs a file whose size is not what it holds")
def test_a_file_that_is_not_as_long_as_it_says_is_refused():
    with pytest.raises(CheckpointError, match="while it was read"):
        read_bytes(Path("/proc/self/status"), 1000)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(max_size=5), _json, max_size=4))
def test_what_json_can_hold_is_read_as_it_was(value):
    assert parse_json(json.dumps(value).encode(), "x") == value
    assert parse_json(json.dumps(value, ensure_ascii=False, indent=1).encode(), "x") == value


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text('{}[]":,0e1.-nulltrueNaIf \\u', max_size=60).map(str.encode))
def test_no_bytes_do_anything_but_parse_or_be_refused(raw):
    try:
        value = parse_json(raw, "x")
    except CheckpointError:
        return
    assert value == json.loads(raw)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": NaN}', "NaN is not finite"),
        (b'{"a": [Infinity]}', "Infinity is not finite"),
        (b'{"a": -Infinity}', "-Infinity is not finite"),
        (b'{"a": 1e999}', "1e999 is not finite"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' is given twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1]", "must hold a JSON object, but holds a list"),
        (b"null", "must hold a JSON object, but holds a NoneType"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper"),
        (b'{"a":' * 100_000, "nested deeper"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper"),
        (b'{"a": [' + b"0," * 300_000 + b"0]}", "more than the 262144 values"),
        (b'{"a": [' + b"[]," * 150_000 + b"0]}", "more than the 262144 values"),
        (b'{"a": [' + b"{}," * 150_000 + b"0]}", "more than the 262144 values"),
    ],
)
def test_json_that_is_broken_or_a_bomb_is_refused_by_name(tmp_path, raw, says):
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_deepest_json_allowed_is_read():
    raw = b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}"
    assert parse_json(raw, "x") == json.loads(raw)


@pytest.mark.parametrize("item", ["[]", "{}", '{"":0}', "0", '""', "1.5", '{"a":[{}]}'])
def test_the_largest_json_allowed_takes_at_most_twice_its_size_and_64_mib(item):
    marks = 1 + item.count("[") + item.count("{")
    raw = ('{"a":[' + ",".join([item] * (files.JSON_VALUES // marks - 1)) + "]}").encode()
    tracemalloc.start()
    parse_json(raw, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(raw) + 64 * 2**20


def test_run_files_do_not_need_torch():
    code = "import sys, recurra.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
