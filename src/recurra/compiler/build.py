"""Writing programs of the loop IR: a builder, and values that can be calculated with.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from recurra.compiler.ir import COMPARISONS, LOGIC, POINTWISE, UNARY, Kind, Node, Op, Program
from recurra.compiler.verify import verify
from recurra.errors import BackendError


@dataclass(frozen=True, slots=True)
class Value:
    """A value in a program that is being built. Arithmetic with it adds nodes; width 1 is broadcast."""

    builder: Builder = field(repr=False, compare=False)
    place: int

    @property
    def node(self) -> Node:
        return self.builder.nodes[self.place]

    @property
    def width(self) -> int:
        return self.node.width

    def __add__(self, other: Operand) -> Value:
        return self.builder.apply(Op.ADD, self, other)

    def __radd__(self, other: float) -> Value:
        return self.builder.apply(Op.ADD, other, self)

    def __sub__(self, other: Operand) -> Value:
        return self.builder.apply(Op.SUB, self, other)

    def __rsub__(self, other: float) -> Value:
        return self.builder.apply(Op.SUB, other, self)

    def __mul__(self, other: Operand) -> Value:
        return self.builder.apply(Op.MUL, self, other)

    def __rmul__(self, other: float) -> Value:
        return self.builder.apply(Op.MUL, other, self)

    def __truediv__(self, other: Operand) -> Value:
        return self.builder.apply(Op.DIV, self, other)

    def __rtruediv__(self, other: float) -> Value:
        return self.builder.apply(Op.DIV, other, self)

    def __neg__(self) -> Value:
        return self.builder.apply(Op.NEG, self)

    def __lt__(self, other: Operand) -> Value:
        return self.builder.apply(Op.LT, self, other)

    def __gt__(self, other: Operand) -> Value:
        return self.builder.apply(Op.GT, self, other)

    def __getitem__(self, features: slice) -> Value:
        start, stop, stride = features.indices(self.width)
        if stride != 1 or stop <= start:
            raise BackendError(f"a slice takes neighbouring features, got {features} of {self.width}")
        return self.builder.slice(self, start, stop - start)


Operand = Value | float


class Builder:
    """A program, node by node. ``finish`` gives the verified program."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._widths: dict[Op, list[int]] = {Op.CARRY: [], Op.INPUT: [], Op.ROW: [], Op.VECTOR: []}
        self._matrices: list[tuple[int, int]] = []

    def carry(self, width: int) -> Value:
        """The old value of the next carry, an array (B, width)."""
        return self._leaf(Op.CARRY, width)

    def input(self, width: int) -> Value:
        """This step's slice of the next array (T, B, width)."""
        return self._leaf(Op.INPUT, width)

    def row(self, width: int) -> Value:
        """The next array (B, width), the same at every step."""
        return self._leaf(Op.ROW, width)

    def vector(self, width: int) -> Value:
        """The next array (width,), the same for every row at every step."""
        return self._leaf(Op.VECTOR, width)

    def matrix(self, rows: int, columns: int) -> int:
        """The number of the next matrix (rows, columns)."""
        self._matrices.append((rows, columns))
        return len(self._matrices) - 1

    def constant(self, number: float) -> Value:
        return self.add(Node(Op.CONST, (), 1, number=float(number)))

    def matmul(
        self,
        x: Value,
        matrix: int,
        *,
        transposed: bool = False,
        start: int = 0,
        width: int | None = None,
        top: int = 0,
    ) -> Value:
        """x @ M or x @ M^T, or ``width`` columns of it from ``start`` on; M may have rows before ``top`` and after."""
        columns = self._matrices[matrix][0 if transposed else 1]
        width = columns - start if width is None else width
        return self.add(Node(Op.MATMUL, (x.place,), width, index=matrix, start=start, transposed=transposed, top=top))

    def slice(self, x: Value, start: int, width: int) -> Value:
        return self.add(Node(Op.SLICE, (x.place,), width, x.node.kind, start=start))

    def gather(self, x: Value, features: Sequence[int]) -> Value:
        """These features of x, in this order; one may be taken more than once."""
        return self.add(Node(Op.GATHER, (x.place,), len(features), x.node.kind, features=tuple(features)))

    def concat(self, parts: Sequence[Value]) -> Value:
        places = tuple(part.place for part in parts)
        return self.add(Node(Op.CONCAT, places, sum(part.width for part in parts), parts[0].node.kind))

    def broadcast(self, x: Value, width: int, inner: int = 1) -> Value:
        """x, seen as (outer, inner), as (outer, many, inner)."""
        return x if x.width == width else self.add(Node(Op.BROADCAST, (x.place,), width, x.node.kind, inner=inner))

    def sum(self, x: Value, width: int = 1, inner: int = 1) -> Value:
        """x, seen as (outer, many, inner), summed over the middle one: ``width`` features."""
        return self.add(Node(Op.SUM, (x.place,), width, inner=inner))

    def max(self, x: Value, width: int = 1, inner: int = 1) -> Value:
        """The largest features, of axes as ``sum`` has them; NaN where there is one."""
        return self.add(Node(Op.MAX, (x.place,), width, inner=inner))

    def mean(self, x: Value) -> Value:
        return self.sum(x) * (1.0 / x.width)

    def power(self, x: Value, exponent: float) -> Value:
        return self.add(Node(Op.POW, (x.place,), x.width, number=float(exponent)))

    def clamp(self, x: Value, low: float, high: float) -> Value:
        return self.apply(Op.MINIMUM, self.apply(Op.MAXIMUM, x, low), high)

    def relu(self, x: Value) -> Value:
        return self.apply(Op.MAXIMUM, x, 0.0)

    def sign(self, x: Value) -> Value:
        """-1, 0 or 1; x itself where that is zero or NaN."""
        return self.apply(Op.WHERE, x > 0.0, 1.0, self.apply(Op.WHERE, x < 0.0, -1.0, x))

    def apply(self, op: Op, *operands: Operand) -> Value:
        """A pointwise operation. Numbers become constants, and width 1 is broadcast to the widest operand."""
        if op not in POINTWISE:
            raise BackendError(f"{op.value} is no pointwise operation")
        values = [each if isinstance(each, Value) else self.constant(each) for each in operands]
        width = max(value.width for value in values)
        places = tuple(self.broadcast(value, width).place for value in values)
        return self.add(Node(op, places, width, Kind.BOOL if op in COMPARISONS | LOGIC else Kind.FLOAT))

    def __getattr__(self, name: str) -> _Function:
        """Every unary operation by its name: ``builder.tanh(x)``."""
        for op in UNARY - {Op.POW}:
            if op.value.rstrip("_") == name:
                return _Function(self, op)
        raise AttributeError(name)

    def add(self, node: Node) -> Value:
        self.nodes.append(node)
        return Value(self, len(self.nodes) - 1)

    def finish(self, outputs: Sequence[Value], new: Sequence[Value]) -> Program:
        """The program that keeps ``outputs`` of each step and carries ``new``. Raises BackendError if malformed."""
        return verify(
            Program(
                carries=tuple(self._widths[Op.CARRY]),
                inputs=tuple(self._widths[Op.INPUT]),
                rows=tuple(self._widths[Op.ROW]),
                vectors=tuple(self._widths[Op.VECTOR]),
                matrices=tuple(self._matrices),
                nodes=tuple(self.nodes),
                outputs=tuple(value.place for value in outputs),
                new=tuple(value.place for value in new),
            )
        )

    def _leaf(self, op: Op, width: int) -> Value:
        self._widths[op].append(width)
        return self.add(Node(op, (), width, index=len(self._widths[op]) - 1))


@dataclass(frozen=True, slots=True)
class _Function:
    builder: Builder
    op: Op

    def __call__(self, x: Value) -> Value:
        return self.builder.apply(self.op, x)
