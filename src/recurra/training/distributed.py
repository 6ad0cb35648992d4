"""Several processes that train one model, as torchrun starts them: streams divided among ranks.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import gc
import importlib
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist

from recurra.cell import State, map_state
from recurra.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among its equals: ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """This rank's share of the batch. Raises ConfigError where it does not divide."""
        if batch_size % self.size:
            raise ConfigError(
                f"batch_size={batch_size} does not divide among {self.size} processes: choose a multiple of {self.size}"
            )
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over all ranks."""
        return nn.parallel.DistributedDataParallel(model) if self.size > 1 else model

    def mean(self, value: float) -> float:
        """The mean of a number over all ranks."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / self.size

    def any(self, *flags: bool) -> list[bool]:
        """Which flags some rank has raised, so that all ranks act alike."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def tell(self, text: str) -> str:
        """A text of the first rank's, at most 4,096 bytes, told to all."""
        if self.size == 1:
            return text
        letters = torch.zeros(4096, dtype=torch.uint8)
        if self.leads:
            encoded = text.encode()
            letters[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        dist.broadcast(letters, src=0)
        return bytes(letters.tolist()).rstrip(b"\0").decode()

    def gather(self, state: State) -> State:
        """The state of the whole batch from each rank's rows."""
        return map_state(self._gather_rows, state) if self.size > 1 else state

    def _gather_rows(self, leaf: Tensor) -> Tensor:
        parts = [torch.empty_like(leaf) for _ in range(self.size)]
        dist.all_gather(parts, leaf.contiguous())
        return torch.cat(parts)


@contextmanager
def world() -> Iterator[World]:
    """The processes that torchrun started, or this one alone.

    What ``wrap`` gave must not be held by the body of the ``with`` when it ends: the group's threads live as long, and
    a thread of PyTorch's that lets go of a tensor while Python shuts down aborts the process.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World()
        return
    # Its functions take the group there is when it is imported as a default, and would keep it for good.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # which hold the model as well
        raise
    finally:
        dist.destroy_process_group()
        gc.collect()
