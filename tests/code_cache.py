"""A cache of compiled code, asked for bytes that stand for code."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from recurra.compiler.llvm import cache

CODE = bytes(random.Random(1).randbytes(1000))
OTHER = bytes(random.Random(2).randbytes(1000))


def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the entries will be. It is not made yet."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "own"))
    return tmp_path / "own" / "kernels"


def ask(content: str = "a", code: bytes = CODE) -> cache.Compiled:
    return cache.compiled([content], lambda: code)


def entry(folder: Path, content: str = "a") -> Path:
    return folder / f"{cache.entry_name([content])}.code"


def kept(folder: Path, content: str = "a") -> bool:
    """Whether the entry is there and good: what would be built is something else."""
    found = ask(content, OTHER)
    assert found.code == (CODE if found.found else OTHER)
    return found.found


def built(remark: str, content: str = "a") -> None:
    """The code is not taken from the cache, is right nevertheless, and it is said why."""
    found = ask(content, OTHER)
    assert (found.code, found.found) == (OTHER, False)
    assert remark in (found.remark or "")
