"""What of a step runs when: carries, components, and the schedules of known cells, forward and backward.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from recurra import cells
from recurra.cell import Cell
from recurra.compiler.carries import find_carries
from recurra.compiler.schedule import Problem, schedule
from recurra.errors import BackendError, ShapeError
from recurra.unroll import Recurrent

# --- graphs by hand: each node with its operands, in order ---


def problem_of(text: str, carries: dict[str, str], **options) -> Problem[str]:
    """``z = x h`` on each line: a node and what it is computed from."""
    operands = {}
    for line in text.split("\n"):
        name, _, rest = line.partition("=")
        if name.strip():
            operands[name.strip()] = rest.split()
    inputs = frozenset(name for name, given in operands.items() if not given)
    old = set(carries)
    return Problem(
        order=list(operands),
        operands=operands.__getitem__,
        carries=list(carries.items()),
        inputs=inputs - old,
        **{name: frozenset(v) if name in ("varying", "linear") else v for name, v in options.items()},
    )


def stages_of(problem: Problem[str]) -> list[str]:
    lines = []
    for stage in schedule(problem):
        carried = " ".join(problem.carries[k][0] for k in stage.carries)
        lines.append(f"{stage.kind}{f' {carried}' if carried else ''}: {' '.join(stage.nodes)}")
    return lines


def components_of(text: str, carries: dict[str, str]) -> list[list[str]]:
    problem = problem_of(text, carries)
    found = find_carries(problem.order, problem.operands, problem.carries).components
    return [[old for k, old in enumerate(carries) if component >> k & 1] for component in found]


def test_carries_that_do_not_need_one_another_are_components_of_their_own_in_the_order_of_need():
    text = "x =\nb =\na =\nc =\nA = a x\nB = b A\nC = c B"
    assert components_of(text, {"b": "B", "a": "A", "c": "C"}) == [["a"], ["b"], ["c"]]


def test_carries_that_need_one_another_are_one_component_however_long_the_way_round():
    text = "x =\na =\nb =\nc =\nd =\nA = c x\nB = a\nC = b\nD = d C"
    assert components_of(text, {"d": "D", "a": "A", "b": "B", "c": "C"}) == [["a", "b", "c"], ["d"]]


def test_what_does_not_wait_for_the_carry_leaves_the_loop_on_either_side():
    text = "w =\nx =\nh =\nu = w\np = x u\nq = h w\nH = p q\ny = H w\nk = h x"
    stages = stages_of(problem_of(text, {"h": "H"}, outputs=["y", "k"], finals=[0], varying=["x"]))
    assert stages == ["once: u", "batched: p", "loop h: q H", "batched: y k"]


def test_two_layers_come_apart_and_feedback_keeps_them_together():
    text = "w =\nx =\na =\nb =\nr = {}\nA = a r w\ns = A w\nB = b s"
    apart = problem_of(text.format("x"), {"a": "A", "b": "B"}, outputs=["B"], finals=[0, 1], varying=["x"])
    together = problem_of(text.format("x b"), {"a": "A", "b": "B"}, outputs=["B"], finals=[0, 1], varying=["x"])
    assert stages_of(apart) == ["batched: r", "loop a: A", "batched: s", "loop b: B"]
    assert stages_of(together) == ["loop a b: r A s B"]


def test_what_nobody_wants_does_not_run():
    text = "x =\nh =\ng =\nH = h x\nG = g H\nlost = H G\ny = H"
    stages = stages_of(problem_of(text, {"h": "H", "g": "G"}, outputs=["y"], varying=["x"]))
    assert stages == ["loop h: H", "batched: y"]


def test_a_carry_that_is_only_delayed_has_a_loop_of_nothing():
    text = "x =\nh =\nH = x\ny = h x"
    stages = stages_of(problem_of(text, {"h": "H"}, outputs=["y"], finals=[0], varying=["x"]))
    assert stages == ["batched: H", "loop h: ", "batched: y"]


def test_gradients_that_are_only_summed_are_summed_first_unless_they_meet_a_value_of_the_step():
    text = "w =\nx =\nd =\na = d\nb = a w\nc = a x\ne = c w\nD = d w"
    problem = problem_of(text, {"d": "D"}, totals=["b", "e"], varying=["x"], linear=["d"])
    assert stages_of(problem) == ["loop d: D", "batched: a c", "summed: b e"]


def test_parts_of_one_result_run_where_it_runs():
    text = "x =\nh =\npair = h x\none = pair\ntwo = pair\nH = one\ny = two"
    parts = {"one": "pair", "two": "pair"}
    problem = problem_of(text, {"h": "H"}, outputs=["y"], finals=[0], varying=["x"], part_of=parts)
    assert stages_of(problem) == ["loop h: pair one two H", "batched: y"]


# --- cells ---


def schedule_of(cell: Cell, *, gradients: bool = True, context=None) -> str:
    rnn = Recurrent(cell, backend="hoisted")
    x = torch.randn(4, 2, cell.input_size, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        rnn(x, context=context)
    text = re.sub(r"  # \S+", "", rnn.explain().schedule)
    # Moving axes about is free.
    return re.sub(r"\n    \w+ = (t|view)\(.*\)", "", text)


def test_the_input_of_an_lstm_and_its_weight_gradients_leave_the_loops():
    assert schedule_of(cells.LSTM(3, 4)) == (
        "forward\n"
        "  once:\n"
        "  all steps at once:\n"
        "    addmm = addmm(bias, x, t)\n"
        "  step by step, carrying h, c:\n"
        "    mm = mm(h, t_1)\n"
        "    add = add(addmm, mm)\n"
        "    split = split(add, 4, 1)\n"
        "    sigmoid = sigmoid(split[0])\n"
        "    sigmoid_1 = sigmoid(split[1])\n"
        "    sigmoid_2 = sigmoid(split[3])\n"
        "    mul = mul(sigmoid_1, c)\n"
        "    tanh = tanh(split[2])\n"
        "    mul_1 = mul(sigmoid, tanh)\n"
        "    add_1 = add(mul, mul_1)\n"
        "    tanh_1 = tanh(add_1)\n"
        "    mul_2 = mul(sigmoid_2, tanh_1)\n"
        "backward\n"
        "  once:\n"
        "  step by step, carrying d_h, d_c:\n"
        "    add_2 = add(d_h, d_y)\n"
        "    mul_3 = mul(add_2, sigmoid_2)\n"
        "    mul_4 = mul(add_2, tanh_1)\n"
        "    tanh_backward = tanh_backward(mul_3, tanh_1)\n"
        "    add_3 = add(d_c, tanh_backward)\n"
        "    mul_5 = mul(add_3, sigmoid)\n"
        "    mul_6 = mul(add_3, tanh)\n"
        "    tanh_backward_1 = tanh_backward(mul_5, tanh)\n"
        "    mul_7 = mul(add_3, sigmoid_1)\n"
        "    mul_8 = mul(add_3, c)\n"
        "    sigmoid_backward = sigmoid_backward(mul_4, sigmoid_2)\n"
        "    sigmoid_backward_1 = sigmoid_backward(mul_8, sigmoid_1)\n"
        "    sigmoid_backward_2 = sigmoid_backward(mul_6, sigmoid)\n"
        "    cat = cat([sigmoid_backward_2, sigmoid_backward_1, tanh_backward_1, sigmoid_backward], 1)\n"
        "    mm_2 = mm(cat, t_4)\n"
        "  all steps at once:\n"
        "    mm_1 = mm(t_2, h)\n"
        "    mm_3 = mm(cat, t_6)\n"
        "    mm_4 = mm(t_7, x)\n"
        "  once, on sums over all steps:\n"
        "    sum_1 = sum(cat, [0], True)"
    )


def loops_of(cell: Cell, **options) -> list[tuple[str, list[str]]]:
    """The loops of a schedule: what each carries, and the operations in it."""
    found = []
    for title, body in re.findall(r"step by step, carrying (.*):\n((?:    .*\n?)*)", schedule_of(cell, **options)):
        found.append((title, re.findall(r"= (\w+)\(", body)))
    return found


def test_the_loop_of_a_linear_recurrence_holds_a_product_and_a_sum():
    assert loops_of(cells.MinGRU(3, 4)) == [("state", ["mul", "add"]), ("d_state", ["add", "mul"])]


def test_a_stack_of_two_comes_apart_into_two_loops_in_each_direction():
    loops = loops_of(cells.Stack(cells.LSTM(3, 4), cells.LSTM(4, 4)))
    layers = ["state_0_h, state_0_c", "state_1_h, state_1_c"]
    back = ["d_state_1_h, d_state_1_c", "d_state_0_h, d_state_0_c"]
    assert [carried for carried, _ in loops] == [*layers, *back]
    assert all(body.count("mm") == 1 and "addmm" not in body for _, body in loops)


class Feedback(Cell):
    """Two layers, the lower of which sees what the upper was one step ago."""

    def __init__(self):
        super().__init__()
        self.input_size, self.output_size = 3, 4
        self.low, self.high = cells.GRU(3 + 4, 4), cells.GRU(4, 4)

    def initial_state(self, batch_size):
        return self.low.initial_state(batch_size), self.high.initial_state(batch_size)

    def step(self, state, x, context=None):
        low, y = self.low(state[0], torch.cat([x, state[1]], dim=1))
        high, y = self.high(state[1], y)
        return (low, high), y


def test_feedback_between_layers_keeps_them_in_one_loop():
    assert [carried for carried, _ in loops_of(Feedback())] == ["state_0, state_1", "d_state_0, d_state_1"]


def test_a_readout_leaves_the_loop_and_so_does_its_gradient():
    loops = loops_of(cells.Readout(cells.Vanilla(3, 4), 2))
    assert loops == [("state", ["mm", "add", "tanh"]), ("d_state", ["add", "tanh_backward", "mm"])]


def test_the_weights_of_a_layer_norm_in_the_gates_get_their_gradients_outside_of_the_loop():
    _, (_, body) = loops_of(cells.LayerNormLSTM(3, 4))
    assert body.count("native_layer_norm_backward") == 2
    text = schedule_of(cells.LayerNormLSTM(3, 4))
    assert text.partition("step by step, carrying d_h")[2].count("[False, True, True]") >= 2


def test_masks_of_each_step_are_drawn_for_all_steps_at_once():
    text = schedule_of(cells.Zoneout(cells.LSTM(3, 4), 0.5).train(), gradients=False)
    batched = text.partition("all steps at once:")[2].partition("step by step")[0]
    assert batched.count("= rand([batch, 4])") == 2
    assert "backward" not in text


def test_explain_names_the_users_line():
    rnn = Recurrent(Feedback(), backend="hoisted")
    rnn(torch.randn(2, 2, 3))
    assert re.search(r"cat = cat\(\[x, state_1\], 1\)  # test_compiler_schedule\.py:\d+\n", rnn.explain().schedule)


# --- what is refused, with the operation and the line ---


class Odd(Cell):
    """A vanilla cell whose step does something with its new state."""

    def __init__(self, twist):
        super().__init__()
        self.input_size = self.output_size = 4
        self.inner, self.twist = cells.Vanilla(4, 4), twist
        self.norm = nn.BatchNorm1d(4)
        self.count = nn.Buffer(torch.zeros(()))

    def initial_state(self, batch_size):
        return self.inner.initial_state(batch_size)

    def step(self, state, x, context=None):
        h, _ = self.inner(state, x)
        h = self.twist(self, h, x)
        return h, h


def branch(cell, h, x):
    return h if h.sum() > 0 else -h


def count(cell, h, x):
    cell.count.add_(1)
    return h


@pytest.mark.parametrize(
    ("twist", "message"),
    [
        (branch, r"depends on the value of a tensor.*test_compiler_schedule\.py:\d+ \(return h if h\.sum\(\) > 0"),
        (lambda cell, h, x: h - h.mean(0), r"mean at test_compiler_schedule\.py:\d+ .*no batch axis any more"),
        (lambda cell, h, x: h.flip(0), r"flip at test_compiler_schedule\.py:\d+ .*along the batch axis"),
        (lambda cell, h, x: h.roll(1, 0), "along the batch axis"),
        (lambda cell, h, x: h.roll(1), "roll .*the whole tensor at once|along the batch axis"),
        (lambda cell, h, x: h.cumsum(0), "cumsum .*along the batch axis"),
        (lambda cell, h, x: torch.softmax(h, 0), "softmax .*along the batch axis"),
        (lambda cell, h, x: h.sort(0).values, "sort .*along the batch axis"),
        (lambda cell, h, x: torch.layer_norm(h, h.shape), "normalises over the batch axis"),
        (lambda cell, h, x: h + h[:1], "no batch axis any more"),
        (lambda cell, h, x: h + h[0], "no batch axis any more"),
        (lambda cell, h, x: torch.cat([h[1:], h[:1]]), "is .* at B=5"),
        (lambda cell, h, x: h @ h.T @ h, "the batch on 2 axes"),
        (lambda cell, h, x: h.reshape(4, -1).T.reshape(-1, 4), "cut into rows otherwise"),
        (lambda cell, h, x: h.reshape(4, -1).reshape(-1, 4), "cut into rows otherwise"),
        (lambda cell, h, x: h.reshape(-1, 2)[: h.shape[0]].repeat(1, 2), "takes a part of a batch"),
        (
            lambda cell, h, x: h / h.shape[0],
            r"div at test_compiler_schedule\.py:\d+ .* calculates with the size of the batch",
        ),
        (lambda cell, h, x: h[torch.arange(h.shape[0]).flip(0)], "arange .* calculates with the size of the batch"),
        (lambda cell, h, x: h[:, 0].sort().values[:, None] * h, "sort .*along the batch axis"),
        (lambda cell, h, x: h[(4 * x[:, 0]).long()], "index .* it picks rows"),
        (lambda cell, h, x: h * torch.rand(4), "it draws without a batch axis"),
        (lambda cell, h, x: cell.norm(h), "batch normalisation|in place|no batch axis"),
        (count, "in-place operation"),
        (lambda cell, h, x: h + float(h[0, 0].detach()), "depends on the value of a tensor"),
        (lambda cell, h, x: h.masked_select(h > 0).sum() * h, "depends on the value of a tensor"),
        (lambda cell, h, x: h if len(h) < 4 else torch.tanh(h), "something else at another batch size"),
    ],
)
def test_a_step_that_is_no_graph_or_whose_rows_meet_is_refused(twist, message):
    with pytest.raises(BackendError, match=message):
        Recurrent(Odd(twist), backend="hoisted")(torch.randn(3, 2, 4))


@pytest.mark.parametrize(
    "twist",
    [
        lambda cell, h, x: h.reshape(-1, 2, 2).transpose(1, 2).reshape(-1, 4),
        lambda cell, h, x: torch.cat([h, x]).tanh().chunk(2)[0],
        lambda cell, h, x: h.T.contiguous().softmax(0).T,
        lambda cell, h, x: h.reshape(-1, 2).tanh().reshape(-1, 4),
        lambda cell, h, x: (h[:, None] * x[:, :, None]).mean(1),
        lambda cell, h, x: torch.stack([h, x]).sum(0),
        lambda cell, h, x: h * torch.eye(4)[1] + torch.tensor([1.0, 2.0, 3.0, 4.0]),
        lambda cell, h, x: h.gather(1, x.argsort(1)),
        lambda cell, h, x: torch.einsum("bi,bj->bij", h, x).flatten(1)[:, :4],
        lambda cell, h, x: torch.cummax(h, 1).values + h.flip(1),
        lambda cell, h, x: h.clone().mul_(2),
    ],
)
def test_a_step_whose_rows_do_not_meet_is_taken(twist):
    cell, x = Odd(twist).eval(), torch.randn(5, 3, 4)
    results = []
    for backend in ("loop", "hoisted"):
        y, _ = Recurrent(cell, backend=backend)(x, lengths=[5, 2, 4])
        grads = torch.autograd.grad(y.square().sum(), list(cell.inner.parameters()))
        results.append([y, *grads])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_state_that_changes_its_form_and_an_output_without_rows_are_refused():
    class Grows(cells.Vanilla):
        def step(self, state, x, context=None):
            return torch.cat([state, state], 1), x

    class Flat(cells.Vanilla):
        def step(self, state, x, context=None):
            return state, x.sum()

    with pytest.raises(ShapeError, match="a step must keep the shape of its state"):
        Recurrent(Grows(3, 4), backend="hoisted")(torch.randn(3, 2, 3))
    with pytest.raises(BackendError, match=r"a step must return y \(B, O\)"):
        Recurrent(Flat(3, 4), backend="hoisted")(torch.randn(3, 2, 3))


def test_a_context_that_is_no_tree_of_tensors_is_refused():
    with pytest.raises(BackendError, match="holds tensors in tuples, lists and dictionaries, got set"):
        Recurrent(cells.GRU(3, 4), backend="hoisted")(torch.randn(3, 2, 3), context={1, 2})
