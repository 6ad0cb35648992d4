"""What ``explain()`` says: which path a cell takes over time, why, and what it costs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from recurra.errors import BackendError


class Details(Protocol):
    """The stages of a traced step, as ``recurra.compiler.explain`` has them."""

    @property
    def rows(self) -> Sequence[Any]: ...

    def picture(self, path: str | Path) -> None: ...


@dataclass(frozen=True)
class Explanation:
    """Which path a Recurrent takes, and why.

    ``ran`` is what the last call took; before the first, where ``called`` is False, what a call without context would
    take. ``schedule`` lists every operation: what runs once, in batches, step by step. Printed, it is a table of what
    each line of the step costs, in FLOPs and bytes.
    """

    asked: str
    ran: str
    why: str
    schedule: str = ""
    called: bool = True
    details: Details | None = None

    @property
    def table(self) -> list[Any]:
        """A ``recurra.compiler.explain.Row`` for each stage, forward, then backward; none for the reference loop."""
        return [] if self.details is None else list(self.details.rows)

    def picture(self, path: str | Path) -> None:
        """Write the stages as an SVG: what runs once, in batches, in which loop, and its share of the FLOPs.

        Raises BackendError where there is no traced step to draw.
        """
        if self.details is None:
            raise BackendError(f"there is no traced step to draw: {self.why}")
        self.details.picture(path)

    def __str__(self) -> str:
        runs = "runs" if self.called else "will run"
        line = textwrap.fill(f"backend={self.asked!r} {runs} {self.ran!r}: {self.why}", 100, break_long_words=False)
        rest = str(self.details or self.schedule)
        return f"{line}\n\n{rest}" if rest else line
