"""What PyTorch does with the program around a run, and whether a graph of our own may be part of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _is_tracing
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_exporting
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from recurra.cell import Cell
from recurra.compiler.fingerprint import hooked
from recurra.errors import BackendError

# Tracing lends the cell other weights for a moment, and PyTorch's tracer is for one thread at a time.
TRACING = threading.Lock()

_TRANSFORMS = {
    "Grad": "torch.func.grad, or what is like it (vjp, jacrev, hessian)",
    "Jvp": "torch.func.jvp, or what is made with it (jacfwd, hessian)",
    "Vmap": "torch.func.vmap, or what is made with it (jacrev, jacfwd, hessian)",
    "Functionalize": "torch.func.functionalize",
}


def transform() -> str:
    """The transform of torch.func that is under way, or ""."""
    inner = peek_interpreter_stack()
    return "" if inner is None else _TRANSFORMS.get(inner.key().name, f"the torch.func transform {inner.key().name}")


def check(backend: str, tensors: Sequence[Tensor]) -> None:
    """Raises BackendError where PyTorch transforms or records the program, or the tensors are not plain ones."""
    check_program(backend)
    strange = [type(tensor) for tensor in tensors if type(tensor) not in (Tensor, nn.Parameter)]
    if strange:
        raise BackendError(refusal(backend, f"tensors of the type {strange[0].__name__}"))


def check_program(backend: str) -> None:
    """Raises BackendError where PyTorch transforms or records the program."""
    where = ""
    if peek_interpreter_stack() is not None:
        where = transform()
    elif is_exporting():
        where = "torch.export"
    elif _is_tracing():
        where = "torch.jit.trace"
    elif get_proxy_mode() is not None:
        where = "a tracer of torch.fx"
    elif forward_ad._current_level >= 0:
        where = "forward-mode automatic differentiation"
    if where:
        raise BackendError(refusal(backend, where))


@contextmanager
def undisturbed() -> Iterator[None]:
    """While this is entered, PyTorch can trace: hooks on what is saved for the backward pass are put aside, as
    checkpointing has them, and so is the watch for anomalies."""
    graph: Any = torch._C._autograd
    hooks: list[Any] = []
    while (top := graph._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        graph._pop_saved_tensors_default_hooks()
    try:
        with torch.autograd.set_detect_anomaly(False):
            yield
    finally:
        for pair in reversed(hooks):
            graph._push_saved_tensors_default_hooks(*pair)


def check_hooks(backend: str, cell: Cell) -> None:
    """Raises BackendError where somebody wants to see every step and any path will do."""
    if backend == "auto" and hooked(cell):
        raise BackendError("hooks on the modules of a cell see every step in the reference loop only")


def refusal(backend: str, where: str) -> str:
    path = "the compiled path" if backend == "auto" else f"backend={backend!r}"
    return f"{path} runs code of its own, which {where} cannot see into: use backend='loop' there"
