"""A JSON record that shows every damage: its first line is the digest of all the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recurra.errors import DataError
from recurra.files import DIGEST_BYTES, digest, parse_json, read_bytes

LARGEST = 64 << 20
MOST_VALUES = 1 << 20

_OPENING = b'{"blake2b": "'
_MIDDLE = b'",\n"content": '
_CLOSING = b"}\n"
_HEAD = len(_OPENING) + 2 * DIGEST_BYTES + len(_MIDDLE)


def seal(content: dict[str, Any]) -> bytes:
    """The file that holds ``content``: one JSON object of the digest and the content."""
    raw = _wrap(json.dumps(content, indent=1).encode())
    if len(raw) > LARGEST:
        raise DataError(f"the record of this corpus has {len(raw)} bytes, more than {LARGEST}: use fewer words")
    return raw


def unseal(path: Path) -> tuple[dict[str, Any], str]:
    """The content and the digest of a file that ``seal`` made. Raises DataError for any other."""
    raw = read_bytes(path, LARGEST, unusable)
    body = raw[_HEAD : -len(_CLOSING)]
    if raw != _wrap(body):
        raise damaged(path, "it does not fit its own digest")
    return parse_json(body, f"{path} is damaged: its content", MOST_VALUES, unusable), digest(body)


def damaged(path: Path, how: str) -> DataError:
    return unusable(f"{path} is damaged: {how}")


def unusable(why: str) -> DataError:
    return DataError(f"{why}; build the corpus again")


def _wrap(body: bytes) -> bytes:
    return _OPENING + digest(body).encode() + _MIDDLE + body + _CLOSING
