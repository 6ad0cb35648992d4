"""A text larger than memory, as blocks that can be encoded one by one, and cut into parts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recurra.data.files import Source, read_byte_chunks, read_text_chunks

# A run without white space is taken apart after about this many characters, so that a block stays small.
LONGEST_RUN = 1 << 16
# Between two parts, white space is looked for over this many characters; beyond them a cut is made as it comes.
FARTHEST_SEAM = 100
_SEAM = re.compile(r"\S(?=[ \n\t])")


@dataclass(frozen=True)
class Block:
    """A piece of a text: bytes for the byte unit, else str. ``start`` is its place in the file ``where``."""

    where: str
    start: int
    content: str | bytes

    def __len__(self) -> int:
        return len(self.content)

    @property
    def text(self) -> str:
        assert isinstance(self.content, str)
        return self.content

    def slice(self, start: int, stop: int | None = None) -> Block:
        return Block(self.where, self.start + start, self.content[start:stop])


class Text:
    """Files one after the other, read anew each time it is gone through.

    A file that does not end in a newline gets one before the next begins. ``unit`` decides what a block
    is: bytes as they are, ending between two characters (byte); decoded text, ending anywhere (character) or
    where white space begins, so that no word lies in two blocks (word, subword).
    """

    def __init__(self, files: Sequence[tuple[str, Source]], unit: str) -> None:
        self.files, self.unit = files, unit
        # Words and subwords take many times the memory of their text while they are encoded.
        self.chunk = 1 << 18 if unit in ("character", "byte") else 1 << 15

    def __iter__(self) -> Iterator[Block]:
        if self.unit == "byte":
            return _whole_characters(self._bytes())
        return self._text() if self.unit == "character" else _whole_words(self._text())

    def parts(self, cuts: Sequence[int]) -> Iterator[tuple[int, Block]]:
        """Every block with the number of the part it is in, cut at the first possible place from each cut on.

        ``cuts`` are places in the text, in characters, or bytes for the byte unit, in order.
        """
        place = part = 0
        for block in self:
            while part < len(cuts) and cuts[part] <= place + len(block):
                at = _next_cut(block.content, max(cuts[part] - place, 0), self.unit)
                yield part, block.slice(0, at)
                block, place, part = block.slice(at), place + at, part + 1
            yield part, block
            place += len(block)

    def _bytes(self) -> Iterator[Block]:
        last = b"\n"
        for name, path in self.files:
            start = 0
            for chunk in read_byte_chunks(path, self.chunk, name):
                if start == 0 and last != b"\n":
                    yield Block(name, 0, b"\n")
                yield Block(name, start, chunk)
                start, last = start + len(chunk), chunk[-1:]

    def _text(self) -> Iterator[Block]:
        last = "\n"
        for name, path in self.files:
            start = 0
            for chunk in read_text_chunks(path, self.chunk, name):
                if start == 0 and last != "\n":
                    yield Block(name, 0, "\n")
                yield Block(name, start, chunk)
                start, last = start + len(chunk), chunk[-1]


def measure(content: str | bytes) -> tuple[int, int]:
    """The characters and the bytes of a content, as UTF-8.

    In bytes, every byte that does not continue a character counts as one.
    """
    if isinstance(content, str):
        return len(content), len(content.encode())
    return int(np.count_nonzero(~_continues(content))), len(content)


def _continues(content: bytes) -> np.ndarray:
    """(N,) bool: which bytes are of the form 10xxxxxx."""
    continues: np.ndarray = np.frombuffer(content, np.uint8) & 0xC0 == 0x80
    return continues


def _next_cut(content: str | bytes, place: int, unit: str) -> int:
    """The first place from ``place`` on at which a block can be cut; its two ends always can."""
    if place in (0, len(content)) or unit == "character":
        return place
    if isinstance(content, bytes):
        # A character has at most three such bytes; where there are more, this is no UTF-8 and any place does.
        continues = _continues(content[place : place + 4])
        return place if continues.all() and len(continues) == 4 else place + int(np.append(continues, False).argmin())
    seam = _SEAM.search(content, place - 1, place + FARTHEST_SEAM + 1)
    if seam is not None:
        return seam.end()
    return len(content) if len(content) - place <= FARTHEST_SEAM else place


def _whole_characters(blocks: Iterator[Block]) -> Iterator[Block]:
    """The same bytes, in blocks that end between two characters of UTF-8."""
    pending = b""
    where, start = "", 0
    for block in blocks:
        assert isinstance(block.content, bytes)
        content = pending + block.content
        where, start = block.where, block.start - len(pending)
        begins = np.flatnonzero(~_continues(content[-4:]))
        at = len(content) - min(len(content), 4) + int(begins[-1]) if len(begins) else len(content)
        if at:
            yield Block(where, start, content[:at])
        pending = content[at:]
    if pending:
        yield Block(where, start, pending)


def _whole_words(blocks: Iterator[Block]) -> Iterator[Block]:
    """The same text, in blocks that end before white space."""
    pending = ""
    where, start = "", 0
    for block in blocks:
        content = pending + block.text
        where, start = block.where, block.start - len(pending)
        at = _last_seam(content)
        if at == 0 and len(content) >= LONGEST_RUN:
            at = len(content)
        if at:
            yield Block(where, start, content[:at])
        pending = content[at:]
    if pending:
        yield Block(where, start, pending)


def _last_seam(text: str) -> int:
    """The last place where white space follows something else, or 0.

    No word and no subword goes over such a place: neither has white space anywhere but at its beginning.
    """
    for at in range(len(text) - 1, 0, -1):
        if text[at] in " \n\t" and not text[at - 1].isspace():
            return at
    return 0
