"""A terminal in raw mode: keys come in one by one, whole pictures go out."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import signal
import termios
import tty
import unicodedata
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import NamedTuple, TextIO

_CONTROLS = {
    "\x03": "interrupt",
    "\x04": "end",
    "\x08": "backspace",
    "\t": "tab",
    "\n": "enter",
    "\r": "enter",
    "\x0e": "down",
    "\x10": "up",
    "\x15": "clear",
    "\x7f": "backspace",
}
_ARROWS = {"A": "up", "B": "down"}
_PASTE, _PASTED = "\x1b[200~", "\x1b[201~"
# ECMA-48, section 5.4: parameters, intermediates, a final byte.
_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*([@-~])|\x1bO(.)|\x1b([^\[O\x1b])", re.DOTALL)
_BEGUN = re.compile(r"\x1b(\[[0-?]{0,32}[ -/]{0,8}|O)?")
_TYPED = re.compile(r"[^\x00-\x1f\x7f]+")
# A lone Escape and the beginning of a sequence look alike but for the time until the next byte.
_ESCAPE_SECONDS = 0.05


class Key(NamedTuple):
    """One key. ``text`` is what was typed or pasted, or the digit of an Alt key ("pick")."""

    name: str
    text: str = ""


class Keys:
    """The bytes of a terminal as keys, however they are cut. Sequences that mean nothing here are dropped."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._rest = ""
        self._pasted: list[str] | None = None

    def feed(self, data: bytes) -> list[Key]:
        """The keys that are whole with these bytes."""
        self._rest += self._decoder.decode(data)
        keys: list[Key] = []
        while self._rest:
            key, length = self._paste() if self._pasted is not None else self._first()
            if length == 0:
                break
            self._rest = self._rest[length:]
            if key is not None:
                keys.append(key)
        return keys

    @property
    def waiting(self) -> bool:
        """Whether an Escape has come that may be the beginning of a sequence."""
        return self._rest == "\x1b"

    def give_up(self) -> None:
        """Take that Escape as a key of its own, which means nothing here."""
        self._rest = ""

    def _first(self) -> tuple[Key | None, int]:
        rest = self._rest
        if rest.startswith(_PASTE):
            self._pasted = []
            return None, len(_PASTE)
        if typed := _TYPED.match(rest):
            text = printable(typed.group())
            return Key("text", text) if text else None, typed.end()
        if rest[0] != "\x1b":
            name = _CONTROLS.get(rest[0])
            return Key(name) if name else None, 2 if rest.startswith("\r\n") else 1
        if sequence := _SEQUENCE.match(rest):
            final, single, other = sequence.groups()
            if final or single:
                name = _ARROWS.get(final or single)
                return Key(name) if name else None, sequence.end()
            return Key("pick", other) if other in "123456789" else None, sequence.end()
        return None, 0 if _BEGUN.fullmatch(rest) else 1

    def _paste(self) -> tuple[Key | None, int]:
        assert self._pasted is not None
        end = self._rest.find(_PASTED)
        if end < 0:
            ready = max(0, len(self._rest) - len(_PASTED) + 1)
            self._pasted.append(self._rest[:ready])
            return None, ready
        text = "".join([*self._pasted, self._rest[:end]])
        self._pasted = None
        text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ")
        return Key("text", printable(text)), end + len(_PASTED)


def printable(text: str) -> str:
    """A text without control characters other than newlines."""
    return "".join(c for c in text if c == "\n" or unicodedata.category(c) not in ("Cc", "Cs"))


class Terminal:
    """A terminal whose screen and keys are ours while the ``with`` block runs, and as before after it.

    A hang-up or SIGTERM leaves the block by SystemExit with the shell's code, 128 and the signal's number.
    """

    def __init__(self, stdin: TextIO, stdout: TextIO) -> None:
        self._in, self._out = stdin.fileno(), stdout
        self._keys = Keys()

    def __enter__(self) -> Terminal:
        self._before = termios.tcgetattr(self._in)
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._handlers = {
            number: signal.signal(number, handler)
            for number, handler in (
                (signal.SIGTERM, _leave),
                (signal.SIGHUP, _leave),
                (signal.SIGWINCH, self._resized),
            )
        }
        try:
            tty.setraw(self._in, termios.TCSADRAIN)
            # The other screen, no wrapping at the edge, pastes marked as such.
            self._write("\x1b[?1049h\x1b[?7l\x1b[?2004h")
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        columns, rows = os.get_terminal_size(self._out.fileno())
        # Terminals that do not know their size say 0.
        return columns or 80, rows or 24

    def draw(self, lines: Sequence[str], cursor: tuple[int, int]) -> None:
        """Paint the whole screen. No line is wider than it; the cursor goes to (row, column) from 0."""
        body = "\r\n".join(f"{line}\x1b[K" for line in lines)
        self._write(f"\x1b[?25l\x1b[H{body}\x1b[J\x1b[{cursor[0] + 1};{cursor[1] + 1}H\x1b[?25h")

    def read(self) -> list[Key]:
        """Wait for keys, or for the window to change its size. A terminal that has gone is an end."""
        timeout = _ESCAPE_SECONDS if self._keys.waiting else None
        ready, _, _ = select.select([self._in, self._woken], [], [], timeout)
        if self._woken in ready:
            os.read(self._woken, 4096)
        if self._in in ready:
            try:
                data = os.read(self._in, 65536)
            except OSError:
                data = b""
            return self._keys.feed(data) if data else [Key("end")]
        if not ready:
            self._keys.give_up()
        return []

    def _resized(self, number: int, frame: FrameType | None) -> None:
        # A full pipe wakes it anyway.
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"\0")

    def _write(self, text: str) -> None:
        self._out.write(text.encode(self._out.encoding, "replace").decode(self._out.encoding))
        self._out.flush()

    def _restore(self) -> None:
        # A terminal that has gone has nothing left to restore.
        with contextlib.suppress(OSError):
            self._write("\x1b[?2004l\x1b[?7h\x1b[?25h\x1b[?1049l")
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self._in, termios.TCSADRAIN, self._before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._woken)
        os.close(self._wake)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
