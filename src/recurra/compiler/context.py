"""What all steps of a sequence share, taken apart into tensors and put together again."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from recurra.cell import Cell
from recurra.errors import BackendError


class Form(NamedTuple):
    """A context without its tensors: what kind of container, its type or keys or plain value, its parts."""

    kind: str
    what: Hashable
    parts: tuple[Form, ...]


def flatten(context: Any) -> tuple[list[Tensor], Form]:
    """The tensors of a context, in order, and the form that ``rebuild`` needs.

    Raises BackendError for anything but tensors, tuples, lists, dictionaries, numbers, text, and None.
    """
    if isinstance(context, Tensor):
        return [context], Form("tensor", None, ())
    if context is None or isinstance(context, (bool, int, float, str)):
        return [], Form("value", (type(context), context), ())
    if isinstance(context, (tuple, list)):
        pieces = [flatten(part) for part in context]
        form = Form("sequence", type(context), tuple(form for _, form in pieces))
    elif isinstance(context, dict):
        pieces = [flatten(part) for part in context.values()]
        form = Form("dictionary", tuple(context), tuple(form for _, form in pieces))
    else:
        raise BackendError(
            f"a context that is traced holds tensors in tuples, lists and dictionaries, got {type(context).__name__}: "
            "use backend='loop', which takes any context"
        )
    return [tensor for tensors, _ in pieces for tensor in tensors], form


def rebuild(form: Form, tensors: Iterator[Any]) -> Any:
    """The context of that form, with these tensors in it."""
    # What ``form.what`` holds follows from ``form.kind``, which the types do not say.
    if form.kind == "tensor":
        return next(tensors)
    if form.kind == "value":
        return form.what[1]  # type: ignore[index]
    parts = [rebuild(part, tensors) for part in form.parts]
    if form.kind == "dictionary":
        return dict(zip(form.what, parts, strict=True))  # type: ignore[call-overload]
    kind: Any = form.what
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


def find_rows(cell: Cell, batch_size: int, given: Any, drawn: Any) -> list[bool]:
    """Of each tensor in ``drawn``, what the cell made of ``given``: whether its first axis is the batch.

    The cell draws twice more, for two other batch sizes, on tensors without numbers; what differs has rows. Of what
    the caller gave, a tensor with ``batch_size`` entries in its first axis has rows.
    """
    tensors, form = flatten(given)
    rows = [tensor.dim() > 0 and tensor.shape[0] == batch_size for tensor in tensors]
    if drawn is given:
        return rows
    seen = []
    for size in (3, 5):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            likes = [
                torch.empty((size, *t.shape[1:]) if r else t.shape, dtype=t.dtype, device=t.device)
                for t, r in zip(tensors, rows, strict=True)
            ]
            try:
                seen.append(
                    [tensor.shape for tensor in flatten(cell.draw_context(size, rebuild(form, iter(likes))))[0]]
                )
            except Exception as error:
                raise BackendError(
                    f"{type(cell).__name__}.draw_context cannot be traced: {error}; use backend='loop'"
                ) from error
    small, large = seen
    found = []
    for k, tensor in enumerate(flatten(drawn)[0]):
        has = small[k] != large[k]
        if has and (small[k][0], large[k][0], small[k][1:]) != (3, 5, large[k][1:]):
            raise BackendError(
                f"tensor {k} of the context, {tuple(tensor.shape)}, has the batch elsewhere than in its first axis: "
                "use backend='loop'"
            )
        found.append(has)
    return found
