"""Grouping: which values are calculated side by side, and which must be kept as whole rows in between.

A region is what one sweep over the features of a row calculates: products, the pointwise arithmetic behind them
and partial reductions, all of one width. Its values live only as long as the sweep is at those features. A product
or a reduction needs whole rows, so what it reads was finished by an earlier region and has a *home* in memory.

Where a row has matrices, a region sweeps *stretches*: neighbouring features, as many as the last axis has. Along one
what is broadcast over that axis is one number, and what is broadcast over another one lies as it does in memory.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from recurra.compiler.ir import LEAVES, POINTWISE, REDUCTIONS, Node, Op, Program

# Shorter stretches are not worth a loop of their own, if nothing is reduced along them.
_LEAST = 8


@dataclass(frozen=True, slots=True)
class View:
    """Where a value can be read: features from ``start`` on of a leaf, or of the home of a value.

    splat: the one feature at ``start`` stands for all. features: not neighbours but these, counted from the first.
    many, inner: as many of a middle axis, before the inner one, have the same features.
    """

    place: int
    home: bool
    start: int = 0
    splat: bool = False
    features: tuple[int, ...] = ()
    many: int = 1
    inner: int = 1

    def one_by_one(self, width: int) -> View:
        """The same view of ``width`` features, with each of them named."""
        if self.features or self.splat:
            return self
        block = self.many * self.inner
        features = tuple(each // block * self.inner + each % self.inner for each in range(width))
        return replace(self, features=features, many=1, inner=1)

    def fits(self, stretch: int) -> bool:
        """Whether it is one number, or neighbours, along each stretch of so many features."""
        return not self.features and (self.many == 1 or longest(self.many, self.inner) % stretch == 0)


def longest(many: int, inner: int) -> int:
    """The longest stretches by which (outer, many, inner) is broadcast or reduced over the middle axis."""
    return many if inner == 1 else inner


@dataclass(frozen=True, slots=True)
class Store:
    """``value`` is written into the home of ``home``, from feature ``start`` on."""

    value: int
    home: int
    start: int


@dataclass(frozen=True, slots=True)
class Region:
    """One sweep over ``width`` features, in stretches of ``stretch``. Every tuple holds places of nodes, in order of
    calculation."""

    width: int
    stretch: int
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
            inner = self._plain(node.args[0])
            if inner.features:
                return _gathered(inner, inner.features[node.start : node.start + node.width])
            return inner if inner.splat else replace(inner, start=inner.start + node.start)
        if node.op is Op.GATHER:
            inner = self._plain(node.args[0])
            if inner.features:
                return _gathered(inner, tuple(inner.features[each] for each in node.features))
            return inner if inner.splat else _gathered(inner, tuple(inner.start + each for each in node.features))
        if node.op is Op.BROADCAST:
            source = self.program.nodes[node.args[0]]
            if source.width == 1:
                return replace(self.view(node.args[0]), splat=True)
            inner, many = self._plain(node.args[0]), node.width // source.width
            if not inner.features:
                return inner if inner.splat else replace(inner, many=many, inner=node.inner)
            block = many * node.inner
            features = (inner.features[k // block * node.inner + k % node.inner] for k in range(node.width))
            return _gathered(inner, tuple(features))
        return View(place, home=node.op not in LEAVES)

    def _plain(self, place: int) -> View:
        """The view of a value, without axes."""
        view = self.view(place)
        return view if view.many == 1 else view.one_by_one(self.program.nodes[place].width)

    def source(self, product: int) -> View:
        """Where a product reads the whole row that it multiplies."""
        place = self.program.nodes[product].args[0]
        return View(place, home=True) if scattered(self.program, place) else self.view(place)

    def __str__(self) -> str:
        lines = []
        for region in self.regions:
            parts = f" in stretches of {region.stretch}" if region.stretch < region.width else ""
            lines.append(f"region of width {region.width}{parts}")
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
    stretches, over = _stretches(program)
    levels = _Levels(program, stretches, over)
    homes = frozenset(_homes(program, levels))
    members: dict[tuple[int, int, int], tuple[list[int], list[int], list[int], list[Store]]] = {}

    def region(level: int, place: int, stretch: int) -> tuple[list[int], list[int], list[int], list[Store]]:
        return members.setdefault((level, program.nodes[place].width, stretch), ([], [], [], []))

    def keep(value: int, home: int, start: int) -> None:
        # A join inside a join that nothing else needs is written part by part.
        if program.nodes[value].op is Op.CONCAT:
            at = start
            for part in program.nodes[value].args:
                keep(part, home, at)
                at += program.nodes[part].width
        else:
            region(levels.stored(value), value, stretches[value])[3].append(Store(value, home, start))

    for place, node in enumerate(program.nodes):
        if node.op is Op.MATMUL:
            region(levels.of[place], place, node.width)[0].append(place)
        elif node.op in POINTWISE:
            region(levels.of[place], place, stretches[place])[1].append(place)
        elif node.op in REDUCTIONS:
            region(levels.of[place], node.args[0], over[place])[2].append(place)
        if place in homes and node.op not in REDUCTIONS:
            keep(place, place, 0)
    regions = []
    for level, width, each in sorted(members):
        products, pointwise, reductions, stores = members[level, width, each]
        regions.append(Region(width, each, tuple(products), tuple(pointwise), tuple(reductions), tuple(stores)))
    return Plan(program, tuple(regions), homes)


class _Levels:
    """When each value is calculated. A region runs after all regions of a lower level."""

    def __init__(self, program: Program, stretches: list[int], over: dict[int, int]) -> None:
        self.program, self.stretches = program, stretches
        self.of: dict[int, int] = {}
        for place, node in enumerate(program.nodes):
            if node.op is Op.MATMUL:
                self.of[place] = self.whole(node.args[0])
            elif node.op in POINTWISE:
                self.of[place] = max(self.beside(arg, stretches[place]) for arg in node.args)
            elif node.op in REDUCTIONS:
                self.of[place] = self.beside(node.args[0], over[place])

    def computed(self, place: int) -> bool:
        op = self.program.nodes[place].op
        return op is Op.MATMUL or op in POINTWISE

    def beside(self, place: int, stretch: int) -> int:
        """The first level at which a value of the same width can be calculated from it, in such stretches."""
        here = self.computed(place) and self.stretches[place] == stretch
        return self.of[place] if here else self.elsewhere(place)

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
        return self.beside(place, self.stretches[place])

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


def _stretches(program: Program) -> tuple[list[int], dict[int, int]]:
    """Of each value, the stretches in which it is calculated or written, and of each reduction, those of its sweep.

    They are all features where there are no axes. What is calculated side by side has the same.
    """
    nodes = program.nodes
    together = list(range(len(nodes)))

    def first(place: int) -> int:
        while together[place] != place:
            together[place] = together[together[place]]
            place = together[place]
        return place

    for place, node in enumerate(nodes):
        for arg in node.args if node.op in POINTWISE else ():
            if nodes[arg].op in POINTWISE:
                together[first(arg)] = first(place)
    reduced, seen = ([0] * len(nodes) for _ in range(2))

    def note(lengths: list[int], place: int, wide: Node, narrow: Node, inner: int) -> None:
        if wide.width > narrow.width > 1:
            lengths[first(place)] = gcd(lengths[first(place)], longest(wide.width // narrow.width, inner))

    for place, node in enumerate(nodes):
        if node.op in REDUCTIONS:
            note(reduced, node.args[0], nodes[node.args[0]], node, node.inner)
        if node.op is Op.BROADCAST:
            note(seen, place, node, nodes[node.args[0]], node.inner)
        for arg in node.args if node.op in POINTWISE else ():
            if nodes[arg].op is Op.BROADCAST:
                note(seen, place, nodes[arg], nodes[nodes[arg].args[0]], nodes[arg].inner)

    def stretch(place: int) -> int:
        needed, liked = reduced[first(place)], seen[first(place)]
        both = gcd(needed, liked)
        return both if both >= _LEAST else needed or nodes[place].width

    found = [node.width if node.op is Op.MATMUL else stretch(place) for place, node in enumerate(nodes)]
    return found, {place: stretch(node.args[0]) for place, node in enumerate(nodes) if node.op in REDUCTIONS}
