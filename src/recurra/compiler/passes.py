"""Passes over programs of the loop IR. Each gives an equal program; the verifier runs after each.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from recurra.compiler.interpret import FUNCTIONS
from recurra.compiler.ir import POINTWISE, REDUCTIONS, Kind, Node, Op, Program, reachable, renumber
from recurra.compiler.verify import verify


def optimise(program: Program) -> Program:
    """The program with nothing in it twice or for nothing, and its slices as early as they can be."""
    verify(program)
    while True:
        before = program
        for apply in (simplify, share, drop_dead, sink_slices):
            program = verify(apply(program))
        if program == before:
            return program


class _Rewriter:
    """A new program, written from the nodes of an old one in order."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[Node] = []
        self.places: dict[int, int] = {}

    def add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def run(self, rewrite: Callable[[Node], int]) -> Program:
        for place, node in enumerate(self.program.nodes):
            self.places[place] = rewrite(renumber(node, self.places))
        outputs: list[int] = []
        for place in (self.places[each] for each in self.program.outputs):
            # An output that has become equal to another one keeps a node of its own.
            twin = place in outputs
            outputs.append(self.add(Node(Op.SLICE, (place,), self.nodes[place].width)) if twin else place)
        return replace(
            self.program,
            nodes=tuple(self.nodes),
            outputs=tuple(outputs),
            new=tuple(self.places[place] for place in self.program.new),
        )


def drop_dead(program: Program) -> Program:
    """Without the nodes that no output and no new carry needs. What is declared stays declared."""
    kept = list(reachable(program))
    places = {old: new for new, old in enumerate(kept)}
    return replace(
        program,
        nodes=tuple(renumber(program.nodes[place], places) for place in kept),
        outputs=tuple(places[place] for place in program.outputs),
        new=tuple(places[place] for place in program.new),
    )


def drop_unused(program: Program) -> tuple[Program, dict[str, list[int]]]:
    """Without the inputs, rows, vectors and matrices that nothing reads; and of each kind, the numbers of the rest."""
    ops = {"input": Op.INPUT, "row": Op.ROW, "vector": Op.VECTOR, "matrix": Op.MATMUL}
    used = {kind: sorted({node.index for node in program.nodes if node.op is op}) for kind, op in ops.items()}
    at = {(op, old): new for kind, op in ops.items() for new, old in enumerate(used[kind])}
    return replace(
        program,
        inputs=tuple(program.inputs[k] for k in used["input"]),
        rows=tuple(program.rows[k] for k in used["row"]),
        vectors=tuple(program.vectors[k] for k in used["vector"]),
        matrices=tuple(program.matrices[k] for k in used["matrix"]),
        nodes=tuple(replace(node, index=at.get((node.op, node.index), node.index)) for node in program.nodes),
    ), used


def share(program: Program) -> Program:
    """Without common subexpressions."""
    rewriter = _Rewriter(program)
    known: dict[object, int] = {}

    def rewrite(node: Node) -> int:
        # 0.0 == -0.0, and NaN is not even itself.
        key = (replace(node, number=0.0), np.float64(node.number).tobytes())
        if key not in known:
            known[key] = rewriter.add(node)
        return known[key]

    return rewriter.run(rewrite)


def simplify(program: Program) -> Program:
    """Constants folded; what is the same for all features calculated once; slices of slices and the like undone."""
    rewriter = _Rewriter(program)
    nodes = rewriter.nodes
    outputs = set(program.outputs)
    place = -1

    def rewrite(node: Node) -> int:
        nonlocal place
        place += 1
        args = [nodes[arg] for arg in node.args]
        if node.op is Op.SLICE:
            # An output that is a whole value again stands apart from it; _Rewriter made it so.
            if node.width == args[0].width:
                return rewriter.add(node) if place in outputs else node.args[0]
            return _slice(rewriter, node.args[0], node.start, node.width)
        if node.op is Op.GATHER:
            return _gather(rewriter, node.args[0], node.features)
        if node.op is Op.BROADCAST or node.op in REDUCTIONS:
            if node.width == args[0].width:
                return node.args[0]
            if node.op is Op.BROADCAST and _is_one_number(rewriter, node.args[0]):
                return rewriter.add(replace(node, args=args[0].args, inner=1))
        if node.op is Op.CONCAT and len(args) == 1:
            return node.args[0]
        if node.op in POINTWISE:
            return _pointwise(rewriter, node, args)
        return rewriter.add(node)

    return rewriter.run(rewrite)


