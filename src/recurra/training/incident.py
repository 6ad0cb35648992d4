"""Where a number first went bad: a window run once more, watched step by step.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recurra.cell import Cell
from recurra.unroll import Recurrent


def find_incident(model: nn.Module, losses: Callable[[], Iterator[Tensor]]) -> str:
    """Which layer and time step first gave or received a number that is not finite, in words.

    ``losses`` computes the windows' losses again, with the randomness of the first time. Forward values are looked
    at in the order of computation, gradients in the order of backpropagation. Gradients of ``model`` are left as
    they come out; the caller discards them.
    """
    watch = _Watch()
    with watch.hooks(model):
        for loss in losses():
            if watch.has_found():
                return watch.found
            if not torch.isfinite(loss):
                return "the loss is not finite though every layer's output is"
            loss.backward()
            if watch.has_found():
                return watch.found
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name} is not finite, though every gradient through time is"
    return "each window's gradient is finite, their sum is not"


@dataclass
class _Watch:
    """Hooks that note the first bad value. Steps are counted within the recurrence they belong to."""

    found: str = ""
    steps: dict[str, int] = field(default_factory=dict)
    recurrence: tuple[bool, int] = (False, 0)

    def has_found(self) -> bool:
        return bool(self.found)

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        handles: list[Any] = []
        for name, module in model.named_modules():
            if isinstance(module, Recurrent):
                handles.append(module.register_forward_pre_hook(self._begin))
            if name:
                handles.append(module.register_forward_hook(self._look_at(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, Recurrent)
        self.steps.clear()
        self.recurrence = (module.reverse, arguments[0].shape[0])

    def _look_at(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, _: Any, output: Any) -> None:
            step = None
            if isinstance(module, Cell):
                count = self.steps.get(name, 0)
                self.steps[name] = count + 1
                reverse, T = self.recurrence
                step = T - 1 - count if reverse else count
            layer = f"{name} ({type(module).__name__})"
            for tensor in _tensors(output):
                self._note(tensor, f"the output of {layer}", step)
                if tensor.requires_grad:
                    tensor.register_hook(
                        lambda gradient, what=f"the gradient at the output of {layer}", step=step: self._note(
                            gradient, what, step
                        )
                    )

        return look

    def _note(self, tensor: Tensor, what: str, step: int | None) -> None:
        if self.found or not tensor.is_floating_point():
            return
        bad = ~torch.isfinite(tensor)
        if not bad.any():
            return
        if step is None and tensor.dim() == 3:
            # A layer outside the recurrence sees all steps at once, (T, B, D).
            steps = bad.flatten(1).any(1).nonzero()
            step = int(steps[-1] if "gradient" in what else steps[0])
        at = "" if step is None else f" at time step {step}"
        self.found = f"{what}{at} is not finite"


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple):
        for part in output:
            yield from _tensors(part)
