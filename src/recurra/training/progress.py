"""What a person sees while training: a bar on a terminal, plain lines elsewhere. All of it goes to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Protocol, Self


class Progress(Protocol):
    """Told of every update, says what matters."""

    def begin(self, total: int, done: int) -> None:
        """Training goes from update ``done`` to update ``total``."""

    def update(self, done: int, figures: Mapping[str, str]) -> None:
        """One more update, with figures ready to be shown."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def end(self) -> None:
        """Nothing more will come."""


class Silent:
    """Says nothing: for the other ranks, and for programs."""

    def begin(self, total: int, done: int) -> None: ...

    def update(self, done: int, figures: Mapping[str, str]) -> None: ...

    def say(self, text: str) -> None: ...

    def end(self) -> None: ...


class Lines:
    """A plain line every few seconds, for log files."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self.total, self.from_step = 0, 0
        self.began = self.last = time.monotonic()

    def begin(self, total: int, done: int) -> None:
        self.total, self.from_step = total, done
        self.began = self.last = time.monotonic()

    def update(self, done: int, figures: Mapping[str, str]) -> None:
        now = time.monotonic()
        if now - self.last < self.seconds and done < self.total:
            return
        self.last = now
        left = (now - self.began) / max(1, done - self.from_step) * (self.total - done)
        shown = "  ".join(f"{name} {value}" for name, value in figures.items())
        self.say(f"update {done}/{self.total}  {shown}  {duration(left)} left")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def end(self) -> None: ...


class Bar:
    """A bar with the figures beside it, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        self.rich = RichProgress(
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
            console=Console(stderr=True),
            refresh_per_second=4,
            expand=True,
        )
        self.bar = self.rich.add_task("", total=None)

    def begin(self, total: int, done: int) -> None:
        self.rich.start()
        self.rich.update(self.bar, total=total, completed=done)

    def update(self, done: int, figures: Mapping[str, str]) -> None:
        shown = " ".join(f"[dim]{name}[/dim] {value}" for name, value in figures.items())
        self.rich.update(self.bar, completed=done, description=shown)

    def say(self, text: str) -> None:
        from rich.text import Text

        self.rich.console.print(Text(text))

    def end(self) -> None:
        self.rich.stop()


def for_stderr() -> Progress:
    """A bar where stderr is a terminal, lines where it is not."""
    return Bar() if sys.stderr.isatty() else Lines()


def duration(seconds: float) -> str:
    """``3 s``, ``2 min 05 s``, ``1 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Rate:
    """Units per second over the last moments, so that a pause for evaluation does not count."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, units: int, seconds: float) -> Self:
        now = units / max(seconds, 1e-9)
        self.value = now if not self.value else 0.9 * self.value + 0.1 * now
        return self
