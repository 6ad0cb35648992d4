"""recurra: write one step of any recurrent cell; the rest is done for you.

    from recurra import Cell, Recurrent

Everything is imported where it is first used, so that importing recurra costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_homes = {
    "Cell": "recurra.cell",
    "State": "recurra.cell",
    "detach": "recurra.cell",
    "Recurrent": "recurra.unroll",
    "Bidirectional": "recurra.unroll",
    "truncated": "recurra.unroll",
    "Stream": "recurra.stream",
    "tap": "recurra.taps",
    "watch": "recurra.taps",
    "RecurraError": "recurra.errors",
}
_rooms = ("cells", "nn", "data", "tasks", "training", "decoding")

# Rooms are not in it: after `import *`, nn should still be torch's.
__all__ = [*_homes]


def __getattr__(name: str) -> Any:
    if name in _homes:
        return getattr(importlib.import_module(_homes[name]), name)
    if name in _rooms:
        return importlib.import_module(f"recurra.{name}")
    raise AttributeError(f"module 'recurra' has no attribute {name!r}: known are {', '.join(__dir__())}")


def __dir__() -> list[str]:
    return [*_homes, *_rooms, "__version__"]
