"""Predictive text: the next words offered while one types.

Legend: T time, B batch, I input, H hidden, O output, D any feature; V vocabulary.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from json import dumps
from typing import NamedTuple, TextIO

import torch
from rich.cells import cell_len, chop_cells, set_cell_size, split_graphemes
from torch import Tensor, nn

from recurra.cell import State
from recurra.cli.terminal import Key, Terminal
from recurra.data import words
from recurra.decoding import Lexicon, Vocabulary, completions, model_step
from recurra.errors import ConfigError, DataError

# As many characters can be taken back without reading the text again.
HISTORY = 1000
# What is typed and not yet read is short, unless somebody never types a space.
_LONGEST_PENDING = 1000
# So many subwords at the end of a word may be spelled otherwise once it is whole.
_OPEN_SUBWORDS = 8
_READ_AT_ONCE = 256
# An emoji of a family is a row of many.
_LONGEST_CHARACTER = 32
_ENDS = {"end": 0, "interrupt": 130}
_HELP = "Tab takes · Alt-1…9 picks · ↑ ↓ chooses · Ctrl-U clears · Ctrl-D ends"


class Offer(NamedTuple):
    """A text to append, and how likely it is."""

    text: str
    probability: float


class _Moment(NamedTuple):
    """All that is known after one character: what the model carries, and what is typed but not yet read."""

    state: State | None
    logits: Tensor | None
    pending: str
    unknown: str


class Completer:
    """A text being typed, and the words that a language model offers to go on.

    ``model(tokens (T, B), state) -> (logits (T, B, V), state)`` is put in evaluation mode. Each character is
    read once. Characters and bytes are read as they are typed, words and subwords when the word has ended;
    until then it narrows the offers. The state after each of the last ``history`` characters is kept, so
    that taking them back costs nothing; taking back more reads the text again, once.
    """

    def __init__(self, model: nn.Module, vocabulary: Vocabulary, history: int = HISTORY) -> None:
        self._model = model.eval()
        self._step = model_step(model)
        self._device = next(model.parameters(), torch.empty(0)).device
        self._vocabulary = vocabulary
        self._lexicon = Lexicon(vocabulary)
        self._whole_words = vocabulary.unit in ("word", "subword")
        self._known: dict[str, bool] = {}
        self._history: deque[_Moment] = deque(maxlen=history)
        self._offers: dict[int, list[Offer]] = {}
        nothing = _Moment(None, None, "", "")
        # A text begins as a line does.
        self._begin = self._read(nothing, "\n") if self._knows("\n") else nothing
        self.reset()

    def reset(self) -> None:
        """Begin a new text."""
        self._characters: list[str] = []
        self._history.clear()
        self._offers.clear()
        self._moment = self._begin

    @property
    def text(self) -> str:
        """All that was typed."""
        return "".join(self._characters)

    @property
    def unknown(self) -> str:
        """What the vocabulary last did not know on this line: a character not read, a word read as <unk>."""
        return self._moment.unknown

    def end_of_text(self, length: int) -> str:
        """The last ``length`` characters typed."""
        return "".join(self._characters[-length:])

    def type(self, text: str) -> None:
        """Append characters."""
        self._offers.clear()
        ahead = max(0, len(text) - (self._history.maxlen or 0))
        if ahead:
            # These cannot be taken back without reading again, so they are read at once.
            self._moment = self._take(self._moment, text[:ahead])
        for character in text[ahead:]:
            self._history.append(self._moment)
            self._moment = self._take(self._moment, character)
        self._characters += text

    def backspace(self, count: int = 1) -> None:
        """Take back the last characters; fewer where there are fewer."""
        count = min(count, len(self._characters))
        if count > len(self._history):
            text = "".join(self._characters[:-count])
            self.reset()
            self.type(text)
            return
        self._offers.clear()
        for _ in range(count):
            self._moment = self._history.pop()
            self._characters.pop()

    def offers(self, count: int = 5) -> list[Offer]:
        """The likeliest next words, best first, none twice. None while there is nothing to go by.

        Raises ConfigError for a count below 1, DataError for a model whose numbers are not finite.
        """
        if count < 1:
            raise ConfigError(f"expected at least 1 offer, got a count of {count}")
        if count not in self._offers:
            self._offers[count] = self._find(count)
        return self._offers[count]

    def _find(self, count: int) -> list[Offer]:
        moment = self._moment
        if len(moment.pending) > _LONGEST_PENDING:
            return []
        settled = self._settled(moment.pending)
        moment = self._read(moment, moment.pending[:settled])._replace(pending=moment.pending[settled:])
        if moment.logits is None:
            return []
        width = max(32, 4 * count)
        found = completions(self._step, moment.state, moment.logits, self._lexicon, moment.pending, count, width=width)
        return [Offer(*entry) for entry in found]

    def _settled(self, pending: str) -> int:
        """How much of a text not yet read is spelled in tokens that no further character will change."""
        if self._vocabulary.unit == "word":
            parts = words.split(pending)
            return pending.rindex(parts[-1]) if parts else len(pending)
        pieces = [self._vocabulary.decode([token]) for token in self._vocabulary.encode(pending)]
        # Tokens that are parts of a character cannot be looked up by its text.
        broken = [n for n, piece in enumerate(pieces, start=1) if "\ufffd" in piece]
        open_pieces = pieces[max(broken[-1] if broken else 0, len(pieces) - _OPEN_SUBWORDS) :]
        return len(pending) - sum(map(len, open_pieces))

    def _take(self, moment: _Moment, text: str) -> _Moment:
        """The moment after more characters."""
        if "\n" in text:
            moment = moment._replace(unknown="")
        if not self._whole_words:
            known = "".join(filter(self._knows, text))
            unknown = next((c for c in reversed(text.rpartition("\n")[2]) if not self._knows(c)), "")
            return self._read(moment, known)._replace(unknown=unknown or moment.unknown)
        text = moment.pending + text
        ended = self._ended(text)
        if self._vocabulary.unit == "word":
            last_line = text[:ended].rpartition("\n")[2]
            unknown = next((w for w in reversed(words.split(last_line)) if not self._knows(w)), "")
            moment = moment._replace(unknown=unknown or moment.unknown)
        return self._read(moment, text[:ended])._replace(pending=text[ended:])

    def _ended(self, text: str) -> int:
        """How much of a text is words that have ended. What is before it is spelled in tokens of its own."""
        body = text.rstrip()
        if self._vocabulary.unit == "word":
            return len(text) if len(body) < len(text) else len(text) - len(text.rsplit(maxsplit=1)[-1])
        if len(body) < len(text):
            return len(body)
        # Subwords take the space before them along; of more white space, the last stands apart.
        return max(0, len(text) - len(text.rsplit(maxsplit=1)[-1]) - 1)

    def _knows(self, text: str) -> bool:
        if text not in self._known:
            try:
                self._known[text] = self._vocabulary.decode(self._vocabulary.encode(text)) == text
            except DataError:
                self._known[text] = False
        return self._known[text]

    @torch.no_grad()
    def _read(self, moment: _Moment, text: str) -> _Moment:
        """The moment after the model has read a text."""
        state, logits = moment.state, moment.logits
        if text:
            tokens = torch.tensor([int(token) for token in self._vocabulary.encode(text)], dtype=torch.int64)
            for start in range(0, len(tokens), _READ_AT_ONCE):
                window = tokens[start : start + _READ_AT_ONCE, None].to(self._device)
                scores, state = self._model(window, state)
                # A copy, so that the scores of the whole window are not kept.
                logits = scores[-1].clone()
        return moment._replace(state=state, logits=logits)


def run(
    completer: Completer, stdin: TextIO, stdout: TextIO, stderr: TextIO, count: int = 5, *, json: bool = False
) -> int:
    """Offer words to a person at a terminal, or for each line of ``stdin``. Returns the exit code.

    At a terminal (``stdin`` and ``stdout`` both) the text is shown as it is typed, with the offers below it;
    at the end it is written to ``stdout``. Ctrl-D ends with 0, Ctrl-C with 130, SIGTERM with 143.

    Otherwise, for ``json``, and where TERM is "dumb", each line is a text of its own. Its offers are written
    one a line as probability, tab, text to append, with an empty line between two texts; or as one JSON
    object: ``{"text": ..., "offers": [{"text": ..., "probability": ...}, ...]}``.

    Raises ConfigError for a count below 1, DataError for input that is not UTF-8.
    """
    if count < 1:
        raise ConfigError(f"expected at least 1 offer, got a count of {count}")
    person = stdin.isatty() and stdout.isatty() and not json
    dumb = os.environ.get("TERM", "dumb") == "dumb"
    if person and dumb:
        print("TERM names no terminal that can be painted: the offers come when a line has ended", file=stderr)
    if dumb or not person:
        return _complete_lines(completer, stdin, stdout, stderr, count, json)
    with Terminal(stdin, stdout) as terminal:
        code = _converse(completer, terminal, count)
    if completer.text:
        print(completer.text, file=stdout, flush=True)
    return code


def _complete_lines(completer: Completer, stdin: TextIO, stdout: TextIO, stderr: TextIO, count: int, json: bool) -> int:
    for number, line in enumerate(_lines(stdin), start=1):
        completer.reset()
        completer.type(line)
        if completer.unknown:
            print(f"line {number}: not in the vocabulary: {completer.unknown}", file=stderr, flush=True)
        offers = completer.offers(count)
        if json:
            record = {"text": line, "offers": [offer._asdict() for offer in offers]}
            print(dumps(record, ensure_ascii=False), file=stdout, flush=True)
            continue
        if number > 1:
            print(file=stdout)
        for offer in offers:
            print(f"{offer.probability:.6f}\t{offer.text}", file=stdout)
        stdout.flush()
    return 0


def _lines(stdin: TextIO) -> Iterator[str]:
    number = 0
    try:
        for line in stdin:
            number += 1
            # A locale without UTF-8 lets other bytes through as halves of characters.
            line.encode()
            yield line.rstrip("\r\n")
    except UnicodeError as problem:
        raise DataError(f"standard input, near line {max(1, number)}, is not UTF-8 text: convert it first") from problem


def _converse(completer: Completer, terminal: Terminal, count: int) -> int:
    """Show the text and its offers and do what the keys say, until one ends it. Returns the exit code."""
    chosen = 0
    while True:
        columns, rows = terminal.size()
        text, offers = completer.end_of_text(columns * rows), completer.offers(count)
        terminal.draw(*picture(text, completer.unknown, offers, chosen, columns, rows))
        for key in terminal.read():
            if key.name in _ENDS:
                return _ENDS[key.name]
            if key.name in ("up", "down"):
                chosen += 1 if key.name == "down" else -1
                chosen %= max(1, len(completer.offers(count)))
            else:
                _edit(completer, key, chosen, count)
                chosen = 0


def _edit(completer: Completer, key: Key, chosen: int, count: int) -> None:
    if key.name == "text":
        completer.type(key.text)
    elif key.name == "enter":
        completer.type("\n")
    elif key.name == "backspace":
        spans, _ = split_graphemes(completer.end_of_text(_LONGEST_CHARACTER).rpartition("\n")[2])
        completer.backspace(spans[-1][1] - spans[-1][0] if spans else 1)
    elif key.name == "clear":
        completer.backspace(len(completer.text.rpartition("\n")[2]))
    else:
        offers = completer.offers(count)
        number = chosen if key.name == "tab" else int(key.text) - 1
        if number < len(offers):
            completer.type(offers[number].text)


def picture(
    text: str, unknown: str, offers: Sequence[Offer], chosen: int, columns: int, rows: int
) -> tuple[list[str], tuple[int, int]]:
    """The lines of a screen of that size, and the place of its cursor: (row, column) from 0.

    The end of the text, what the vocabulary does not know, the offers, a line of help. Where there is no room
    for all, the last of them are left out.
    """
    notice = f"not in the vocabulary: {unknown}" if unknown else ""
    below = [f"\x1b[33m{_cut(notice, columns)}\x1b[0m"]
    stem = re.split(r"[^\w'’]", text)[-1]
    labels = [stem + o.text if re.match(r"[\w'’]", o.text) else o.text.lstrip() for o in offers]
    width = max((cell_len(label) for label in labels), default=0)
    for number, (label, offer) in enumerate(zip(labels, offers, strict=True)):
        bar = "█" * round(20 * offer.probability)
        start = f"{'>' if number == chosen else ' '} {number + 1} {set_cell_size(label, width)}"
        line = _cut(f"{start}  {100 * offer.probability:5.1f} %  {bar}", columns)
        below.append(f"\x1b[1m{line}\x1b[0m" if number == chosen else line)
    below.append(f"\x1b[2m{_cut(_HELP, columns)}\x1b[0m")
    below = below[: rows - 1]
    above = _wrap(text, columns)[-(rows - len(below)) :]
    return above + below, (len(above) - 1, cell_len(above[-1]))


def _wrap(text: str, columns: int) -> list[str]:
    """A text as rows of a screen; the last one has room for the cursor."""
    rows = [row for line in text.split("\n") for row in chop_cells(line, columns) or [""]]
    return rows if cell_len(rows[-1]) < columns else [*rows, ""]


def _cut(text: str, columns: int) -> str:
    return set_cell_size(text, min(columns, cell_len(text)))
