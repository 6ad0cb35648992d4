"""Vocabularies: text to token numbers and back, by characters, bytes, words or subwords.

N is the number of tokens, V the size of the vocabulary.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from recurra.data import bpe, words
from recurra.errors import DataError, suggest

UNITS = ("character", "byte", "word", "subword")

# While words are counted, rare ones are forgotten where there are more different ones than this.
MOST_WORDS = 300_000
LONGEST_WORD = 100


class Vocabulary(ABC):
    """What every vocabulary can do. Two are equal where they number the same tokens in the same way."""

    unit: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encode(self, text: str, where: str = "text", *, start: int = 0) -> np.ndarray:
        """The tokens of a text, (N,) of ``dtype``.

        For messages only: ``where`` is what they call the text, ``start`` where in it ``text`` begins.
        Raises DataError for what the vocabulary cannot express.
        """

    @abstractmethod
    def piece(self, token: int) -> str:
        """One token as it can be shown: white space, control characters and single bytes made visible."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What ``vocabulary_from_json`` makes the same vocabulary of."""

    @abstractmethod
    def _decode(self, tokens: np.ndarray) -> str: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens (N,). Raises DataError for numbers outside the vocabulary."""
        tokens = np.asarray(ids)
        if tokens.size == 0:
            return ""
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(f"expected tokens (N,) of an integer dtype, got {tokens.shape} of {tokens.dtype}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= len(self):
            wrong = low if low < 0 else high
            raise DataError(f"token {wrong} is outside this vocabulary of 0 to {len(self) - 1}")
        return self._decode(tokens)

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint8, uint16 and uint32 that holds every token."""
        return np.dtype(next(t for t in (np.uint8, np.uint16, np.uint32) if len(self) - 1 <= np.iinfo(t).max))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Vocabulary) and self.to_json() == other.to_json()

    def __repr__(self) -> str:
        return f"<{len(self)} {self.unit}s>"


class Characters(Vocabulary):
    """Every character of the training text, in the order of Unicode. Round trips are exact."""

    unit = "character"

    def __init__(self, characters: Collection[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise DataError("a vocabulary of characters needs at least one: give a text that is not empty")
        self._points = _points(self.characters)
        # One place behind the largest character, where `take` sends everything beyond it.
        self._numbers = np.full(int(self._points.max()) + 2, -1, np.int32)
        self._numbers[self._points] = np.arange(len(self._points))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str, where: str = "text", *, start: int = 0) -> np.ndarray:
        points = _points(text)
        tokens = self._numbers.take(points, mode="clip")
        if len(tokens) and tokens.min() < 0:
            raise DataError(self._unknown(text, np.flatnonzero(tokens < 0), where, start))
        return tokens.astype(self.dtype)

    def piece(self, token: int) -> str:
        return _visible(self.decode([token]))

    def to_json(self) -> dict[str, Any]:
        return {"unit": self.unit, "characters": self.characters}

    def _decode(self, tokens: np.ndarray) -> str:
        return str(self._points[tokens].astype("<u4").tobytes(), "utf-32-le")

    def _unknown(self, text: str, places: np.ndarray, where: str, start: int) -> str:
        first: dict[str, int] = {}
        for place in places:
            first.setdefault(text[place], start + int(place))
        named = ", ".join(
            f"{character!r} (U+{ord(character):04X}) at {place}" for character, place in list(first.items())[:5]
        )
        more = f" and {len(first) - 5} others" if len(first) > 5 else ""
        return (
            f"{where} has characters that the training text did not have: {named}{more} "
            "(the first place is 0); leave them out, or train on a text that has them or with --unit byte"
        )


class Bytes(Vocabulary):
    """The 256 bytes, of which UTF-8 makes any text. Bytes that are no UTF-8 are decoded as U+FFFD."""

    unit = "byte"

    def __len__(self) -> int:
        return 256

    def encode(self, text: str, where: str = "text", *, start: int = 0) -> np.ndarray:
        return np.frombuffer(_utf8(text, where, start), np.uint8)

    def piece(self, token: int) -> str:
        self.decode([token])
        return _visible(bytes([token]).decode("ascii", "backslashreplace"))

    def to_json(self) -> dict[str, Any]:
        return {"unit": self.unit}

    def _decode(self, tokens: np.ndarray) -> str:
        return tokens.astype(np.uint8).tobytes().decode("utf-8", "replace")


class Words(Vocabulary):
    """The most frequent words, punctuation marks and newlines; token 0, ``<unk>``, stands for all others.

    Decoding gives a readable text with the usual spaces, not the exact original: see ``words.split`` and
    ``words.join``.
    """

    unit = "word"

    def __init__(self, tokens: Sequence[str]) -> None:
        self.words = tuple(tokens)
        self._numbers = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def learn(cls, texts: Iterable[str], size: int) -> Words:
        """The ``size`` most frequent words with ``<unk>``; of equals, the first in the order of Unicode.

        Memory stays bounded: words of more than 100 characters are not counted, and where there are more than
        300,000 different ones (or 4 * size), the rarest are forgotten as often as it takes. A word that comes
        back is counted from 1 again, so there the counts, and the choice among rare words, are approximate.
        """
        counts: Counter[str] = Counter()
        most = max(MOST_WORDS, 4 * size)
        for text in texts:
            counts.update(word for word in words.split(text) if len(word) <= LONGEST_WORD)
            rare = 1
            while len(counts) > most:
                counts = Counter({word: count for word, count in counts.items() if count > rare})
                rare += 1
        del counts[words.UNKNOWN]
        best = heapq.nsmallest(size - 1, counts.items(), key=lambda entry: (-entry[1], entry[0]))
        return cls([words.UNKNOWN, *(word for word, _ in best)])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, where: str = "text", *, start: int = 0) -> np.ndarray:
        numbers = self._numbers
        return np.array([numbers.get(word, 0) for word in words.split(text)], self.dtype)

    def piece(self, token: int) -> str:
        return _visible(self.decode([token]))

    def to_json(self) -> dict[str, Any]:
        return {"unit": self.unit, "words": list(self.words)}

    def _decode(self, tokens: np.ndarray) -> str:
        return words.join([self.words[token] for token in tokens.tolist()])


