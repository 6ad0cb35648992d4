"""The table of ``explain()``, for a terminal of 100 columns."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recurra.compiler.explain import Details, Operation, Row

WIDTH = 100
_COLUMNS = (14, 8, 12, 12)
_LABEL = WIDTH - sum(_COLUMNS)


def table(details: Details) -> str:
    """A line for each stage and, below it, for each line of the user's code in it."""
    rows = details.rows
    total = {direction: sum(row.flops for row in rows if row.direction == direction) for direction in DIRECTIONS}
    lines = [
        _line("", "FLOPs", "share", "bytes of", "bytes"),
        _line("for each row and step", "", "", "weights", "kept"),
    ]
    indent = 6 + max((len(each.line) for row in rows for each in row.operations), default=0)
    for direction in DIRECTIONS:
        mine = [row for row in rows if row.direction == direction]
        if mine:
            lines.append(direction)
        for row in mine:
            lines += _stage(row, sum(total.values()), indent)
    stored, once = sum(row.stored for row in rows), sum(row.flops_once for row in rows)
    lines.append("-" * WIDTH)
    if total["backward"]:
        lines += [_line(name, f"{flops:,}", _share(flops, sum(total.values()))) for name, flops in total.items()]
    lines.append(_line("total", f"{sum(total.values()):,}", "", f"{details.weights:,}", f"{stored:,}"))
    lines.append(_line("and for each sequence, once", f"{once:,}"))
    if details.memory == "sqrt":
        lines.append("memory='sqrt' keeps the carried state of about sqrt(T) steps, and nothing of the others")
    return "\n".join(lines)


DIRECTIONS = ("forward", "backward")


def said(operations: Iterable[Operation]) -> str:
    """Operations in words: ``2 sigmoid, tanh, mul``."""
    counts = Counter(each.name for each in operations)
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items())


def notes(row: Row) -> list[str]:
    """What there is to say about a loop."""
    found = []
    if row.linear:
        found.append("a linear recurrence: h = a * h + b, where a and b do not depend on h")
    if row.native:
        found.append(f"native code, {row.code}")
    if row.fused:
        found.append(f"fused into it: {said(each for each in row.fused if not each.moves) or 'views'}")
    if row.refused:
        found.append(f"no native code: {row.refused}")
    return found


def _stage(row: Row, total: int, indent: int) -> list[str]:
    if row.kind != "loop" and all(each.moves for each in row.operations):
        return []
    once = row.kind in ("once", "summed")
    lines = _wrapped(
        row.title,
        "  ",
        "    ",
        f"{row.flops:,}" if row.flops or not once else "once",
        _share(row.flops, total) if row.flops else "",
        f"{row.weights:,}" if row.weights else "",
        f"{row.stored:,}" if row.stored else "",
    )
    for note in notes(row):
        lines += textwrap.wrap(note, WIDTH, initial_indent="    ", subsequent_indent="      ", break_long_words=False)
    groups: dict[str, list[Operation]] = {}
    for each in row.operations:
        if not each.moves:
            groups.setdefault(each.line, []).append(each)
    for line, operations in groups.items():
        flops = sum(each.flops for each in operations)
        # What is done once has its FLOPs in the last line of the table.
        figure = "" if once and not row.flops else f"{flops:,}"
        lines += _wrapped(said(operations), f"    {line:<{indent - 4}}", " " * indent, figure)
    return lines


def _wrapped(text: str, begin: str, indent: str, *figures: str) -> list[str]:
    room = max(20, _LABEL - len(indent))
    first, *rest = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return [_line(begin + first, *figures), *(indent + each for each in rest)]


def _line(label: str, *figures: str) -> str:
    pairs: Sequence[tuple[str, int]] = list(zip(figures, _COLUMNS, strict=False))
    return (f"{label:<{_LABEL}}" + "".join(f"{figure:>{width}}" for figure, width in pairs)).rstrip()


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
