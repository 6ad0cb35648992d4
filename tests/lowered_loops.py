"""Every loop that the hoisted path runs, lowered, and its numbers beside the loop's own.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import catalogue
from recurra.cell import Cell, leaves
from recurra.compiler import hoisted
from recurra.compiler.context import find_rows
from recurra.compiler.decompose import decompositions
from recurra.compiler.eager import EagerLoop, steps
from recurra.compiler.hoisted import Call
from recurra.compiler.interpret import interpret
from recurra.compiler.lower import Lowered, lower
from recurra.compiler.operands import Operands
from recurra.compiler.plan import Analysis, Plan
from recurra.compiler.rows import by_row
from recurra.compiler.trace import trace, weights_of
from recurra.compiler.verify import verify


class Functions(Cell):
    """Every pointwise operation there is a rule for, on a state of two leaves of different sizes."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size, self.hidden_size = input_size, hidden_size, hidden_size
        self.inward = nn.Linear(input_size, hidden_size)
        self.back = nn.Parameter(torch.zeros(2, hidden_size))
        self.out = nn.Parameter(torch.zeros(hidden_size, 2))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.hidden_size), self.zeros(batch_size, 2)

    def step(self, state, x, context=None):
        h, m = state
        z = torch.tanh(self.inward(x) + h + m @ self.back)
        a = F.softplus(z) + F.elu(z) + F.silu(z) + F.leaky_relu(z, 0.1) + F.hardtanh(z, -0.3, 0.4)
        a = a + torch.expm1(0.1 * z) + torch.log1p(z * z) + F.logsigmoid(z) + torch.abs(z) - torch.sign(z)
        a = a + torch.minimum(z, h) * torch.rsqrt(1 + z * z) + torch.reciprocal(2 + z) - torch.sqrt(z + 3)
        a = a + (z + 2) ** 1.5 + z**2 + z**3 + (z + 2) ** -1 + torch.clamp(z, min=-0.2) + torch.log(z + 2)
        mask = (z > 0) & ~(h >= 0.3) | (z < -0.4) | (h == 0)
        a = torch.where(mask, a, -a) * torch.exp(-z.clamp(max=0.5)) + a.masked_fill(z <= 0.1, 0.5) * (h != 0)
        h = torch.tanh(0.2 * a) - torch.relu(h - 0.4)
        return (h, torch.tanh(h @ self.out)), h


