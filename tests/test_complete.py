"""Predictive text: one incremental reading equals a fresh one, keys, pictures, a real terminal, a pipe."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recurra import cells
from recurra.cli import complete
from recurra.cli.complete import Completer, Offer, picture, run
from recurra.cli.terminal import Key, Keys
from recurra.data.vocabulary import Bytes, Characters, Subwords, Words
from recurra.decoding import Lexicon, completions, model_step
from recurra.errors import ConfigError, DataError
from recurra.unroll import Recurrent

TEXT = "the cat sat on the mat.\nthe hat is on  the cat, the car can't.\nthen the mathématicien sat — on mats.\n"


class Tiny(nn.Module):
    """A language model small enough to be read again and again; it counts what it reads."""

    def __init__(self, V):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(V, 4)
        self.rnn = Recurrent(cells.LSTM(4, 6))
        self.readout = nn.Linear(6, V)
        self.read = 0
        self.double()
        with torch.no_grad():
            self.readout.weight *= 4

    def forward(self, tokens, state=None):
        self.read += tokens.numel()
        y, state = self.rnn(self.embedding(tokens), state)
        return self.readout(y), state


def vocabulary_of(unit):
    if unit == "character":
        return Characters(TEXT)
    if unit == "byte":
        return Bytes()
    if unit == "word":
        return Words.learn([TEXT], 20)
    pytest.importorskip("tokenizers")
    return Subwords.learn([TEXT * 5], 290)


MADE = {}


def completer_of(unit, history=complete.HISTORY):
    if unit not in MADE:
        vocabulary = vocabulary_of(unit)
        MADE[unit] = vocabulary, Tiny(len(vocabulary))
    vocabulary, model = MADE[unit]
    return Completer(model, vocabulary, history)


UNITS = ["character", "byte", "word", "subword"]


def typed(unit, text):
    completer = completer_of(unit)
    for character in text:
        completer.type(character)
    return completer


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

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from test_complete import completer_of
from recurra.cli import complete
if {broken!r}:
    complete.picture = lambda *ignored: 1 / 0
sys.exit(complete.run(completer_of({unit!r}), sys.stdin, sys.stdout, sys.stderr, 3))
"""


def child(unit="character", broken=False, term="xterm", **streams):
    program = PROGRAM.format(tests=str(Path(__file__).parent), unit=unit, broken=broken)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "TERM": term}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, **streams)


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
