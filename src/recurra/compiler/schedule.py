"""When each node of a step runs: once, for all steps in one batch, in a time loop, or once on a sum over time.

One rule: a node is in the time loop of a component of carries exactly when it depends on the component's old values
and its new values depend on it. Nothing here knows tensors or a device, and forward and backward are the same: the
backward step carries gradients from new to old.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic

from recurra.compiler.carries import Carries, Node, find_carries

ONCE, BATCHED, LOOP, SUMMED = "once", "batched", "loop", "summed"


@dataclass(frozen=True)
class Stage(Generic[Node]):
    """Nodes that run together. ``kind`` is ONCE, BATCHED (all steps in one batch), LOOP (one step after another, for
    ``carries``), or SUMMED (once, on sums over all steps). Their order is one in which they can be run."""

    kind: str
    nodes: tuple[Node, ...]
    carries: tuple[int, ...] = ()


@dataclass(frozen=True)
class Problem(Generic[Node]):
    """A step as the schedule sees it.

    ``order`` has every node after its operands; ``carries`` are pairs (old, new). ``outputs`` are wanted for every
    step, ``totals`` summed over all steps, ``finals`` are the numbers of the carries whose last value is wanted.
    ``varying`` are the nodes that differ from step to step by themselves: inputs, and what draws. Every node that
    depends on ``linear`` is a linear function of them. ``part_of`` has a node that is a part of a node's result.
    """

    order: Sequence[Node]
    operands: Callable[[Node], Iterable[Node]]
    carries: Sequence[tuple[Node, Node]]
    outputs: Sequence[Node] = ()
    totals: Sequence[Node] = ()
    finals: Sequence[int] = ()
    inputs: frozenset[Node] = frozenset()
    varying: frozenset[Node] = frozenset()
    linear: frozenset[Node] = frozenset()
    part_of: Mapping[Node, Node] = field(default_factory=dict)


def schedule(problem: Problem[Node]) -> list[Stage[Node]]:
    """The stages of a step over time, in the order in which they run. What nobody wants is in none of them."""
    order, operands = problem.order, problem.operands
    carries = find_carries(order, operands, problem.carries)
    needed, wanted = _needed(problem)
    old = {node for node, _ in problem.carries}
    varies = _downstream(problem, problem.varying | old)
    summed = _summed(problem, carries, needed, varies)
    runs = [node for node in order if node in needed and node not in problem.inputs and node not in old]

    def whole(node: Node) -> Node:
        return problem.part_of.get(node, node)

    def loop_of(node: Node) -> int | None:
        parts = [node, *(part for part, of in problem.part_of.items() if of == node)]
        feeds = 0
        for part in parts:
            feeds |= carries.feeds[part]
        return next((c for c in carries.components if carries.depends[node] & c and feeds & c), None)

    loops = {node: loop_of(whole(node)) for node in runs}
    stages = [Stage(ONCE, tuple(node for node in runs if node not in varies))]
    placed = set(stages[0].nodes)
    for component in carries.components:
        numbers = tuple(k for k in range(len(problem.carries)) if component >> k & 1)
        if not any(k in wanted for k in numbers):
            continue
        body = tuple(node for node in runs if loops[node] == component)
        before = _upstream(problem, [*body, *(problem.carries[k][1] for k in numbers)])
        # Parts of one result run together.
        before |= {part for part, of in problem.part_of.items() if of in before}
        ready = tuple(node for node in runs if node in before and node not in placed and node not in body)
        stages += [Stage(BATCHED, ready), Stage(LOOP, body, numbers)]
        placed.update(ready, body)
    rest = [node for node in runs if node not in placed]
    stages.append(Stage(BATCHED, tuple(node for node in rest if whole(node) not in summed)))
    stages.append(Stage(SUMMED, tuple(node for node in rest if whole(node) in summed)))
    return [stage for stage in stages if stage.nodes or stage.kind == LOOP]


def _needed(problem: Problem[Node]) -> tuple[set[Node], set[int]]:
    """The nodes that a result is computed from, and the carries among them."""
    wanted = set(problem.finals)
    while True:
        ends = [*problem.outputs, *problem.totals, *(problem.carries[k][1] for k in wanted)]
        needed = _upstream(problem, ends)
        more = {k for k, (old, _) in enumerate(problem.carries) if old in needed} | wanted
        if more == wanted:
            needed |= {part for part, of in problem.part_of.items() if of in needed}
            return needed, wanted
        wanted = more


def _upstream(problem: Problem[Node], ends: Iterable[Node]) -> set[Node]:
    found: set[Node] = set()
    todo = list(ends)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += problem.operands(node)
    return found


def _downstream(problem: Problem[Node], begins: Iterable[Node]) -> set[Node]:
    found = set(begins)
    for node in problem.order:
        if any(operand in found for operand in problem.operands(node)):
            found.add(node)
    return found


def _summed(problem: Problem[Node], carries: Carries[Node], needed: set[Node], varies: set[Node]) -> set[Node]:
    """The nodes that may run on a sum over time: linear in it, and wanted by nobody step by step."""
    by_step = _upstream(problem, problem.outputs)
    linear = _downstream(problem, problem.linear)
    users: dict[Node, list[Node]] = {}
    for node in problem.order:
        if node in needed:
            for operand in problem.operands(node):
                users.setdefault(operand, []).append(node)
    summed: set[Node] = set()
    for node in reversed(problem.order):
        if (
            node in linear
            and node not in problem.inputs
            and node not in by_step
            and not carries.feeds[node]
            and all(user in summed for user in users.get(node, ()))
            and all(operand in linear or operand not in varies for operand in problem.operands(node))
        ):
            summed.add(node)
    return summed
