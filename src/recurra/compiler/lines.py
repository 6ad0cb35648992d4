"""Where in the user's code a node of a graph, or an error, comes from."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

_TORCH = str(Path(torch.__file__).parent)


class Lines(TorchFunctionMode):
    """While this is entered, each node that is traced is noted with the line of the user's code that made it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _is_torch(frame.f_code.co_filename):
            frame = frame.f_back
        line = "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        with fx.traceback.annotate({"line": line}):
            result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, torch.Tensor) and part.grad_fn is not None:
                _note_gradient(part.grad_fn, line)
        return result


def _note_gradient(begin: Any, line: str) -> None:
    """Have what autograd does for a line noted with it, when it is traced in its turn."""
    todo = [begin]
    while todo:
        function = todo.pop()
        # Those that have it belong to earlier lines. One that only collects a gradient belongs to none.
        if function is None or "line" in function.metadata or hasattr(function, "variable"):
            continue
        function.metadata["line"] = line
        noted: list[Any] = []

        def before(gradients: Any, noted: list[Any] = noted) -> None:
            noted.append(fx.traceback.annotate({"gradient of": line}))
            noted[-1].__enter__()

        def after(inputs: Any, outputs: Any, noted: list[Any] = noted) -> None:
            noted.pop().__exit__(None, None, None)

        function.register_prehook(before)
        function.register_hook(after)
        todo += [each for each, _ in function.next_functions]


def line_of(node: fx.Node) -> str:
    """``file:line`` of a node, or nothing where it is not known, as for most of the backward step."""
    return str((node.meta.get("custom") or {}).get("line", ""))


def name_of(node: fx.Node) -> str:
    """The operation of a node as a user knows it: ``addmm``, ``sigmoid``."""
    target = node.target
    return str(target._schema.name).removeprefix("aten::") if isinstance(target, OpOverload) else node.name


def at_line(node: fx.Node) -> str:
    """A node as part of a message: what it is, and where it was written."""
    line = line_of(node)
    return f"{name_of(node)} at {line}" if line else name_of(node)


def origin_of(node: fx.Node) -> str:
    """A node as part of a message, like ``at_line``. One of the backward step has no line: it gets that of the value
    of the forward step nearest to it."""
    if line_of(node):
        return at_line(node)
    line = line_near(node)
    return f"{name_of(node)}, in the gradient of {line}" if line else name_of(node)


def line_near(node: fx.Node) -> str:
    """``file:line`` of a node; of one of the backward step, that of the operation whose gradient it is, or where that
    is not known, of the nearest that it is calculated from; nothing without any."""
    seen, layer = {node}, [node]
    while layer:
        lines = [line_of(each) or str((each.meta.get("custom") or {}).get("gradient of", "")) for each in layer]
        if any(lines):
            return next(line for line in lines[::-1] if line)
        layer = [operand for each in layer for operand in each.all_input_nodes if operand not in seen]
        seen.update(layer)
    return ""


def where_raised(error: Exception) -> str:
    """``file:line (code)`` of the last frame of an error that is not PyTorch's own."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_torch(frame.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} ({frames[-1].line})" if frames else "no line"


def _is_torch(file: str) -> bool:
    return file.startswith((_TORCH, "<")) or file == __file__
