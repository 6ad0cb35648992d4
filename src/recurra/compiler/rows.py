"""Where the batch lies in every value of a traced step, and the proof that its rows never meet.

Rows that never meet may come from different steps: T steps of B rows are one step of T * B rows.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from recurra.compiler.lines import at_line
from recurra.compiler.trace import SIZES, Step
from recurra.errors import BackendError

_aten = torch.ops.aten
# The same numbers in the same order under another shape.
VIEWS = {_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default}
# These name an axis and leave the rows alone: they move axes, or cut and join what belongs to one row each.
_HARMLESS = {
    "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "split", "split_with_sizes", "cat", "slice",
    "slice_backward", "slice_scatter", "unbind", "stack", "select", "select_backward", "sum", "mean", "amax", "amin",
    "argmax", "var", "std", "any", "all", "prod", "logsumexp", "linalg_vector_norm",
}  # fmt: skip
# These may sum over the rows. T * B rows then give the sum over T steps as well, which a gradient is.
_SUMMING = {
    "mm", "bmm", "addmm", "mv", "dot", "sum", "native_layer_norm_backward", "native_group_norm_backward",
    "embedding_dense_backward", "convolution_backward",
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """The batch lies on ``axis``, which has ``factor`` entries for each row.

    ``apart`` of them are whole batches, one behind the other; ``factor // apart`` lie side by side in a row.
    """

    axis: int
    factor: int = 1
    apart: int = 1

    def by_step(self, value: Tensor, T: int) -> Tensor:
        """A value of T steps with three axes in place of the batch: what lies apart, the steps, the rows."""
        parts: Tensor = value.unflatten(self.axis, (self.apart, T, value.shape[self.axis] // T // self.apart))
        return parts

    def steps(self, value: Tensor, span: slice, T: int) -> Tensor:
        """Some of the T steps of a value whose entries lie side by side."""
        size = value.shape[self.axis] // T
        return value.narrow(self.axis, span.start * size, (span.stop - span.start) * size)


def by_row(value: Tensor, rows: Rows) -> Tensor:
    """A tensor with the batch somewhere as (B, D): of each row all features, in the order of the other axes."""
    size = value.shape[rows.axis] // rows.factor
    parts: Tensor = value.unflatten(rows.axis, (rows.apart, size, rows.factor // rows.apart))
    parts = parts.movedim(rows.axis + 1, 0)
    return parts.reshape(size, prod(parts.shape[1:]))


def from_rows(value: Tensor, rows: Rows, like: Tensor) -> Tensor:
    """The tensor that ``by_row`` made a value (B, D) of, with the other axes of ``like``."""
    shape = [*like.shape]
    shape[rows.axis : rows.axis + 1] = [rows.apart, rows.factor // rows.apart]
    parts: Tensor = value.reshape(value.shape[0], *shape).movedim(0, rows.axis + 1)
    return parts.flatten(rows.axis, rows.axis + 2)


def find_rows_of_nodes(step: Step, varying: set[fx.Node], backward: set[fx.Node]) -> dict[fx.Node, Rows | None]:
    """The batch axis of every node that is a tensor; None for one without.

    ``varying`` are the nodes that differ from step to step, ``backward`` those that depend on a gradient: only there
    may an operation sum over the rows.

    Raises BackendError where rows meet, or may.
    """
    rows: dict[fx.Node, Rows | None] = {}
    for node in step.graph.nodes:
        value = node.meta.get("val")
        if node.op == "output" or not isinstance(value, Tensor):
            if node.op == "call_function" and node not in step.sizes:
                _check(step, node, rows)
            continue
        rows[node] = _rows_of(node, value, node.meta["other"], rows)
        if node.op != "call_function":
            continue
        before = [rows[operand] for operand in node.all_input_nodes if rows.get(operand) is not None]
        _check(step, node, rows)
        if rows[node] is None and node in varying and value.numel():
            if node not in backward:
                meet = before or any(operand in varying for operand in node.all_input_nodes)
                raise _mix(node, "the value has no batch axis any more" if meet else "it draws without a batch axis")
            if before and _name(node) not in _SUMMING:
                raise _mix(node, "the gradient takes something other than a sum over the rows")
    return rows


def _rows_of(node: fx.Node, value: Tensor, other: Tensor, rows: dict[fx.Node, Rows | None]) -> Rows | None:
    found = [axis for axis, (a, b) in enumerate(zip(value.shape, other.shape, strict=True)) if a != b]
    if not found:
        return None
    if len(found) > 1:
        raise _mix(node, f"the value has the batch on {len(found)} axes")
    axis = found[0]
    factor = value.shape[axis] // SIZES[0]
    if (value.shape[axis], other.shape[axis]) != (factor * SIZES[0], factor * SIZES[1]):
        raise _mix(node, f"an axis of {value.shape[axis]} at B={SIZES[0]} is {other.shape[axis]} at B={SIZES[1]}")
    given = [(operand, r) for operand in node.all_input_nodes if (r := rows.get(operand)) is not None]
    if node.target in VIEWS and given:
        source, old = given[0]
        before = prod(source.meta["val"].shape[: old.axis]) * old.apart
        apart, rest = divmod(before, max(1, prod(value.shape[:axis])))
        if rest or apart < 1 or factor % apart:
            raise _mix(node, "the value is cut into rows otherwise than the batch is")
        return Rows(axis, factor, apart)
    if factor == 1:
        if any(r.factor != 1 and r.apart != r.factor for _, r in given):
            raise _mix(node, "it takes a part of a batch")
        return Rows(axis)
    if _name(node) == "cat" and given and all(r.factor == r.apart for _, r in given):
        return Rows(axis, factor, factor)
    aparts = {r.apart for _, r in given if r.factor == factor}
    if len(aparts) != 1 or any(r.factor != factor for _, r in given):
        raise _mix(node, "it is not clear which row an entry belongs to")
    return Rows(axis, factor, aparts.pop())


def _check(step: Step, node: fx.Node, rows: dict[fx.Node, Rows | None]) -> None:
    """Raises BackendError for an operation that works along the batch axis, or calculates with its size."""
    target = node.target
    if not isinstance(target, OpOverload):
        return
    name = _name(node)
    arguments: dict[str, Any] = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    arguments |= zip((a.name for a in target._schema.arguments), node.args, strict=False)
    arguments |= node.kwargs
    for argument in target._schema.arguments:
        # It may shape a value, but T steps in one batch have another size.
        given = arguments.get(argument.name)
        if isinstance(given, fx.Node) and given in step.sizes and "int" not in str(argument.real_type).lower():
            raise _mix(node, "it calculates with the size of the batch")
    first = next((a for a in node.args if isinstance(a, fx.Node)), None)
    batch = rows.get(first) if first is not None else None
    if "batch_norm" in name and (arguments.get("training", True) or arguments.get("train", False)):
        raise _mix(node, "batch normalisation works across the rows")
    if first is None or batch is None:
        return
    dimensions = first.meta["val"].dim()
    if name not in _HARMLESS:
        for key in ("dim", "dims", "axis"):
            given = arguments.get(key)
            named = [given] if isinstance(given, int) else given if isinstance(given, (list, tuple)) else []
            if any(isinstance(d, int) and d % dimensions == batch.axis for d in named) or (
                key in arguments and given == []
            ):
                raise _mix(node, "it works along the batch axis")
    if name == "native_layer_norm" and dimensions - len(arguments["normalized_shape"]) <= batch.axis:
        raise _mix(node, "it normalises over the batch axis")
    if name in ("index", "index_put", "_unsafe_index", "_index_put_impl"):
        indices = arguments["indices"]
        if len(indices) > batch.axis and indices[batch.axis] is not None:
            raise _mix(node, "it picks rows")
        if any(index is not None and rows.get(index) is not None for index in indices):
            raise _mix(node, "it picks by row")
    if "scaled_dot_product" in name and batch.axis >= 2:
        raise _mix(node, "it attends along the batch axis")
    if name == "unfold" and arguments["dimension"] % dimensions == batch.axis:
        raise _mix(node, "it works along the batch axis")
    strided = name in ("as_strided", "as_strided_scatter") and not _within_rows(first, batch, arguments)
    if strided or (name == "roll" and not arguments.get("dims")):
        raise _mix(node, "it works on the whole tensor at once")


def _within_rows(node: fx.Node, rows: Rows, arguments: dict[str, Any]) -> bool:
    """Whether a view by strides of a tensor takes of each row a part of that row."""
    value = node.meta["val"]
    size, stride, offset = arguments["size"], arguments["stride"], arguments.get("storage_offset") or 0
    if rows != Rows(0) or not value.is_contiguous() or not size or not isinstance(size[0], fx.Node):
        return False
    width = prod(value.shape[1:])
    last = offset + sum((n - 1) * step for n, step in zip(size[1:], stride[1:], strict=True))
    return bool(stride[0] == width and offset >= 0 and last < width)


def _name(node: fx.Node) -> str:
    target = node.target
    return str(target._schema.name).removeprefix("aten::") if isinstance(target, OpOverload) else node.name


def _mix(node: fx.Node, why: str) -> BackendError:
    return BackendError(
        f"the rows of a batch must not meet, and {at_line(node)} may let them: {why}. "
        "Where that is wanted, or the message is wrong, use backend='loop'"
    )
