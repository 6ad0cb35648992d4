"""What explain() says: figures by hand formulas, what became of each loop, and that all of it can be read.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from explained import H, I, Sharing, Sorted, by_direction, rows_of
from recurra import Cell, Recurrent, cells
from recurra.compiler import cost, linear
from recurra.compiler.llvm import kernel
from recurra.errors import BackendError

# --- figures, by hand ---

# Of each cell, the FLOPs of a row's step forward: products, then everything that is done number by number.
FORWARD = {
    "vanilla": (cells.Vanilla, 2 * I * H + 2 * H * H, H + H + H),
    "lstm": (cells.LSTM, 4 * (2 * I * H + 2 * H * H), 4 * H + 4 * H + 3 * H + 2 * H + 3 * H + H),
    "gru": (cells.GRU, 3 * (2 * I * H + 2 * H * H), 3 * H + 2 * (H + H) + (H + H + H + H) + (H + H + H + H)),
    "readout": (lambda i, h: cells.Readout(cells.Vanilla(i, h), 3), 2 * I * H + 2 * H * H + 2 * H * 3, 3 * H + 3),
}


@pytest.mark.parametrize("backend", ["hoisted", "compiled"])
@pytest.mark.parametrize("name", FORWARD)
def test_flops_of_a_step_are_those_of_its_formula(name, backend):
    make, products, pointwise = FORWARD[name]
    rows = rows_of(make(I, H), backend)
    assert by_direction(rows, "forward") == products + pointwise
    # Each product has two in the gradient: that of what came in (the first input wants none), and of its weights.
    backward = [
        op for row in rows if row.direction == "backward" for op in row.operations if op.name in ("mm", "addmm")
    ]
    first = 2 * I * H * {"vanilla": 1, "lstm": 4, "gru": 3, "readout": 1}[name]
    assert sum(op.flops for op in backward) == 2 * products - first
    assert not by_direction(rows, "forward", "flops_once")


def test_where_the_flops_of_an_lstm_are():
    rows = [row for row in rows_of(cells.LSTM(I, H)) if row.flops or row.flops_once]
    assert [(row.direction, row.kind) for row in rows] == [
        ("forward", "batched"),
        ("forward", "loop"),
        ("backward", "loop"),
        ("backward", "batched"),
        ("backward", "summed"),
    ]
    projection, loop, back, weights, bias = rows
    assert projection.flops == 2 * 4 * H * I + 4 * H
    assert loop.flops == 2 * 4 * H * H + (4 + 3 + 2 + 3 + 1) * H
    assert loop.carries == ("h", "c")
    assert back.carries == ("d_h", "d_c")
    assert weights.flops == 2 * 4 * H * (I + H)
    assert bias.flops == bias.flops_once == 4 * H


def test_bytes_of_weights_and_of_what_is_kept():
    rows = rows_of(cells.LSTM(I, H))
    named = {row.kind: row for row in rows if row.direction == "forward"}
    assert named["batched"].reads == ("weight_ih", "bias")
    assert named["batched"].weights == 4 * (4 * H * I + 4 * H)
    assert named["loop"].reads == ("weight_hh",)
    assert named["loop"].weights == 4 * 4 * H * H
    # i, f, g, o, c and h, of which c and h are the old ones, too; tanh(c) is calculated again.
    assert named["loop"].stored == 4 * 6 * H
    eager = next(row for row in rows_of(cells.LSTM(I, H), "hoisted") if row.kind == "loop")
    assert eager.stored == 4 * 7 * H
    double = next(row for row in rows_of(cells.LSTM(I, H).double()) if row.kind == "loop")
    assert double.stored == 2 * named["loop"].stored
    carried = [row for row in rows_of(cells.LSTM(I, H), memory="recompute") if row.direction == "forward"]
    assert sum(row.stored for row in carried) == 4 * 2 * H
    assert sum(row.stored for row in rows_of(cells.LSTM(I, H), memory="sqrt")) == 0
    assert "keeps the carried state of about sqrt(T)" in str(Recurrent(cells.LSTM(I, H), memory="sqrt").explain())


def test_figures_do_not_depend_on_the_batch_or_on_the_length():
    rnn = Recurrent(cells.GRU(I, H))
    before = str(rnn.explain())
    rnn(torch.randn(7, 5, I))
    found = rnn.explain()
    assert found.called
    assert [(row.flops, row.stored) for row in found.table] == [
        (row.flops, row.stored) for row in Recurrent(cells.GRU(I, H)).explain().table
    ]
    after = re.sub(r"native code, .*", "native code, to be built at the first call", str(found))
    assert after.partition("\n\n")[2] == before.partition("\n\n")[2]


def test_what_is_done_once_counts_for_the_sequence():
    once, *rest = rows_of(Sharing(), gradients=False)
    assert (once.kind, once.flops, once.flops_once) == ("once", 0, 4 * 4 + 4)
    assert once.reads == ("weight", "leak")
    assert [row.kind for row in rest] == ["batched", "loop", "batched"]
    assert rest[1].reads == ("leak",)
    assert rest[1].flops == 2 * 4
    assert sum(row.flops_once for row in rest) == 0


# --- loops ---


def loops(rows, direction="forward"):
    return [row for row in rows if row.kind == "loop" and row.direction == direction]


def test_a_stack_has_two_loops_and_feedback_one():
    rows = rows_of(cells.Stack(cells.LSTM(I, H), cells.GRU(H, 3)))
    assert [row.carries for row in loops(rows)] == [("state_0_h", "state_0_c"), ("state_1",)]
    assert [row.carries for row in loops(rows, "backward")] == [("d_state_1",), ("d_state_0_h", "d_state_0_c")]
    assert all(row.native for row in loops(rows))
    assert not any(row.native or row.code for row in loops(rows_of(cells.LSTM(I, H), "hoisted")))


@pytest.mark.parametrize("backend", ["hoisted", "compiled"])
@pytest.mark.parametrize(
    ("cell", "linear_recurrence"),
    [
        (lambda: cells.MinGRU(I, H), True),
        (lambda: cells.MinLSTM(I, H), True),
        (lambda: cells.Zoneout(cells.MinGRU(I, H), 0.3), True),
        (lambda: cells.Zoneout(cells.MinGRU(I, H), 0.3).eval(), True),
        (lambda: Sharing(), True),
        (lambda: cells.Vanilla(I, H), False),
        (lambda: cells.Vanilla(I, H, lambda x: x), False),
        (lambda: cells.LSTM(I, H), False),
        (lambda: cells.GRU(I, H), False),
    ],
)
def test_a_linear_recurrence_is_known_as_one(cell, linear_recurrence, backend):
    rows = rows_of(cell(), backend)
    assert [row.linear for row in loops(rows)] == [linear_recurrence]
    assert [row.linear for row in loops(rows, "backward")] == [linear_recurrence]


class Pointwise(Cell):
    """A step of pointwise arithmetic on one leaf."""

    input_size = output_size = 3

    def __init__(self, function):
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones(3))

    def initial_state(self, batch_size):
        return self.zeros(batch_size, 3)

    def step(self, state, x, context=None):
        new = self.function(state, x, self.scale)
        return new, new


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda h, x, w: w * h + x, True),
        (lambda h, x, w: x - h / (1 + x.square()), True),
        (lambda h, x, w: torch.where(x > 0, h, -x) + 2 * h, True),
        (lambda h, x, w: torch.lerp(h, x, torch.sigmoid(x)), True),
        (lambda h, x, w: (h[:, :, None] * x[:, :, None]).squeeze(2), True),
        (lambda h, x, w: torch.addcmul(x, h, w), True),
        (lambda h, x, w: h * h + x, False),
        (lambda h, x, w: x / (1 + h), False),
        (lambda h, x, w: torch.where(h > 0, h, x), False),
        (lambda h, x, w: torch.lerp(x, w * x, h), False),
        (lambda h, x, w: torch.addcmul(x, h, h), False),
        (lambda h, x, w: torch.relu(h) + x, False),
        (lambda h, x, w: h.flip(1) + x, False),
        (lambda h, x, w: h.cumsum(1) + x, False),
        (lambda h, x, w: h + 0 * x + h.sum(1, keepdim=True), False),
    ],
)
def test_linear_means_feature_by_feature_and_by_values_from_outside(function, expected):
    (loop,) = loops(rows_of(Pointwise(function), "hoisted", gradients=False))
    assert loop.linear == expected


def test_a_check_of_linearity_that_lets_everything_pass_is_told_apart(monkeypatch):
    monkeypatch.setattr(linear, "_not_both", lambda *operands: True)
    monkeypatch.setitem(linear._RULES, torch.ops.aten.mul, lambda *operands: True)
    (loop,) = loops(rows_of(Pointwise(lambda h, x, w: h * h + x), "hoisted", gradients=False))
    assert loop.linear


def test_what_is_fused_into_a_loop_is_listed():
    (loop,) = loops(rows_of(cells.MinGRU(I, H)), "backward")
    assert {"sigmoid_backward", "cat"} <= {each.name for each in loop.fused}
    assert set(loop.fused) <= set(loop.operations)
    assert "fused into it: " in str(Recurrent(cells.MinGRU(I, H)).explain())
    (eager,) = loops(rows_of(cells.MinGRU(I, H), "hoisted"), "backward")
    assert eager.fused == ()
    # Nothing is lost or done twice on the way into the loop, but for 1 - z, which is sooner calculated than read.
    fused, apart = rows_of(cells.MinGRU(I, H)), rows_of(cells.MinGRU(I, H), "hoisted")
    assert by_direction(fused, "forward") == by_direction(apart, "forward")
    assert by_direction(fused, "backward") == by_direction(apart, "backward") + H
    assert [each.name for each in loop.operations].count("rsub") == 1


def test_where_native_code_came_from(tmp_path, monkeypatch):
    monkeypatch.setenv("RECURRA_CACHE_DIR", str(tmp_path))
    said = []
    for _ in range(2):
        kernel._kernel_for.cache_clear()
        rnn = Recurrent(cells.Vanilla(3, 17))
        said.append(loops(rnn.explain().table)[0].code)
        rnn(torch.randn(2, 1, 3))
        said.append(loops(rnn.explain().table)[0].code)
    assert said == ["to be built at the first call", "built", "to be built at the first call", "from the cache"]
    monkeypatch.setenv("RECURRA_CACHE_DIR", "")
    kernel._kernel_for.cache_clear()
    rnn(torch.randn(2, 1, 3))
    rnn = Recurrent(cells.Vanilla(3, 17))
    rnn(torch.randn(2, 1, 3))
    assert "native code, built; RECURRA_CACHE_DIR is empty, which turns the cache off" in str(rnn.explain())


# --- refusals ---


def test_a_refusal_names_the_operation_and_the_line():
    rnn = Recurrent(Sorted())
    for _ in range(2):
        found = rnn.explain()
        assert (found.ran, found.asked) == ("hoisted", "auto")
        (loop,) = loops(found.table)
        assert re.search(r"sort at explained\.py:\d+", loop.refused)
        assert re.search(r"no native code: .*sort at\s+explained\.py:\d+", str(found), re.DOTALL)
        assert not loop.native
        rnn(torch.randn(2, 2, 3))
    with pytest.raises(BackendError, match=r"sort at explained\.py:\d+"):
        Recurrent(Sorted(), backend="compiled")(torch.randn(2, 2, 3))
    before = Recurrent(Sorted(), backend="compiled").explain()
    assert not before.called
    assert re.search(r"sort at explained\.py:\d+", before.why)


def test_operations_of_the_backward_step_have_the_line_of_what_they_are_the_gradient_of():
    (loop,) = loops(rows_of(Pointwise(lambda h, x, w: torch.tanh(h) * w + x)), "backward")
    lines = {each.name: each.line for each in loop.operations if each.name in ("tanh_backward", "mul")}
    assert len(set(lines.values())) == 1
    assert re.fullmatch(r"test_compiler_explain\.py:\d+", lines["tanh_backward"])
    rows = rows_of(cells.Readout(cells.LSTM(I, H), 3))
    products = {(each.line.split(":")[0], each.flops) for row in rows for each in row.operations if each.name == "mm"}
    assert products == {
        ("lstm.py", 2 * 4 * H * H),
        ("lstm.py", 2 * 4 * H * I),
        ("wrappers.py", 2 * H * 3),
    }


def test_a_count_that_forgets_the_products_is_told_apart(monkeypatch):
    monkeypatch.setattr(cost, "flop_registry", {})
    make, products, pointwise = FORWARD["lstm"]
    assert by_direction(rows_of(make(I, H)), "forward") != products + pointwise
