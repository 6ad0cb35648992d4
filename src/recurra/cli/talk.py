"""How the command line speaks: data to stdout, talk to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def say(text: str = "") -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def complain(text: str, label: str | None = "error") -> None:
    """What went wrong, for the person at the terminal."""
    say(f"recurra: {label}: {text}" if label else f"recurra: {text}")


def closing(made: Mapping[str, str], next_steps: Sequence[str]) -> None:
    """What a command made, where it is, and what to try next."""
    say()
    width = max((len(name) for name in made), default=0)
    for name, where in made.items():
        say(f"  {name:<{width}}  {where}")
    if next_steps:
        say("\nNext:")
        for step in next_steps:
            say(f"  {step}")


def table(title: str, rows: Mapping[str, Any]) -> None:
    """Names and values, as a table on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Outside a terminal nobody is there to widen the window: never cut a value.
    console = Console(width=None if sys.stdout.isatty() else 200)
    drawn = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    for name, value in rows.items():
        drawn.add_row(Text(name), Text(str(value)))
    console.print(drawn)


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    print(json.dumps(value, ensure_ascii=False))
