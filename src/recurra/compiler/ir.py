"""The loop IR: the body of one time loop over rows, for any kind of machine.

A value is one row's: ``width`` numbers, or booleans. A program reads old carries, inputs of this step and what is
constant over time, and says what is kept of this step and what the new carries are. Rows never meet.

The text of a program (``str(program)``, ``parse``) is one line for each value::

    carry 3
    input 6
    matrix 3x6
    %0 = carry [index=0] : 3
    %1 = input [index=0] : 6
    %2 = matmul %0 [index=0] : 6
    %3 = add %1 %2 : 6
    %4 = slice %3 [start=3] : 3
    %5 = tanh %4 : 3
    output %5
    new %5

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import Enum

from recurra.errors import BackendError


class Op(Enum):
    """What a node does. The value is its name in the text."""

    CARRY = "carry"
    INPUT = "input"
    ROW = "row"
    VECTOR = "vector"
    CONST = "const"
    MATMUL = "matmul"
    SLICE = "slice"
    GATHER = "gather"
    CONCAT = "concat"
    BROADCAST = "broadcast"
    SUM = "sum"
    MAX = "max"
    ADD = "add"
    SUB = "sub"
    MUL = "mul"
    DIV = "div"
    MAXIMUM = "maximum"
    MINIMUM = "minimum"
    NEG = "neg"
    ABS = "abs"
    SQRT = "sqrt"
    EXP = "exp"
    LOG = "log"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    LOG_SIGMOID = "log_sigmoid"
    SIN = "sin"
    COS = "cos"
    ATAN = "atan"
    ERF = "erf"
    ROUND = "round"
    FLOOR = "floor"
    POW = "pow"
    LT = "lt"
    LE = "le"
    GT = "gt"
    GE = "ge"
    EQ = "eq"
    NE = "ne"
    AND = "and"
    OR = "or"
    NOT = "not"
    WHERE = "where"


ARRAYS = (Op.CARRY, Op.INPUT, Op.ROW, Op.VECTOR)
LEAVES = frozenset({*ARRAYS, Op.CONST})
REDUCTIONS = frozenset({Op.SUM, Op.MAX})
COMPARISONS = frozenset({Op.LT, Op.LE, Op.GT, Op.GE, Op.EQ, Op.NE})
LOGIC = frozenset({Op.AND, Op.OR, Op.NOT})
UNARY = frozenset(
    {Op.NEG, Op.ABS, Op.SQRT, Op.EXP, Op.LOG, Op.TANH, Op.SIGMOID, Op.LOG_SIGMOID, Op.SIN, Op.COS}
    | {Op.ATAN, Op.ERF, Op.ROUND, Op.FLOOR, Op.POW, Op.NOT},
)
POINTWISE = UNARY | COMPARISONS | LOGIC | {Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.MAXIMUM, Op.MINIMUM, Op.WHERE}


class Kind(Enum):
    """What the numbers of a value are; how wide a float is, the backend decides."""

    FLOAT = "float"
    BOOL = "bool"


@dataclass(frozen=True, slots=True)
class Node:
    """One value of width D, and how it comes from earlier ones (``args``, their places in ``Program.nodes``).

    index: which carry, input, row, vector or matrix. transposed: the product is with the matrix's transpose.
    start: the first feature of a slice; the first column of a matrix, once it is transposed, and top its first row.
    inner: a reduction takes features together that are ``inner`` apart, of axes (outer, many, inner) the middle one; a
    broadcast gives what a reduction of that ``inner`` takes.
    features: those that a gather takes, in its order. number: of a constant; the exponent of pow.
    """

    op: Op
    args: tuple[int, ...]
    width: int
    kind: Kind = Kind.FLOAT
    index: int = 0
    start: int = 0
    transposed: bool = False
    number: float = 0.0
    top: int = 0
    features: tuple[int, ...] = ()
    inner: int = 1

    def __str__(self) -> str:
        args = "".join(f" %{arg}" for arg in self.args)
        notes = []
        if self.op in ARRAYS or self.op is Op.MATMUL:
            notes.append(f"index={self.index}")
        if self.start:
            notes.append(f"start={self.start}")
        if self.top:
            notes.append(f"top={self.top}")
        if self.inner != 1:
            notes.append(f"inner={self.inner}")
        if self.features:
            notes.append(f"features={','.join(map(str, self.features))}")
        if self.transposed:
            notes.append("transposed")
        if self.op in (Op.CONST, Op.POW):
            notes.append(f"number={self.number!r}")
        kind = " bool" if self.kind is Kind.BOOL else ""
        return f"{self.op.value}{args}" + (f" [{' '.join(notes)}]" if notes else "") + f" : {self.width}{kind}"


@dataclass(frozen=True, slots=True)
class Program:
    """The body of a time loop.

    carries: the width of each carry (B, D), a float that goes from step to step.
    inputs: of each array (T, B, D) of which a step sees one slice.
    rows: of each array (B, D), constant over time. vectors: of each array (D,), the same for all rows.
    matrices: the shape of each constant matrix.
    outputs: the values kept of each step, each in an array (T, B, D) of its own.
    new: the value that each carry has after the step.
    """

    carries: tuple[int, ...]
    inputs: tuple[int, ...]
    rows: tuple[int, ...]
    vectors: tuple[int, ...]
    matrices: tuple[tuple[int, int], ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    new: tuple[int, ...]

    def __str__(self) -> str:
        widths = [("carry", self.carries), ("input", self.inputs), ("row", self.rows), ("vector", self.vectors)]
        lines = [f"{name} " + " ".join(map(str, each)) for name, each in widths if each]
        if self.matrices:
            lines.append("matrix " + " ".join(f"{rows}x{columns}" for rows, columns in self.matrices))
        lines += [f"%{place} = {node}" for place, node in enumerate(self.nodes)]
        for name, places in (("output", self.outputs), ("new", self.new)):
            if places:
                lines.append(f"{name} " + " ".join(f"%{place}" for place in places))
        return "\n".join(lines) + "\n"

    def uses(self) -> list[list[int]]:
        """For each node, the places of the nodes that read it, one entry for each argument."""
        users: list[list[int]] = [[] for _ in self.nodes]
        for place, node in enumerate(self.nodes):
            for arg in node.args:
                users[arg].append(place)
        return users


_NODE = re.compile(r"%(\d+) = (\w+)((?: %\d+)*)(?: \[([^\]]*)\])? : (\d+)( bool)?")
_OPS = {op.value: op for op in Op}


def parse(text: str) -> Program:
    """The program that a text says. Raises BackendError at the first line that cannot be read."""
    heads: dict[str, tuple[str, ...]] = {}
    nodes: list[Node] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if words[0] in ("carry", "input", "row", "vector", "matrix", "output", "new"):
            heads[words[0]] = tuple(words[1:])
            continue
        found = _NODE.fullmatch(line.strip())
        if found is None or found[2] not in _OPS or int(found[1]) != len(nodes):
            raise BackendError(f"line {number} of a program cannot be read: {line.strip()!r}")
        notes = dict(note.partition("=")[::2] for note in (found[4] or "").split())
        nodes.append(
            Node(
                op=_OPS[found[2]],
                args=tuple(int(arg[1:]) for arg in found[3].split()),
                width=int(found[5]),
                kind=Kind.BOOL if found[6] else Kind.FLOAT,
                index=int(notes.get("index", 0)),
                start=int(notes.get("start", 0)),
                transposed="transposed" in notes,
                number=float(notes.get("number", 0)),
                top=int(notes.get("top", 0)),
                features=tuple(int(each) for each in notes.get("features", "").split(",") if each),
                inner=int(notes.get("inner", 1)),
            )
        )

    def numbers(name: str) -> tuple[int, ...]:
        return tuple(int(word.lstrip("%")) for word in heads.get(name, ()))

    shapes = [shape.split("x") for shape in heads.get("matrix", ())]
    return Program(
        carries=numbers("carry"),
        inputs=numbers("input"),
        rows=numbers("row"),
        vectors=numbers("vector"),
        matrices=tuple((int(rows), int(columns)) for rows, columns in shapes),
        nodes=tuple(nodes),
        outputs=numbers("output"),
        new=numbers("new"),
    )


def renumber(node: Node, places: dict[int, int]) -> Node:
    """The node with its arguments found in ``places``."""
    values = {field.name: getattr(node, field.name) for field in fields(node)}
    return Node(**{**values, "args": tuple(places[arg] for arg in node.args)})


def reachable(program: Program) -> Iterator[int]:
    """The places of the nodes that an output or a new carry needs, in order."""
    needed = set()
    waiting = [*program.outputs, *program.new]
    while waiting:
        place = waiting.pop()
        if place not in needed:
            needed.add(place)
            waiting += program.nodes[place].args
    return iter(sorted(needed))
