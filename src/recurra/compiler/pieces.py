"""A pass as a script: on all steps at once, or where that is much memory on pieces of time one after the other. What
one operation hands to the next is still in the caches then, and takes one piece's memory.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import fx

from recurra.compiler.llvm.sequence import team
from recurra.compiler.places import Value, cut
from recurra.compiler.script import Called, Script, Section, lay_out
from recurra.compiler.writer import Unfit, Writer

# Bytes of all values above which a call is long, and memory is better given back on the way.
MOST = 1 << 26
# Measured, see docs/lab-notes.md. Bytes that nobody sees, and rows, that a piece of time has at least. Each piece packs
# the weights of the products anew, and goes over their gradients.
PIECE = 3 << 21
ROWS = 2048


def write(writer: Writer, kept: Sequence[int | None]) -> Script:
    """The script of a call. ``kept`` has the number of every result that may lie in one tensor with others, None for
    what is the caller's. Raises Unfit for what cannot be written down."""
    T = writer.call.T
    env, found = writer.write(T)
    shared = _shared(writer, found, kept)
    results = writer.results(found, shared)
    sections = [Section(writer.list)]
    if any(each.members > 1 for each in writer.list) and not team():
        raise Unfit
    seen = {result.place.index for result in results if result is not None}
    brief = writer.brief - seen
    steps = _steps(writer, brief)
    if steps < T:
        sections = _pieces(writer, env, shared, steps)
    sizes = [prod(shape) for shape in writer.shapes]
    sizes = [size // T * steps if k in brief else size for k, size in enumerate(sizes)]
    if sum(size for k, size in enumerate(sizes) if steps == T or k not in seen) * writer.itemsize > MOST:
        raise Unfit
    loops, given = tuple(writer.loops.values()), len(writer.given)
    return lay_out(sections, sizes, brief, results, kept, given, loops, writer.itemsize, steps)


def _steps(writer: Writer, brief: set[int]) -> int:
    """Of how many steps a piece of time is; all where one is not worth it, or not possible."""
    T: int = writer.call.T
    step = sum(prod(writer.shapes[k]) for k in brief) * writer.itemsize // T
    if not writer.divisible or len(writer.directions) != 1 or step == 0:
        return T
    count = T // max(-(-ROWS // writer.call.B), PIECE // step) or 1
    return -(-T // count)


def _pieces(writer: Writer, env: dict[fx.Node, Any], shared: Sequence[int], steps: int) -> list[Section]:
    """What is called on each piece: on the first, which may be shorter, on the others, and after them. ``env`` has what
    there is of all steps."""
    T = writer.call.T
    times = -(-T // steps) - 1
    begin = T - times * steps
    calls: list[list[Called]] = []
    for size in (begin, steps):
        found, results = writer.write(size, again=bool(calls))
        writer.results(results, shared)
        for node, value in env.items():
            if isinstance(value, Value) and replace(found[node], place=value.place) != cut(value, size, T):
                raise Unfit
        calls.append(writer.list)
    (back,) = writer.directions
    first, second, onward = (T - begin, T - begin - steps, -steps) if back else (0, begin, steps)
    return [Section(calls[0], 1, first), Section(calls[1], times, second, onward), Section(writer.last)]


def _shared(writer: Writer, found: Sequence[Value | None], kept: Sequence[int | None]) -> list[int]:
    """Which results for the caller share their memory with others: what is written on them must be their own."""
    rest = [result for result in found if result is not None]
    shared = []
    for k, (result, number) in enumerate(zip(found, kept, strict=True)):
        if result is None or number is not None:
            continue
        rest.remove(result)
        index = result.place.index
        if prod(result.shape) != prod(writer.shapes[index]) or any(other.place.index == index for other in rest):
            shared.append(k)
    return shared
