"""A call of one size, written down: which native function is called on what, and where in that the addresses are of
the tensors and the memory of each call.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod

import numpy as np

from recurra.compiler.block import Block
from recurra.compiler.llvm.kernel import Kernel
from recurra.compiler.llvm.sequence import CALL, MOVE, SECTION, team
from recurra.compiler.places import Place, Value
from recurra.compiler.pool import LEAST

# Bytes between two values in one piece of memory: at multiples of a page they would fall into the same cache lines.
_APART = 320
_LINE = 8
# What a room has, before the workspaces of the loops.
ROOM = "words", "memory", "scratch"


@dataclass(frozen=True)
class Called:
    """A native function and its words: where in them is the address of what, and which count something and begin at
    zero; and how many threads call it."""

    function: int
    words: Sequence[int]
    places: Mapping[int, Place]
    counters: Sequence[int] = ()
    members: int = 1


@dataclass(frozen=True)
class Section:
    """Calls, made so many ``times``: on the steps from ``begin`` on, and each time ``onward`` steps further."""

    calls: Sequence[Called]
    times: int = 1
    begin: int = 0
    onward: int = 0


@dataclass(frozen=True)
class Script:
    """A call of one size: its words, and where in them is the address of what: of memory that ``fixed`` has for all
    calls in the same room, or of tensors (``slots``). ``shapes`` are those of the tensors that it makes, and whether
    they are for the pool, ``results`` which of them are the results, ``block`` what is in the one of all that is kept.
    What nobody sees takes ``scratch`` numbers of the room, or if they are many ``spare`` ones of a tensor behind all
    others. ``steps`` are those of a piece of time."""

    words: np.ndarray
    fixed: tuple[tuple[int, int, int], ...]
    slots: tuple[tuple[int, int, int], ...]
    shapes: tuple[tuple[tuple[int, ...], bool], ...]
    results: tuple[int | None, ...]
    block: Block | None
    loops: tuple[Kernel, ...]
    members: int
    scratch: int
    spare: int
    steps: int


def lay_out(
    sections: Sequence[Section],
    sizes: Sequence[int],
    brief: Set[int],
    results: Sequence[Value | None],
    kept: Sequence[int | None],
    given: int,
    loops: tuple[Kernel, ...],
    itemsize: int,
    steps: int,
) -> Script:
    """The script of these sections. Their values have so many numbers each (``sizes``); those that are ``brief`` have
    memory for one time only, which the next one writes over. ``kept`` has the number of every result that may lie in
    one tensor with others, ``given`` is how many tensors are given."""
    return _Layout(sizes, brief, results, kept, itemsize).script(sections, given, loops, steps)


class _Layout:
    """``places`` has, of each value, in which tensor it is and from which number on; the one behind the tensors of the
    results (``shapes``) is for what nobody sees."""

    def __init__(
        self,
        sizes: Sequence[int],
        brief: Set[int],
        results: Sequence[Value | None],
        kept: Sequence[int | None],
        itemsize: int,
    ) -> None:
        self.sizes, self.brief, self.results, self.kept, self.itemsize = sizes, brief, results, kept, itemsize
        self.places: dict[int, tuple[int, int]] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.block = self.seen()
        self.scratch = self.pack({*range(len(sizes))} - {*self.places}, len(self.shapes))

    def seen(self) -> Block | None:
        """Gives the results their places; gives what is in the one tensor of all that is kept."""
        pairs = [(result, number) for result, number in zip(self.results, self.kept, strict=True) if result is not None]
        alone = [result for result, number in pairs if number is None]
        kept = {number: result for result, number in pairs if number is not None}
        self.shapes += [result.shape for result in alone]
        self.places.update({result.place.index: (k, 0) for k, result in enumerate(alone)})
        if not kept:
            return None
        self.shapes.append((self.pack({result.place.index for result in kept.values()}, len(self.shapes)),))
        begins = {number: self.places[result.place.index][1] for number, result in kept.items()}
        return Block({number: (begins[number] + r.place.skip // self.itemsize, r.shape) for number, r in kept.items()})

    def pack(self, values: set[int], into: int) -> int:
        """Lays values into one tensor, number ``into``, one behind the other; gives its size."""
        size = 0
        for index in sorted(values):
            self.places[index] = into, size
            size += self.sizes[index] + _APART // self.itemsize
            size += -size % (64 // self.itemsize)
        return size

    def script(self, sections: Sequence[Section], given: int, loops: tuple[Kernel, ...], steps: int) -> Script:
        # Large memory is better given back.
        held = self.scratch * self.itemsize < LEAST
        fixed: list[tuple[int, int, int]] = []
        slots: list[tuple[int, int, int]] = []
        words = [len(sections), team(), *[0] * len(sections)]
        body: list[int] = []
        moves: list[list[tuple[int, int, int]]] = []
        # What comes before the words of the calls.
        size = len(words)
        for section in sections:
            moved = [] if section.times == 1 else [*self.moves(section)]
            moves.append(moved)
            size += SECTION + CALL * len(section.calls) + MOVE * len(moved)
        size += -size % _LINE
        for number, (section, moved) in enumerate(zip(sections, moves, strict=True)):
            words[2 + number] = len(words)
            words += [len(section.calls), section.times, len(moved)]
            begin = size + len(body)
            for call in section.calls:
                at = size + len(body)
                fixed.append((len(words) + 1, ROOM.index("words"), at * 8))
                words += [call.function, 0, call.members]
                for word, place in call.places.items():
                    kind, index, skip = self.find(place, section.begin, held, given)
                    (fixed if kind == "room" else slots).append((at + word, index, skip))
                body += [*call.words, *[0] * (-len(call.words) % _LINE)]
            for word, mask, add in moved:
                words += [begin + word, mask, add]
        return Script(
            words=np.array([*words, *[0] * (size - len(words)), *body], np.int64),
            fixed=tuple(fixed),
            slots=tuple(slots),
            shapes=tuple((shape, prod(shape) * self.itemsize >= LEAST) for shape in self.shapes),
            results=tuple(self.end(*each) for each in zip(self.results, self.kept, strict=True)),
            block=self.block,
            loops=loops,
            members=max((call.members for section in sections for call in section.calls), default=1),
            scratch=self.scratch if held else 0,
            spare=0 if held else self.scratch,
            steps=steps,
        )

    def find(self, place: Place, begin: int, held: bool, given: int) -> tuple[str, int, int]:
        """In what a place is, in the room or in tensors, and from which byte on where the steps do from ``begin``."""
        kind, index, skip = place.kind, place.index, place.skip + begin * self.step(place)
        if kind != "value":
            return kind, index, skip
        index, first = self.places[index]
        skip += first * self.itemsize
        if held and index == len(self.shapes):
            return "room", ROOM.index("scratch"), skip
        return kind, given + index, skip

    def step(self, place: Place) -> int:
        """How many bytes it is from one step to the next."""
        return 0 if place.kind == "value" and place.index in self.brief else place.step

    def moves(self, section: Section) -> list[tuple[int, int, int]]:
        """What becomes of the section's words from one time to the next: which is kept or not, and what is added."""
        found, at = [], 0
        for call in section.calls:
            found += [(at + word, 0, 0) for word in call.counters]
            steps = ((word, self.step(place)) for word, place in call.places.items())
            found += [(at + word, -1, step * section.onward) for word, step in steps if step]
            at += len(call.words) + -len(call.words) % _LINE
        return found

    def end(self, result: Value | None, number: int | None) -> int | None:
        """In which tensor a result is; None for what is in the one of another."""
        if result is None or (self.block is not None and number in self.block.parts and number != self.block.first):
            return None
        return self.places[result.place.index][0]