def _slice(rewriter: _Rewriter, place: int, start: int, width: int) -> int:
    """``width`` features of a value, reaching through what only moves features."""
    source = rewriter.nodes[place]
    if (start, width) == (0, source.width):
        return place
    if source.op is Op.SLICE:
        return _slice(rewriter, source.args[0], source.start + start, width)
    if source.op is Op.GATHER:
        return _gather(rewriter, source.args[0], source.features[start : start + width])
    if source.op is Op.BROADCAST:
        if _is_one_number(rewriter, place):
            return rewriter.add(replace(source, width=width)) if width > 1 else source.args[0]
        block = source.inner * (source.width // rewriter.nodes[source.args[0]].width)
        if start % block == width % block == 0:
            first, count = (number // block * source.inner for number in (start, width))
            return rewriter.add(replace(source, args=(_slice(rewriter, source.args[0], first, count),), width=width))
        inner, offset = start // block * source.inner, start % source.inner
        if offset + width <= source.inner:
            return _slice(rewriter, source.args[0], inner + offset, width)
    if source.op is Op.CONCAT:
        parts, at = [], 0
        for part in source.args:
            size = rewriter.nodes[part].width
            low, high = max(start - at, 0), min(start + width - at, size)
            if low < high:
                parts.append(_slice(rewriter, part, low, high - low))
            at += size
        return parts[0] if len(parts) == 1 else rewriter.add(Node(Op.CONCAT, tuple(parts), width, source.kind))
    return rewriter.add(Node(Op.SLICE, (place,), width, source.kind, start=start))


def _gather(rewriter: _Rewriter, place: int, features: tuple[int, ...]) -> int:
    """These features of a value, reaching through what only moves features."""
    source, first, width = rewriter.nodes[place], features[0], len(features)
    if features == tuple(range(first, first + width)):
        return _slice(rewriter, place, first, width)
    if len(set(features)) == 1:
        return rewriter.add(Node(Op.BROADCAST, (_slice(rewriter, place, first, 1),), width, source.kind))
    if source.op is Op.BROADCAST:
        block, inner = source.inner * (source.width // rewriter.nodes[source.args[0]].width), source.inner
        return _gather(rewriter, source.args[0], tuple(each // block * inner + each % inner for each in features))
    if source.op is Op.SLICE:
        return _gather(rewriter, source.args[0], tuple(source.start + each for each in features))
    if source.op is Op.GATHER:
        return _gather(rewriter, source.args[0], tuple(source.features[each] for each in features))
    if source.op is Op.CONCAT:
        at = 0
        for part in source.args:
            size = rewriter.nodes[part].width
            if at <= min(features) and max(features) < at + size:
                return _gather(rewriter, part, tuple(each - at for each in features))
            at += size
    return rewriter.add(Node(Op.GATHER, (place,), width, source.kind, features=features))


def _pointwise(rewriter: _Rewriter, node: Node, args: list[Node]) -> int:
    if node.width > 1 and all(arg.op is Op.BROADCAST for arg in args):
        # One number is broadcast in every way.
        ways = {(rewriter.nodes[arg.args[0]].width, arg.inner) for arg in args} - {(1, 1)} or {(1, 1)}
        if len(ways) == 1:
            ((width, inner),) = ways
            narrow = tuple(_widened(rewriter, arg.args[0], width) for arg in args)
            found = rewriter.add(replace(node, args=narrow, width=width))
            return rewriter.add(Node(Op.BROADCAST, (found,), node.width, node.kind, inner=inner))
    if node.kind is Kind.FLOAT and node.op is not Op.WHERE and all(arg.op is Op.CONST for arg in args):
        numbers = [np.float64(arg.number) for arg in args]
        with np.errstate(all="ignore"):
            folded = np.power(numbers[0], node.number) if node.op is Op.POW else FUNCTIONS[node.op](*numbers)
        return rewriter.add(Node(Op.CONST, (), 1, number=float(folded)))
    if node.op is Op.NEG and args[0].op is Op.NEG:
        return args[0].args[0]
    if node.op in (Op.MUL, Op.DIV) and _is_one(rewriter, node.args[1]):
        return node.args[0]
    if node.op is Op.MUL and _is_one(rewriter, node.args[0]):
        return node.args[1]
    return rewriter.add(node)


def _is_one_number(rewriter: _Rewriter, place: int) -> bool:
    """Whether a value is a broadcast of a single number."""
    node = rewriter.nodes[place]
    return node.op is Op.BROADCAST and rewriter.nodes[node.args[0]].width == 1


def _is_one(rewriter: _Rewriter, place: int) -> bool:
    node = rewriter.nodes[place]
    if node.op is Op.BROADCAST:
        node = rewriter.nodes[node.args[0]]
    return node.op is Op.CONST and node.number == 1.0


def sink_slices(program: Program) -> Program:
    """Slices moved before what is calculated, where nothing needs the whole.

    The product of a state with the gates' matrix, (B, 4 H), becomes four products with a quarter of its
    columns, and the gates of one hidden unit can be calculated side by side.
    """
    users = program.uses()
    ends = {*program.outputs, *program.new}
    cut = {
        place
        for place, node in enumerate(program.nodes)
        if (node.op in POINTWISE or node.op is Op.MATMUL)
        and place not in ends
        and users[place]
        and all(program.nodes[user].op is Op.SLICE for user in users[place])
        and sum(program.nodes[user].width for user in users[place]) <= node.width
    }
    rewriter = _Rewriter(program)

    def rewrite(node: Node) -> int:
        if node.op is not Op.SLICE or node.args[0] not in cut_now:
            return rewriter.add(node)
        whole = rewriter.nodes[node.args[0]]
        if whole.op is Op.MATMUL:
            return rewriter.add(replace(whole, width=node.width, start=whole.start + node.start))
        args = tuple(_slice(rewriter, arg, node.start, node.width) for arg in whole.args)
        args = tuple(_widened(rewriter, arg, node.width) for arg in args)
        return rewriter.add(replace(whole, args=args, width=node.width))

    # Places move while nodes are added; the cut ones are followed as they are written.
    cut_now: set[int] = set()
    place = -1

    def follow(node: Node) -> int:
        nonlocal place
        place += 1
        written = rewrite(node)
        if place in cut:
            cut_now.add(written)
        return written

    return rewriter.run(follow)


def _widened(rewriter: _Rewriter, place: int, width: int) -> int:
    node = rewriter.nodes[place]
    if node.width == width:
        return place
    return rewriter.add(Node(Op.BROADCAST, (place,), width, node.kind))
