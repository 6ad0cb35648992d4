"""What can go wrong, by name. Every error of recurra is a RecurraError and says what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecurraError(Exception):
    """Base of every error that recurra raises on purpose."""


class ShapeError(RecurraError, ValueError):
    """A tensor has the wrong shape, dtype or device."""


class BackendError(RecurraError, RuntimeError):
    """The path asked for cannot run this cell; nothing else ran in its place."""


class ConfigError(RecurraError, ValueError):
    """A setting is unknown or has a value that cannot be used."""


class DataError(RecurraError, ValueError):
    """The data cannot be read as what it was given for."""


class CheckpointError(RecurraError):
    """A checkpoint or run folder is missing, damaged or does not fit."""


class TrainingError(RecurraError, RuntimeError):
    """Training cannot go on, for a reason the message names."""


class TapError(RecurraError, LookupError):
    """No value, or more than one, goes by that name."""


class MissingExtraError(RecurraError, ImportError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'recurra[{extra}]'")


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a wrong name: the nearest known one, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)
