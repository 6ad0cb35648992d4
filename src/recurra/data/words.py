"""Text as words, punctuation marks and newlines, and back to a text that reads well."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence

UNKNOWN = "<unk>"

# Chinese and Japanese put no spaces between words: there, every character is a word.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# A row of the same mark is one token: "...", "--", the line under a heading.
_ROWS = ".-=*~^#!?:+/\\|$"
_NO_SPACE_BEFORE = frozenset(",.;:!?)]}%…”»、。，．；：！？）」』】》")
_NO_SPACE_AFTER = frozenset("([{$£€“«（「『【《")


def split(text: str) -> list[str]:
    """The tokens of a text: words, punctuation marks, newlines. Other white space only separates.

    A word is a run of letters, digits and underscores of any script with the marks that combine with them;
    ``don't``, ``well-known``, ``3.14`` and ``<unk>`` are one word each. A Chinese or Japanese character is a
    word of its own. In scripts that write neither spaces nor such characters (Thai, say) a phrase is a word.
    """
    return _pattern().findall(text)


def join(tokens: Sequence[str]) -> str:
    """A text of these tokens, with spaces where they are usual.

    Whether two tokens have a space between them depends on these two alone, so that a text can be joined
    as its tokens come. ``split(join(tokens)) == tokens`` for the tokens of any text, while
    ``join(split(text))`` has other white space than ``text``.
    """
    pieces = list(tokens[:1])
    for before, token in itertools.pairwise(tokens):
        pieces.append(token if _touch(before, token) else " " + token)
    return "".join(pieces)


def _touch(before: str, token: str) -> bool:
    if before == "\n" or token == "\n":
        return True
    if before[-1] == token[0] and token[0] in _ROWS:
        return False
    return (
        token[0] in _NO_SPACE_BEFORE
        or before[-1] in _NO_SPACE_AFTER
        or _ideograph().match(before) is not None
        or _ideograph().match(token) is not None
    )


@functools.cache
def _ideograph() -> re.Pattern[str]:
    return re.compile(f"[{_IDEOGRAPHS}]")


@functools.cache
def _pattern() -> re.Pattern[str]:
    # Python's \w leaves out the vowel signs of Indic scripts and every other combining mark.
    near, far = (
        _combining(range(0x300, 0x10000)),
        _combining((*range(0x10000, 0x20000), *range(0xE0100, 0xE01F0))),
    )
    # The class of the marks beyond U+FFFF is slow to look into, so it is asked only about characters there.
    marks = f"(?:[{near}\u200c\u200d]|(?=[\U00010000-\U0010ffff])[{far}])"
    letters = rf"[^\W{_IDEOGRAPHS}]"
    word = f"{letters}+(?:{marks}+{letters}*)*"
    rows = "|".join(re.escape(mark) + "+" for mark in _ROWS)
    return re.compile(rf"{word}(?:['’\-]{word}|(?<=\d)[.,]\d+)*|{UNKNOWN}|\n|[{_IDEOGRAPHS}]|{rows}|\S")


def _combining(points: Iterable[int]) -> str:
    marks = "".join(c for c in map(chr, points) if unicodedata.category(c)[0] == "M")
    return _ideograph().sub("", marks)
