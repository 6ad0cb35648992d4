"""Every operation of every stage of a plan, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from recurra.compiler.lines import line_of, name_of
from recurra.compiler.schedule import BATCHED, LOOP, ONCE, SUMMED

if TYPE_CHECKING:
    from recurra.compiler.plan import Pass, Plan

TITLES = {ONCE: "once", BATCHED: "all steps at once", SUMMED: "once, on sums over all steps"}


def listing(plan: Plan) -> str:
    """The stages, forward and backward, a line for each operation, with the user's line where that is known."""
    parts = ["forward", *_lines(plan.ahead)]
    if plan.back.stages:
        parts += ["backward", *_lines(plan.back)]
    return "\n".join(parts)


def is_part(node: fx.Node) -> bool:
    """Whether a node only names one of the results of another."""
    return getattr(node.target, "__name__", "") == "getitem"


def _lines(part: Pass) -> list[str]:
    lines = []
    for compiled in part.stages:
        stage = compiled.stage
        title = TITLES.get(stage.kind, "")
        if stage.kind == LOOP:
            title = f"step by step, carrying {', '.join(part.carries[k][0].name for k in stage.carries)}"
        lines.append(f"  {title}:")
        for node in stage.nodes:
            if not is_part(node):
                text = f"    {node.name} = {name_of(node)}({', '.join(_argument(a) for a in node.args)})"
                line = line_of(node)
                lines.append(f"{text}  # {line}" if line else text)
    return lines


def _argument(argument: Any) -> str:
    if isinstance(argument, fx.Node) and is_part(argument):
        return f"{argument.args[0]}[{argument.args[1]}]"
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_argument(part) for part in argument)}]"
    return str(argument)
