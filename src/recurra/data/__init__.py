"""Text as tokens: which files, which vocabulary, the corpus on disk, and its streams for training.

Everything is imported where it is first used; only ``streams`` needs torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_homes = {
    "Corpus": "recurra.data.corpus",
    "build_corpus": "recurra.data.corpus",
    "encode_file": "recurra.data.corpus",
    "Vocabulary": "recurra.data.vocabulary",
    "vocabulary_from_json": "recurra.data.vocabulary",
    "Streams": "recurra.data.streams",
    "cover": "recurra.data.streams",
}

__all__ = [*_homes]


def __getattr__(name: str) -> Any:
    if name in _homes:
        return getattr(importlib.import_module(_homes[name]), name)
    raise AttributeError(f"module 'recurra.data' has no attribute {name!r}: known are {', '.join(_homes)}")


def __dir__() -> list[str]:
    return list(_homes)
