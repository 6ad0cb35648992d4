"""What every program of the loop IR must be, whatever pass it came from.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from recurra.compiler.ir import COMPARISONS, LEAVES, LOGIC, POINTWISE, REDUCTIONS, UNARY, Kind, Node, Op, Program
from recurra.errors import BackendError

_ARITY = {Op.MATMUL: 1, Op.SLICE: 1, Op.GATHER: 1, Op.BROADCAST: 1, Op.SUM: 1, Op.MAX: 1, Op.WHERE: 3}


def verify(program: Program) -> Program:
    """The program itself, if it is well formed. Raises BackendError with the first node that is not, and why."""
    for place, node in enumerate(program.nodes):
        try:
            _check_node(program, place, node)
        except BackendError as problem:
            raise BackendError(f"malformed program: {problem}, in\n  %{place} = {node}") from None
    try:
        _check_ends(program)
    except BackendError as problem:
        raise BackendError(f"malformed program: {problem}") from None
    return program


def _expect(true: bool, message: str) -> None:
    if not true:
        raise BackendError(message)


def _check_node(program: Program, place: int, node: Node) -> None:
    for arg in node.args:
        _expect(0 <= arg < len(program.nodes), f"%{arg} is not defined")
        _expect(arg < place, f"%{arg} is used before it is defined: a program has no cycles")
    arity = 0 if node.op in LEAVES else _ARITY.get(node.op, 1 if node.op in UNARY else 2)
    if node.op is not Op.CONCAT:
        _expect(len(node.args) == arity, f"{node.op.value} takes {arity} values, got {len(node.args)}")
    _expect(node.width >= 1, f"a value has at least 1 feature, not {node.width}")
    args = [program.nodes[arg] for arg in node.args]
    _check_kinds(node, args)
    _check_widths(program, node, args)


def _check_kinds(node: Node, args: list[Node]) -> None:
    passes_on = node.op in (Op.SLICE, Op.GATHER, Op.CONCAT, Op.BROADCAST)
    for position, arg in enumerate(args):
        if passes_on:
            expected = node.kind
        elif node.op in LOGIC or (node.op is Op.WHERE and position == 0):
            expected = Kind.BOOL
        else:
            expected = Kind.FLOAT
        _expect(arg.kind is expected, f"%{node.args[position]} is {arg.kind.value}, not {expected.value}")
    if not passes_on:
        gives = Kind.BOOL if node.op in COMPARISONS | LOGIC else Kind.FLOAT
        _expect(node.kind is gives, f"{node.op.value} gives a {gives.value}, not a {node.kind.value}")


def _check_widths(program: Program, node: Node, args: list[Node]) -> None:
    declared = {Op.CARRY: "carries", Op.INPUT: "inputs", Op.ROW: "rows", Op.VECTOR: "vectors"}
    if node.op in declared:
        widths = getattr(program, declared[node.op])
        _expect(0 <= node.index < len(widths), f"there is no {node.op.value} {node.index}, only {len(widths)}")
        _same(node, widths[node.index], f"{node.op.value} {node.index}")
    elif node.op is Op.CONST:
        _same(node, 1, "a constant")
    elif node.op is Op.MATMUL:
        _expect(0 <= node.index < len(program.matrices), f"there is no matrix {node.index}")
        shape = program.matrices[node.index]
        rows, columns = shape[::-1] if node.transposed else shape
        bottom = node.top + args[0].width
        _expect(node.top >= 0 and bottom <= rows, f"rows {node.top} to {bottom} of a matrix with {rows}")
        _expect(
            node.start >= 0 and node.start + node.width <= columns,
            f"columns {node.start} to {node.start + node.width} of a matrix with {columns}",
        )
    elif node.op is Op.SLICE:
        stop = node.start + node.width
        _expect(node.start >= 0 and stop <= args[0].width, f"features {node.start} to {stop} of {args[0].width}")
    elif node.op is Op.GATHER:
        _same(node, len(node.features), "what it gathers")
        odd = [each for each in node.features if not 0 <= each < args[0].width]
        _expect(not odd, f"feature {odd[0] if odd else 0} of {args[0].width}")
    elif node.op is Op.CONCAT:
        _expect(bool(args), "concat takes at least 1 value")
        _same(node, sum(arg.width for arg in args), "what it joins")
    elif node.op is Op.BROADCAST:
        _check_axes(node, node.width, args[0].width)
    elif node.op in REDUCTIONS:
        _check_axes(node, args[0].width, node.width)
    elif node.op in POINTWISE:
        for place, arg in zip(node.args, args, strict=True):
            _expect(arg.width == node.width, f"%{place} has width {arg.width}, not {node.width}")


def _check_axes(node: Node, wide: int, narrow: int) -> None:
    fits = node.inner > 0 and wide % narrow == 0 and narrow % node.inner == 0
    _expect(fits, f"{wide} features are no axes (outer, many, {node.inner}) where {narrow} are (outer, {node.inner})")


def _same(node: Node, width: int, what: str) -> None:
    _expect(node.width == width, f"{what} has width {width}, not {node.width}")


def _check_ends(program: Program) -> None:
    for place in (*program.outputs, *program.new):
        _expect(0 <= place < len(program.nodes), f"%{place} is not defined, but is an output or a new carry")
        _expect(program.nodes[place].kind is Kind.FLOAT, f"%{place} is bool: an output or new carry is a float")
    for place in program.outputs:
        _expect(program.outputs.count(place) == 1, f"%{place} is an output twice")
    _expect(
        len(program.new) == len(program.carries),
        f"{len(program.carries)} carries have {len(program.new)} new values",
    )
    for carry, (place, width) in enumerate(zip(program.new, program.carries, strict=True)):
        found = program.nodes[place].width
        _expect(found == width, f"carry {carry} has width {width}, its new value %{place} {found}")
