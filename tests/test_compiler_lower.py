"""Loops lowered to programs: their numbers against the hoisted loop's own, and what is refused.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import catalogue
import plain
from lowered_loops import check, make
from random_cells import BINARY, UNARY, Random, pick
from recurra.cell import Cell
from recurra.compiler.interpret import interpret
from recurra.compiler.llvm.kernel import Kernel
from recurra.compiler.passes import optimise
from recurra.compiler.rules import RULES
from recurra.errors import BackendError

NAMES = [
    "LSTM", "PeepholeLSTM", "CoupledLSTM", "ProjectedLSTM", "LayerNormLSTM", "GRU", "GRUResetBefore",
    "RecurrentHighway", "RecurrentHighway depth 1", "Vanilla", "Vanilla relu", "MinGRU", "MinLSTM", "SLSTM",
    "Stack", "Residual", "LearnedInitialState", "Zoneout", "deep", "user: Leaky", "user: Rotor", "Readout",
    "LayerNorm", "VariationalDropout", "WeightDrop", "user: Direction", "MLSTM",
]  # fmt: skip
WITH_HEADS = ["SLSTM heads", "MLSTM heads"]
WITH_MEMORY = ["user: Attending"]
NOT_LOWERED = ["user: Counting"]


@pytest.mark.parametrize("name", NAMES)
def test_the_loops_of_a_cell_give_the_same_numbers_when_they_are_lowered(monkeypatch, name):
    check(monkeypatch, make(name, 3, 5))


@pytest.mark.parametrize("name", WITH_HEADS)
def test_heads_with_a_matrix_each(monkeypatch, name):
    check(monkeypatch, make(name, 3, 8))


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_a_memory_of_each_row(monkeypatch, name):
    check(monkeypatch, make(name, 3, 5), context=torch.rand(4, 6, 5, dtype=torch.float64))


def test_every_cell_of_the_catalogue_is_lowered_or_known_not_to_be():
    assert {*NAMES, *WITH_HEADS, *WITH_MEMORY, *NOT_LOWERED} == set(catalogue.BY_NAME)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LayerNormLSTM", "SLSTM heads", "user: Leaky"])
def test_cells_in_float32(monkeypatch, name):
    watch = check(monkeypatch, make(name, 3, 4).float())
    assert all(lowered.carries[0].meta["val"].dtype is torch.float32 for lowered in watch.programs)


@pytest.mark.parametrize("name", ["LSTM", "LayerNormLSTM", "RecurrentHighway", "SLSTM", "user: Leaky"])
def test_one_hidden_unit_and_time_the_other_way(monkeypatch, name):
    check(monkeypatch, make(name, 3, 1), reverse=True)


def test_every_function(monkeypatch):
    check(monkeypatch, make("Functions", 3, 6), T=9)


def test_every_way_of_taking_a_row_apart(monkeypatch):
    context = torch.rand(4, 6, dtype=torch.float64)
    watch = check(monkeypatch, make("Pieces", 3, 6), context=context)
    assert any(lowered.rows for lowered in watch.programs)


@pytest.mark.parametrize("name", ["LSTM", "GRUResetBefore", "LayerNormLSTM", "SLSTM", "Vanilla relu"])
def test_a_step_that_was_taken_further_apart_gives_the_same_numbers(monkeypatch, name):
    check(monkeypatch, make(name, 3, 5), table=torch._decomp.core_aten_decompositions())


@pytest.mark.parametrize("name", ["LSTM", "LayerNormLSTM", "SLSTM", "Functions", "Pieces"])
def test_lowered_loops_run_as_native_code(monkeypatch, name):
    context = torch.rand(4, 5, dtype=torch.float64) if name == "Pieces" else None
    watch = check(monkeypatch, make(name, 3, 5), context=context)
    for lowered, operands in zip(watch.programs, watch.operands, strict=True):
        program = optimise(lowered.program)
        expected, last = interpret(lowered.program, operands)
        for run in (partial(interpret, program), Kernel(program, np.float64)):
            outputs, state = run(operands)
            for ours, theirs in zip([*outputs, *state], [*expected, *last], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["LSTM", "SLSTM", "Vanilla relu"])
def test_a_step_that_was_not_taken_apart_at_all_gives_the_same_numbers(monkeypatch, name):
    check(monkeypatch, make(name, 3, 5), table={})


def test_one_row_and_one_step(monkeypatch):
    check(monkeypatch, make("LayerNormLSTM", 2, 4), T=1, B=1)


class Simple(Cell):
    """h = function(h, x)."""

    def __init__(self, function):
        super().__init__()
        self.input_size = self.output_size = 4
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.function = function

    def initial_state(self, batch_size):
        return self.zeros(batch_size, 4)

    def step(self, state, x, context=None):
        h = torch.tanh(self.function(state @ self.weight + x))
        return h, h


MATRIX = torch.linspace(-1.0, 0.5, 16, dtype=torch.float64).view(4, 4)


def assigned(z):
    out = torch.empty_like(z)
    out[:, :2], out[:, 2:] = z[:, 2:] * 2, z[:, :2]
    z = z.clone()
    z[:, ::2] = out[:, 1::2]
    return z + out


HEADS = MATRIX.view(2, 2, 4)[..., :2]
ACCEPTED = {
    "features one by one": lambda z: torch.stack(z.unbind(1)[::-1], dim=1),
    "axes that come and go": lambda z: z[:, None, :].transpose(1, 2).squeeze(-1).view(-1, 2, 2).flatten(1),
    "pieces of two axes": lambda z: torch.stack([z[:, :2], z.view(-1, 2, 2)[:, 1]], 1).flatten(1) * z,
    "a weight from the left": lambda z: (MATRIX @ z.T).T,
    "a sum of products": lambda z: torch.addmm(z, z, MATRIX, beta=0.5, alpha=2.0),
    "one product of a batch of one": lambda z: torch.einsum("bkd,kgd->bkg", z[:, None], MATRIX[None])[:, 0],
    "a mask in arithmetic": lambda z: z * (z > 0) + (z > 0.5).double() - torch.ones_like(z),
    "the sum of what is the same": lambda z: z + (0.1 * z.sum(1, keepdim=True)).expand(-1, 4).sum(1, keepdim=True),
    "the variance": lambda z: z / torch.sqrt(z.var(1, keepdim=True, correction=0) + 0.1),
    "very small and very large": lambda z: torch.log1p(1e-12 * z) + torch.expm1(1e-12 * z) * 1e12 + F.softplus(50 * z),
    "a softmax over one feature": lambda z: z * torch.softmax(z[:, :1], 1) + torch.log_softmax(z[:, :1], 1),
    "gradients of pieces": lambda z: torch.cat([z[:, 2:], z[:, :2] * z[:, 1:2]], 1),
    "sums of all before": lambda z: torch.cumsum(z, 1) + torch.cumprod(z, 1) + z.view(-1, 2, 2).cumsum(1).flatten(1),
    "axes that change places": lambda z: z.view(-1, 2, 2).transpose(1, 2).flatten(1),
    "a part spread over the rest": lambda z: (z.view(-1, 2, 2) * z[:, None, :2] * z[:, :2, None]).flatten(1),
    "some features at a time": lambda z: torch.cat([z.view(-1, 2, 2).sum(1), z.view(-1, 2, 2).amax(2)], 1),
    "features that are no neighbours": lambda z: torch.cat([z[:, ::2], z[:, 1::2]], 1) * z[:, [0, 0, 3, 1]],
    "a row's own matrices": lambda z: (z.view(-1, 2, 2) @ z.view(-1, 2, 2)).flatten(1),
    "more products at once": lambda z: (z.view(-1, 2, 2).movedim(1, 0) @ HEADS).sum(0).repeat(1, 2),
    "the same matrix for each head": lambda z: (z.view(-1, 2, 2) @ MATRIX[:2, :2]).flatten(1),
    "matrices from the left": lambda z: (MATRIX[:2, :2] @ z.view(-1, 2, 2)).flatten(1),
    "heads on an axis of their own": lambda z: torch.matmul(z.view(-1, 2, 1, 2), HEADS).flatten(1),
    "an index that is calculated": lambda z: z * z.gather(1, z.argmax(1, keepdim=True)) - z.min(1, keepdim=True)[0],
    "equals in a maximum": lambda z: z.round().max(1, keepdim=True)[0] * z.round().argmax(1, keepdim=True) + z,
    "pieces that are assigned": assigned,
    "a state of three axes": lambda z: z.view(-1, 1, 2, 2).permute(0, 3, 1, 2).reshape(-1, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_ways_to_write_a_step(monkeypatch, name):
    check(monkeypatch, Simple(ACCEPTED[name]))


REFUSED = {
    "sort at test_compiler_lower.py:\\d+: it sorts": lambda z: torch.sort(z, 1)[0],
    "topk at test_compiler_lower.py:\\d+: it sorts": lambda z: z + z.topk(1, 1)[0],
    "lgamma at test_compiler_lower.py:\\d+: there is no rule": torch.lgamma,
    "var at test_compiler_lower.py:\\d+: the variance of so few": lambda z: z + z[:, :1].var(1, True, keepdim=True),
    "gather at test_compiler_lower.py:\\d+: it takes more than one": lambda z: z.gather(1, (z > 0).long()),
    "add at test_compiler_lower.py:\\d+: it calculates with whole numbers": lambda z: z * ((z > 0).long() + 1),
    "index at test_compiler_lower.py:\\d+: the indices are known only when it runs": lambda z: (
        z + MATRIX.flatten()[z.argmax(1)][:, None]
    ),
    "it gives torch.float32": lambda z: z.float().double(),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_loop_ir_has_no_words_for_is_refused_with_the_operation_and_the_line(monkeypatch, message):
    with pytest.raises(BackendError, match=f"the time loop cannot be compiled at .*{message}.*backend='hoisted'"):
        check(monkeypatch, Simple(REFUSED[message]))


def test_an_operation_of_the_backward_step_alone_is_refused_with_the_line_it_comes_from(monkeypatch):
    monkeypatch.delitem(RULES, torch.ops.aten.scatter)
    with pytest.raises(BackendError, match=r"scatter, in the gradient of test_compiler_lower.py:\d+: there is no rule"):
        check(monkeypatch, Simple(lambda z: z + z.max(1, keepdim=True)[0]))


def test_a_state_of_whole_numbers_is_refused(monkeypatch):
    with pytest.raises(BackendError, match=r"state_1 is torch\.int64"):
        check(monkeypatch, make("user: Counting", 3, 4))


def test_the_program_of_a_vanilla_cell_word_for_word(monkeypatch):
    ahead, back = check(monkeypatch, make("Vanilla", 3, 5)).programs
    assert str(ahead.program) == (
        "carry 5\n"
        "input 5\n"
        "matrix 5x5\n"
        "%0 = carry [index=0] : 5\n"
        "%1 = matmul %0 [index=0 transposed] : 5\n"
        "%2 = input [index=0] : 5\n"
        "%3 = add %2 %1 : 5\n"
        "%4 = tanh %3 : 5\n"
        "output %4 %0\n"
        "new %4\n"
    )
    assert str(back.program) == (
        "carry 5\n"
        "input 5 5\n"
        "matrix 5x5\n"
        "%0 = carry [index=0] : 5\n"
        "%1 = input [index=0] : 5\n"
        "%2 = add %0 %1 : 5\n"
        "%3 = input [index=1] : 5\n"
        "%4 = mul %3 %3 : 5\n"
        "%5 = const [number=1.0] : 1\n"
        "%6 = broadcast %5 : 5\n"
        "%7 = sub %6 %4 : 5\n"
        "%8 = mul %2 %7 : 5\n"
        "%9 = matmul %8 [index=0] : 5\n"
        "output %8\n"
        "new %9\n"
    )
    assert [node.name for node in (*ahead.matrices, *back.matrices)] == ["weight_hh", "weight_hh"]


def named(kind: str, names: dict, left_out: set[str], operands: int):
    return st.tuples(st.just(kind), st.sampled_from(sorted(names.keys() - left_out)), *[pick] * operands)


lowered_operation = st.one_of(
    named("unary", UNARY, set(), 1),
    named("binary", BINARY, set(), 2),
    *[st.tuples(st.just(kind), pick) for kind in ("linear", "linear", "scale", "context")],
)


@settings(max_examples=12)
@given(
    program=st.lists(lowered_operation, min_size=2, max_size=12),
    new=st.lists(pick, min_size=1, max_size=3),
    shown=pick,
)
def test_the_loops_of_a_random_cell(program, new, shown):
    cell = catalogue.Entry("random", lambda _, __: Random(program, new, shown), plain.lstm).build(4, 4)
    with pytest.MonkeyPatch.context() as monkeypatch:
        check(monkeypatch, cell, context=torch.rand(4, 2, 4, dtype=torch.float64))
