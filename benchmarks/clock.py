"""Times of several ways to do the same, taken in turn: A, B, C, A, B, C ..."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# n -> the seconds of each of n calls one after another.
Run = Callable[[int], list[float]]

# The workers of one library spin for about as long after a call, on the cores that the next one needs.
PAUSE = 0.003
CALLS = 500
# Turns of what takes long: the fewest that have a median.
FEWEST = 3


def repeated(call: Callable[[], object]) -> Run:
    """A Run of a function of this process."""

    def run(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        return seconds

    return run


def in_turn(runs: Mapping[str, Run], seconds: float, rounds: int) -> dict[str, list[float]]:
    """The times of each run, warmed up already, in ``rounds`` turns that share ``seconds``; fewer where one call of
    each takes several times that.

    A turn is one call, or, of what is short, several, the first of which, with the caches of the others, is left out.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    once = {name: max(run(1)[0], 1e-9) for name, run in runs.items()}
    if sum(once.values()) > 4 * seconds:
        rounds = min(rounds, FEWEST)
    calls = {name: max(1, min(CALLS, int(seconds / rounds / each))) for name, each in once.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(PAUSE)
            count = calls[name]
            found[name].extend(run(count) if count == 1 else run(count + 1)[1:])
    return found


def one_by_one(push: Callable[[Any], object], rows: Sequence[Any], steps: int, seconds: float) -> dict[str, float]:
    """p50 and p99, in nanoseconds, of single calls: ``rows`` over and over, some ``steps``, at most some ``seconds``.

    The time is what the caller waits, the reading of the clock (some 50 ns) included.
    """
    clock = time.perf_counter_ns
    times: list[int] = []
    end = clock() + int(1e9 * seconds)
    while len(times) < steps and clock() < end:
        for row in rows:
            began = clock()
            push(row)
            times.append(clock() - began)
    times.sort()
    return {"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100], "steps": len(times)}
