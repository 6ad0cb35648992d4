"""The door to torch.compile: a run over time as one operator of PyTorch, which the compiler takes as it is.

What a run depends on, tensors aside, is found while PyTorch traces the program around it, and kept under a name. The
operator gets that name and a flat list of tensors. It gives back, besides its results, what its backward pass takes,
so that PyTorch decides how long that is kept; the backward pass is an operator too.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import guard_scalar

from recurra.cell import Cell, State, leaves
from recurra.compiler import memory
from recurra.compiler.autograd import again, own
from recurra.compiler.context import Form, flatten, rebuild
from recurra.compiler.fingerprint import fingerprint, settings
from recurra.compiler.hoisted import Call
from recurra.compiler.plan import Plan
from recurra.compiler.surroundings import TRACING, check_hooks, refusal, transform
from recurra.errors import BackendError, RecurraError, ShapeError

_SCHEMA = "(str site, Tensor[] tensors, Tensor? lengths, Tensor? resets, bool reverse) -> Tensor[]"
_BACKWARD = (
    "(str site, Tensor[] tensors, Tensor[] saved, Tensor[] gradients, Tensor? lengths, Tensor? resets, bool reverse) "
    "-> Tensor[]"
)


@dataclass(frozen=True, eq=False)
class Site:
    """A run over time in a compiled program, tensors aside. ``wanted`` says of each tensor whether its gradient is.

    The cell and its path are not kept alive: a program that is no longer held by anybody holds nothing itself.
    """

    name: str
    plan: Plan
    wanted: tuple[bool, ...]
    weights: list[str]
    form: Form
    state: State
    print: Hashable
    cell: weakref.ref[Cell]
    path: weakref.ref[Any]

    def call(self, tensors: Sequence[Tensor], lengths: Tensor | None, resets: Tensor | None, reverse: bool) -> Call:
        T, B = tensors[0].shape[:2]
        if lengths is not None and B and (int(lengths.min()) < 0 or int(lengths.max()) > T):
            raise ShapeError(f"expected lengths from 0 to T={T}, got {lengths.tolist()}")
        active = None if lengths is None else torch.arange(T, device=lengths.device)[:, None] < lengths

        def by_loop(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            path, cell = self.path(), self.cell()
            if path is None or cell is None:
                raise BackendError(
                    "a second derivative runs the cell again, and it is gone: keep the module until then"
                )
            options = (lengths, resets, reverse)
            results: tuple[Tensor, ...] = path._again(
                cell, tensors, self.weights, self.form, self.plan, self.state, *options
            )
            return results

        return Call(self.plan, T, B, active, resets, reverse, by_loop, lengths)

    def check(self) -> None:
        """Raises BackendError where the cell is another than the one that was compiled."""
        cell = self.cell()
        if cell is not None and fingerprint(cell) != self.print:
            raise BackendError(
                f"an attribute or hook of {type(cell).__name__} was changed after torch.compile had read it: "
                "call torch.compiler.reset() after such a change"
            )

    def results(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """y, the final leaves and what is saved, without numbers: the shapes that ``forward`` gives."""
        step = self.plan.step
        T, B = tensors[0].shape[:2]
        sizes = [[T, B, *step.y.meta["val"].shape[1:]], *(_size(old, 0, B) for old in step.old)]
        likes: list[fx.Node | None] = [step.y, *step.old]
        if self.plan.memory == "sqrt" and self.plan.saved:
            for _ in memory.parts_of(self.plan, int(T), 1, False):
                likes += [None, *step.old]
                sizes += [[len(torch.get_rng_state())] if self.plan.analysis.draws else [0]]
                sizes += [_size(old, 0, B) for old in step.old]
        else:
            for node in self.plan.saved:
                rows = self.plan.analysis.rows[node]
                many = T * B if node in self.plan.analysis.varying else B
                likes.append(node)
                sizes.append(_size(node, None if rows is None else rows.axis, many))
        return [_empty(like, size) for like, size in zip(likes, sizes, strict=True)]

    def given(self, resets: Tensor | None) -> list[int]:
        """The tensors whose gradient the backward pass gives; those of the others are zero, or not asked for."""
        plan = self.plan
        count = len(plan.step.old)
        begin = len(self.wanted) - 2 * count
        nodes = [plan.step.x, *plan.analysis.inputs[: begin - 1]]
        found = [k for k, node in enumerate(nodes) if node in plan.wanted]
        found += [begin + k for k in plan.first]
        if resets is not None:
            found += [begin + count + k for k in plan.first]
        return [k for k in found if self.wanted[k]]


class _Tensors(NamedTuple):
    """What is known of the tensors of a run while PyTorch traces: shape, dtype and device, and "B" for the batch."""

    x: tuple[Any, ...]
    weights: tuple[Any, ...]
    context: tuple[Any, ...]
    state: tuple[Any, ...]
    given: tuple[Any, ...]


# By name; each is held by the path it belongs to, and some for a while after that is gone, as a backward pass may
# still be to come.
_SITES: weakref.WeakValueDictionary[str, Site] = weakref.WeakValueDictionary()
_GONE: deque[Site] = deque(maxlen=32)
_NAMES: Counter[str] = Counter()
_DRAWING = "drawing-"


def find(
    path: Any, cell: Cell, tensors: Sequence[Tensor], weights: dict[str, Tensor], state: State, given: Any, drawn: Any
) -> tuple[str, str, tuple[bool, ...]]:
    """The name of the site, or why there is none, and which results depend on what has a gradient.

    Read by torch.compile, which guards what it reads.
    """
    B = tensors[0].shape[1]
    known = _Tensors(
        x=_look(tensors[0], True, 2),
        weights=tuple([_look(tensor, False) for tensor in weights.values()]),
        context=tuple([_look(tensor, tensor.dim() > 0 and tensor.shape[0] == B) for tensor in flatten(drawn)[0]]),
        state=tuple([_look(leaf, True) for leaf in leaves(state)]),
        given=()
        if given is drawn
        else tuple([_look(tensor, tensor.dim() > 0 and tensor.shape[0] == B) for tensor in flatten(given)[0]]),
    )
    forms = (flatten(state)[1], flatten(drawn)[1], None if given is drawn else flatten(given)[1])
    learning = torch.is_grad_enabled()
    wanted = tuple([learning and tensor.requires_grad for tensor in tensors])
    found: tuple[str, str, tuple[bool, ...]] = _find(
        path, cell, (tuple(known), forms, wanted, tuple(weights), settings(cell))
    )
    return found


def _look(tensor: Tensor, rows: bool, axes: int = 1) -> tuple[tuple[Any, ...], torch.dtype, torch.device]:
    sizes = [guard_scalar(size) for size in tensor.shape[axes if rows else 0 :]]
    return (("B", *sizes) if rows else tuple(sizes)), tensor.dtype, tensor.device


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _find(path: Any, cell: Cell, facts: tuple[Any, ...]) -> tuple[str, str, tuple[bool, ...]]:
    known, forms, wanted, names, _ = facts
    if transform():
        path._last = BackendError(refusal(path.backend, transform()))
        return "", str(path._last), ()
    try:
        check_hooks(path.backend, cell)
        site = _make(path, cell, _Tensors(*known), forms, wanted, list(names))
        return site.name, "", site.plan.differentiable
    except RecurraError as error:
        path._last = error
        return "", str(error), ()


def _make(path: Any, cell: Cell, known: _Tensors, forms: Any, wanted: tuple[bool, ...], names: list[str]) -> Site:
    shapes = [shape for group in known[1:] for shape, _, _ in group]
    # Like the size of nothing else.
    B = 1 + max([2, *(size for shape in [known.x[0], *shapes] for size in shape if size != "B")])

    def tensors(group: Sequence[Any]) -> list[Tensor]:
        return [
            torch.empty([B if size == "B" else size for size in shape], dtype=dtype, device=device)
            for shape, dtype, device in group
        ]

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x, weights, context = tensors([known.x])[0][None], tensors(known.weights), tensors(known.context)
        begun, fresh, given = tensors(known.state), tensors(known.state), tensors(known.given)
    state = rebuild(forms[0], iter(begun))

    def make() -> Plan:
        drawn = before = rebuild(forms[1], iter(context)) if forms[2] is None else rebuild(forms[2], iter(given))
        if forms[2] is not None:
            # What has as many entries as the batch may have them by chance: drawn for this batch, it shows.
            with mode, torch.no_grad():
                parts, form = flatten(cell.draw_context(B, before))
            if form != forms[1]:
                raise BackendError(f"{type(cell).__name__}.draw_context gives another kind of context each time")
            drawn = rebuild(form, iter(parts))
        flat = [x, *weights, *flatten(drawn)[0], *begun, *fresh]
        for tensor, want in zip(flat, wanted, strict=True):
            tensor.requires_grad_(want)
        plan: Plan = path._plan(cell, flat, names, state, drawn, forms[1], before, B)
        return plan

    with TRACING, torch.set_grad_enabled(any(wanted)):
        lent = {f"cell.{name}": weight for name, weight in zip(names, weights, strict=True)}
        plan: Plan = functional_call(_Lent(cell), lent, (make,), tie_weights=False)
    path._last = plan
    key = id(plan), id(cell)
    if key not in path.sites:
        text = repr((type(cell).__name__, str(plan), known, forms, wanted, names, plan.memory, torch.__version__))
        digest = blake2b(text.encode(), digest_size=10).hexdigest()
        site = Site(
            name=f"{_DRAWING if plan.analysis.draws else ''}{digest}-{_NAMES[digest]}",
            plan=plan,
            wanted=wanted,
            weights=names,
            form=forms[1],
            state=state,
            print=fingerprint(cell),
            cell=weakref.ref(cell),
            path=weakref.ref(path),
        )
        _NAMES[digest] += 1
        _SITES[site.name] = site
        path.sites[key] = site
        weakref.finalize(path, _GONE.append, site)
    found: Site = path.sites[key]
    return found


class _Lent(nn.Module):
    """A cell that can be lent weights while something is done with it: its own may be elsewhere."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, work: Callable[[], Plan]) -> Plan:
        return work()


