"""Where everything lies: the table of words, the memory of a row, the panels of packed weights.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm

from recurra.compiler.ir import Program
from recurra.compiler.llvm.code import Floats
from recurra.compiler.regions import Plan, Region, View

# Rows of a matrix that are packed together: their pages are few enough to be known to the machine all at once.
BLOCK = 16
# Bytes of a cache line.
_LINE = 64
# Into how many steps a sweep of matrices is cut at least, if it can be.
_STEPS = 8


@dataclass(frozen=True)
class Group:
    """Products of one source that are calculated together, and their panel of packed weights.

    The panel is (steps, rows of the matrix, products, vectors of a step, lanes): what one tile reads lies in the
    order in which it is read. The last step may have fewer vectors. ``offset`` is where it begins among all panels.
    """

    source: View
    products: tuple[int, ...]
    length: int
    offset: int


@dataclass(frozen=True)
class Sweep:
    """How a region is swept: in steps of ``stride`` vectors, and in tiles of up to ``rows`` rows.

    Where it has stretches, they have ``vectors``. Blocks of ``period`` stretches are cut into ``chunks``, which are the
    steps. ``finished`` are the reductions that are not done when all steps are.
    """

    region: Region
    groups: tuple[Group, ...]
    vectors: int
    lanes: int
    stride: int
    rows: int
    finished: tuple[int, ...] = ()
    period: int = 0
    chunks: int = 0

    @property
    def steps(self) -> int:
        if self.chunks:
            return self.region.width // self.region.stretch // self.period * self.chunks
        return -(-self.vectors // self.stride)

    def partial(self, place: int, program: Program) -> int:
        """How many partial numbers a reduction has in each row."""
        node, lanes = program.nodes[place], self.lanes
        if not self.chunks:
            return self.steps * lanes
        if node.inner == 1:
            return self.region.width // self.region.stretch
        return self.steps * (self.period // (self.region.width // node.width)) * self.vectors * lanes


@dataclass(frozen=True)
class Chain:
    """What is done a row at a time: reductions of the sweep before are finished, then ``sweeps`` follow one another."""

    before: Sweep | None
    sweeps: tuple[Sweep, ...]


def stages_of(sweeps: Sequence[Sweep]) -> tuple[Sweep | Chain, ...]:
    """What is done with all rows before anything else is, in order.

    A single sweep without products or reductions is no chain: its steps can be shared among more threads.
    """
    found: list[Sweep | Chain] = []
    for sweep in sweeps:
        last = found[-1] if found else None
        if sweep.groups or sweep.chunks:
            found.append(sweep)
            if sweep.finished:
                found.append(Chain(sweep, ()))
        elif isinstance(last, Chain):
            found[-1] = replace(last, sweeps=(*last.sweeps, sweep))
        else:
            found.append(Chain(None, (sweep,)))

    def alone(stage: Sweep | Chain) -> Sweep | Chain:
        if isinstance(stage, Sweep) or stage.before or len(stage.sweeps) > 1 or stage.sweeps[0].region.reductions:
            return stage
        return stage.sweeps[0]

    return tuple(map(alone, found))


class Layout:
    """Numbers that the generated code and its caller must agree on."""

    def __init__(self, plan: Plan, floats: Floats) -> None:
        self.plan, self.program, self.lanes = plan, plan.program, floats.lanes
        program = plan.program
        self.panels = 0
        self.sweeps = tuple(self._sweep(region, floats) for region in plan.regions)
        self.stages = stages_of(self.sweeps)
        names: list[tuple[str, int]] = []
        for name, count in (
            ("input", len(program.inputs)),
            ("row", len(program.rows)),
            ("vector", len(program.vectors)),
            ("matrix", len(program.matrices)),
            ("matrix_stride", len(program.matrices)),
            ("state", len(program.carries)),
            ("fresh", len(program.carries)),
            ("output", len(program.outputs)),
            ("lengths", 1),
            ("resets", 1),
            ("panels", 1),
            ("scratch", 1),
            ("work", 1),
        ):
            names += [(name, index) for index in range(count)]
        self.entries = {name: index for index, name in enumerate(names)}
        # Each row has a piece of the scratch memory, with a place for each of these: where it begins, and its size. So
        # all that a thread writes lies together, and of what lies behind it, which the machine reads in advance, little
        # is another thread's. What a carry becomes has two places, of odd and of even steps, for it is written while
        # the one before is read.
        self.slots: dict[tuple[str, int], tuple[int, int]] = {}
        self.scratch = 0
        for place in sorted(plan.homes):
            if place not in program.outputs:
                self._slot("home", place, program.nodes[place].width, floats, 2 if place in program.new else 1)
        # What a chain reduces it finishes itself.
        for sweep in (stage for stage in self.stages if isinstance(stage, Sweep)):
            for place in sweep.region.reductions:
                self._slot("partial", place, sweep.partial(place, program), floats)
        # Rows a multiple of a kilobyte apart would fall into the same few cache lines.
        self.scratch += _LINE // floats.bytes if self.scratch * floats.bytes % 1024 == 0 else 0

    def _slot(self, kind: str, index: int, width: int, floats: Floats, copies: int = 1) -> None:
        # Two threads that write the same cache line wait for one another.
        line = _LINE // floats.bytes
        stride = -(-width // line) * line
        self.slots[kind, index] = (self.scratch, stride)
        self.scratch += copies * stride

    def _sweep(self, region: Region, floats: Floats) -> Sweep:
        most = 4 if floats.registers == 32 else 2
        if region.stretch < region.width:
            return self._stretches(region, floats)
        vectors = -(-region.width // floats.lanes)
        by_source: dict[View, list[int]] = {}
        for product in region.products:
            by_source.setdefault(self.plan.source(product), []).append(product)
        groups = []
        for source, products in by_source.items():
            count = -(-len(products) // most)
            for part in range(count):
                chosen = products[part * len(products) // count : (part + 1) * len(products) // count]
                first = self.program.nodes[chosen[0]]
                length = self.program.nodes[first.args[0]].width
                groups.append(Group(source, tuple(chosen), length, self.panels))
                self.panels += vectors * floats.lanes * length * len(chosen)
        # Steps of nearly equal width: 5 vectors are 3 and 2, not 4 and 1.
        widest = most // max((len(group.products) for group in groups), default=1)
        stride = -(-vectors // -(-vectors // widest))
        rows = min((tile_rows(len(group.products) * stride, floats) for group in groups), default=1)
        return Sweep(region, tuple(groups), vectors, floats.lanes, stride, rows, region.reductions)

    def _stretches(self, region: Region, floats: Floats) -> Sweep:
        stretch, count = region.stretch, region.width // region.stretch
        nodes = self.program.nodes
        over = [place for place in region.reductions if nodes[place].inner > 1]
        period = lcm(*(region.width // nodes[k].width * nodes[k].inner // stretch for k in over)) if over else count
        chunks = min(period, -(-_STEPS // (count // period)))
        finished = [k for k in region.reductions if k in over or region.width // nodes[k].width > stretch]
        vectors = -(-stretch // floats.lanes)
        return Sweep(region, (), vectors, floats.lanes, 1, 1, tuple(finished), period, chunks)

    @cached_property
    def pieces(self) -> tuple[tuple[Sweep, Group, bool, int], ...]:
        """The groups, whether each is packed step by step, and into how many pieces: steps, or blocks of rows.

        The columns of a step are rows of a turned matrix, which are read from end to end.
        """
        found = []
        for sweep in self.sweeps:
            for group in sweep.groups:
                turned = all(self.program.nodes[place].transposed for place in group.products)
                found.append((sweep, group, turned, sweep.steps if turned else -(-group.length // BLOCK)))
        return tuple(found)

    @property
    def units(self) -> int:
        """How many pieces of packing there are."""
        return sum(count for *_, count in self.pieces)

    @property
    def work(self) -> int:
        """How many words of its own a thread needs for each row: whether it is active, and where its carries are."""
        return 1 + len(self.program.carries)


def tile_rows(columns: int, floats: Floats) -> int:
    """How many rows of ``columns`` accumulators the registers hold, beside the weights."""
    return min(8, (floats.registers - columns - 2) // columns)
