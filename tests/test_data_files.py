"""Names of texts, and texts in chunks, against the plainest reading of the same files."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recurra.data import files
from recurra.data.files import expand, name_of, read_byte_chunks, read_text_chunks, rereadable
from recurra.errors import DataError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder of files, some in folders, some hidden; it is the working folder."""
    for name in ("b.txt", "a.txt", "notes.md", "more/c.txt", "more/deep/d.txt", "more/.secret/e.txt", ".hidden.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _names(*paths):
    return [str(source) for source in expand(paths)]


def _refused(*paths):
    with pytest.raises(DataError) as caught:
        expand(paths)
    return str(caught.value)


def test_files_stay_in_the_order_given(tree):
    assert _names("b.txt", "more/c.txt", "a.txt") == ["b.txt", "more/c.txt", "a.txt"]


def test_one_name_may_stand_alone(tree):
    assert expand("b.txt") == expand(Path("b.txt")) == [Path("b.txt")]


def test_a_folder_is_read_to_its_bottom_in_order_without_what_is_hidden(tree):
    assert _names(".") == ["a.txt", "b.txt", "more/c.txt", "more/deep/d.txt", "notes.md"]
    assert _names(str(tree / "more")) == [str(tree / "more/c.txt"), str(tree / "more/deep/d.txt")]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.txt", ["a.txt", "b.txt"]),
        ("?.txt", ["a.txt", "b.txt"]),
        ("[b-z].txt", ["b.txt"]),
        ("more/*", ["more/c.txt"]),
        ("*/*.txt", ["more/c.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "more/c.txt", "more/deep/d.txt"]),
        ("**/**/d.txt", ["more/deep/d.txt"]),
        ("more/**", ["more/c.txt", "more/deep/d.txt"]),
        ("**/deep/*", ["more/deep/d.txt"]),
    ],
)
def test_a_pattern_is_the_files_that_match_it(tree, pattern, found):
    assert _names(pattern) == found
    assert _names(str(tree / pattern)) == [str(tree / name) for name in found]


def test_a_hidden_file_can_be_named(tree):
    assert _names(".hidden.txt") == [".hidden.txt"]


def test_a_name_with_brackets_is_a_file_where_there_is_one(tree):
    (tree / "x[1].txt").write_text("x")
    assert _names("x[1].txt") == ["x[1].txt"]


def test_links_in_a_folder_are_not_followed_and_may_be_named(tree, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "far.txt").write_text("far")
    folder = tree / "linked"
    folder.mkdir()
    (folder / "near.txt").write_text("near")
    (folder / "file.txt").symlink_to(outside / "far.txt")
    (folder / "folder").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    for name in ("linked", "linked/*.txt", "linked/**"):
        assert _names(name) == ["linked/near.txt"]
    assert _names("linked/file.txt") == ["linked/file.txt"]
    (folder / "near.txt").unlink()
    assert "3 symbolic links" in _refused("linked")
    assert "3 symbolic links" in _refused("linked/*.txt")


def test_a_pattern_of_one_level_does_not_look_below_it(tree):
    (tree / "more" / "link").symlink_to("c.txt")
    assert "symbolic" not in _refused("*.text")
    assert "1 symbolic" in _refused("*/*.text")
    assert "1 symbolic" in _refused("**/*.text")


def test_pipes_and_sockets_in_a_folder_are_passed_over(tree):
    os.mkfifo(tree / "more" / "pipe")
    assert _names("more") == ["more/c.txt", "more/deep/d.txt"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("aa.txt", "'aa.txt': did you mean 'a.txt'?"),
        ("more/see.txt", "'more/see.txt': did you mean"),
        ("zzz", "known: a.txt, b.txt, more, notes.md"),
        ("nowhere/a.txt", "there is no folder 'nowhere'"),
        ("nowhere/*.txt", "there is no folder 'nowhere'"),
        ("*.text", "no file matches '*.text'"),
        ("a.txt/b", "'a.txt/b'"),
        ("", "empty"),
        ("a\0b", "null"),
        ("/dev/null", "device"),
        ("x" * 5000, "too long"),
    ],
)
def test_a_name_that_stands_for_nothing_is_named_with_its_neighbours(tree, name, says):
    assert says in _refused(name)


def test_an_empty_folder_and_no_name_at_all_are_refused(tree):
    (tree / "empty").mkdir()
    assert "'empty' has no files" in _refused("empty")
    assert "the folder 'empty' is empty" in _refused("empty/a.txt")
    assert "no text was given" in _refused()


def test_a_link_to_nothing_is_called_one(tree):
    (tree / "gone.txt").symlink_to("elsewhere.txt")
    assert "link to 'elsewhere.txt'" in _refused("gone.txt")


def test_a_message_does_not_list_a_large_folder(tree):
    for n in range(50):
        (tree / "more" / f"chapter{n}.txt").write_text("x")
    assert "did you mean 'chapter7.txt'?" in _refused("more/chaptre7.txt")
    assert _refused("more/zzz").endswith("'more' has 52 others")


@pytest.mark.parametrize("names", [("a.txt", "./a.txt"), ("a.txt", "*.txt"), ("more", "more/c.txt"), ("-", "-")])
def test_a_file_named_twice_is_refused(tree, names):
    assert "named twice" in _refused(*names)


