"""Random programs of the loop IR, for hypothesis: every operation, widths that fit no vector, values that stay small.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from hypothesis import strategies as st

from recurra.compiler.build import Builder, Value
from recurra.compiler.ir import Op, Program

WIDTHS = (1, 2, 5, 8, 17)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A program of up to 16 operations; carries and outputs are bounded by tanh."""
    b = Builder()
    width = draw(st.sampled_from(WIDTHS))
    carries = [b.carry(draw(st.sampled_from(WIDTHS))) for _ in range(draw(st.integers(1, 3)))]
    values = [*carries, b.input(width), b.vector(width), b.row(width), b.row(1)]
    for _ in range(draw(st.integers(1, 16))):
        values.append(draw(_operation(b, values)))
    new = [b.tanh(_fitted(b, draw(st.sampled_from(values)), carry.width)) for carry in carries]
    kept = draw(st.lists(st.sampled_from(values), max_size=3, unique_by=lambda value: value.place))
    return b.finish(kept, new)


def _fitted(b: Builder, x: Value, width: int) -> Value:
    if x.width == width or x.width == 1:
        return b.broadcast(x, width)
    return x[:width] if x.width > width else b.matmul(x, b.matrix(x.width, width))


@st.composite
def _operation(draw: st.DrawFn, b: Builder, values: list[Value]) -> Value:
    x = draw(st.sampled_from(values))
    fitting = [value for value in values if value.width == x.width or value.width == 1]
    y = draw(st.sampled_from(fitting))
    size = draw(st.sampled_from(WIDTHS))
    choices = {
        "unary": lambda: draw(st.sampled_from([b.tanh, b.sigmoid, b.neg, b.abs, b.log_sigmoid]))(x),
        "wave": lambda: draw(st.sampled_from([b.sin, b.cos, b.atan, b.erf]))(x),
        "whole": lambda: draw(st.sampled_from([b.floor, b.round]))(b.clamp(3.0 * x, -9.0, 9.0)),
        "bounded": lambda: b.exp(b.clamp(x, -2.0, 1.0)),
        "root": lambda: b.sqrt(b.abs(x) + 0.5),
        "log": lambda: b.log(b.abs(x) + 0.5),
        "power": lambda: b.power(b.abs(x) + 0.5, draw(st.sampled_from([-2.0, -0.5, 0.5, 3.0, 0.3]))),
        "add": lambda: x + y,
        "sub": lambda: x - y,
        "mul": lambda: b.tanh(x) * y,
        "div": lambda: x / (1.0 + b.abs(y)),
        "extreme": lambda: b.apply(draw(st.sampled_from([Op.MAXIMUM, Op.MINIMUM])), x, y),
        "where": lambda: b.apply(Op.WHERE, _condition(draw, b, x, y), x, b.sigmoid(y)),
        "matmul": lambda: b.tanh(b.matmul(x, b.matrix(size, x.width), transposed=True)),
        "columns": lambda: b.matmul(x, b.matrix(x.width, size + 3), start=2, width=size),
        "block": lambda: b.matmul(x, b.matrix(x.width + 4, size + 3), top=3, start=1, width=size),
        "turned block": lambda: b.matmul(
            x, b.matrix(size + 3, x.width + 4), transposed=True, top=3, start=1, width=size
        ),
        "gather": lambda: b.gather(x, draw(st.lists(st.integers(0, x.width - 1), min_size=size, max_size=size))),
        "slice": lambda: b.slice(x, x.width // 3, x.width - x.width // 2),
        "concat": lambda: b.concat([x, y, x])[: max(WIDTHS)],
        "sum": lambda: b.mean(x),
        "max": lambda: b.max(x),
        "softmax": lambda: b.exp(x - b.max(x)) / b.sum(b.exp(x - b.max(x))),
        "broadcast": lambda: b.broadcast(b.mean(x), size),
        "spread": lambda: _spread(draw, b, x),
        "sum of an axis": lambda: b.tanh(b.sum(x, *_axes(draw, x.width))),
        "largest of an axis": lambda: b.max(x, *_axes(draw, x.width)),
    }
    return choices[draw(st.sampled_from(sorted(choices)))]()


def _spread(draw: st.DrawFn, b: Builder, x: Value) -> Value:
    if x.width > max(WIDTHS):
        return b.neg(x)
    return b.broadcast(x, x.width * draw(st.integers(2, 5)), draw(st.sampled_from(_parts(x.width))))


def _axes(draw: st.DrawFn, width: int) -> tuple[int, int]:
    """How many features are left of so many when an axis is reduced, and how many of them are its inner ones."""
    left = draw(st.sampled_from(_parts(width)))
    return left, draw(st.sampled_from(_parts(left)))


def _parts(width: int) -> list[int]:
    return [part for part in range(1, width + 1) if width % part == 0]


def _condition(draw: st.DrawFn, b: Builder, x: Value, y: Value) -> Value:
    compare = draw(st.sampled_from([Op.LT, Op.LE, Op.GT, Op.GE, Op.EQ, Op.NE]))
    found = b.apply(compare, x, y)
    how = draw(st.sampled_from(["plain", "not", "and", "or"]))
    if how == "not":
        return b.apply(Op.NOT, found)
    if how == "plain":
        return found
    return b.apply(Op.AND if how == "and" else Op.OR, found, b.apply(Op.LT, b.abs(x), 0.7))
