"""A text of any size as token files on disk: a part to train on, and two that are held out."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from recurra.data.blocks import Block, Text, measure
from recurra.data.files import CHUNK, Source, expand, name_of, rereadable
from recurra.data.output import Outputs, writing
from recurra.data.record import damaged, seal, unseal, unusable
from recurra.data.vocabulary import (
    UNITS,
    Bytes,
    Characters,
    Subwords,
    Vocabulary,
    Words,
    vocabulary_from_json,
)
from recurra.errors import ConfigError, DataError, suggest
from recurra.files import DIGEST_BYTES, open_regular, reason

SPLITS = ("train", "validation", "test")
RECORD = "corpus.json"
LARGEST_VOCABULARY = 65_536
# The unit: the smallest and the usual size of its vocabulary.
SIZES = {"word": (2, 10_000), "subword": (256, 2_000)}
# Subwords are learned from this many characters, or this many for each subword where that is more.
LEARNED, LEARNED_FOR_EACH = 1 << 22, 1 << 8

_COUNTED = ("tokens", "characters", "bytes")


@dataclass(frozen=True)
class Corpus:
    r"""A text, encoded, in three parts: "train", then "validation", then "test", in the order of the text.

    ``tokens``, ``characters`` and ``bytes`` count each part, by its name. They are those of the text as it is
    modelled: UTF-8 with ``\n`` at each line's end, or for the byte unit the files as they are. ``sources``
    are the files by name, an absolute name without its folders. ``digest`` (hex) is that of the whole corpus:
    two with the same digest hold the same.
    """

    folder: Path
    vocabulary: Vocabulary
    sources: tuple[str, ...]
    tokens: Mapping[str, int]
    characters: Mapping[str, int]
    bytes: Mapping[str, int]
    digest: str

    def split(self, name: str) -> np.ndarray:
        """The tokens of a part, (N,) of ``vocabulary.dtype``, memory-mapped and read-only."""
        if name not in SPLITS:
            raise DataError(f"a corpus has no part {name!r}: {suggest(name, SPLITS)}")
        if self.tokens[name] == 0:
            return np.empty(0, self.vocabulary.dtype)
        path = self.folder / f"{name}.bin"
        try:
            return np.memmap(path, _stored(self.vocabulary), "r", shape=(self.tokens[name],))
        except (OSError, ValueError) as problem:
            raise damaged(path, str(problem)) from problem

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Corpus:
        """The corpus that ``build_corpus`` wrote. Every byte of its files is checked against its digest.

        Raises DataError for a folder without a corpus, and for a file that is missing or damaged, by name.
        """
        folder = Path(folder)
        record = folder / RECORD
        if not os.path.lexists(record):
            raise DataError(f"there is no corpus in {folder}, or it was never finished: {RECORD} is missing")
        content, digest = unseal(record)
        try:
            vocabulary = vocabulary_from_json(content["vocabulary"])
            counts = {field: {name: content["splits"][name][field] for name in SPLITS} for field in _COUNTED}
            digests = [content["splits"][name]["digest"] for name in SPLITS]
            sources = tuple(content["sources"])
            dtype = content["dtype"]
        except (KeyError, TypeError) as problem:
            raise damaged(record, f"a field is missing or of a wrong type: {problem}") from problem
        numbers = [number for field in counts.values() for number in field.values()]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise damaged(record, "a count is no whole number")
        if not all(isinstance(text, str) for text in (*digests, *sources)):
            raise damaged(record, "a digest or the name of a source is no string")
        if dtype != vocabulary.dtype.name:
            raise damaged(record, f"expected the dtype {vocabulary.dtype.name!r}, got {dtype!r}")
        for name, expected in zip(SPLITS, digests, strict=True):
            _verify(folder / f"{name}.bin", counts["tokens"][name], expected, vocabulary)
        return cls(folder, vocabulary, sources, digest=digest, **counts)


@dataclass(frozen=True)
class Encoded:
    """A whole text as tokens (N,), memory-mapped and read-only, and what it has of characters and bytes."""

    tokens: np.ndarray
    characters: int
    bytes: int


def build_corpus(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    unit: str = "character",
    vocabulary_size: int | None = None,
    validation: float = 0.05,
    test: float = 0.05,
) -> Corpus:
    """Encodes a text into ``folder``, reading it two or three times and never holding it in memory.

    ``paths`` as ``files.expand`` takes them. The files are put one after the other, with a newline between
    two where there is none. ``unit`` is "character", "byte", "word" or "subword"; ``vocabulary_size`` is for
    words (10,000 unless given) and subwords (2,000). The vocabulary of characters comes from the whole text,
    as is usual for published figures; those of words and subwords from the training part alone.
    Of a long one, subwords are learned from a sample, 4 million characters or more spread evenly over it.

    ``validation`` and ``test`` are the shares of the text, in characters (bytes for the byte unit), that its
    last two parts have; 0 leaves a part empty. A cut is never inside a character, and for words and subwords
    is moved on to the next place where white space begins, if there is one within 100 characters.

    The folder gets ``train.bin``, ``validation.bin``, ``test.bin`` (the tokens, little-endian) and
    ``corpus.json``, or stays as it was. Raises ConfigError for settings that do not fit, DataError for a text
    that cannot be read, is too short or changes meanwhile, and for a folder that is full or read-only.
    """
    vocabulary_size = _check(unit, vocabulary_size, validation, test)
    sources = expand(paths)
    folder = _made(folder)
    with rereadable(sources, folder) as files, Outputs(folder) as outputs:
        text = Text(files, unit)
        size, characters = _survey(text)
        if size == 0:
            raise DataError(f"the text is empty: {_names(sources)}; give a text to train on")
        held_out = round(size * test)
        cuts = (size - held_out - round(size * validation), size - held_out)
        vocabulary = _learn(text, cuts, characters, vocabulary_size)
        splits = _write(text, cuts, vocabulary, outputs)
        if sum(split["bytes" if unit == "byte" else "characters"] for split in splits.values()) != size:
            raise DataError(f"the text changed while it was read: {_names(sources)}; try again")
        _check_lengths(splits, unit, size, {"validation": validation, "test": test})
        record = {
            "sources": [_recorded(source) for source in sources],
            "dtype": vocabulary.dtype.name,
            "splits": splits,
            "vocabulary": vocabulary.to_json(),
        }
        outputs.create(RECORD).write(seal(record))
        outputs.commit()
    return Corpus.open(folder)


def encode_file(
    vocabulary: Vocabulary,
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
) -> Encoded:
    """A whole text in the tokens of a vocabulary that is there already: to evaluate a model on another text.

    The tokens lie in a file in ``folder`` that has no name and is gone when nobody uses them any more.
    Raises DataError for a text that the vocabulary cannot express, that cannot be read or has fewer than two
    tokens, and for a folder that is full or cannot be written.
    """
    sources = expand(paths)
    folder = _made(folder)
    stored = _stored(vocabulary)
    tokens = characters = size = 0
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        for block in Text([(name_of(source), source) for source in sources], vocabulary.unit):
            encoded = _encode(vocabulary, block)
            file.write(encoded.astype(stored, copy=False).data)
            more_characters, more_bytes = measure(block.content)
            tokens += len(encoded)
            characters += more_characters
            size += more_bytes
        if tokens < 2:
            raise DataError(f"the text is too short: {_names(sources)} has {tokens} tokens, and at least 2 are needed")
        file.flush()
        return Encoded(np.memmap(file, stored, "r", shape=(tokens,)), characters, size)


def _check(unit: str, vocabulary_size: int | None, validation: float, test: float) -> int:
    if unit not in UNITS:
        raise ConfigError(f"there is no unit {unit!r}: {suggest(str(unit), UNITS)}")
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise ConfigError(
            "expected shares for validation and test from 0 on, together below 1, "
            f"got validation={validation} and test={test}"
        )
    if unit not in SIZES:
        if vocabulary_size is not None:
            raise ConfigError(
                f"vocabulary_size={vocabulary_size} is for words and subwords: "
                f"a vocabulary of {unit}s has them all; leave it out"
            )
        return 0
    least, usual = SIZES[unit]
    size = usual if vocabulary_size is None else vocabulary_size
    if not isinstance(size, int) or not least <= size <= LARGEST_VOCABULARY:
        raise ConfigError(f"expected a vocabulary_size from {least} to {LARGEST_VOCABULARY} for {unit}s, got {size!r}")
    return size


def _made(folder: str | os.PathLike[str]) -> Path:
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _survey(text: Text) -> tuple[int, set[str]]:
    """The length of a text in characters, or in bytes for the byte unit, and its different characters."""
    size, characters = 0, set[str]()
    for block in text:
        size += len(block)
        if text.unit == "character":
            characters.update(block.text)
    return size, characters


def _learn(text: Text, cuts: Sequence[int], characters: set[str], size: int) -> Vocabulary:
    if text.unit == "byte":
        return Bytes()
    if text.unit == "character":
        return Characters(characters)
    if text.unit == "word":
        return Words.learn(_training(text, cuts), size)
    every = max(1, math.ceil(cuts[0] / max(LEARNED, LEARNED_FOR_EACH * size)))
    return Subwords.learn(islice(_training(text, cuts), 0, None, every), size)


def _training(text: Text, cuts: Sequence[int]) -> Iterator[str]:
    for part, block in text.parts(cuts):
        if part > 0:
            return
        yield block.text


def _write(text: Text, cuts: Sequence[int], vocabulary: Vocabulary, outputs: Outputs) -> dict[str, dict]:
    files = [outputs.create(f"{name}.bin") for name in SPLITS]
    counts = np.zeros((len(SPLITS), 2), np.int64)
    stored = _stored(vocabulary)
    for part, block in text.parts(cuts):
        files[part].write(_encode(vocabulary, block).astype(stored, copy=False).data)
        counts[part] += measure(block.content)
    return {
        name: {
            "tokens": file.size // stored.itemsize,
            "characters": int(characters),
            "bytes": int(size),
            "digest": file.digest,
        }
        for name, file, (characters, size) in zip(SPLITS, files, counts, strict=True)
    }


def _check_lengths(splits: Mapping[str, dict], unit: str, size: int, shares: Mapping[str, float]) -> None:
    shares = {"train": 1 - sum(shares.values()), **shares}
    for name, share in shares.items():
        if share > 0 and splits[name]["tokens"] < 2:
            needed = math.ceil(2 / min(share for share in shares.values() if share > 0))
            raise DataError(
                f"the text is too short: it has {size} {'bytes' if unit == 'byte' else 'characters'}, "
                f"which leaves {splits[name]['tokens']} {unit}s for {name}, and at least 2 are needed; "
                f"give a text of about {needed} {unit}s or more, or larger shares"
            )


def _encode(vocabulary: Vocabulary, block: Block) -> np.ndarray:
    if isinstance(block.content, bytes):
        return np.frombuffer(block.content, np.uint8)
    return vocabulary.encode(block.content, block.where, start=block.start)


def _stored(vocabulary: Vocabulary) -> np.dtype:
    return vocabulary.dtype.newbyteorder("<")


def _verify(path: Path, tokens: int, digest: str, vocabulary: Vocabulary) -> None:
    stored = _stored(vocabulary)
    seen = hashlib.blake2b(digest_size=DIGEST_BYTES)
    largest = 0
    with open_regular(path, unusable) as file:
        size = os.fstat(file.fileno()).st_size
        if size != tokens * stored.itemsize:
            raise damaged(path, f"it has {size} bytes, expected {tokens * stored.itemsize}")
        try:
            while chunk := file.read(CHUNK):
                seen.update(chunk)
                if len(chunk) % stored.itemsize == 0:
                    largest = max(largest, int(np.frombuffer(chunk, stored).max()))
        except OSError as problem:
            raise damaged(path, f"it cannot be read: {reason(problem)}") from problem
    if seen.hexdigest() != digest:
        raise damaged(path, "it does not fit its digest")
    if largest >= len(vocabulary):
        raise damaged(path, f"it has the token {largest}, and the vocabulary ends at {len(vocabulary) - 1}")


def _names(sources: Sequence[Source]) -> str:
    named = ", ".join(name_of(source) for source in sources[:3])
    return named if len(sources) <= 3 else f"{named} and {len(sources) - 3} others"


def _recorded(source: Source) -> str:
    if isinstance(source, str):
        return source
    return source.name if source.is_absolute() else str(source)
