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
from recurra.compiler.hoisted import Call
from recurra.compiler.interpret import interpret
from recurra.compiler.lower import Lowered, decompositions, lower
from recurra.compiler.operands import Operands
from recurra.compiler.plan import Analysis, Plan
from recurra.compiler.rows import by_row
from recurra.compiler.stages import Values
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


def stacked(values: Values, node, rows) -> Tensor:
    """A value of all steps as (T, B, D)."""
    return torch.stack([features(value, rows[node]) for value in values.steps(node)])


def constant(values: Values, node) -> Tensor:
    """A value without rows. The stages keep only what they need themselves; the rest is calculated again."""
    try:
        return values.get(node)
    except KeyError:
        return node.target(*fx.node.map_arg(node.args, partial(constant, values)), **node.kwargs)


def operands_of(call: Call, lowered: Lowered, values: Values, state: list[Tensor], reverse: bool) -> Operands:
    rows = call.plan.analysis.rows
    program = lowered.program
    return Operands(
        T=call.T,
        B=call.B,
        inputs=[stacked(values, node, rows).numpy() for node in lowered.inputs],
        rows=[features(values.get(node), rows[node]).numpy() for node in lowered.rows],
        vectors=[constant(values, node).reshape(-1).double().numpy() for node in lowered.vectors],
        matrices=[
            constant(values, node).reshape(shape).double().contiguous().numpy()
            for node, shape in zip(lowered.matrices, program.matrices, strict=True)
        ],
        state=[features(leaf, rows[node]).numpy() for leaf, node in zip(state, lowered.carries, strict=True)],
        reverse=reverse,
    )


class Watch:
    """Lowers every loop that the hoisted path runs, and compares the program's numbers with the loop's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tolerance: float) -> None:
        self.tolerance = tolerance
        self.programs: list[Lowered] = []
        self.operands: list[Operands] = []
        # A lowered loop may take a weight that the stages have turned already.
        monkeypatch.setattr(Values, "drop", lambda self, nodes: None)
        for name, backward in (("_loop_forward", False), ("_loop_backward", True)):
            monkeypatch.setattr(hoisted, name, self.around(getattr(hoisted, name), backward))

    def around(self, right, backward: bool):
        def run(call, compiled, values, finals, rest):
            lowered = lower(compiled, call.plan.analysis.rows)
            verify(lowered.program)
            numbers = compiled.stage.carries
            state = [finals[k].detach() for k in numbers]
            operands = operands_of(call, lowered, values, state, call.reverse != backward)
            right(call, compiled, values, finals, rest)
            self.programs.append(lowered)
            self.operands.append(operands)
            outputs, state = interpret(lowered.program, operands)
            rows = call.plan.analysis.rows
            expected = [stacked(values, node, rows) for node in lowered.outputs]
            expected += [features(finals[k], rows[node]) for k, node in zip(numbers, lowered.carries, strict=True)]
            for ours, theirs in zip([*outputs, *state], expected, strict=True):
                torch.testing.assert_close(torch.tensor(ours), theirs, rtol=self.tolerance, atol=self.tolerance)

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
    plan = Plan(analysis, frozenset(inputs), [True] * len(leaves_))
    call = Call(plan, T, B, None, None, reverse, lambda tensors: ())
    tensors = [t.detach() for t in (x, *weights_of(cell).values(), *parts, *leaves_, *leaves_)]
    watch = Watch(monkeypatch, 1e-12 if dtype is torch.float64 else 2e-5)
    y, finals, saved = hoisted.forward(call, tensors)
    gradients = [normal(*result.shape) for result in (y, *finals)]
    hoisted.backward(call, tensors, saved, gradients, [True] * len(tensors))
    assert watch.programs
    return watch
