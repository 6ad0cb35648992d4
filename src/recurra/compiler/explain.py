"""What a plan runs when, in words and figures: the operations of each stage with the user's lines, what they cost,
what became of each loop.

Figures are for one row and one step. A product of m x k with k x n counts 2 * m * k * n FLOPs, any other operation one
for each number that it gives, or, where it gives fewer than it takes, that it takes. What only moves numbers about
counts none.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, fx

from recurra.compiler import layout
from recurra.compiler.cost import flops, is_free, numbers
from recurra.compiler.linear import is_linear_recurrence
from recurra.compiler.lines import line_near, name_of
from recurra.compiler.listing import TITLES, is_part
from recurra.compiler.native import NativeLoop
from recurra.compiler.plan import Pass, Plan
from recurra.compiler.schedule import BATCHED, LOOP, ONCE, SUMMED
from recurra.compiler.stages import ROWS, Compiled
from recurra.compiler.trace import SIZES


@dataclass(frozen=True)
class Operation:
    """A node of a step. ``line`` is ``file:line`` of the user's code; an operation of the backward step has that of
    the forward one that it belongs to. ``moves``: it only says anew how numbers lie in memory."""

    name: str
    line: str
    flops: int
    moves: bool = False


@dataclass(frozen=True)
class Row:
    """A stage. ``direction`` is "forward" or "backward", ``kind`` "once", "batched", "loop" or "summed".

    ``flops`` and ``stored``, the bytes kept for the backward pass, are for one row and step, ``flops_once`` for a whole
    sequence of one row. ``weights`` are the bytes of the parameters, buffers and context that it reads, ``reads`` their
    names. Of a loop: what it ``carries``; whether it is ``native``, and where its ``code`` came from; whether it is a
    ``linear`` recurrence, h = a * h + b with a and b from outside, feature by feature; ``fused``, those of its
    operations that the carry does not need, and that it has taken over from other stages; why native code was
    ``refused``, where it was asked for.
    """

    direction: str
    kind: str
    operations: tuple[Operation, ...]
    flops: int
    flops_once: int
    weights: int
    stored: int
    reads: tuple[str, ...]
    carries: tuple[str, ...] = ()
    native: bool = False
    code: str = ""
    linear: bool = False
    fused: tuple[Operation, ...] = ()
    refused: str = ""

    @property
    def title(self) -> str:
        """The stage in words."""
        return TITLES[self.kind] if self.kind != LOOP else f"step by step, carrying {', '.join(self.carries)}"


@dataclass(frozen=True)
class Details:
    """All stages of a plan. ``schedule`` has every operation; ``weights`` are the bytes of all that they read."""

    rows: tuple[Row, ...]
    schedule: str
    weights: int
    memory: str

    def __str__(self) -> str:
        return layout.table(self)

    def picture(self, path: str | Path) -> None:
        """Write the stages as an SVG."""
        from recurra.compiler.picture import draw

        draw(self, Path(path))


def details(plan: Plan) -> Details:
    """What there is to say about a plan."""
    writer = _Rows(plan)
    rows = [*writer.rows("forward", plan.ahead), *writer.rows("backward", plan.back)]
    names = {name for row in rows for name in row.reads}
    weights = sum(writer.bytes_of[name] for name in names)
    return Details(tuple(rows), str(plan), weights, plan.memory)


class _Rows:
    """Writes the rows of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.step, self.analysis = plan, plan.step, plan.analysis
        self.names = {node: name for name, node in self.step.weights.items()}
        self.names |= {node: node.name for node in self.step.context if self.analysis.rows[node] is None}
        self.names |= {node: node.name for node in self.step.constants}
        self.bytes_of = {name: numbers(node, "val") * _itemsize(node) for node, name in self.names.items()}
        self.forms = dict.fromkeys(self.analysis.varying, ROWS)

    def rows(self, direction: str, part: Pass) -> list[Row]:
        return [self._row(direction, compiled, part) for compiled in part.stages]

    def _row(self, direction: str, compiled: Compiled, part: Pass) -> Row:
        stage = compiled.stage
        self.forms.update(compiled.forms)
        nodes = _upstream(compiled.outputs, stage.nodes)
        sunk = compiled.native.lowered.sunk if isinstance(compiled.native, NativeLoop) else ()
        every = [*sunk, *nodes]
        operations = [self._operation(node, stage.kind) for node in every if not is_part(node)]
        if stage.kind == SUMMED:
            summed = [node for node in compiled.inputs if self.forms.get(node) == ROWS]
            total = sum(_at_one(numbers(node, "val"), numbers(node, "other"))[0] for node in summed)
            operations[:0] = [Operation("sum over time", "", total)] if total else []
        by_step = stage.kind in (LOOP, BATCHED)
        once = 0 if by_step else sum(self._flops(node, stage.kind) for node in every)
        reads = self._reads(every, stage.kind)
        row = Row(
            direction=direction,
            kind=stage.kind,
            operations=tuple(operations),
            flops=sum(each.flops for each in operations) - once,
            flops_once=once,
            weights=sum(self.bytes_of[name] for name in reads),
            stored=self._stored(nodes, compiled, part) if direction == "forward" else 0,
            reads=tuple(reads),
        )
        if stage.kind != LOOP:
            return row
        pairs = [part.carries[k] for k in stage.carries]
        needed = _upstream([new for _, new in pairs], stage.nodes)
        fused = [node for node in every if node not in needed and not is_part(node)]
        return replace(
            row,
            carries=tuple(old.name for old, _ in pairs),
            native=compiled.native is not None,
            code=_code(compiled),
            linear=len(pairs) == 1 and is_linear_recurrence(*pairs[0], needed),
            fused=tuple(self._operation(node, LOOP) for node in fused if compiled.native is not None),
            refused=compiled.refused,
        )

    def _operation(self, node: fx.Node, kind: str) -> Operation:
        return Operation(name_of(node), line_near(node), self._flops(node, kind), is_free(node))

    def _flops(self, node: fx.Node, kind: str) -> int:
        if is_part(node):
            return 0
        by_row, fixed = _at_one(flops(node, "val"), flops(node, "other"))
        return by_row if kind in (LOOP, BATCHED) else by_row + fixed

    def _reads(self, nodes: Iterable[fx.Node], kind: str) -> list[str]:
        """The names of the weights that a stage reads, also through what is calculated once."""
        found: dict[str, None] = {}
        todo = [n for node in nodes if kind != ONCE or not is_free(node) for n in node.all_input_nodes]
        seen: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.names:
                found[self.names[node]] = None
            elif node not in self.analysis.varying and node not in self.analysis.linear:
                todo += node.all_input_nodes
        return [name for name in self.names.values() if name in found]

    def _stored(self, nodes: Sequence[fx.Node], compiled: Compiled, part: Pass) -> int:
        if self.plan.memory == "sqrt":
            return 0
        mine = [node for node in self.plan.saved if node in nodes]
        for k in compiled.stage.carries:
            old, new = part.carries[k]
            # In native code an old carry is the new one of the step before, in the same memory.
            if old in self.plan.saved and not (compiled.native is not None and new in mine):
                mine.append(old)
        return sum(_at_one(numbers(n, "val"), numbers(n, "other"))[0] * _itemsize(n) for n in mine)


def _at_one(small: int, large: int) -> tuple[int, int]:
    """Of a figure at both sizes of a trace: how much of it is for each row, and how much for none."""
    by_row = (large - small) // (SIZES[1] - SIZES[0])
    return by_row, small - by_row * SIZES[0]


def _upstream(ends: Iterable[fx.Node], nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of ``nodes`` that the ends are calculated from, in order."""
    found = set(ends)
    for node in reversed(nodes):
        if node in found:
            found.update(node.all_input_nodes)
    return [node for node in nodes if node in found]


def _itemsize(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.element_size() if isinstance(value, Tensor) else 0


def _code(compiled: Compiled) -> str:
    if not isinstance(compiled.native, NativeLoop):
        return ""
    found = []
    for kernel in compiled.native.kernels:
        where = "from the cache" if kernel.compiled.found else "built"
        found.append(f"{where}; {kernel.compiled.remark}" if kernel.compiled.remark else where)
    return "; ".join(dict.fromkeys(found)) or "to be built at the first call"
