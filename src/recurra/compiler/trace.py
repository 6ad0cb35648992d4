"""One step of a cell, and its vector-Jacobian product, as one plain graph in which the batch is a symbol.

PyTorch's own tracer writes the graph, and PyTorch's autograd the backward step. The step is traced at two batch
sizes. The two graphs must be node for node the same; what differs between them is the batch.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.func import functional_call, functionalize, vjp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from recurra.cell import Cell, State, leaves, map_state
from recurra.compiler.context import Form, flatten, rebuild
from recurra.compiler.lines import Lines, at_line, where_raised
from recurra.compiler.tidy import tidy
from recurra.compiler.twin import twin
from recurra.errors import BackendError, RecurraError, ShapeError
from recurra.taps import Record

# Two sizes that differ from one another, from 0 and from 1, and neither a multiple of the other.
SIZES = (3, 5)

_aten = torch.ops.aten
# These read only the shape of their first argument: as they stand, a mask would seem to depend on the carry.
_FILLS: dict[Any, int | None] = {
    _aten.zeros_like.default: 0,
    _aten.new_zeros.default: 0,
    _aten.ones_like.default: 1,
    _aten.new_ones.default: 1,
    _aten.full_like.default: None,
    _aten.new_full.default: None,
}
_DRAWS = {_aten.rand_like.default: _aten.rand.default, _aten.randn_like.default: _aten.randn.default}


@dataclass(frozen=True)
class Like:
    """What an input of the step looks like: (B, ``*shape``) with ``rows``, else ``shape``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    rows: bool

    def make(self, size: int) -> Tensor:
        """A tensor like this at a batch of ``size``."""
        return torch.empty((size, *self.shape) if self.rows else self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Step:
    """A traced step: nodes of ``graph``, forward and backward together.

    ``batch`` is the node of the batch size, an int; ``sizes`` are it and its multiples. ``gradient[input]`` is the
    gradient of an input, given ``new_gradient`` and ``y_gradient``, the gradients of what the step returns; None
    stands for what is no floating-point number. ``constants`` are tensors from outside of the step's arguments.
    ``taps`` are the named values that are to be seen. ``past``: whether it reads weights past a twin of the cell.

    ``node.meta["val"]`` is the value of a node at a batch of ``SIZES[0]`` and ``node.meta["other"]`` at one of
    ``SIZES[1]``: tensors without numbers.
    """

    graph: fx.Graph
    batch: fx.Node
    sizes: frozenset[fx.Node]
    weights: dict[str, fx.Node]
    old: list[fx.Node]
    x: fx.Node
    context: list[fx.Node]
    new: list[fx.Node]
    y: fx.Node
    new_gradient: list[fx.Node | None]
    y_gradient: fx.Node | None
    gradient: dict[fx.Node, fx.Node]
    constants: dict[fx.Node, Tensor]
    past: bool
    taps: dict[str, fx.Node] = field(default_factory=dict)


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def weights_of(cell: Cell) -> dict[str, Tensor]:
    """Every parameter and buffer of a cell by name: each place that holds one, also where two share a tensor."""
    found: dict[str, Tensor] = {}
    for prefix, module in cell.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[f"{prefix}.{name}" if prefix else name] = tensor
    return found


def trace(
    cell: Cell,
    x: Tensor,
    state: State,
    context: Any = None,
    context_rows: Sequence[bool] = (),
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    tapped: bool = False,
) -> Step:
    """The step of ``cell`` for inputs that look like x (B, I), ``state`` and ``context``, at any batch size.

    ``context_rows`` says of each tensor in ``context`` whether its first axis is the batch.
    ``decompositions`` is a table as ``make_fx`` takes it, for a backend that wants fewer kinds of operations.
    ``tapped``: whether the step gives the values of its taps as well.

    Raises BackendError where the step cannot be one graph that holds for every batch size.
    """
    parts, form = flatten(context)
    weights = weights_of(cell)
    likes = [_like(name, tensor, False) for name, tensor in weights.items()]
    likes += [_like(name, leaf, True) for name, leaf in zip(leaf_names(state), leaves(state), strict=True)]
    likes += [_like("x", x, True)]
    likes += [_like(f"context_{k}", p, r) for k, (p, r) in enumerate(zip(parts, context_rows, strict=True))]
    for same in (twin(cell), cell):
        joint = _Joint(same, list(weights), state, form, tapped)
        ours, theirs = [_record(cell, joint, likes, size, decompositions) for size in SIZES]
        if not _storages(_constants(ours, ours.graph).values()) & _storages(weights.values()):
            # Nothing in the step, such as a function that knows the cell itself, reads a weight past the twin.
            break
    _compare(cell, ours.graph, theirs.graph)

    graph = ours.graph
    _Symbols(cell, graph).replace()
    inputs = iter(_rename([node for node in graph.nodes if node.op == "placeholder" and node.name != "batch"], likes))
    given = {"weights": [next(inputs) for _ in weights], "old": [next(inputs) for _ in leaves(state)]}
    x_node, context_nodes = next(inputs), [next(inputs) for _ in parts]

    results: Any = graph.output_node().args[0]
    count = len(given["old"]) + 1
    tangents = _tangents_to_inputs(graph, results[count : 2 * count], [*leaf_names(state), "y"])
    differentiated = [
        node
        for node in (*given["weights"], *given["old"], x_node, *context_nodes)
        if node.meta["val"].is_floating_point()
    ]
    tidy(graph)
    # The tangents are inputs by now.
    results = graph.output_node().args[0]
    sizes = [node for node in graph.nodes if node.target is operator.mul or node.name == "batch"]
    return Step(
        graph=graph,
        batch=sizes[0],
        sizes=frozenset(sizes),
        weights=dict(zip(weights, given["weights"], strict=True)),
        old=given["old"],
        x=x_node,
        context=context_nodes,
        new=list(results[: count - 1]),
        y=results[count - 1],
        new_gradient=tangents[:-1],
        y_gradient=tangents[-1],
        gradient=dict(zip(differentiated, results[2 * count : len(results) - len(joint.taps)], strict=True)),
        constants=_constants(ours, graph),
        past=same is cell,
        taps=dict(zip(joint.taps, results[len(results) - len(joint.taps) :], strict=True)),
    )


def _constants(module: fx.GraphModule, graph: fx.Graph) -> dict[fx.Node, Tensor]:
    return {node: getattr(module, str(node.target)) for node in graph.nodes if node.op == "get_attr"}


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


class _Joint:
    """The step and its vector-Jacobian product as one function of a flat list of tensors."""

    def __init__(self, cell: Cell, names: list[str], state: State, form: Form, tapped: bool) -> None:
        self.cell, self.names, self.state, self.form, self.tapped = cell, names, state, form, tapped
        self.taps: list[str] = []

    def __call__(self, inputs: list[Tensor]) -> list[Tensor | None]:
        floating = [k for k, tensor in enumerate(inputs) if tensor.is_floating_point()]

        def step(*primals: Tensor) -> tuple[tuple[Tensor, ...], tuple[list[Tensor], list[Tensor]]]:
            given = list(inputs)
            for k, primal in zip(floating, primals, strict=True):
                given[k] = primal
            results, taps = self._step(given)
            return tuple(result for result in results if result.is_floating_point()), (results, taps)

        pulled: Any = vjp(step, *(inputs[k] for k in floating), has_aux=True)
        outputs, pull, (results, taps) = pulled
        real = iter(outputs)
        results = [next(real) if result.is_floating_point() else result for result in results]
        # Whatever they hold: they become inputs of the graph.
        tangents = [torch.empty_like(result) if result.is_floating_point() else None for result in results]
        gradients = pull(tuple(tangent for tangent in tangents if tangent is not None))
        return [*results, *tangents, *gradients, *taps]

    def _step(self, given: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        rest = iter(given)
        weights = {name: next(rest) for name in self.names}
        old = map_state(lambda _: next(rest), self.state)
        x = next(rest)
        context = rebuild(self.form, rest)
        with Lines(), Record(self.cell) if self.tapped else nullcontext() as record:
            new, y = functional_call(self.cell, weights, (old, x, context), tie_weights=False)
        new = map_state(_as_carried, new, old)
        if not isinstance(y, Tensor) or y.dim() == 0 or y.shape[0] != x.shape[0]:
            raise BackendError(
                f"a step must return y (B, O); {type(self.cell).__name__}, traced at B={x.shape[0]}, returned "
                f"{tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}: use backend='loop'"
            )
        size = getattr(self.cell, "output_size", None)
        if size is not None and y.shape[-1] != size:
            name = type(self.cell).__name__
            raise ShapeError(f"{name} has output_size={size}, but its step returned y (B, {y.shape[-1]})")
        taps = {} if record is None else record.steps[-1]
        self.taps = list(taps)
        return [*leaves(new), y], [*taps.values()]


def _as_carried(new: Tensor, old: Tensor) -> Tensor:
    if new.shape != old.shape:
        raise ShapeError(
            f"a step must keep the shape of its state: {tuple(old.shape)} went in, {tuple(new.shape)} came out, "
            f"when it was traced at B={old.shape[0]}"
        )
    if new.is_floating_point() and not old.is_floating_point():
        raise ShapeError(
            f"a step returned {new.dtype} for a state that began as {old.dtype}: begin with a state of {new.dtype}"
        )
    return new.to(old.dtype)


def _record(
    cell: Cell,
    joint: _Joint,
    likes: list[Like],
    size: int,
    decompositions: Mapping[Any, Callable[..., Any]] | None,
) -> fx.GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [like.make(size) for like in likes]
    tracer = make_fx(
        functionalize(joint),
        None if decompositions is None else dict(decompositions),
        tracing_mode="fake",
    )
    try:
        # PyTorch's table takes fused attention apart in the forward pass only: what the fused backward pass would be
        # given then is something else, and its gradients wrong.
        whole = _aten._scaled_dot_product_flash_attention_for_cpu.default not in (decompositions or ())
        attention = nullcontext() if whole else sdpa_kernel(SDPBackend.MATH)
        with fx.traceback.preserve_node_meta(), torch.inference_mode(False), torch.enable_grad(), attention:
            return tracer(inputs)
    except RecurraError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
            reason = f"what it does depends on the value of a tensor: {reason}"
        raise BackendError(
            f"the step of {type(cell).__name__} cannot be one graph: {reason}, at {where_raised(error)}; "
            "use backend='loop'"
        ) from error


def _compare(cell: Cell, ours: fx.Graph, theirs: fx.Graph) -> None:
    """Hold two graphs against one another, and note in ours what theirs has otherwise."""
    twin: dict[fx.Node, fx.Node] = {}
    for a, b in zip(ours.nodes, theirs.nodes, strict=False):
        twin[a] = b
        if a.op != b.op or a.target != b.target or [twin[n] for n in a.all_input_nodes] != b.all_input_nodes:
            raise BackendError(
                f"the step of {type(cell).__name__} does something else at another batch size, "
                f"from {at_line(a)} on: it cannot be one graph; use backend='loop'"
            )
        if a.target is _aten.copy_.default:
            raise BackendError(
                f"the step of {type(cell).__name__} changes a tensor that is not its own in place: "
                "return it as part of the state, or use backend='loop'"
            )
        a.meta["other"] = b.meta.get("val")
        a.meta["twin"] = b


class _Symbols:
    """Replaces every number that differs between two traces by a multiple of the batch size."""

    def __init__(self, cell: Cell, graph: fx.Graph) -> None:
        self.cell, self.graph = cell, graph
        with graph.inserting_before(next(iter(graph.nodes))):
            self.batch = graph.placeholder("batch")
        self.multiples = {1: self.batch}

    def replace(self) -> None:
        for node in list(self.graph.nodes):
            twin = node.meta.pop("twin", None)
            if twin is None or node.op != "call_function":
                continue
            node.args = self._symbolic(node, node.args, twin.args)
            node.kwargs = {name: self._symbolic(node, v, twin.kwargs[name]) for name, v in node.kwargs.items()}
            if node.target in _FILLS or node.target in _DRAWS:
                self._read_only_the_shape(node)

    def _symbolic(self, node: fx.Node, a: Any, b: Any) -> Any:
        if isinstance(a, (list, tuple)):
            return type(a)([self._symbolic(node, p, q) for p, q in zip(a, b, strict=True)])
        if isinstance(a, fx.Node) or a == b or (a != a and b != b):
            return a
        factor = a // SIZES[0] if type(a) is int else 0
        if factor < 1 or (a, b) != (factor * SIZES[0], factor * SIZES[1]):
            raise BackendError(
                f"the step of {type(self.cell).__name__} lets the rows of a batch mix: in {at_line(node)}, "
                f"{a} at B={SIZES[0]} is {b} at B={SIZES[1]}; use backend='loop'"
            )
        if factor not in self.multiples:
            with self.graph.inserting_after(self.batch):
                self.multiples[factor] = self.graph.call_function(operator.mul, (self.batch, factor))
        return self.multiples[factor]

    def _read_only_the_shape(self, node: fx.Node) -> None:
        value, other = node.meta["val"], node.meta["other"]
        shape = self._symbolic(node, list(value.shape), list(other.shape))
        like = {"dtype": value.dtype, "device": value.device}
        if node.target in _DRAWS:
            node.target, node.args = _DRAWS[node.target], (shape,)
        else:
            fill = _FILLS[node.target]
            at = 2 if node.target is _aten.new_full.default else 1
            node.target, node.args = _aten.full.default, (shape, node.args[at] if fill is None else fill)
        node.kwargs = like


def _tangents_to_inputs(graph: fx.Graph, tangents: Sequence[fx.Node | None], names: list[str]) -> list[fx.Node | None]:
    inputs: list[fx.Node | None] = []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node, name in zip(tangents, names, strict=True):
        if node is None:
            inputs.append(None)
            continue
        with graph.inserting_after(last):
            last = graph.placeholder(f"d_{name}")
        last.meta.update(node.meta)
        node.replace_all_uses_with(last)
        graph.erase_node(node)
        inputs.append(last)
    return inputs


def _rename(nodes: list[fx.Node], likes: list[Like]) -> list[fx.Node]:
    for node, like in zip(nodes, likes, strict=True):
        node._rename(re.sub(r"\W", "_", like.name))
    return nodes


def leaf_names(state: State, prefix: str = "") -> list[str]:
    """A name for each leaf of a state: its field, or its number in a plain tuple; "state" where it is one tensor."""
    if isinstance(state, Tensor):
        return [prefix or "state"]
    fields = getattr(state, "_fields", None) or [str(k) for k in range(len(state))]
    stem = f"{prefix}_" if prefix else "" if hasattr(state, "_fields") else "state_"
    return [name for field, part in zip(fields, state, strict=True) for name in leaf_names(part, f"{stem}{field}")]


def _like(name: str, tensor: Tensor, rows: bool) -> Like:
    return Like(name, tuple(tensor.shape[1:] if rows else tensor.shape), tensor.dtype, tensor.device, rows)
