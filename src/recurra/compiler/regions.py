"""Grouping: which values are calculated side by side, and which must be kept as whole rows in between.

A region is what one sweep over the features of a row calculates: products, the pointwise arithmetic behind them
and partial reductions, all of one width. Its values live only as long as the sweep is at those features. A product
or a reduction needs whole rows, so what it reads was finished by an earlier region and has a *home* in memory.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from recurra.compiler.ir import LEAVES, POINTWISE, REDUCTIONS, Op, Program


@dataclass(frozen=True, slots=True)
class View:
    """Where a value can be read: features from ``start`` on of a leaf, or of the home of a value.

    splat: the one feature at ``start`` stands for all. features: not neighbours but these, counted from the first.
    """

    place: int
    home: bool
    start: int = 0
    splat: bool = False
    features: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Store:
    """``value`` is written into the home of ``home``, from feature ``start`` on."""

    value: int
    home: int
    start: int


@dataclass(frozen=True, slots=True)
class Region:
    """One sweep over ``width`` features. Every tuple holds places of nodes, in order of calculation."""

    width: int
    products: tuple[int, ...]
    pointwise: tuple[int, ...]
    reductions: tuple[int, ...]
    stores: tuple[Store, ...]


@dataclass(frozen=True)
class Plan:
    """The regions of a program in order of running, and the values that have a home."""

    program: Program
    regions: tuple[Region, ...]
    homes: frozenset[int]

    def view(self, place: int) -> View:
        """Where a region that does not calculate the value reads it."""
        node = self.program.nodes[place]
        if node.op is Op.SLICE:
            inner = self.view(node.args[0])
            if inner.features:
                return _gathered(inner, inner.features[node.start : node.start + node.width])
            return inner if inner.splat else replace(inner, start=inner.start + node.start)
        if node.op is Op.GATHER:
            inner = self.view(node.args[0])
            if inner.features:
                return _gathered(inner, tuple(inner.features[each] for each in node.features))
            return inner if inner.splat else _gathered(inner, tuple(inner.start + each for each in node.features))
        if node.op is Op.BROADCAST:
            return replace(self.view(node.args[0]), splat=True)
        return View(place, home=node.op not in LEAVES)

    def source(self, product: int) -> View:
        """Where a product reads the whole row that it multiplies."""
        place = self.program.nodes[product].args[0]
        return View(place, home=True) if scattered(self.program, place) else self.view(place)

    def __str__(self) -> str:
        lines = []
        for region in self.regions:
            lines.append(f"region of width {region.width}")
            for place in (*region.products, *region.pointwise, *region.reductions):
                lines.append(f"  %{place} = {self.program.nodes[place]}")
            lines += [f"  keep %{each.value} in %{each.home} from {each.start}" for each in region.stores]
        return "\n".join(lines) + "\n"


def _gathered(view: View, features: tuple[int, ...]) -> View:
    """A view with other features; of a single one it starts there."""
    if len(features) == 1:
        return replace(view, start=features[0], features=())
    return replace(view, start=0, features=features)


def scattered(program: Program, place: int) -> bool:
    """Whether the value is nowhere in memory as a row: one number for all features, or features from anywhere."""
    node = program.nodes[place]
    if node.op is Op.SLICE:
        return scattered(program, node.args[0])
    return node.op in (Op.BROADCAST, Op.CONST, Op.GATHER)


def group(program: Program) -> Plan:
    """The regions of a verified program."""
    levels = _Levels(program)
    homes = frozenset(_homes(program, levels))
    members: dict[tuple[int, int], tuple[list[int], list[int], list[int], list[Store]]] = {}

    def region(level: int, width: int) -> tuple[list[int], list[int], list[int], list[Store]]:
        return members.setdefault((level, width), ([], [], [], []))

    def keep(value: int, home: int, start: int) -> None:
        # A join inside a join that nothing else needs is written part by part.
        if program.nodes[value].op is Op.CONCAT:
            at = start
            for part in program.nodes[value].args:
                keep(part, home, at)
                at += program.nodes[part].width
        else:
            region(levels.stored(value), program.nodes[value].width)[3].append(Store(value, home, start))

    for place, node in enumerate(program.nodes):
        if node.op is Op.MATMUL:
            region(levels.of[place], node.width)[0].append(place)
        elif node.op in POINTWISE:
            region(levels.of[place], node.width)[1].append(place)
        elif node.op in REDUCTIONS:
            region(levels.of[place], program.nodes[node.args[0]].width)[2].append(place)
        if place in homes and node.op not in REDUCTIONS:
            keep(place, place, 0)
    regions = []
    for _, width in sorted(members):
        products, pointwise, reductions, stores = members[_, width]
        regions.append(Region(width, tuple(products), tuple(pointwise), tuple(reductions), tuple(stores)))
    return Plan(program, tuple(regions), homes)


class _Levels:
    """When each value is calculated. A region runs after all regions of a lower level."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.of: dict[int, int] = {}
        for place, node in enumerate(program.nodes):
            if node.op is Op.MATMUL:
                self.of[place] = self.whole(node.args[0])
            elif node.op in POINTWISE:
                self.of[place] = max(self.beside(arg) for arg in node.args)
            elif node.op in REDUCTIONS:
                self.of[place] = self.beside(node.args[0])

    def computed(self, place: int) -> bool:
        op = self.program.nodes[place].op
        return op is Op.MATMUL or op in POINTWISE

    def beside(self, place: int) -> int:
        """The first level at which a value of the same width can be calculated from it."""
        return self.of[place] if self.computed(place) else self.elsewhere(place)

    def elsewhere(self, place: int) -> int:
        """The first level at which it can be read from memory, through what only moves features."""
        node = self.program.nodes[place]
        if node.op in LEAVES:
            return 0
        if node.op in (Op.SLICE, Op.GATHER, Op.BROADCAST):
            return self.elsewhere(node.args[0])
        if node.op is Op.CONCAT:
            return max(self.stored(part) for part in node.args) + 1
        return self.of[place] + 1

    def stored(self, place: int) -> int:
        """The first level at which it can be written to a home."""
        node = self.program.nodes[place]
        if node.op is Op.CONCAT:
            return max(self.stored(part) for part in node.args)
        return self.beside(place)

    def whole(self, place: int) -> int:
        """The first level at which a product can read it as one row in memory."""
        return self.stored(place) + 1 if scattered(self.program, place) else self.elsewhere(place)


def _homes(program: Program, levels: _Levels) -> set[int]:
    homes = {*program.outputs, *program.new}
    for place, node in enumerate(program.nodes):
        if node.op is Op.CONCAT:
            homes.add(place)
            continue
        if node.op in REDUCTIONS:
            homes.add(place)
        for arg in node.args:
            sweeps = node.op in POINTWISE | REDUCTIONS
            if levels.computed(arg) and not (sweeps and levels.of[arg] == levels.of[place]):
                homes.add(arg)
            if node.op is Op.MATMUL and scattered(program, arg):
                homes.add(arg)
    return homes
