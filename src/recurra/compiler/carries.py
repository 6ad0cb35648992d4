"""Which values of a graph are carried into which: the one thing that says what must wait for the step before.

Pure graph code. A node is anything hashable; nothing here knows tensors, time or a device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Node = TypeVar("Node", bound=Hashable)


@dataclass(frozen=True)
class Carries(Generic[Node]):
    """Sets of carries as bits of an int: carry ``k`` is ``1 << k``.

    ``depends[node]``: the carries whose old value the node is computed from. ``feeds[node]``: the carries whose new
    value is computed from it. ``components``: the carries that need one another, each component after those that
    it needs.
    """

    depends: dict[Node, int]
    feeds: dict[Node, int]
    components: tuple[int, ...]

    def loop_of(self, node: Node) -> int | None:
        """The component in whose loop a node must run: it depends on it, and feeds it. None for all others."""
        return next((c for c in self.components if self.depends[node] & c and self.feeds[node] & c), None)


def find_carries(
    order: Sequence[Node],
    operands: Callable[[Node], Iterable[Node]],
    carries: Sequence[tuple[Node, Node]],
) -> Carries[Node]:
    """The carries of a graph whose nodes stand in ``order``, each after its operands.

    ``carries`` are pairs (old value, an input; new value, any node).
    """
    depends = dict.fromkeys(order, 0)
    for k, (old, _) in enumerate(carries):
        depends[old] |= 1 << k
    for node in order:
        for operand in operands(node):
            depends[node] |= depends[operand]
    feeds = dict.fromkeys(order, 0)
    for k, (_, new) in enumerate(carries):
        feeds[new] |= 1 << k
    for node in reversed(order):
        for operand in operands(node):
            feeds[operand] |= feeds[node]
    needs = [depends[new] for _, new in carries]
    return Carries(depends, feeds, _components(needs))


def _components(needs: list[int]) -> tuple[int, ...]:
    """The strongly connected components, as sets, each after those it needs; ``needs[k]`` is the set k needs."""
    reach = [1 << k | need for k, need in enumerate(needs)]
    for middle in range(len(reach)):
        for k, there in enumerate(reach):
            if there >> middle & 1:
                reach[k] |= reach[middle]
    components: list[int] = []
    for k, there in enumerate(reach):
        component = sum(1 << j for j in range(len(reach)) if there >> j & 1 and reach[j] >> k & 1)
        if component not in components:
            components.append(component)
    # What a component can reach is what it needs, so one that needs another reaches more.
    return tuple(sorted(components, key=lambda c: (reach[c.bit_length() - 1].bit_count(), c)))
