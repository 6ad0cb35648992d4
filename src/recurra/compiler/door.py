"""The faster paths of a Recurrent: what is traced, kept for the next call, refused, and explained.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from recurra.cell import Cell, State, leaves, map_state
from recurra.compiler import operator
from recurra.compiler.autograd import run
from recurra.compiler.context import Form, find_rows, flatten, rebuild
from recurra.compiler.cpu import CPU
from recurra.compiler.decompose import decompositions, needed
from recurra.compiler.explain import Details, details
from recurra.compiler.fingerprint import Attributes, fingerprint, look
from recurra.compiler.hoisted import Call
from recurra.compiler.plan import Analysis, Plan
from recurra.compiler.surroundings import TRACING, check, check_hooks, check_program, undisturbed
from recurra.compiler.trace import trace, weights_of
from recurra.compiler.twin import twin
from recurra.errors import BackendError, RecurraError
from recurra.taps import recording


class Report(NamedTuple):
    """What there is to say about the path of a Recurrent; ``recurra.unroll.Explanation`` has the words."""

    ran: str
    why: str
    called: bool
    schedule: str = ""
    details: Details | None = None


# As many kinds of input are remembered; a cell whose attributes change all the time does not fill the memory.
_KEPT = 32


class Traced:
    """Runs a cell over time from a trace of its step, with everything that is not carried out of the time loop.

    ``backend`` is what was asked for. ``"compiled"``: every time loop is native code, or BackendError says why not.
    ``"hoisted"``: they are loops of eager steps. ``"auto"``: native code where it can be, else eager steps, and where
    there can be no trace, the reference loop.

    A step is traced when it first meets its kind of input: dtypes, devices, features, the form of the context, the
    training mode, the plain attributes of the cell. Lengths, batch size and weights may change freely. ``loop`` is
    the reference loop, through which second derivatives go; ``memory`` is what is kept for the backward pass.
    """

    def __init__(self, loop: Callable[..., tuple[Tensor, State]], backend: str, memory: str = "store") -> None:
        self.loop, self.backend, self.memory = loop, backend, memory
        self._analyses: dict[Hashable, Analysis] = {}
        self._plans: dict[Hashable, Plan] = {}
        # What ran last: a plan, or why there is none.
        self._last: Plan | RecurraError | None = None
        self._refused: dict[Hashable, RecurraError] = {}
        self.sites: dict[tuple[int, int], operator.Site] = {}
        self._before: _Before | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        return Traced(self.loop, self.backend, self.memory)

    def __reduce__(self) -> tuple[Any, ...]:
        return Traced, (self.loop, self.backend, self.memory)

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
        options = {"fresh": fresh, "lengths": lengths, "resets": resets, "reverse": reverse}
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return self._in_program(cell, x, state, context, given, **options)
        before = self._before if context is None and given is None else None
        known = None if before is None else before.tensors(cell, x, state, fresh)
        try:
            if before is not None and known is not None:
                plan, weights, form, tensors = before.plan, before.weights, before.form, known
                check_program(self.backend)
            else:
                check_hooks(self.backend, cell)
                parts, form = flatten(context)
                with TRACING:
                    weights = weights_of(cell)
                    tensors = [x, *weights.values(), *parts, *leaves(state), *leaves(fresh)]
                    check(self.backend, tensors)
                    plan = self._plan(cell, tensors, list(weights), state, context, form, given, x.shape[1])
                    usual = not parts and given is None and _is_usual(x)
                    self._before = _Before(cell, tensors, plan, weights, form, state is fresh) if usual else None
        except RecurraError as error:
            if self.backend != "auto" or self.memory != "store":
                raise
            # If the step is wrong, the loop says so with the caller's own shapes.
            self._last = error
            return self.loop(cell, x, state, context, **options)
        self._last = plan
        return self._run(plan, cell, tensors, weights, form, state, **options)

    def _in_program(
        self,
        cell: Cell,
        x: Tensor,
        state: State,
        context: Any,
        given: Any,
        *,
        fresh: State,
        lengths: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, State]:
        """The same as an operator of the program that torch.compile makes."""
        weights = weights_of(cell)
        tensors = [x, *weights.values(), *flatten(context)[0], *leaves(state), *leaves(fresh)]
        site, why, differentiable = operator.find(self, cell, tensors, weights, state, given, context)
        if why:
            if self.backend != "auto" or self.memory != "store":
                raise BackendError(why)
            return self.loop(cell, x, state, context, fresh=fresh, lengths=lengths, resets=resets, reverse=reverse)
        T, B = x.shape[:2]
        active = None
        if lengths is not None:
            tensors[0], active = fill_padding(x, lengths)
            resets = None if resets is None else resets & active
        y, *finals = operator.run(site, tensors, lengths, resets, reverse, differentiable)
        if active is not None:
            y = torch.where(active.view(T, B, *[1] * (y.dim() - 2)), y, torch.zeros_like(y))
        rest = iter(finals)
        return y, map_state(lambda _: next(rest), state)

    def _run(
        self,
        plan: Plan,
        cell: Cell,
        tensors: list[Tensor],
        weights: dict[str, Tensor],
        form: Form,
        state: State,
        *,
        fresh: State,
        lengths: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, State]:
        T, B = tensors[0].shape[:2]
        active = None
        if lengths is not None:
            tensors[0], active = fill_padding(tensors[0], lengths)
            resets = None if resets is None else resets & active

        def again(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return self._again(cell, tensors, list(weights), form, plan, state, lengths, resets, reverse)

        call = Call(plan, T, B, active, resets, reverse, again, lengths, together=True)
        y, *finals = run(call, tensors)
        if (record := recording()) is not None:
            record.values = dict(call.taps)
        if active is not None:
            y = torch.where(active.view(T, B, *[1] * (y.dim() - 2)), y, torch.zeros_like(y))
        rest = iter(finals)
        return y, map_state(lambda _: next(rest), state)

    def report(self, cell: Cell) -> Report:
        """What ran last, why, and its stages; before the first call, what would run."""
        last = self._last
        called = last is not None
        if last is None:
            try:
                last = self._rehearse(cell)
            except RecurraError as error:
                why = f"the step is traced at its first call; a trial without context was refused: {error}"
                return Report(self.backend, why, called)
        if last is None:
            return Report(self.backend, "the step is traced at its first call", called)
        if isinstance(last, RecurraError):
            return Report("loop", str(last), called)
        found = details(last)
        if self.backend == "hoisted" or last.refused:
            why = "only what depends on the step before runs step by step"
            return Report("hoisted", "; ".join([why, *last.refused]), called, str(last), found)
        why = "every time loop is native code; second derivatives go through the loop"
        return Report("compiled", why, called, str(last), found)

    def _rehearse(self, cell: Cell) -> Plan | None:
        """The plan of a call without context, in the cell's own dtype; None where the cell does not say enough for it.

        Raises RecurraError where the step is refused.
        """
        size = getattr(cell, "input_size", None)
        held = [tensor for tensor in (*cell.parameters(), *cell.buffers()) if tensor.is_floating_point()]
        like = held[0] if held else torch.empty(0)
        if not isinstance(size, int) or like.is_meta:
            return None
        with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
            try:
                state, context = cell.initial_state(1), cell.draw_context(1)
            except Exception:
                # It takes a context, of a kind that only the caller knows.
                return None
        parts, form = flatten(context)
        with TRACING:
            weights = weights_of(cell)
            tensors = [like.new_zeros(1, 1, size), *weights.values(), *parts, *leaves(state), *leaves(state)]
            check(self.backend, tensors)
            return self._plan(cell, tensors, list(weights), state, context, form, None, 1)

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
            tuple(look(tensor) for tensor in tensors[1 : 1 + len(names)]),
            (x.dtype, x.device, x.shape[2:]),
            tuple((leaf.dtype, leaf.device, leaf.shape[1:]) for leaf in leaves(state)),
            form,
            tuple(look(part, B) for part in parts),
            None if given is context else tuple(look(part, B) for part in flatten(given)[0]),
            autocast,
            recording() is not None,
            fingerprint(cell),
        )
        learning = torch.is_grad_enabled()
        wanted = tuple(learning and tensor.requires_grad for tensor in tensors)
        plan = self._plans.get((key, wanted))
        if plan is None:
            if key in self._refused:
                raise self._refused[key]
            try:
                plan = self._make(key, wanted, cell, x, state, given, context, B)
            except RecurraError as error:
                _keep(self._refused, key, error)
                raise
            _keep(self._plans, (key, wanted), plan)
        return plan

    def _make(
        self,
        key: Hashable,
        wanted: Sequence[bool],
        cell: Cell,
        x: Tensor,
        state: State,
        given: Any,
        context: Any,
        B: int,
    ) -> Plan:
        native = self.backend != "hoisted"
        if key not in self._analyses:
            rows = find_rows(cell, B, given, context)
            table = decompositions() if native else needed()
            with undisturbed():
                step = trace(cell, x[0], state, context, rows, table, tapped=recording() is not None)
            _keep(self._analyses, key, Analysis(step))
        analysis = self._analyses[key]
        nodes = [analysis.step.x, *analysis.step.weights.values(), *analysis.step.context]
        count = len(analysis.step.old)
        starts = wanted[len(nodes) :]
        first = [starts[k] or starts[count + k] for k in range(count)]
        asked = frozenset(node for node, want in zip(nodes, wanted, strict=False) if want)
        plan = Plan(analysis, asked, first, CPU(analysis.rows) if native else None, self.memory)
        if plan.refused and self.backend == "compiled":
            raise BackendError(plan.refused[0])
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
        over_time = _OverTime(cell if plan.step.past else twin(cell), self.loop)
        options = {"lengths": lengths, "resets": resets, "fresh": fresh, "reverse": reverse}
        lent = {f"cell.{name}": weight for name, weight in weights.items()}
        y, final = functional_call(over_time, lent, (x, begin, context), options, tie_weights=False)
        return y, *leaves(final)


class _Before:
    """A call without context, and whether another one has the same plan: so the next one need not look for it.

    ``tensors`` are those of the call, ``began`` says whether it began with the fresh state.
    """

    def __init__(
        self, cell: Cell, tensors: list[Tensor], plan: Plan, weights: dict[str, Tensor], form: Form, began: bool
    ) -> None:
        self.cell, self.plan, self.weights, self.form, self.began = cell, plan, weights, form, began
        self.attributes = Attributes(cell)
        self.count = 1 + len(weights)
        # The state that it began with is the fresh one, or both are looked at.
        self.end = self.count + len(plan.step.old) if began else len(tensors)
        self.looks = self._look(tensors)

    def tensors(self, cell: Cell, x: Tensor, state: State, fresh: State) -> list[Tensor] | None:
        """The tensors of a call that has the same plan; None of any other."""
        if cell is not self.cell or (state is fresh) != self.began or not _is_usual(x) or self.attributes.changed():
            return None
        begin = leaves(state)
        tensors = [x, *self.weights.values(), *begin, *(begin if self.began else leaves(fresh))]
        return tensors if self._look(tensors) == self.looks else None

    def _look(self, tensors: list[Tensor]) -> list[Any]:
        # Of the weights, which are the same ones, only what may have changed.
        looks: list[Any] = [torch.is_grad_enabled()]
        for t in tensors[1 : self.count]:
            looks += t.shape, t.dtype, t.device, t.requires_grad
        for t in (tensors[0], *tensors[self.count : self.end]):
            looks += type(t), t.shape[1:], t.dtype, t.device, t.requires_grad
        return looks


def _is_usual(x: Tensor) -> bool:
    """Whether nobody watches, and no autocast."""
    return recording() is None and not torch.is_autocast_enabled(x.device.type)


def _keep(kept: dict[Hashable, Any], key: Hashable, thing: Any) -> None:
    kept[key] = thing
    while len(kept) > _KEPT:
        kept.pop(next(iter(kept)))


class _OverTime(nn.Module):
    """The reference loop as a module, so that it can be lent weights once for all steps."""

    def __init__(self, cell: Cell, loop: Callable[..., tuple[Tensor, State]]) -> None:
        super().__init__()
        self.cell, self.loop = cell, loop

    def forward(self, x: Tensor, state: State, context: Any, **options: Any) -> tuple[Tensor, State]:
        return self.loop(self.cell, x, state, context, **options)


def fill_padding(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, B, I) whose rows take their last valid input again once they have ended, and which steps (T, B) are
    valid. A row without any takes ones. As in the reference loop: whatever lies in the padding goes nowhere."""
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    active = steps < lengths
    last = torch.minimum(steps, (lengths - 1).clamp(min=0))
    filler = x.detach().gather(0, last[:, :, None].expand_as(x))
    filler = torch.where((lengths > 0)[:, None], filler, torch.ones_like(filler))
    return torch.where(active[:, :, None], x, filler), active
