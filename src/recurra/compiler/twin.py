"""A cell that nobody else uses: other threads go on with the cell itself while its weights are replaced."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def twin(module: Module) -> Module:
    """Modules like these, with the same attributes and the very same weights, whose weights can be replaced.

    A module that is in several places is in the same places here. One of TorchScript is itself: it has its weights
    where Python does not see them.
    """
    return _twin(module, {})


def _twin(module: Module, done: dict[nn.Module, nn.Module]) -> Module:
    found = module if isinstance(module, torch.jit.ScriptModule) else done.get(module)
    if found is None:
        found = done[module] = module.__new__(type(module))
        own = module.__dict__
        children = {name: child and _twin(child, done) for name, child in own["_modules"].items()}
        held = {name: dict(own[name]) for name in ("_parameters", "_buffers")}
        found.__dict__.update({**own, **held, "_modules": children})
    return found  # type: ignore[return-value]
