"""What recurra has set itself to reach, and whether a run reached it.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from grid import OWN, STANDARD, Point

Record = dict[str, Any]
Row = dict[str, Any]
# No path is faster than the machine; a little for what two measurements of the same differ by.
BEYOND = 1.03
OURS = ("recurra", "recurra.nn")


@dataclass(frozen=True)
class Bar:
    """One aim. ``passed`` is None where the run did not measure it; ``worst`` is the point that decides."""

    aim: str
    passed: bool | None
    worst: str


def name(row: Row) -> str:
    return str(Point(**{key: row[key] for key in Point.__dataclass_fields__}))


def fastest_peer(row: Row) -> str | None:
    peers = {peer: ms for peer, ms in row["milliseconds"].items() if peer not in OURS}
    return min(peers, key=peers.__getitem__) if peers else None


def ratio(row: Row) -> float | None:
    """The fastest peer's time over recurra's: above 1 recurra is faster. 0 where recurra has no figure."""
    peer = fastest_peer(row)
    if peer is None:
        return None
    ms = row["milliseconds"]
    return ms[peer] / ms["recurra"] if "recurra" in ms else 0.0


def share(row: Row, limits: list[Row], way: str = "recurra") -> float | None:
    """Necessary operations a second over the measured limit of as many threads."""
    limit = next((each["flops"] for each in limits if each["threads"] == row["threads"]), None)
    if limit is None or way not in row["milliseconds"]:
        return None
    return row["flops"] / (1e-3 * row["milliseconds"][way]) / limit


def decide(aim: str, found: Iterable[tuple[float, str]], at_least: float, unit: Callable[[float], str]) -> Bar:
    """Passed where the smallest of the values reaches ``at_least``."""
    values = sorted(found)
    if not values:
        return Bar(aim, None, "not measured")
    value, where = values[0]
    below = sum(each < at_least for each, _ in values)
    count = f"; {below} of {len(values)} points below" if len(values) > 1 else ""
    return Bar(aim, below == 0, f"{unit(value)}: {where}{count}")


def times(value: float) -> str:
    return f"{value:.2f} times" if 0 < value < math.inf else "no figure"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def at_most(aim: str, found: Iterable[tuple[float, str]], most: float, unit: Callable[[float], str]) -> Bar:
    return decide(aim, [(-value, where) for value, where in found], -most, lambda value: unit(-value))


def judge(record: Record) -> list[Bar]:
    """Every bar, on the points of the largest number of threads."""
    limits = record["limits"]
    threads = max((row["threads"] for row in record["points"]), default=0)
    rows = [row for row in record["points"] if row["threads"] == threads]
    return [
        decide("never slower than the fastest peer", compared(rows), 1.0, times),
        *(mean(cell, rows) for cell in STANDARD),
        near_the_limit(rows, limits),
        *own(rows, limits),
        c1(rows),
        *memory(record["memory"]),
    ]


def compared(rows: list[Row]) -> list[tuple[float, str]]:
    return [(value, f"{name(row)} ({fastest_peer(row)})") for row in rows if (value := ratio(row)) is not None]


def mean_ratio(rows: list[Row], way: str | None = None) -> float | None:
    """The geometric mean of the fastest peer's time, or of that of one way, over recurra's."""
    values = []
    for row in rows:
        ms = row["milliseconds"]
        theirs = fastest_peer(row) if way is None else way
        if theirs in ms:
            values.append(ms[theirs] / ms["recurra"] if "recurra" in ms else 0.0)
    if not values:
        return None
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0


def mean(cell: str, rows: list[Row]) -> Bar:
    mine = [row for row in rows if row["cell"] == cell]
    found = mean_ratio(mine)
    aim = f"{cell}: at least 1.5 times the fastest peer, as geometric mean"
    if found is None:
        return Bar(aim, None, "not measured")
    return Bar(aim, found >= 1.5, f"{times(found)} over {len(mine)} points")


def near_the_limit(rows: list[Row], limits: list[Row]) -> Bar:
    aim = "85 % of the measured limit in training, B >= 32 and H >= 256"
    large = [row for row in rows if limits and row["B"] >= 32 and row["H"] >= 256]
    shares = [(share(row, limits) or 0.0, name(row)) for row in large]
    if shares and max(shares)[0] > BEYOND:
        value, where = max(shares)
        return Bar(
            aim,
            None,
            f"the limit is wrong, other work was on the machine while it was measured: {percent(value)}: {where}",
        )
    return decide(aim, shares, 0.85, percent)


def own(rows: list[Row], limits: list[Row]) -> list[Bar]:
    """A cell of one's own beside the built-in LSTM of recurra at the same sizes, and beside the eager loop."""

    def size(row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("T", "B", "I", "H", "layers"))

    def slowness(row: Row) -> float:
        ms = row["milliseconds"]
        return ms["recurra"] / row["flops"] if "recurra" in ms else float("inf")

    built_in = {size(row): slowness(row) for row in rows if row["cell"] == "LSTM" and "recurra" in row["milliseconds"]}
    mine = [row for row in rows if row["cell"] in OWN]
    beside = [(slowness(row) / built_in[size(row)], name(row)) for row in mine if size(row) in built_in]
    small = [row for row in mine if row["B"] <= 32 and row["H"] <= 256 and "eager" in row["milliseconds"]]
    eager = [(row["milliseconds"]["eager"] / row["milliseconds"].get("recurra", math.inf), name(row)) for row in small]
    fivefold = decide("a cell of one's own: at least 5 times the eager loop, B <= 32 and H <= 256", eager, 5.0, times)
    # At the limit itself, recurra would be as many times as fast as the eager loop.
    most = [1 / found for row in small if (found := share(row, limits, "eager"))]
    if fivefold.passed is False and (beyond := sum(each < 5.0 for each in most)):
        fivefold = replace(fivefold, worst=f"{fivefold.worst}, {beyond} of them beyond the machine's limit")
    return [
        at_most("a cell of one's own: at most 1.15 times the built-in LSTM's time per operation", beside, 1.15, times),
        fivefold,
    ]


def c1(rows: list[Row]) -> Bar:
    aim = "C1 in under 5 ms"
    row = next((row for row in rows if row["grid"] == "C1"), None)
    if row is None:
        return Bar(aim, None, "not measured")
    ours, theirs = (row["milliseconds"].get(way, math.inf) for way in ("recurra", "torch.nn"))
    return Bar(aim, ours < 5.0, f"{ours:.2f} ms; torch.nn.GRU {theirs:.2f} ms")


def memory(rows: list[Row]) -> list[Bar]:
    theirs = {(row["cell"], row["T"]): row["bytes"] for row in rows if row["path"] == "torch.nn" and "bytes" in row}

    def parts(path: str) -> list[tuple[float, str]]:
        return [
            (row.get("bytes", math.inf) / theirs[row["cell"], row["T"]], f"{row['cell']} T{row['T']}")
            for row in rows
            if row["path"] == path and (row["cell"], row["T"]) in theirs
        ]

    return [
        at_most("memory: 'store' at most torch.nn's", parts("store"), 1.0, times),
        at_most("memory: 'recompute' at most half of torch.nn's", parts("recompute"), 0.5, times),
    ]
