"""A JSON record that shows every damage: its first line is the digest of all the rest."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from recurra.data.output import DIGEST_BYTES
from recurra.errors import DataError

LARGEST = 64 << 20
MOST_VALUES = 1 << 20

_OPENING = b'{"blake2b": "'
_MIDDLE = b'",\n"content": '
_CLOSING = b"}\n"
_HEAD = len(_OPENING) + 2 * DIGEST_BYTES + len(_MIDDLE)


def seal(content: dict[str, Any]) -> bytes:
    """The file that holds ``content``: one JSON object of the digest and the content."""
    body = json.dumps(content, indent=1).encode()
    raw = _OPENING + _digest(body) + _MIDDLE + body + _CLOSING
    if len(raw) > LARGEST:
        raise DataError(f"the record of this corpus has {len(raw)} bytes, more than {LARGEST}: use fewer words")
    return raw


def unseal(path: Path) -> tuple[dict[str, Any], str]:
    """The content and the digest of a file that ``seal`` made. Raises DataError for any other."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST:
            raise DataError(f"{path} has {size} bytes, more than the {LARGEST} that it may have")
        raw = file.read(size + 1)
    body, digest = raw[_HEAD : -len(_CLOSING)], raw[len(_OPENING) : len(_OPENING) + 2 * DIGEST_BYTES]
    if raw != _OPENING + _digest(body) + _MIDDLE + body + _CLOSING:
        raise damaged(path, "it does not fit its own digest")
    # Counted before parsing, because an empty list of 3 bytes takes 64 in memory.
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MOST_VALUES:
        raise damaged(path, f"it holds more than {MOST_VALUES} values")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as problem:
        raise damaged(path, f"it is not valid JSON: {problem}") from problem
    if not isinstance(content, dict):
        raise damaged(path, f"it holds a {type(content).__name__}, not an object")
    return content, digest.decode()


def damaged(path: Path, how: str) -> DataError:
    return DataError(f"{path} is damaged: {how}; build the corpus again")


def open_regular(path: Path) -> BinaryIO:
    """The file open for reading. Raises DataError where it is missing, or no regular file."""
    try:
        # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as problem:
        raise DataError(f"{path} cannot be read: {problem.strerror or problem}") from problem
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise damaged(path, "it is no regular file")
    return open(descriptor, "rb")


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).hexdigest().encode()
