"""What training knows of an application: this, and nothing else.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from recurra.cell import State


class Task(Protocol):
    """An application as the training loop sees it.

    The data of one epoch is a sequence of windows, each given by its number alone, so that training can stop and
    go on anywhere. Within an epoch a state may be carried from one window into the next.
    """

    windows: int
    """Windows in one epoch."""
    unit: str
    """What is counted, in the plural: ``characters``, ``words``, ``sentences``."""

    @property
    def model(self) -> nn.Module:
        """The network, which holds all that is trained."""

    def initial_carry(self) -> State:
        """The state before the first window of an epoch, for the whole batch."""

    def loss(self, model: nn.Module, window: int, carry: State, rows: slice) -> tuple[Tensor, int, State]:
        """The mean loss over one window of those rows of the batch, how many units it saw, and the state after it.

        ``model`` is ``self.model``, or what distributed training has put around it.
        """

    def evaluate(self, model: nn.Module) -> float:
        """The loss on the validation data, in evaluation mode, without gradients."""

    def figures(self, loss: float) -> dict[str, float]:
        """A loss in the units people know for this task, by name."""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the task to fit it, beside the shapes: a digest of a vocabulary, say."""