def run(
    site: str,
    tensors: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    differentiable: tuple[bool, ...],
) -> list[Tensor]:
    """As ``recurra.compiler.autograd.run``: y (T, B, O) and the leaves of the final state."""
    over_time = torch.ops.recurra.over_time_drawing if site.startswith(_DRAWING) else torch.ops.recurra.over_time
    results: list[Tensor] = over_time(site, tensors, lengths, resets, reverse)
    return [r if depends else r.detach() for r, depends in zip(results, differentiable, strict=False)]


def _site(name: str) -> Site:
    site = _SITES.get(name)
    if site is None:
        raise BackendError(
            "a compiled program runs a Recurrent that is gone: keep the module as long as what was compiled from it"
        )
    return site


def _size(node: fx.Node, axis: int | None, rows: Any) -> list[Any]:
    """The shape of a node's value with ``rows`` in place of the batch."""
    shape, other = list(node.meta["val"].shape), node.meta["other"].shape
    if axis is not None and shape[axis] != other[axis]:
        shape[axis] = rows * ((other[axis] - shape[axis]) // 2)
    return shape


def _empty(node: fx.Node | None, size: list[Any]) -> Tensor:
    if node is None:
        return torch.empty(size, dtype=torch.uint8 if size[0] else torch.float32)
    value = node.meta["val"]
    return torch.empty(size, dtype=value.dtype, device=value.device)


def _over_time(
    site: str, tensors: Sequence[Tensor], lengths: Tensor | None, resets: Tensor | None, reverse: bool
) -> list[Tensor]:
    here = _site(site)
    here.check()
    with torch.no_grad():
        y, finals, saved = memory.forward(here.call(tensors, lengths, resets, reverse), tensors)
        results = own([y, *finals, *saved], tensors)
    return [result.contiguous() for result in results]


def _over_time_backward(
    site: str,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> list[Tensor]:
    here = _site(site)
    with torch.no_grad():
        call = here.call(tensors, lengths, resets, reverse)
        found = memory.backward(call, tensors, saved, gradients, here.wanted)
        results = [found[k] for k in here.given(resets)]
        whole = [
            torch.zeros_like(tensors[k]) if result is None else result
            for k, result in zip(here.given(resets), results, strict=True)
        ]
        return [result.contiguous() for result in own(whole, [*tensors, *saved, *gradients])]


_TAGS = (torch.Tag.pt2_compliant_tag,)
_backward = torch.library.custom_op(
    "recurra::over_time_backward", _over_time_backward, mutates_args=(), schema=_BACKWARD, tags=_TAGS
)


@_backward.register_fake
def _(
    site: str,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor],
    lengths: Any,
    resets: Any,
    reverse: bool,
) -> list[Tensor]:
    return [torch.empty_like(tensors[k], memory_format=torch.contiguous_format) for k in _site(site).given(resets)]


def _over_time_fake(site: str, tensors: Sequence[Tensor], lengths: Any, resets: Any, reverse: bool) -> list[Tensor]:
    return _site(site).results(tensors)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    site, tensors, lengths, resets, reverse = inputs
    ctx.site, ctx.reverse, ctx.count = site, reverse, len(tensors)
    ctx.save_for_backward(*tensors, lengths, resets, *output[1 + len(_site(site).plan.step.old) :])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    here, count = _site(ctx.site), ctx.count
    kept = ctx.saved_tensors
    tensors, (lengths, resets, *saved) = list(kept[:count]), kept[count:]
    incoming = [
        torch.zeros_like(like) if gradient is None else gradient
        for like, gradient in zip(here.results(tensors)[: 1 + len(here.plan.step.old)], gradients, strict=False)
    ]
    found: list[Tensor | None] = [None] * count
    if torch.is_grad_enabled():
        found = again(here.call(tensors, lengths, resets, ctx.reverse), tensors, ctx.needs_input_grad[1], incoming)
    else:
        results = torch.ops.recurra.over_time_backward(ctx.site, tensors, saved, incoming, lengths, resets, ctx.reverse)
        for k, result in zip(here.given(resets), results, strict=True):
            found[k] = result
    return None, found, None, None, None


# What draws random numbers must be run neither twice nor once instead of twice, and PyTorch has to know.
for _name, _tags in (
    ("over_time", _TAGS),
    ("over_time_drawing", (*_TAGS, torch.Tag.nondeterministic_seeded)),
):
    _forward = torch.library.custom_op(f"recurra::{_name}", _over_time, mutates_args=(), schema=_SCHEMA, tags=_tags)
    _forward.register_fake(_over_time_fake)
    _forward.register_autograd(_differentiate, setup_context=_keep)
