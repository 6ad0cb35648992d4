"""The terminal of predictive text: keys, pictures, and a program at a terminal of its own."""

from __future__ import annotations

import codecs
import itertools
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recurra.cli.complete import Offer, picture
from recurra.cli.terminal import Key, Keys
from small_languages import child, completer_of, typed

# Keys

STREAM = (
    "hé漢\t\x1b[A\x1bOB\x1b3\x7f\r\x15\x0e\x10\x1b[1;5C\x1b[200~a\tb\r\nc\x1b[A\x07\x1b[201~z\x1b[3~\x08\x03\x04"
).encode()
KEYS = [
    Key("text", "hé漢"),
    Key("tab"),
    Key("up"),
    Key("down"),
    Key("pick", "3"),
    Key("backspace"),
    Key("enter"),
    Key("clear"),
    Key("down"),
    Key("up"),
    Key("text", "a b\nc[A"),
    Key("text", "z"),
    Key("backspace"),
    Key("interrupt"),
    Key("end"),
]


def joined(keys):
    """Keys with the typed text of neighbours put together, unless one is a paste."""
    result = []
    for key in keys:
        if key.name == "text" and result and result[-1].name == "text" and "\n" not in result[-1].text:
            key = Key("text", result.pop().text + key.text)
        result.append(key)
    return result


@given(st.sets(st.integers(1, len(STREAM) - 1)))
def test_keys_are_the_same_however_their_bytes_are_cut(places):
    keys = Keys()
    bounds = [0, *sorted(places), len(STREAM)]
    found = [key for a, b in itertools.pairwise(bounds) for key in keys.feed(STREAM[a:b])]
    assert joined(found) == KEYS
    assert not keys.waiting