def test_a_file_named_twice_through_a_link_is_refused(tree):
    (tree / "other.txt").symlink_to("a.txt")
    assert "named twice" in _refused("a.txt", "other.txt")


# --- reading ---


def _chunks(tmp_path, data, chunk):
    path = tmp_path / "text"
    path.write_bytes(data)
    return list(read_text_chunks(path, chunk))


# What a chunk boundary can cut apart: a character of 2, 3 or 4 bytes, a line end, the byte order mark.
_HARD = st.lists(st.sampled_from(["\r", "\n", "\r\n", "é", "€", "𝄞", "a", "\ufeff"]), max_size=12).map("".join)


@given(text=_HARD | st.text(st.characters(exclude_characters="\0", codec="utf-8")), chunk=st.integers(1, 7))
def test_text_in_chunks_is_the_text(tmp_path_factory, text, chunk):
    folder = tmp_path_factory.getbasetemp()
    whole = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(_chunks(folder, text.encode(), chunk)) == whole


# Whole and broken characters, zero bytes and line ends, in every order.
_BROKEN = st.lists(
    st.sampled_from([b"a", b"\xe2", b"\x82", b"\xac", b"\xff", b"\0", b"\r", b"\xef\xbb\xbf"]), max_size=6
)


@given(data=_BROKEN.map(b"".join) | st.binary(max_size=40), chunk=st.integers(1, 7))
def test_any_bytes_are_the_same_text_or_a_refusal_at_the_first_wrong_byte(tmp_path_factory, data, chunk):
    folder = tmp_path_factory.getbasetemp()
    head = data.split(b"\0")[0]
    try:
        head.decode()
        wrong = len(head) if b"\0" in data else None
    except UnicodeDecodeError as problem:
        wrong = problem.start
    if wrong is None:
        assert "".join(_chunks(folder, data, chunk)) == io.TextIOWrapper(io.BytesIO(data), "utf-8-sig").read()
        return
    with pytest.raises(DataError, match="--unit byte") as caught:
        _chunks(folder, data, chunk)
    assert f"offset {wrong} " in str(caught.value) or "UTF-16" in str(caught.value)


def test_a_file_is_closed_as_soon_as_its_text_is_wrong(tmp_path, monkeypatch):
    opened = []
    right = files._opened
    monkeypatch.setattr(files, "_opened", lambda source: opened.append(right(source)) or opened[-1])
    with pytest.raises(DataError) as caught:
        _chunks(tmp_path, b"ok\xff and more", 4)
    assert [file.closed for file in opened] == [True], caught


def test_a_wrong_byte_is_named_with_its_file_and_place(tmp_path):
    with pytest.raises(DataError, match=r"text is not UTF-8 text: byte 0xff at offset 5 ") as caught:
        _chunks(tmp_path, "aé€".encode()[:3] + b"ok\xff", 4)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("data", "wrong"), [(b"abcdef\0", 6), (b"ab\xe2\x82\0", 2), (b"abcde\xe2\x82", 5)])
def test_a_zero_byte_and_half_a_character_are_found_where_they_begin(tmp_path, data, wrong):
    with pytest.raises(DataError, match=f"offset {wrong} "):
        _chunks(tmp_path, data, 3)


def test_utf16_is_recognised(tmp_path):
    with pytest.raises(DataError, match="looks like UTF-16"):
        _chunks(tmp_path, "hello".encode("utf-16"), 100)


def test_bytes_in_chunks_are_the_bytes_no_chunk_larger_than_asked(tmp_path):
    data = bytes(range(256)) * 5
    path = tmp_path / "data"
    path.write_bytes(data)
    chunks = list(read_byte_chunks(path, 100))
    assert b"".join(chunks) == data
    assert max(map(len, chunks)) == 100


def test_a_file_that_goes_away_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="gone cannot be read: No such file"):
        list(read_byte_chunks(tmp_path / "gone"))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_byte_chunks(tmp_path))


def test_closed_standard_input_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="standard input is closed"):
        list(read_byte_chunks("-"))


def test_standard_input_is_copied_once_and_the_copy_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"once")))
    (tmp_path / "plain").write_text("plain")
    with rereadable(["-", tmp_path / "plain"], tmp_path) as files:
        assert [name for name, _ in files] == ["standard input", str(tmp_path / "plain")]
        for _ in range(2):
            assert [path.read_bytes() for _, path in files] == [b"once", b"plain"]
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_standard_input_and_a_pipe_are_read_in_a_program_of_its_own(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    program = (
        "from recurra.data.files import *; import sys; from pathlib import Path\n"
        "with rereadable(expand(['-', 'pipe']), Path('.')) as files:\n"
        "    for _ in 'ab': print([''.join(read_text_chunks(path, 1)) for _, path in files])\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdin.write("zwölf\r\n".encode())
        process.stdin.close()
        (tmp_path / "pipe").write_text("piped")
        out = process.stdout.read().decode()
    assert process.returncode == 0
    assert out == "['zwölf\\n', 'piped']\n" * 2


def test_names_for_people():
    assert name_of("-") == "standard input"
    assert name_of(Path("a/b.txt")) == "a/b.txt"
