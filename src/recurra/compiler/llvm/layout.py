"""Where everything lies: the table of pointers, the scratch memory of a row, the panels of packed weights.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recurra.compiler.ir import REDUCTIONS, Program
from recurra.compiler.llvm.code import Floats
from recurra.compiler.operands import Array
from recurra.compiler.regions import Plan, Region, View


@dataclass(frozen=True)
class Group:
    """Products of one source that are calculated together, and their panel of packed weights.

    The panel is (steps, rows of the matrix, products, vectors of a step, lanes): what one tile reads lies in the
    order in which it is read. The last step may have fewer vectors.
    """

    source: View
    products: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class Sweep:
    """How a region is swept: ``stride`` vectors at a time, tiles of up to ``rows`` rows."""

    region: Region
    groups: tuple[Group, ...]
    vectors: int
    stride: int
    rows: int


class Layout:
    """Numbers that the generated code and its caller must agree on."""

    def __init__(self, plan: Plan, floats: Floats) -> None:
        self.plan, self.program, self.lanes = plan, plan.program, floats.lanes
        program = plan.program
        self.sweeps = tuple(_sweep(plan, region, floats) for region in plan.regions)
        self.groups = tuple(group for sweep in self.sweeps for group in sweep.groups)
        names: list[tuple[str, int]] = []
        for name, count in (
            ("input", len(program.inputs)),
            ("row", len(program.rows)),
            ("vector", len(program.vectors)),
            ("state", len(program.carries)),
            ("fresh", len(program.carries)),
            ("output", len(program.outputs)),
            ("panel", len(self.groups)),
            ("lengths", 1),
            ("resets", 1),
            ("active", 1),
            ("scratch", 1),
        ):
            names += [(name, index) for index in range(count)]
        self.entries = {name: index for index, name in enumerate(names)}
        # Scratch memory is one array (B, stride) for each of these, one after another.
        self.slots: dict[tuple[str, int], tuple[int, int]] = {}
        self.scratch = 0
        for carry, width in enumerate(program.carries):
            self._slot("old", carry, width, floats)
        for place in sorted(plan.homes):
            if place not in program.outputs:
                self._slot("home", place, program.nodes[place].width, floats)
        for place, node in enumerate(program.nodes):
            if node.op in REDUCTIONS:
                self._slot("partial", place, floats.lanes, floats)

    def _slot(self, kind: str, index: int, width: int, floats: Floats) -> None:
        # Rows a multiple of a kilobyte apart would fall into the same few cache lines.
        stride = width if (width * floats.bytes) % 1024 else width + 64 // floats.bytes
        self.slots[kind, index] = (self.scratch, stride)
        self.scratch += stride


def _sweep(plan: Plan, region: Region, floats: Floats) -> Sweep:
    most = 4 if floats.registers == 32 else 2
    vectors = -(-region.width // floats.lanes)
    by_source: dict[View, list[int]] = {}
    for product in region.products:
        by_source.setdefault(plan.source(product), []).append(product)
    groups = []
    for source, products in by_source.items():
        count = -(-len(products) // most)
        for part in range(count):
            chosen = products[part * len(products) // count : (part + 1) * len(products) // count]
            first = plan.program.nodes[chosen[0]]
            groups.append(Group(source, tuple(chosen), plan.program.nodes[first.args[0]].width))
    stride = min(vectors, most // max((len(group.products) for group in groups), default=most))
    rows = min((tile_rows(len(group.products) * stride, floats) for group in groups), default=1)
    return Sweep(region, tuple(groups), vectors, stride, rows)


def tile_rows(columns: int, floats: Floats) -> int:
    """How many rows of ``columns`` accumulators the registers hold, beside the weights."""
    return min(8, (floats.registers - columns - 2) // columns)


def panel_size(sweep: Sweep, group: Group, lanes: int) -> int:
    """How many numbers the panel of a group has."""
    return sweep.vectors * lanes * group.length * len(group.products)


def pack(program: Program, sweep: Sweep, group: Group, lanes: int, matrices: Sequence[Array], panel: Array) -> None:
    """Fills the panel of a group, flat; columns beyond the matrix are zero."""
    whole = sweep.region.width // lanes
    rest = sweep.region.width % lanes
    steps = sweep.vectors // sweep.stride
    count, length = len(group.products), group.length
    # Whole steps, then the last one with fewer vectors.
    split = steps * length * count * sweep.stride * lanes
    first = panel[:split].reshape(steps, length, count, sweep.stride, lanes)
    last = panel[split:].reshape(length, count, sweep.vectors - steps * sweep.stride, lanes)
    for column, product in enumerate(group.products):
        node = program.nodes[product]
        matrix = matrices[node.index].T if node.transposed else matrices[node.index]
        matrix = matrix[:, node.start : node.start + node.width]
        tail = np.zeros((length, lanes), panel.dtype)
        tail[:, :rest] = matrix[:, whole * lanes :]
        for step in range(steps):
            for vector in range(sweep.stride):
                _fill(first[step, :, column, vector], matrix, tail, step * sweep.stride + vector)
        for vector in range(last.shape[2]):
            _fill(last[:, column, vector], matrix, tail, steps * sweep.stride + vector)


def _fill(target: Array, matrix: Array, tail: Array, vector: int) -> None:
    lanes = target.shape[1]
    columns = matrix[:, vector * lanes : (vector + 1) * lanes]
    target[...] = columns if columns.shape[1] == lanes else tail
