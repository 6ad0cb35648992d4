"""The hoisted path of a Recurrent: what is traced, kept for the next call, refused, and explained.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from recurra.cell import Cell, State, leaves, map_state
from recurra.compiler.context import Form, find_rows, flatten, rebuild
from recurra.compiler.hoisted import Call, run
from recurra.compiler.plan import Analysis, Plan
from recurra.compiler.trace import trace, weights_of
from recurra.errors import BackendError

# As many kinds of input are remembered; a cell whose attributes change all the time does not fill the memory.
_KEPT = 32
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
# What every module has, and how it is called: none of it changes what a step computes.
_COMMON = frozenset(nn.Module().__dict__)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Hoisted:
    """Runs a cell over time with everything that is not carried taken out of the time loop.

    A step is traced when it first meets its kind of input: dtypes, devices, features, the form of the context, the
    training mode, the plain attributes of the cell. Lengths, batch size and weights may change freely. ``loop`` is
    the reference loop, through which second derivatives go.
    """

    def __init__(self, loop: Callable[..., tuple[Tensor, State]]) -> None:
        self.loop = loop
        self._analyses: dict[Hashable, Analysis] = {}
        self._plans: dict[Hashable, Plan] = {}
        # Tracing lends the cell other weights for a moment.
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Hoisted:
        return Hoisted(self.loop)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hoisted, (self.loop,)

    def __call__(
        self,
        cell: Cell,
        x: Tensor,
        state: State,
        context: Any,
        *,
        given: Any,
        fresh: State,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, State]:
        """As the reference loop; ``given`` is the context before the cell drew from it.

        Raises BackendError where the step cannot be traced, or its rows may meet.
        """
        T, B = x.shape[:2]
        if torch.compiler.is_compiling():
            raise BackendError("backend='hoisted' is no part of torch.compile: use backend='loop' inside of it")
        active = None
        if lengths is not None:
            x, active = fill_padding(x, lengths)
            resets = None if resets is None else resets & active
        parts, form = flatten(context)
        with self._lock:
            weights = weights_of(cell)
            tensors = [x, *weights.values(), *parts, *leaves(state), *leaves(fresh)]
            plan = self._plan(cell, tensors, list(weights), state, context, form, given, B)

        def again(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return self._again(cell, tensors, list(weights), form, plan, state, lengths, resets, reverse)

        y, *finals = run(Call(plan, T, B, active, resets, reverse, again), tensors)
        y = y.view(T, B, *y.shape[1:])
        if active is not None:
            y = torch.where(active.view(T, B, *[1] * (y.dim() - 2)), y, torch.zeros_like(y))
        rest = iter(finals)
        return y, map_state(lambda _: next(rest), state)

    def explain(self) -> str:
        """What runs when, for the last kind of input that was met."""
        if not self._plans:
            return "the step is traced at its first call"
        return str(list(self._plans.values())[-1])

    def _plan(
        self,
        cell: Cell,
        tensors: Sequence[Tensor],
        names: list[str],
        state: State,
        context: Any,
        form: Form,
        given: Any,
        B: int,
    ) -> Plan:
        x, parts = tensors[0], flatten(context)[0]
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (
            tuple(names),
            tuple(_look(tensor) for tensor in tensors[1 : 1 + len(names)]),
            (x.dtype, x.device, x.shape[2:]),
            tuple((leaf.dtype, leaf.device, leaf.shape[1:]) for leaf in leaves(state)),
            form,
            tuple(_look(part, B) for part in parts),
            None if given is context else tuple(_look(part, B) for part in flatten(given)[0]),
            autocast,
            fingerprint(cell),
        )
        learning = torch.is_grad_enabled()
        wanted = tuple(learning and tensor.requires_grad for tensor in tensors)
        plan = self._plans.get((key, wanted))
        if plan is None:
            if key not in self._analyses:
                rows = find_rows(cell, B, given, context)
                self._analyses[key] = Analysis(trace(cell, x[0], state, context, rows))
            analysis = self._analyses[key]
            nodes = [analysis.step.x, *analysis.step.weights.values(), *analysis.step.context]
            count = len(analysis.step.old)
            starts = wanted[len(nodes) :]
            first = [starts[k] or starts[count + k] for k in range(count)]
            asked = frozenset(node for node, want in zip(nodes, wanted, strict=False) if want)
            plan = self._plans[key, wanted] = Plan(analysis, asked, first)
            for kept in (self._plans, self._analyses):
                while len(kept) > _KEPT:
                    kept.pop(next(iter(kept)))
        return plan

    def _again(
        self,
        cell: Cell,
        tensors: Sequence[Tensor],
        names: list[str],
        form: Form,
        plan: Plan,
        state: State,
        lengths: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, ...]:
        """The same run by the reference loop."""
        if plan.analysis.draws:
            raise BackendError(
                f"{type(cell).__name__} draws random numbers in its step, and a second derivative runs it again, "
                "with others: use backend='loop'"
            )
        rest = iter(tensors)
        x = next(rest)
        weights = {name: next(rest) for name in names}
        context = rebuild(form, rest)
        begin = map_state(lambda _: next(rest), state)
        fresh = map_state(lambda _: next(rest), state)
        over_time = _OverTime(cell, self.loop)
        options = {"lengths": lengths, "resets": resets, "fresh": fresh, "reverse": reverse}
        lent = {f"cell.{name}": weight for name, weight in weights.items()}
        y, final = functional_call(over_time, lent, (x, begin, context), options, tie_weights=False)
        return y.flatten(0, 1), *leaves(final)


class _OverTime(nn.Module):
    """The reference loop as a module, so that it can be lent weights once for all steps."""

    def __init__(self, cell: Cell, loop: Callable[..., tuple[Tensor, State]]) -> None:
        super().__init__()
        self.cell, self.loop = cell, loop

    def forward(self, x: Tensor, state: State, context: Any, **options: Any) -> tuple[Tensor, State]:
        return self.loop(self.cell, x, state, context, **options)


class _Same:
    """An object as part of a key: equal to itself alone."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


def fingerprint(cell: Cell) -> Hashable:
    """What a traced step depends on, tensors aside: the modules of a cell, their mode, hooks and plain attributes."""
    found: list[Hashable] = []
    for module in cell.modules():
        own = module.__dict__
        found.append((type(module), module.training))
        found.extend((name, _frozen(value)) for name, value in own.items() if name not in _COMMON)
        found.extend(tuple(map(_Same, own[hooks].values())) for hooks in _HOOKS if own[hooks])
    return tuple(found)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_frozen, value))
    if isinstance(value, dict):
        return dict, tuple((_frozen(key), _frozen(part)) for key, part in value.items())
    return _Same(value)


def _look(tensor: Tensor, batch_size: int | None = None) -> Hashable:
    """A tensor as part of a key; its first axis may be the batch."""
    shape: tuple[Any, ...] = tuple(tensor.shape)
    if batch_size is not None and shape[:1] == (batch_size,):
        shape = ("B", *shape[1:])
    return shape, tensor.dtype, tensor.device


def fill_padding(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, B, I) whose rows take their last valid input again once they have ended, and which steps (T, B) are
    valid. A row without any takes ones. As in the reference loop: whatever lies in the padding goes nowhere."""
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    active = steps < lengths
    last = torch.minimum(steps, (lengths - 1).clamp(min=0))
    filler = x.detach().gather(0, last[:, :, None].expand_as(x))
    filler = torch.where((lengths > 0)[:, None], filler, torch.ones_like(filler))
    return torch.where(active[:, :, None], x, filler), active
