"""What to run for a traced step: the stages forward, the stages backward, and what goes from one to the other.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx
from torch._ops import OpOverload

from recurra.compiler.assemble import Assembled, Ends, assemble
from recurra.compiler.fuse import absorb
from recurra.compiler.listing import listing
from recurra.compiler.rows import find_rows_of_nodes
from recurra.compiler.schedule import BATCHED, ONCE, SUMMED, Problem, Stage, schedule
from recurra.compiler.stages import ROWS, Backend, Compiled, build
from recurra.compiler.trace import Step, draws

_aten = torch.ops.aten
# Finite numbers make finite numbers.
_TAME = {
    _aten.mm, _aten.bmm, _aten.addmm, _aten.mv, _aten.add, _aten.sub, _aten.rsub, _aten.mul, _aten.neg, _aten.sum,
    _aten.tanh, _aten.sigmoid, _aten.relu, _aten.tanh_backward, _aten.sigmoid_backward, _aten.threshold_backward,
    _aten.view, _aten._unsafe_view, _aten.reshape, _aten.t, _aten.transpose, _aten.permute, _aten.unsqueeze,
    _aten.squeeze, _aten.expand, _aten.cat, _aten.split, _aten.split_with_sizes, _aten.slice, _aten.slice_backward,
    _aten.where, _aten.full, _aten.full_like, _aten.clone, _aten.alias, _aten.detach,
}  # fmt: skip
# Calculated sooner than read from memory.
_CHEAP = {
    _aten.add, _aten.sub, _aten.rsub, _aten.mul, _aten.neg, _aten.tanh, _aten.sigmoid, _aten.alias, _aten.detach,
}  # fmt: skip
_SEEN = {_aten.view, _aten._unsafe_view, _aten.reshape, _aten.unsqueeze, _aten.squeeze}
_PIECES = {_aten.split, _aten.split_with_sizes}
_TURNS = {_aten.t.default, _aten.permute.default, _aten.transpose.int}
Wanted = frozenset[fx.Node]
Carries = list[tuple[fx.Node, fx.Node]]
_Planned = tuple[Carries, list[tuple[fx.Node, str]], list[Compiled], dict[fx.Node, str]]


class Analysis:
    """What is true of a step whatever gradients are asked for."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.order = [node for node in step.graph.nodes if node.op != "output" and node not in step.sizes]
        self.draws = [node for node in self.order if draws(node)]
        self.inputs = [*step.weights.values(), *step.context, *step.constants]
        self.gradients = [node for node in (*step.new_gradient, step.y_gradient) if node is not None]
        self.part_of = {
            node: node.all_input_nodes[0]
            for node in self.order
            if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"
        }
        self.forward = self._upstream([*step.new, step.y, *step.taps.values()])
        self.forward |= {part for part, of in self.part_of.items() if of in self.forward}
        self.linear = self._downstream(self.gradients)
        self.varying = self._downstream([step.x, *step.old, *self.draws])
        self.rows = find_rows_of_nodes(step, self.varying | self.linear, self.linear)

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that a node is computed from."""
        return [operand for operand in node.all_input_nodes if operand not in self.step.sizes]

    def is_seen_otherwise(self, node: fx.Node) -> bool:
        """Whether a node is a given tensor with its axes in another order."""
        if node.target not in _TURNS:
            return False
        (source,) = node.all_input_nodes
        return source in self.inputs or self.is_seen_otherwise(source)

    def _upstream(self, ends: Iterable[fx.Node]) -> set[fx.Node]:
        found = set(ends)
        for node in reversed(self.order):
            if node in found:
                found.update(self.operands(node))
        return found

    def _downstream(self, begins: Iterable[fx.Node]) -> set[fx.Node]:
        found = set(begins)
        for node in self.order:
            if any(operand in found for operand in self.operands(node)):
                found.add(node)
        return found


@dataclass(frozen=True)
class Pass:
    """One direction: its stages, the carries (from, to), and all of it as a function."""

    stages: list[Compiled]
    carries: Carries
    whole: Assembled


class Plan:
    """The stages for one choice of gradients.

    ``wanted`` are the inputs of the step whose gradients are asked for; ``first`` says of each leaf of the state
    whether the gradient of what it began with is. Without any, nothing is kept for a backward pass. ``backend`` makes
    native code of the loops, None of none. ``memory`` is one of the modes of ``recurra.compiler.memory``.
    """

    def __init__(
        self,
        analysis: Analysis,
        wanted: Wanted,
        first: Sequence[bool],
        backend: Backend | None = None,
        memory: str = "store",
    ) -> None:
        self.analysis, self.step, self.backend, self.memory = analysis, analysis.step, backend, memory
        step = analysis.step
        self.differentiated = [k for k, gradient in enumerate(step.new_gradient) if gradient is not None]
        # In parts, every part takes the gradient of the state that the one before it has left.
        parts = memory != "store" and bool(wanted or any(first))
        self._begun = [k for k in self.differentiated if first[k]]
        self.first = [k for k in self.differentiated if first[k] or parts]
        self.wanted = {n: g for n, g in step.gradient.items() if n in wanted and g in analysis.linear}
        carries, kinds, stages, forms = planned = self._plan_backward()
        again = self._cheap(planned)
        if again:
            anew = self._plan_backward(again)
            # If a stage would write them to memory, they may as well be kept.
            if again.isdisjoint(node for compiled in anew[2] for node in compiled.outputs):
                carries, kinds, stages, forms = anew
        made = {node for compiled in stages for node in compiled.outputs}
        takes = {node for compiled in stages for node in compiled.needs} - made
        if memory != "recompute":
            takes |= {gradient for gradient in self.wanted.values() if gradient in analysis.forward}
        made_ahead = [n for n in analysis.order if n in analysis.forward and n.op == "call_function"]
        self.saved = [node for node in made_ahead if node in takes and not analysis.is_seen_otherwise(node)]
        self.saved += [node for node in step.old if node in takes]
        given = [step.x, *analysis.inputs]
        incoming = [] if step.y_gradient is None else [step.y_gradient]
        # Where the gradients go, among the tensors of a call.
        self.places = [given.index(node) for node in self.wanted]
        asked = [k in self.first for k in self.differentiated]
        self.back = self._pass(stages, carries, forms, [*given, *self.saved, *incoming], kinds, asked)
        carries, kinds, stages, forms = self._plan_forward()
        self.ahead = self._pass(stages, carries, forms, given, kinds, [True] * len(carries), self.back.whole)

    @cached_property
    def differentiable(self) -> tuple[bool, ...]:
        """Of y and each leaf of the final state, whether a gradient that is asked for depends on it."""
        step, analysis = self.step, self.analysis
        leads: dict[int, set[int]] = {}
        found = set(self._begun)
        for k, tangent in enumerate([*step.new_gradient, step.y_gradient]):
            if tangent is not None:
                below = analysis._downstream([tangent])
                leads[k] = {j for j in self.differentiated if step.gradient[step.old[j]] in below}
                if any(gradient in below for gradient in self.wanted.values()):
                    found.add(k)
        for _ in leads:
            found |= {k for k, to in leads.items() if to & found}
        count = len(step.old)
        return tuple(k in found for k in (count, *range(count)))

    def _plan_forward(self) -> _Planned:
        analysis, step = self.analysis, self.step
        carries = list(zip(step.old, step.new, strict=True))
        kinds = [(node, BATCHED) for node in (step.y, *step.taps.values())]
        problem = Problem(
            order=[node for node in analysis.order if node in analysis.forward or node in step.old],
            operands=analysis.operands,
            carries=carries,
            outputs=[*(node for node, _ in kinds), *self.saved],
            finals=range(len(carries)),
            inputs=frozenset([step.x, *analysis.inputs]),
            varying=frozenset([step.x, *analysis.draws]),
            part_of={part: of for part, of in analysis.part_of.items() if part in analysis.forward},
        )
        forms = dict.fromkeys(analysis.inputs, ONCE) | {step.x: ROWS}
        return carries, kinds, *self._build(schedule(problem), carries, forms, problem.outputs)

    def _cheap(self, planned: _Planned) -> frozenset[fx.Node]:
        """What native loops would read from memory, and calculate sooner of other things that they read."""
        analysis, step = self.analysis, self.step
        if self.backend is None or self.memory == "recompute":
            return frozenset()
        _, kinds, stages, _ = planned
        read = {node for each in stages if each.native is not None for node in each.needs}
        others = {node for each in stages if each.native is None for node in each.needs}
        # A new carry costs nothing, as it is the next step's old one.
        others.update([*(node for node, _ in kinds), step.y, *step.new, *step.taps.values()])
        found: set[fx.Node] = set()
        there = read | others
        for node in analysis.order:
            if node not in analysis.forward or node not in read - others:
                continue
            # A piece of something is as good as an operation on it.
            whole = analysis.part_of.get(node)
            packet = getattr((whole or node).target, "overloadpacket", None)
            operands = {operand for operand in analysis.operands(whole or node) if operand in analysis.varying}
            if packet in _SEEN and operands <= there.union(step.old):
                # What it shows can be read in its place.
                found.add(node)
            elif packet in (_CHEAP if whole is None else _PIECES) and operands <= there:
                found.update([node] if whole is None else [node, whole])
                there.difference_update((node, whole))
        return frozenset(found)

    def _plan_backward(self, again: frozenset[fx.Node] = frozenset()) -> _Planned:
        """``again`` are values of the forward step that are calculated once more."""
        analysis, step = self.analysis, self.step
        carries = [(d, step.gradient[step.old[k]]) for k, d in enumerate(step.new_gradient) if d is not None]
        outputs = [gradient for node, gradient in self.wanted.items() if node is step.x]
        totals = [gradient for node, gradient in self.wanted.items() if node is not step.x]
        inputs = (analysis.forward - again) | {step.x, *analysis.inputs, *step.old}

        def operands(node: fx.Node) -> list[fx.Node]:
            return [] if node in analysis.forward and node not in again else analysis.operands(node)

        if self.memory == "recompute":
            # The forward step is part of the backward one: with all carries given, nothing of it is in a loop.
            inputs = {step.x, *analysis.inputs, *step.old, *analysis.draws}
            operands = analysis.operands
        forms = {node: ROWS if node in analysis.varying else ONCE for node in inputs}
        if step.y_gradient is not None:
            forms[step.y_gradient] = ROWS
        problem = Problem(
            order=analysis.order,
            operands=operands,
            carries=carries,
            outputs=outputs,
            totals=totals,
            finals=[self.differentiated.index(k) for k in self.first],
            inputs=frozenset(forms),
            varying=frozenset(node for node, form in forms.items() if form == ROWS),
            linear=frozenset(analysis.gradients),
            part_of={part: of for part, of in analysis.part_of.items() if part not in inputs},
        )
        kinds = [(gradient, BATCHED if n is step.x else SUMMED) for n, gradient in self.wanted.items()]
        return carries, kinds, *self._build(schedule(problem), carries, forms, [node for node, _ in kinds])

    def _build(
        self, stages: list[Stage[fx.Node]], carries: Carries, forms: dict[fx.Node, str], wanted: Sequence[fx.Node]
    ) -> tuple[list[Compiled], dict[fx.Node, str]]:
        """The stages as they will be run, and the form of every value."""
        rows, backend = self.analysis.rows, self.backend
        if backend is not None:
            sizes = dict.fromkeys(self.step.sizes, ONCE)
            fused = absorb(stages, rows, sizes | forms | {old: ROWS for old, _ in carries})
            found = dict(forms)
            compiled = build(self.step, fused, rows, carries, found, wanted, backend, backend.functions)
            if not any(each.refused for each in compiled):
                return compiled, found
        functions = None if backend is None else backend.functions
        return build(self.step, stages, rows, carries, forms, wanted, backend, functions), forms

    def _pass(
        self,
        stages: list[Compiled],
        carries: Carries,
        forms: dict[fx.Node, str],
        given: Sequence[fx.Node],
        ends: Ends,
        asked: Sequence[bool],
        backward: Assembled | None = None,
    ) -> Pass:
        rows = self.analysis.rows
        whole = assemble(stages, rows, forms, given, asked, ends, self.saved, self.backend, backward)
        return Pass(stages, carries, whole)

    @cached_property
    def fills(self) -> bool:
        """Whether native loops must leave more than zeros where a row has ended: a batched stage behind them might
        make infinity of a zero, and a gradient of zero times that is none."""
        batched = [each.stage for each in (*self.ahead.stages, *self.back.stages) if each.stage.kind == BATCHED]
        targets = [node.target for stage in batched for node in stage.nodes]
        wild = any(isinstance(t, OpOverload) and t.overloadpacket not in _TAME for t in targets)
        return wild and bool(self.back.stages)

    @property
    def refused(self) -> list[str]:
        """Why loops are no native code, where that was asked for."""
        return list(dict.fromkeys(each.refused for each in (*self.ahead.stages, *self.back.stages) if each.refused))

    def __str__(self) -> str:
        return listing(self)
