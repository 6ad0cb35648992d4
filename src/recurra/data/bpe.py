"""Byte-level byte pair encoding: the door to the package tokenizers, and a reader of its files."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from recurra.errors import DataError, MissingExtraError


def learn(texts: Iterable[str], size: int) -> str:
    """Subwords of texts, as JSON of the package tokenizers. It holds 256 of the texts at a time."""
    library = _library()
    tokenizer = _blank(library, library.models.BPE())
    trainer = library.trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=sorted(_byte_of()))
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def parse(text: str) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """The bytes of each token and the merges, in order, of a tokenizer as ``learn`` gives it.

    Everything is checked here, as the package ends the whole program at some wrong files.
    Raises DataError.
    """
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise TypeError(f"it is a {type(content).__name__}, not an object")
        if content["model"]["type"] != "BPE" or content["pre_tokenizer"]["type"] != "ByteLevel":
            raise ValueError("it is no byte-level BPE")
        if content["pre_tokenizer"]["add_prefix_space"] is not False or content["normalizer"] is not None:
            raise ValueError("it changes the text")
        vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
        if set(map(type, vocabulary.values())) - {int}:
            raise ValueError("its tokens are not numbered")
        spelled = sorted(vocabulary, key=vocabulary.__getitem__)
        if [vocabulary[spelling] for spelling in spelled] != list(range(len(spelled))):
            raise ValueError("its tokens are not numbered from 0 without a gap")
        tokens = [_as_bytes(spelling) for spelling in spelled]
        pairs = [(_as_bytes(a), _as_bytes(b)) for a, b in merges]
        known = set(tokens)
        if not known.issuperset(bytes([byte]) for byte in range(256)):
            raise ValueError("it lacks some of the 256 bytes")
        if any(not {a, b, a + b} <= known for a, b in pairs):
            raise ValueError("it merges tokens that it does not have")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as problem:
        reason = f"it has no {problem}" if isinstance(problem, KeyError) else str(problem)
        raise DataError(f"this is no vocabulary of subwords of recurra: {reason[:200]}") from problem
    return tokens, pairs


def encoder(tokens: Sequence[bytes], merges: Sequence[tuple[bytes, bytes]]) -> Any:
    """The tokenizer of what ``parse`` returned."""
    library = _library()
    vocabulary = {_spelling(token): number for number, token in enumerate(tokens)}
    pairs = [(_spelling(a), _spelling(b)) for a, b in merges]
    return _blank(library, library.models.BPE(vocab=vocabulary, merges=pairs))


def _blank(library: Any, model: Any) -> Any:
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as problem:
        raise MissingExtraError("tokenizers", "text", "splitting text into subwords") from problem
    return tokenizers


@functools.cache
def _byte_of() -> dict[str, int]:
    """The character by which each byte is spelled (Radford et al. 2019).

    The printable ones of Latin-1 stand for themselves, the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


@functools.cache
def _character_of() -> dict[int, str]:
    return {byte: character for character, byte in _byte_of().items()}


def _as_bytes(spelling: str) -> bytes:
    if not isinstance(spelling, str) or not spelling:
        raise TypeError("a token is no string, or empty")
    return bytes(_byte_of()[character] for character in spelling)


def _spelling(token: bytes) -> str:
    return "".join(_character_of()[byte] for byte in token)