class Pieces(Cell):
    """Reductions, normalisation, softmax and pieces of a row, and a row constant from a context (B, H)."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size, self.hidden_size = input_size, hidden_size, hidden_size
        self.inward = nn.Linear(input_size, hidden_size)
        self.back = nn.Linear(hidden_size, 3 * hidden_size)
        self.scale = nn.Parameter(torch.zeros(hidden_size))
        self.gain = nn.Parameter(torch.zeros(()))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, self.hidden_size) + 0.1

    def step(self, state, x, context=None):
        z = self.back(state)
        size = self.hidden_size
        a, b = z[:, :size] + self.inward(x), z[:, size : 2 * size]
        c = z.narrow(1, 2 * size, size)
        share = torch.softmax(a, dim=1) + torch.log_softmax(b, dim=1) + self.scale * c.mean(1, keepdim=True)
        share = share * c.amax(1)[:, None] - torch.amin(c, 1, keepdim=True) + c[:, 0:1] + c[:, -1].unsqueeze(1)
        share = F.layer_norm(share, (size,), self.scale) + F.rms_norm(a, (size,), self.scale)
        share = share + a / (1 + a.norm(dim=1, keepdim=True)) + torch.cat([b[:, 1:], b[:, :1]], dim=-1)
        h = torch.tanh(0.3 * share * context + self.gain * state + torch.sum(state * b, dim=1, keepdim=True))
        return h, h


OWN = {"Functions": Functions, "Pieces": Pieces}


def make(name: str, inputs: int, H: int) -> Cell:
    entry = catalogue.BY_NAME.get(name)
    return catalogue.Entry(name, OWN[name], None).build(inputs, H) if entry is None else entry.build(inputs, H)


def features(value: Tensor, rows) -> Tensor:
    """A value of one step as (B, D)."""
    return by_row(value, rows).double().contiguous()


def stacked(value: Tensor, T: int, rows) -> Tensor:
    """A value of all steps as (T, B, D)."""
    return torch.stack([features(part, rows) for part in steps(value, rows, T)])


def constant(values: dict[fx.Node, Tensor], node) -> Tensor:
    """A value without rows. The stages hand on only what they need themselves; the rest is calculated again."""
    if node not in values:
        return node.target(*fx.node.map_arg(node.args, partial(constant, values)), **node.kwargs)
    return values[node]


def operands_of(
    call: Call, lowered: Lowered, values: dict[fx.Node, Tensor], state: list[Tensor], reverse: bool
) -> Operands:
    rows = call.plan.analysis.rows
    program = lowered.program
    return Operands(
        T=call.T,
        B=call.B,
        inputs=[stacked(values[node], call.T, rows[node]).numpy() for node in lowered.inputs],
        rows=[features(constant(values, node), rows[node]).numpy() for node in lowered.rows],
        vectors=[constant(values, node).reshape(-1).double().numpy() for node in lowered.vectors],
        matrices=[
            constant(values, node).reshape(shape).double().contiguous().numpy()
            for node, shape in zip(lowered.matrices, program.matrices, strict=True)
        ],
        state=[features(leaf, rows[node]).numpy() for leaf, node in zip(state, lowered.carries, strict=True)],
        reverse=reverse,
    )


class Watch:
    """Lowers every loop that the hoisted path runs, and compares the program's numbers with the loop's own.

    ``constants`` are the values of weights and context, of which a lowered loop may take one that the stages have
    turned already.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tolerance: float, constants: dict[fx.Node, Tensor]) -> None:
        self.tolerance, self.constants = tolerance, constants
        self.programs: list[Lowered] = []
        self.operands: list[Operands] = []
        for name in ("forward", "backward"):
            monkeypatch.setattr(EagerLoop, name, self.around(getattr(EagerLoop, name), name == "backward"))

    def around(self, right, backward: bool):
        def run(loop, call, operands, state, *fresh):
            rows = call.plan.analysis.rows
            lowered = lower(loop.compiled, rows)
            verify(lowered.program)
            values = {**self.constants, **dict(zip(loop.needs, operands, strict=True))}
            given = operands_of(call, lowered, values, [leaf.detach() for leaf in state], call.reverse != backward)
            results = right(loop, call, operands, state, *fresh)
            self.programs.append(lowered)
            self.operands.append(given)
            outputs, last = interpret(lowered.program, given)
            values = dict(zip(loop.gives, results[-len(loop.gives) :], strict=True)) if loop.gives else {}
            expected = [stacked(values[node], call.T, rows[node]) for node in lowered.outputs]
            expected += [features(leaf, rows[node]) for leaf, node in zip(results, lowered.carries, strict=False)]
            for ours, theirs in zip([*outputs, *last], expected, strict=True):
                torch.testing.assert_close(torch.tensor(ours), theirs, rtol=self.tolerance, atol=self.tolerance)
            return results

        return run


def check(monkeypatch, cell: Cell, T: int = 5, B: int = 4, table=None, reverse: bool = False, context=None) -> Watch:
    """Runs a cell forward and backward; each of its loops must give the same numbers when it is lowered.

    The program is calculated in float64, also where the loop is not.
    """
    dtype = next((each.dtype for each in weights_of(cell).values() if each.is_floating_point()), torch.float64)
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(T, B, cell.input_size)
    state = cell.initial_state(B)
    leaves_ = [leaf.detach() + 0.1 * normal(*leaf.shape).abs() for leaf in leaves(state)]
    parts = [] if context is None else [context]
    rows = find_rows(cell, B, context, context)
    analysis = Analysis(trace(cell, x[0], state, context, rows, decompositions() if table is None else table))
    step = analysis.step
    inputs = [*step.weights.values(), step.x, *step.context]
    tensors = [t.detach() for t in (x, *weights_of(cell).values(), *parts, *leaves_, *leaves_)]
    constants = dict(zip(analysis.inputs, [*tensors[1 : -2 * len(leaves_)], *step.constants.values()], strict=True))
    watch = Watch(monkeypatch, 1e-12 if dtype is torch.float64 else 2e-5, constants)
    plan = Plan(analysis, frozenset(inputs), [True] * len(leaves_))
    call = Call(plan, T, B, None, None, reverse, lambda tensors: ())
    y, finals, saved = hoisted.forward(call, tensors)
    gradients = [normal(*result.shape) for result in (y, *finals)]
    hoisted.backward(call, tensors, saved, gradients, [True] * len(tensors))
    assert watch.programs
    return watch
