"""What loops take over: around them only products are left, and what makes those ready.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from catalogue import Entry
from invented_cells import FOREIGN
from recurra import Recurrent, cells
from recurra.cell import Cell
from recurra.compiler import fuse
from recurra.compiler.schedule import BATCHED

PRODUCTS = {"mm", "addmm", "bmm", "native_layer_norm"}
SEEN_OTHERWISE = {"permute", "reshape", "squeeze", "unsqueeze", "split_with_sizes", "split", "getitem"}


class Gates(Cell):
    """Gates that no state is in, one of which only the output needs; Bradbury et al. 2016, "Quasi-recurrent neural
    networks", equations 1 and 4."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.all = nn.Linear(input_size, 3 * hidden_size)
        self.scale = nn.Parameter(torch.ones(hidden_size))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.output_size)

    def step(self, state, x, context=None):
        z, f, o = self.all(x).chunk(3, dim=1)
        f = torch.sigmoid(self.scale * f)
        c = f * state + (1 - f) * torch.tanh(z)
        return c, torch.sigmoid(o) * c


CELLS = {
    "gates": Entry("gates", Gates, None),
    "LayerNormLSTM": Entry("", cells.LayerNormLSTM, None),
    **{name: Entry("", FOREIGN[name], None) for name in ("SRU", "MUT", "Maxout", "DeltaRNN")},
}


def around(entry: Entry) -> set[str]:
    """What runs for each step and in no loop, other than products and what shows a value in another way."""
    cell = entry.build(5, 6)
    rnn = Recurrent(cell, backend="compiled")
    y, _ = rnn(torch.randn(7, 3, 5, dtype=torch.float64, requires_grad=True))
    y.sum().backward()
    plan = rnn._path._last
    stages = [stage for stage in (*plan.ahead.stages, *plan.back.stages) if stage.stage.kind == BATCHED]
    targets = [node.target for stage in stages for node in stage.graph.nodes if node.op == "call_function"]
    return {target.__name__.split(".")[0] for target in targets} - PRODUCTS - SEEN_OTHERWISE


@pytest.mark.parametrize("name", CELLS)
def test_around_a_loop_there_are_only_products(name):
    assert around(CELLS[name]) == set()


@pytest.mark.parametrize("name", ["_pull", "_taken"])
def test_a_loop_that_does_not_take_over_is_told_apart(name, monkeypatch):
    nothing = {"_pull": set(), "_taken": ([], [])}
    monkeypatch.setattr(fuse, name, lambda *_: nothing[name])
    assert around(CELLS["gates"]) != set()