@given(st.binary(max_size=60))
def test_no_bytes_break_the_keys_or_bring_control_characters_into_the_text(data):
    for key in Keys().feed(data):
        assert not [c for c in key.text if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"]


def test_a_lone_escape_is_given_up_and_the_next_key_is_whole():
    keys = Keys()
    assert keys.feed(b"\x1b") == []
    assert keys.waiting
    keys.give_up()
    assert keys.feed(b"1") == [Key("text", "1")]
    assert keys.feed(b"\x1b\x1b[A") == [Key("up")]


def test_a_line_end_of_two_characters_is_one_key():
    assert Keys().feed(b"a\r\nb") == [Key("text", "a"), Key("enter"), Key("text", "b")]


def test_endless_sequences_do_not_swallow_what_follows():
    keys = Keys()
    keys.feed(b"\x1b[" + b"1" * 10_000)
    assert keys.feed(b"\x04")[-1] == Key("end")


# Pictures


def width_of(text):
    """Cells of a text: an oracle of our own for plain, wide and combining characters."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def plain(line):
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


some_text = st.text(st.sampled_from("ab é漢字e\u0301\n— "), max_size=80)


@given(
    some_text,
    st.lists(st.builds(Offer, st.sampled_from(["at", " sat", "漢", ", and", "x" * 60]), st.floats(0, 1)), max_size=9),
    st.integers(0, 8),
    st.sampled_from(["", "☃", "zebra" * 9]),
    st.integers(2, 50),
    st.integers(1, 14),
)
def test_a_picture_fits_any_screen_and_ends_its_text_at_the_cursor(text, offers, chosen, unknown, columns, rows):
    lines, (row, column) = picture(text, unknown, offers, chosen, columns, rows)
    assert 1 <= len(lines) <= rows
    assert all(width_of(plain(line)) <= columns for line in lines)
    assert all("\n" not in line for line in lines)
    assert 0 <= row < len(lines)
    assert 0 <= column < columns
    assert column == width_of(lines[row])
    shown = "".join(lines[: row + 1])
    assert text.replace("\n", "").endswith(shown)
    if rows >= 14 + len(text):
        assert shown == text.replace("\n", "")
    assert len(lines) >= min(rows, 2 + len(offers))


def test_a_picture_shows_the_words_numbered_with_their_probabilities():
    lines, cursor = picture("so the c", "☃", [Offer("at", 0.5), Offer(" sat", 0.25)], 1, 60, 20)
    assert [plain(line) for line in lines[:4]] == [
        "so the c",
        "not in the vocabulary: ☃",
        "  1 cat   50.0 %  ██████████",
        "> 2 sat   25.0 %  █████",
    ]
    assert "Ctrl-D ends" in plain(picture("", "", [], 0, 200, 9)[0][-1])
    assert cursor == (0, 8)


def test_the_end_of_a_long_text_is_what_is_seen():
    lines, _ = picture("\n".join(map(str, range(100))) + "\n" + "x" * 25, "", [Offer("y", 1.0)], 0, 10, 9)
    assert lines[:6] == ["97", "98", "99", "x" * 10, "x" * 10, "x" * 5]


# A terminal


class Screen:
    """What a terminal shows. It knows the sequences that recurra uses, and no others."""

    def __init__(self, columns, rows, modes=()):
        self.columns, self.rows, self.modes = columns, rows, set(modes)
        self.lines, self.row, self.column = {}, 0, 0

    def write(self, text):
        for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[^\x1b]", text, re.DOTALL):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.row += 1
            elif part == "\t":
                self.column += 8
            elif part.startswith("\x1b"):
                self.obey(part)
            else:
                self.put(part)

    def put(self, character):
        assert character.isprintable(), repr(character)
        width = width_of(character)
        if "1049" in self.modes:
            assert self.column + width <= self.columns, "a line is wider than the screen"
            assert self.row < self.rows, "a line is below the screen"
        line = self.lines.setdefault(self.row, [])
        line += [" "] * (self.column - len(line))
        if width == 0:
            line[self.column - 1] += character
        else:
            line[self.column : self.column + width] = [character, *[""] * (width - 1)]
        self.column += width

    def obey(self, sequence):
        if mode := re.fullmatch(r"\x1b\[\?(\d+)([hl])", sequence):
            number, on = mode.groups()
            (self.modes.add if on == "h" else self.modes.discard)(number)
            if number == "1049":
                self.lines, self.row, self.column = {}, 0, 0
        elif place := re.fullmatch(r"\x1b\[(\d*);?(\d*)H", sequence):
            self.row, self.column = (int(n or 1) - 1 for n in place.groups())
        elif sequence in ("\x1b[K", "\x1b[J"):
            del self.lines.setdefault(self.row, [])[self.column :]
            if sequence == "\x1b[J":
                self.lines = {row: line for row, line in self.lines.items() if row <= self.row}
        else:
            assert re.fullmatch(r"\x1b\[[0-9;]*m", sequence), f"unknown sequence {sequence!r}"

    def shown(self):
        return ["".join(self.lines.get(row, [])) for row in range(max(self.lines, default=0) + 1)]


class Conversation:
    """A child process at a terminal of its own."""

    def __init__(self, columns=70, rows=16, **program):
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.screen = Screen(columns, rows)
        termios.tcsetwinsize(self.slave, (rows, columns))
        self.process = child(stdin=self.slave, stdout=self.slave, stderr=subprocess.PIPE, **program)
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.cut = ""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        os.close(self.slave)
        os.close(self.master)

    def send(self, keys):
        os.write(self.master, keys.encode())

    def resize(self, columns, rows):
        self.screen = Screen(columns, rows, self.screen.modes)
        termios.tcsetwinsize(self.slave, (rows, columns))
        self.process.send_signal(signal.SIGWINCH)

    def until(self, wanted):
        """Follow the screen until it shows the lines ``wanted`` at its top, or is as wanted."""
        end = time.monotonic() + 30
        while not (wanted(self.screen) if callable(wanted) else self.screen.shown()[: len(wanted)] == wanted):
            assert time.monotonic() < end, f"never came: {wanted!r}; the screen is {self.screen.shown()}"
            if select.select([self.master], [], [], 0.1)[0]:
                text = self.cut + self.decoder.decode(os.read(self.master, 65536))
                whole = re.search(r"(\x1b(\[[?0-9;]*)?)?\Z", text).start()
                self.screen.write(text[:whole])
                self.cut = text[whole:]
            elif self.process.poll() is not None:
                raise AssertionError(f"ended without {wanted!r}: {self.process.stderr.read().decode()}")

    def end(self):
        """The exit code. The terminal must be as it was before."""
        self.until(lambda screen: "1049" not in screen.modes and "25" in screen.modes)
        code = self.process.wait(60)
        assert termios.tcgetattr(self.slave) == self.before
        assert self.screen.modes == {"7", "25"}
        return code


def test_a_person_types_takes_offers_and_ends():
    mirror = completer_of("character")
    with Conversation() as talk:
        talk.until(lambda screen: "Ctrl-D ends" in screen.shown()[-1])
        assert termios.tcgetattr(talk.slave) != talk.before
        talk.send("the c")
        mirror.type("the c")
        first, second, _ = mirror.offers(3)
        percent = f"{100 * first.probability:5.1f} %"
        talk.until(lambda screen: screen.shown()[0] == "the c" and percent in screen.shown()[2])
        assert talk.screen.shown()[2].startswith("> 1 ")
        assert (talk.screen.row, talk.screen.column) == (0, 5)
        talk.send("\t")
        talk.until(["the c" + first.text])
        talk.send("\x7f" * len(first.text) + "\x1b2")
        talk.until(["the c" + second.text])
        mirror.type(second.text + " ")
        talk.send(" \x1b[B\x1b[B\t")
        mirror.type(mirror.offers(3)[2].text)
        talk.until([mirror.text])
        talk.send("\rh☃é\x1b[200~on\r\nit\x1b[201~")
        mirror.type("\nh☃éon\nit")
        talk.until([*mirror.text.split("\n"), ""])
        talk.send("\x15sat on ☃")
        mirror.backspace(2)
        mirror.type("sat on ☃")
        talk.until([*mirror.text.split("\n"), "not in the vocabulary: ☃"])
        assert f"{100 * mirror.offers(3)[0].probability:5.1f} %" in talk.screen.shown()[4]
        talk.send("\x04")
        assert talk.end() == 0
        talk.until(mirror.text.split("\n"))


def test_long_lines_and_another_window_size_do_not_break_the_picture():
    with Conversation(columns=40, rows=12) as talk:
        talk.until(lambda screen: len(screen.shown()) == 6)
        text = "the cat sat on the mat, " * 6
        talk.send(text)
        talk.until([text[:40], text[40:80], text[80:120], text[120:], ""])
        talk.resize(25, 7)
        # Five lines are for the notice, the offers and the help; the text has two.
        talk.until([text[100:125], text[125:], ""])
        assert len(talk.screen.shown()) == 7
        talk.resize(100, 30)
        talk.until([text[:100], text[100:], ""])
        talk.send("漢" * 60)
        talk.until([text[:100], text[100:] + "漢" * 28, "漢" * 32])
        talk.send("\x03")
        assert talk.end() == 130


@pytest.mark.parametrize("ending", ["terminated", "broken"])
def test_the_terminal_is_restored_whatever_ends_the_program(ending):
    with Conversation(broken=ending == "broken") as talk:
        if ending == "terminated":
            talk.until(lambda screen: len(screen.shown()) == 6)
            assert termios.tcgetattr(talk.slave) != talk.before
            talk.process.send_signal(signal.SIGTERM)
        talk.until(lambda screen: "1049" not in screen.modes and "25" in screen.modes)
        assert talk.end() == (143 if ending == "terminated" else 1)
        assert (b"ZeroDivisionError" in talk.process.stderr.read()) == (ending == "broken")


def test_a_terminal_that_cannot_be_painted_is_served_line_by_line():
    with Conversation(term="dumb") as talk:
        talk.send("the c\n\x04")
        assert talk.process.wait(60) == 0
        talk.until(lambda screen: len(screen.shown()) >= 4)
        offers = typed("character", "the c").offers(3)
        assert talk.screen.shown()[1:4] == [f"{o.probability:.6f}        {o.text}" for o in offers]
        assert b"TERM" in talk.process.stderr.read()