class Subwords(Vocabulary):
    """Byte-level byte pair encoding (Sennrich et al. 2016; Radford et al. 2019). Round trips are exact.

    Needs the package tokenizers to encode and to learn, not to decode. ``tokenizer`` is its JSON.
    """

    unit = "subword"

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = tokenizer
        self._bytes, self._merges = bpe.parse(tokenizer)

    @classmethod
    def learn(cls, texts: Iterable[str], size: int) -> Subwords:
        """At most ``size`` subwords of short texts, the 256 bytes among them. Raises MissingExtraError."""
        return cls(bpe.learn(texts, size))

    def __len__(self) -> int:
        return len(self._bytes)

    def encode(self, text: str, where: str = "text", *, start: int = 0) -> np.ndarray:
        _utf8(text, where, start)
        return np.array(self._encoder.encode_batch_fast([text])[0].ids, self.dtype)

    def piece(self, token: int) -> str:
        self.decode([token])
        return _visible(self._bytes[token].decode("utf-8", "backslashreplace"))

    def to_json(self) -> dict[str, Any]:
        return {"unit": self.unit, "tokenizer": self.tokenizer}

    def _decode(self, tokens: np.ndarray) -> str:
        return b"".join(self._bytes[token] for token in tokens.tolist()).decode("utf-8", "replace")

    @functools.cached_property
    def _encoder(self) -> Any:
        return bpe.encoder(self._bytes, self._merges)


def vocabulary_from_json(value: Any) -> Vocabulary:
    """The vocabulary that ``to_json`` described. Raises DataError for anything else."""
    fields = {"character": "characters", "byte": None, "word": "words", "subword": "tokenizer"}
    unit = value.get("unit") if isinstance(value, dict) else None
    if not isinstance(unit, str):
        raise _wrong("it names no unit")
    if unit not in fields:
        raise _wrong(f"there is no unit {unit[:40]!r}, {suggest(unit[:40], fields)}")
    field = fields[unit]
    if set(value) != {"unit"} | ({field} if field else set()):
        raise _wrong(f"the unit {unit} has the fields {sorted(filter(None, ('unit', field)))}, got {sorted(value)}")
    content = value.get(field)
    if unit == "byte":
        return Bytes()
    if unit == "word":
        if not isinstance(content, list) or not content or content[0] != words.UNKNOWN:
            raise _wrong(f"its words must be a list that begins with {words.UNKNOWN!r}")
        if not all(isinstance(word, str) and word for word in content) or len(set(content)) != len(content):
            raise _wrong("its words must be different strings, none of them empty")
        return Words(content)
    if not isinstance(content, str) or not content:
        raise _wrong(f"its {field} must be a string, not empty")
    if unit == "subword":
        return Subwords(content)
    if any(a >= b for a, b in itertools.pairwise(content)) or any("\ud800" <= c <= "\udfff" for c in content):
        raise _wrong("its characters must be different, in order, and none of them half a character")
    return Characters(content)


def _wrong(how: str) -> DataError:
    return DataError(f"this is no vocabulary of recurra: {how}; make it anew from the text")


def _points(text: str) -> np.ndarray:
    """The characters of a text as numbers, (N,) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _utf8(text: str, where: str, start: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as problem:
        raise DataError(
            f"{where} has half a character, {text[problem.start]!a}, at {start + problem.start} "
            "(the first is 0), which UTF-8 cannot express: leave it out"
        ) from problem


def _visible(text: str) -> str:
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown).replace(" ", "␣")
