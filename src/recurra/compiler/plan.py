"""What to run for a traced step: the stages forward, the stages backward, and what goes from one to the other.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from recurra.compiler.lines import line_of, name_of
from recurra.compiler.rows import find_rows_of_nodes
from recurra.compiler.schedule import BATCHED, LOOP, ONCE, SUMMED, Problem, Stage, schedule
from recurra.compiler.stages import ROWS, Compiled, build
from recurra.compiler.trace import Step, draws

Wanted = frozenset[fx.Node]


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
        self.forward = self._upstream([*step.new, step.y])
        self.forward |= {part for part, of in self.part_of.items() if of in self.forward}
        self.linear = self._downstream(self.gradients)
        self.varying = self._downstream([step.x, *step.old, *self.draws])
        self.rows = find_rows_of_nodes(step, self.varying | self.linear, self.linear)

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that a node is computed from."""
        return [operand for operand in node.all_input_nodes if operand not in self.step.sizes]

    def operands_backward(self, node: fx.Node) -> list[fx.Node]:
        """The same, where every value of the forward step is given."""
        return [] if node in self.forward else self.operands(node)

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
    """One direction: its stages, what may be forgotten after each, and the carries (from, to)."""

    stages: list[Compiled]
    forget: list[list[fx.Node]]
    carries: list[tuple[fx.Node, fx.Node]]


class Plan:
    """The stages for one choice of gradients.

    ``wanted`` are the inputs of the step whose gradients are asked for; ``first`` says of each leaf of the state
    whether the gradient of what it began with is. Without any, nothing is kept for a backward pass.
    """

    def __init__(self, analysis: Analysis, wanted: Wanted, first: Sequence[bool]) -> None:
        self.analysis, self.step = analysis, analysis.step
        step = analysis.step
        self.differentiated = [k for k, gradient in enumerate(step.new_gradient) if gradient is not None]
        self.first = [k for k in self.differentiated if first[k]]
        self.wanted = {n: g for n, g in step.gradient.items() if n in wanted and g in analysis.linear}
        self.back = self._plan_backward()
        takes = {node for compiled in self.back.stages for node in compiled.inputs}
        takes |= {gradient for gradient in self.wanted.values() if gradient in analysis.forward}
        self.given = [node for node in [step.x, *analysis.inputs] if node in takes]
        self.saved = [n for n in analysis.order if n in takes and n in analysis.forward and n.op == "call_function"]
        self.saved += [node for node in step.old if node in takes]
        self.ahead = self._plan_forward()

    def _plan_forward(self) -> Pass:
        analysis, step = self.analysis, self.step
        carries = list(zip(step.old, step.new, strict=True))
        ends = [step.y, *self.saved]
        problem = Problem(
            order=[node for node in analysis.order if node in analysis.forward or node in step.old],
            operands=analysis.operands,
            carries=carries,
            outputs=ends,
            finals=range(len(carries)),
            inputs=frozenset([step.x, *analysis.inputs]),
            varying=frozenset([step.x, *analysis.draws]),
            part_of={part: of for part, of in analysis.part_of.items() if part in analysis.forward},
        )
        forms = dict.fromkeys(analysis.inputs, ONCE) | {step.x: ROWS}
        return self._compile(schedule(problem), carries, forms, ends)

    def _plan_backward(self) -> Pass:
        analysis, step = self.analysis, self.step
        carries = [(d, step.gradient[step.old[k]]) for k, d in enumerate(step.new_gradient) if d is not None]
        outputs = [gradient for node, gradient in self.wanted.items() if node is step.x]
        totals = [gradient for node, gradient in self.wanted.items() if node is not step.x]
        inputs = analysis.forward | {step.x, *analysis.inputs, *step.old}
        forms = {node: ROWS if node in analysis.varying else ONCE for node in inputs}
        if step.y_gradient is not None:
            forms[step.y_gradient] = ROWS
        problem = Problem(
            order=analysis.order,
            operands=analysis.operands_backward,
            carries=carries,
            outputs=outputs,
            totals=totals,
            finals=[self.differentiated.index(k) for k in self.first],
            inputs=frozenset(forms),
            varying=frozenset(node for node, form in forms.items() if form == ROWS),
            linear=frozenset(analysis.gradients),
            part_of={part: of for part, of in analysis.part_of.items() if part not in analysis.forward},
        )
        return self._compile(schedule(problem), carries, forms, [*outputs, *totals])

    def _compile(
        self,
        stages: list[Stage[fx.Node]],
        carries: list[tuple[fx.Node, fx.Node]],
        forms: dict[fx.Node, str],
        ends: Sequence[fx.Node],
    ) -> Pass:
        compiled = build(self.step, stages, self.analysis.rows, carries, forms, ends)
        forget: list[list[fx.Node]] = []
        later = set(ends)
        for each in reversed(compiled):
            forget.append([node for node in {*each.inputs, *each.outputs} if node not in later])
            later |= set(each.inputs)
        return Pass(compiled, forget[::-1], carries)

    def __str__(self) -> str:
        parts = ["forward", *_lines(self.ahead)]
        if self.back.stages:
            parts += ["backward", *_lines(self.back)]
        return "\n".join(parts)


_TITLES = {ONCE: "once", BATCHED: "all steps at once", SUMMED: "once, on sums over all steps"}


def _lines(part: Pass) -> list[str]:
    """A schedule for people."""
    lines = []
    for compiled in part.stages:
        stage = compiled.stage
        title = _TITLES.get(stage.kind, "")
        if stage.kind == LOOP:
            title = f"step by step, carrying {', '.join(part.carries[k][0].name for k in stage.carries)}"
        lines.append(f"  {title}:")
        for node in stage.nodes:
            if getattr(node.target, "__name__", "") != "getitem":
                text = f"    {node.name} = {name_of(node)}({', '.join(_argument(a) for a in node.args)})"
                line = line_of(node)
                lines.append(f"{text}  # {line}" if line else text)
    return lines


def _argument(argument: object) -> str:
    if isinstance(argument, fx.Node) and getattr(argument.target, "__name__", "") == "getitem":
        return f"{argument.args[0]}[{argument.args[1]}]"
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_argument(part) for part in argument)}]"
    return str(argument)
